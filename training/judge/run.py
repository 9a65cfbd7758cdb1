"""Whole runs: train a judge and evaluate it. What `mtedit-fast judge` calls."""

from __future__ import annotations

import json
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mtedit_fast.progress import progress_bar
from mtedit_fast.training.judge.config import JudgeConfig
from mtedit_fast.training.judge.data import JudgeData
from mtedit_fast.training.judge.evaluation import summarize, write_predictions
from mtedit_fast.training.judge.parts import Parts, load_parts
from mtedit_fast.training.judge.report import KINDS, LABELS, UNREADABLE, write_report
from mtedit_fast.training.judge.trainer import JudgeTrainer

SHOWN = (
    "loss", "squared_error", "cross_entropy", "accuracy", "valid", "mass", "grad_norm",
    "eval/expected/pearson", "eval/sampled/pearson",
)  # fmt: skip


def load_data(config: JudgeConfig) -> tuple[JudgeData, JudgeData | None]:
    """Training and held-out examples, checked for what the method needs."""
    imitates = config.prompt.thinking and not config.samples_thoughts
    scale, skip = config.prompt.prompt.answers, config.data.skip_unreadable
    data = JudgeData(
        config.data.path, scale, complete=imitates, thoughts=imitates, skip_unreadable=skip, seed=config.run.seed
    )
    held_out = None
    if config.evaluation.path is not None:
        held_out = JudgeData(config.evaluation.path, scale, skip_unreadable=skip, name="evaluation.path")
    return data, held_out


def train(config: JudgeConfig, console: Console | None = None, *, parts: Parts | None = None) -> dict[str, Any]:
    """Run `config` to its end, going on from its checkpoint if there is one; returns what summary.json holds.

    Writes into `run.output_dir`: config.yaml, metrics.jsonl, checkpoints/, model/ (for
    `HuggingFaceJudge.from_pretrained`), with LoRA lora/, summary.json, and with held-out data predictions/ and
    report.html. parts: the judge to start from, instead of `model.path`.
    """
    console = console or Console()
    start = time.perf_counter()
    data, held_out = load_data(config)
    for kind, examples in (("training", data), ("held-out", held_out)):
        for name, reason in examples.skipped.items() if examples is not None else ():
            console.print(f"skipped {kind} example {name}: {reason}", markup=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = JudgeTrainer(parts or load_parts(config.model, device), data, config, held_out)
    output = trainer.output_dir
    counts = ", ".join(f"{value} {name}" for name, value in data.statistics().items())
    trained = sum(p.numel() for p in trainer.parameters)
    console.print(f"[bold]{config.method.name}[/] on {counts}; {trained:,} parameters → {output}")
    with progress_bar(console) as progress:
        task = progress.add_task("train", total=config.run.steps, shown="")
        if trainer.resume():
            console.print(f"resumed at step {trainer.iteration} from {output / 'checkpoints'}")
            progress.update(task, completed=trainer.iteration)
        for metrics in trainer.fit():
            shown = {name.removeprefix("eval/"): metrics[name] for name in SHOWN if name in metrics}
            progress.update(task, completed=trainer.iteration, shown=_figures(shown))
            if not console.is_terminal and trainer.iteration % 10 == 0:  # a log file has no live bar
                console.print(f"step {trainer.iteration}/{config.run.steps}  {_figures(shown)}")
        summary: dict[str, Any] = {
            "method": config.method.name,
            "steps": config.run.steps,
            "seed": config.run.seed,
            "skipped": len(data.skipped),
            "models": {},
        }
        if held_out is not None:
            count = min(config.evaluation.examples, len(held_out))
            task = progress.add_task("evaluate", total=count, shown="")
            scored = trainer.evaluate(lambda n: progress.advance(task, n))
            summary["models"][config.method.name] = summarize(scored)
            write_predictions(output / "predictions" / f"{config.method.name}.jsonl", scored)
    trainer.export()
    summary["seconds"] = time.perf_counter() - start
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    if summary["models"]:
        console.print(agreement_table(summary["models"]))
        console.print(f"report: {write_report(output)}")
    return summary


def agreement_table(models: dict[str, Any]) -> Table:
    """The figures of summary.json for a terminal."""
    table = Table("judge", "score", *LABELS.values())
    for name, summary in models.items():
        if not any(kind in summary for kind in KINDS):
            table.add_row(name, UNREADABLE)
        for kind, label in KINDS.items():
            if kind in summary:
                values = [summary[kind][metric]["mean"] for metric in LABELS]
                table.add_row(name, label, *("–" if v is None else f"{v:.3f}" for v in values))
    return table


def _figures(values: dict[str, Any]) -> str:
    return "  ".join(f"{name} {'–' if value is None else format(value, '.3g')}" for name, value in values.items())
