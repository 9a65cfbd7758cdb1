"""`mtedit-fast judge …`: training, evaluation and use of judges."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from mtedit_fast.judge.prompts import JudgePrompt
    from mtedit_fast.training.judge.data import JudgeData
    from mtedit_fast.training.judge.evaluation import Scored

judge_app = typer.Typer(no_args_is_help=True, help="Judges of edits: train, evaluate against true scores, score.")

DataOption = Annotated[
    Path, typer.Option(help="JSONL of {id, image, edits, instructions, scores}, image paths relative to it")
]
ScaleOption = Annotated[
    str | None, typer.Option(help="1-5, 0-5, binary or yes_no; default: what the judge was trained with, else 1-5")
]
ThinkingOption = Annotated[
    bool | None,
    typer.Option("--thinking/--no-thinking", help="have it think before it scores; default: as trained, else no"),
]
SamplesOption = Annotated[int, typer.Option(min=1, help="answers per question")]
TokensOption = Annotated[int, typer.Option(min=1, help="most tokens of an answer")]
BatchOption = Annotated[int, typer.Option(min=1, help="questions per forward, or per call of a server")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …; auto takes a GPU")]
DtypeOption = Annotated[str, typer.Option(help="of the weights: auto (as stored), fp32, bf16 or fp16")]
ServedOption = Annotated[str | None, typer.Option(help="for a server: the model's name there")]
SkipOption = Annotated[bool, typer.Option("--skip-unreadable", help="leave broken images out instead of stopping")]
SeedOption = Annotated[int, typer.Option(help="of the sampled answers")]


@judge_app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML; every key is documented in training/configs/judge_real.yaml")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value overrides, e.g. method.name=tract optimizer.lr=1e-5", show_default=False),
    ] = None,
) -> None:
    """Train a judge on scored edits: sft, tract, regression, rloo, grpo or real, with LoRA or all weights.

    Data is JSONL beside its images, one example a line: {"id": "7", "image": "7.png", "edits": ["7_1.png", "7_2.png"],
    "instructions": ["Remove the cup", "Make it dusk"], "scores": [4, 2.5], "thought": "…"}. A score may be null; the
    thought is what sft and tract imitate. A run that was stopped goes on where it was.
    """
    from mtedit_fast.training.judge.config import load_judge_config

    loaded = load_judge_config(config, overrides or [])
    from mtedit_fast.training.judge.run import train as run

    run(loaded)


@judge_app.command("eval")
def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="folder, hub id or server's URL; name=MODEL chooses what the report calls it")
    ],
    data: DataOption,
    out: Annotated[Path, typer.Option(help="folder for summary.json, report.html and predictions/")] = Path(
        "runs/judge"
    ),
    scale: ScaleOption = None,
    thinking: ThinkingOption = None,
    samples: SamplesOption = 4,
    max_new_tokens: TokensOption = 1024,
    top_p: Annotated[float, typer.Option(help="nucleus of the sampled answers")] = 0.9,
    batch: BatchOption = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="only so many examples, from the top")] = None,
    resamples: Annotated[int, typer.Option(min=1, help="of the bootstrap")] = 1000,
    served_model: ServedOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    skip_unreadable: SkipOption = False,
    seed: SeedOption = 0,
) -> None:
    """Compare judges with true scores: Pearson, Spearman, Kendall, L1 and RMSE of expected and of sampled scores.

    Intervals are bootstraps over original images. Judges that were evaluated into the same folder before stay in its
    summary and report.
    """
    from mtedit_fast.training.judge.evaluation import summarize, write_predictions
    from mtedit_fast.training.judge.report import write_report
    from mtedit_fast.training.judge.run import agreement_table

    console = Console()
    named = dict(_named(model) for model in models)
    if len(named) < len(models):
        raise ValueError(
            f"MODEL: expected distinct names, got {[_named(m)[0] for m in models]}; choose them by name=MODEL"
        )
    path = out / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    summary = {"data": str(data), "models": summary.get("models", {}) if summary.get("data") == str(data) else {}}
    for name, model in named.items():
        prompt = _prompt(model, scale, thinking)
        examples = _data(data, prompt, console, skip=skip_unreadable)
        place: dict[str, Any] = {"served_model": served_model, "device": device, "dtype": dtype}
        answers: dict[str, Any] = {"samples": samples, "top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed}
        scored = _score(model, prompt, examples, console, name, limit, batch, **place, **answers)
        write_predictions(out / "predictions" / f"{name}.jsonl", scored)
        summary["models"][name] = {
            "model": model,
            "scale": prompt.scale,
            "thinking": prompt.thinking,
            "samples": samples,
            **summarize(scored, resamples=resamples, seed=seed),
        }
        path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    console.print(agreement_table(summary["models"]))
    for name, figures in summary["models"].items():
        invalid = ", ".join(f"{v['count']} of {v['of']} {kind}" for kind, v in figures["invalid"].items())
        console.print(f"{name}: {figures['scores']} true scores; invalid: {invalid or 'all'}")
    console.print(f"report: {write_report(out)}")


@judge_app.command()
def score(
    model: Annotated[str, typer.Argument(help="folder, hub id or server's URL")],
    data: DataOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL, a line per example")],
    scale: ScaleOption = None,
    thinking: ThinkingOption = None,
    samples: SamplesOption = 1,
    max_new_tokens: TokensOption = 1024,
    top_p: Annotated[float, typer.Option(help="nucleus of the sampled answers")] = 0.9,
    batch: BatchOption = 16,
    served_model: ServedOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    skip_unreadable: SkipOption = False,
    seed: SeedOption = 0,
) -> None:
    """Score edits, with true scores or without.

    A line of the output is the line of the data, its image paths relative to the output, with "judged" (the score of
    every turn, null where invalid) and "mass". With --thinking, "thoughts" replaces the line's own: these lines are
    training data for a second stage of tract on thoughts that the judge wrote itself.
    """
    console = Console()
    prompt = _prompt(model, scale, thinking)
    examples = _data(data, prompt, console, scored=False, skip=skip_unreadable)
    place: dict[str, Any] = {"served_model": served_model, "device": device, "dtype": dtype}
    answers: dict[str, Any] = {"samples": samples, "top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed}
    scored = _score(model, prompt, examples, console, "score", None, batch, **place, **answers)
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = [_line(one, output.parent, prompt.thinking) for one in scored]
    output.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    invalid = sum(value is None for line in lines for value in line["judged"])
    console.print(f"{len(lines)} examples scored, {invalid} scores invalid, {len(examples.skipped)} skipped → {output}")


def _named(model: str) -> tuple[str, str]:
    """(name, model) of "name=model", or of a model by its last telling part."""
    name, separator, rest = model.partition("=")
    if separator and not _served(model) and not Path(model).exists():
        return name, rest
    parts = [part for part in model.rstrip("/").split("/") if part not in ("model", "v1", "..", ".")]
    return (parts or [model])[-1].replace(":", "-"), model


def _served(model: str) -> bool:
    return model.startswith(("http://", "https://"))


def _prompt(model: str, scale: str | None, thinking: bool | None) -> JudgePrompt:
    from dataclasses import replace

    from mtedit_fast.judge.prompts import JudgePrompt
    from mtedit_fast.training.judge.parts import load_prompt

    prompt = (None if _served(model) else load_prompt(model)) or JudgePrompt()
    if scale is not None and scale != prompt.scale:
        prompt = replace(prompt, scale=scale, rubric=None)
    return prompt if thinking is None else replace(prompt, thinking=thinking)


def _data(path: Path, prompt: JudgePrompt, console: Console, *, scored: bool = True, skip: bool = False) -> JudgeData:
    from mtedit_fast.training.judge.data import JudgeData

    data = JudgeData(path, prompt.answers, scored=scored, skip_unreadable=skip, name="data")
    for name, reason in data.skipped.items():
        console.print(f"skipped {name}: {reason}", markup=False)
    return data


def _score(
    model: str,
    prompt: JudgePrompt,
    data: JudgeData,
    console: Console,
    name: str,
    limit: int | None,
    batch: int,
    *,
    served_model: str | None,
    device: str,
    dtype: str,
    samples: int,
    top_p: float,
    max_new_tokens: int,
    seed: int,
) -> list[Scored]:
    from mtedit_fast.judge import HuggingFaceJudge, ImageSpec, ServedJudge, ServedJudgeError
    from mtedit_fast.progress import progress_bar
    from mtedit_fast.training.judge.batch import Packer
    from mtedit_fast.training.judge.evaluation import predict, predict_with

    examples = data.examples[:limit]
    written: dict[str, Any] = {"samples": samples, "max_new_tokens": max_new_tokens}
    with progress_bar(console) as progress:
        task = progress.add_task(name, total=len(examples), shown="")

        def advance(count: int) -> None:
            progress.advance(task, count)

        if _served(model):
            if served_model is None:
                raise ValueError(f"served_model: expected --served-model, the judge's name at {model}")
            served = ServedJudge(model, served_model, prompt, normalize="vocab", **written)
            try:
                return predict_with(served, data, examples, thinking=prompt.thinking, batch=batch, progress=advance)
            except ServedJudgeError as error:
                raise ValueError(str(error)) from error
        judge = HuggingFaceJudge.from_pretrained(
            model,
            prompt=prompt,
            dtype=_dtype(dtype),
            device=None if device == "auto" else device,
            normalize="vocab",
            top_p=top_p,
            seed=seed,
            **written,
        )
        if isinstance(judge.images, ImageSpec):
            packer = Packer(judge.model, judge.tokenizer, judge.images, prompt, data.image)
            return predict(packer, examples, batch=batch, top_p=top_p, seed=seed, progress=advance, **written)
        return predict_with(
            judge, data, examples, thinking=prompt.thinking, batch=batch, device=judge.model.device, progress=advance
        )


def _dtype(name: str) -> Any:
    import torch

    dtypes = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in dtypes:
        raise ValueError(f"dtype: expected one of {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]


def _line(one: Scored, folder: Path, thinking: bool) -> dict[str, Any]:
    example, said = one.example, one.line()
    line = {key: value for key, value in example.line.items() if key not in ("thought", "thoughts")}
    line["image"] = os.path.relpath(example.image, folder)
    line["edits"] = [os.path.relpath(edit, folder) for edit in example.edits]
    line["judged"] = said["expected"] if any(v is not None for v in said["expected"]) else said["sampled"]
    line["mass"] = said["mass"]
    if not thinking:
        return line | {key: example.line[key] for key in ("thought", "thoughts") if key in example.line}
    return line | {"thoughts": _thoughts(one.answers)}


def _thoughts(answers: list[str]) -> list[str]:
    """What stands between the thought's tags in every answer that has them."""
    inside = [answer.partition("<Thought>")[2].partition("</Thought>") for answer in answers]
    return list(dict.fromkeys(text.strip() for text, end, _ in inside if end and text.strip()))
