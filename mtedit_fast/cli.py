"""The `mtedit-fast` command."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from mtedit_fast.cli_bench import add_bench
from mtedit_fast.cli_edit import edit
from mtedit_fast.cli_edival import edival_app, evaluate
from mtedit_fast.cli_export import add_commands
from mtedit_fast.cli_judge import judge_app
from mtedit_fast.cli_restore import restore
from mtedit_fast.cli_rsd import rsd_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fast reinforcement learning of multi-turn image editors.",
)
playground_app = typer.Typer(no_args_is_help=True, help="The tiny world: data, weights and their success rates.")
app.add_typer(playground_app, name="playground")
app.add_typer(edival_app, name="edival")
app.add_typer(judge_app, name="judge")
app.add_typer(rsd_app, name="rsd")
app.command()(evaluate)
app.command()(edit)
app.command()(restore)
add_bench(app)
add_commands(app)

STUDIES = {"multi_turn": ("study", "study", 12), "judge": ("judge_study", "judge", 60)}
"""Name: module, folder of its runs, and how long each is."""

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value overrides, e.g. rollout.group_size=16 rewards.1.weight=0.5", show_default=False),
]


@app.command()
def train(
    config: Annotated[
        Path,
        typer.Argument(help="YAML, or the name of one in training/configs; kontext_lora.yaml documents every key"),
    ],
    overrides: Overrides = None,
) -> None:
    """Train a LoRA on multi-turn trajectories of your own images.

    Data is JSONL beside its images, one chain a line: {"id": "0001", "image": "images/0001.jpg", "instructions":
    ["Remove the cup", "Add a dog", "Make it dusk"]}. Rewards are functions by import path: a vision-language judge, and
    your own. A run that was stopped goes on where it was. TensorBoard: tensorboard --logdir OUTPUT_DIR.
    """
    from mtedit_fast.training.config_file import load_config

    loaded = load_config(config, overrides or [])  # before what takes seconds to import, so that a typo is told at once
    from mtedit_fast.training.run import train as run

    run(loaded)


@app.command()
def memory(
    config: Annotated[Path, typer.Argument(help="YAML, or the name of one in training/configs: qwen_image_edit_8gpu")],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="how many the run is divided over")] = 1,
) -> None:
    """Estimate the memory that CONFIG takes on each GPU: nothing is downloaded and no GPU is needed."""
    from mtedit_fast.training.config_file import load_config

    loaded = load_config(config, overrides or [])
    from mtedit_fast.training.memory import estimate

    Console().print(estimate(loaded, gpus).table())


@app.command()
def plan(
    config: Annotated[
        str | None, typer.Argument(help="YAML, or the name of one in training/configs: kontext_8gpu")
    ] = None,
    overrides: Overrides = None,
    editor: Annotated[
        str | None,
        typer.Option(help="kontext, qwen or klein in place of CONFIG: what training/configs has for so many GPUs"),
    ] = None,
    gpus: Annotated[
        str | None,
        typer.Option(help="number and kind, e.g. 8xH100: A100, H100, H200, B200; default: this machine, as --probe"),
    ] = None,
    utilisation: Annotated[float, typer.Option(help="share of the data sheet's rate that is assumed")] = 0.4,
    reward_seconds: Annotated[
        float, typer.Option(help="that the rewards of one image take on the GPU that samples")
    ] = 0.0,
    kept: Annotated[
        float, typer.Option(help="part of the trajectories that filters leave; metric advantage/kept")
    ] = 1.0,
    probe: Annotated[bool, typer.Option("--probe", help="measure iterations of two groups here first")] = False,
) -> None:
    """Predict what a run takes before it starts: seconds per iteration by phase, memory, GPU hours.

    mtedit-fast plan --editor kontext --gpus 8xH100 rollout.group_size=8

    Operations are counted from the configuration, on no device. What a GPU makes of them is assumed (--utilisation)
    unless it is measured: on a machine of the kind the run is for, --probe loads the model and runs two groups.
    """
    from mtedit_fast.training import plan as planner
    from mtedit_fast.training.config_file import load_config

    number, gpu = planner.parse_gpus(gpus) if gpus is not None else (1, None)
    given = [text for text in (config, *(overrides or [])) if text is not None]
    if editor is not None:
        given.insert(0, planner.configuration_of(editor, number))
    if not given:
        raise ValueError("config: expected a YAML file, or --editor; got neither")
    loaded = load_config(given[0], given[1:])
    if probe or gpu is None:
        from mtedit_fast.training.probe import probe as measure

        rates = measure(loaded)
    else:
        rates = planner.assumed_rates(loaded, gpu, utilisation=utilisation, reward_seconds=reward_seconds)
    Console().print(planner.plan(loaded, number, rates, kept=kept, gpu=gpu).table())


@app.command()
def demo(
    overrides: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option(help="folder for data, checkpoints and report.html; default: runs/demo or runs/demo_nft"),
    ] = None,
    control: Annotated[str, typer.Option(help="'shuffle' permutes advantages within the batch")] = "none",
    objective: Annotated[str, typer.Option(help="grpo (training/configs/demo.yaml) or nft (demo_nft.yaml)")] = "grpo",
    seed: Annotated[int, typer.Option(help="of data order, noise and adapter")] = 0,
    fresh: Annotated[bool, typer.Option(help="start over instead of going on from a checkpoint")] = False,
) -> None:
    """Train the playground's tiny FLUX.1-Kontext over three turns: minutes on two CPU cores, nothing to download."""
    from mtedit_fast.training.playground.demo import run_demo

    run_demo(output, objective=objective, seed=seed, control=control, overrides=overrides or [], fresh=fresh)


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="multi_turn or judge")],
    output: Annotated[
        Path | None, typer.Option(help="folder of the runs, finished ones are kept; default: runs/study, runs/judge")
    ] = None,
    page: Annotated[Path | None, typer.Option(help="where table and plot go; default: docs/NAME.md")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="seeds 0 … n-1 of every arm")] = 3,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="of every run; default: 12, or 60 for the judge")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="runs at a time, each with its share of the cores")] = 2,
    only: Annotated[str | None, typer.Option(help="one factor alone (credit), or one method (real)")] = None,
    table: Annotated[bool, typer.Option("--table", help="only write the page, from the runs there are")] = False,
) -> None:
    """Compare ways to train on the playground, over seeds, and write the page with table and plot.

    multi_turn: the editor under one switch at a time: credit, fusion, turns, objective, scores, consistency, group
    size; about two minutes a run on one core. judge: the judge on a rater's scores by SFT, TRACT, RLOO, GRPO and REAL;
    about two minutes a run.
    """
    if name not in STUDIES:
        raise ValueError(f"name: expected one of {', '.join(STUDIES)}, got {name!r}")
    module, folder, length = STUDIES[name]
    runs, pages = (import_module(f"mtedit_fast.training.playground.{part}") for part in (module, f"{module}_report"))
    output, console = output or Path("runs") / folder, Console()
    if not table:
        runs.run_study(output, seeds=seeds, iterations=iterations or length, jobs=jobs, only=only, console=console)
    console.print(f"study: {pages.write_study(output, page or Path('docs') / f'{name}.md')}")


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="a finished run, e.g. runs/demo")]) -> None:
    """Write RUN_DIR/report.html again from its metrics and summary."""
    from mtedit_fast.training.report import write_report

    Console().print(f"report: {write_report(run_dir)}")


@playground_app.command("build")
def playground_build(
    output: Annotated[Path | None, typer.Option(help="folder for the weights; default: the package's own")] = None,
    seed: Annotated[int, typer.Option(help="of every stage")] = 0,
    fresh: Annotated[bool, typer.Option(help="start over instead of resuming from runs/playground")] = False,
) -> None:
    """Train the playground's weights from nothing: VAE, editor, DINO, judge, prior. A stopped build
    resumes."""
    from mtedit_fast.training.playground.build import WEIGHTS, build

    build(output or WEIGHTS, seed=seed, resume=not fresh)


@playground_app.command("data")
def playground_data(
    output: Annotated[Path, typer.Argument(help="folder for {split}.jsonl and its images")],
    chains: Annotated[int, typer.Option(help="how many chains")] = 1000,
    split: Annotated[str, typer.Option(help="train or heldout")] = "train",
    seed: Annotated[int, typer.Option(help="of the scenes and instructions")] = 0,
    turns: Annotated[int, typer.Option(help="instructions per chain")] = 3,
) -> None:
    """Write scenes and instructions in the format `train` reads."""
    from mtedit_fast.training.playground.data import write_dataset

    Console().print(f"wrote {write_dataset(output, chains, seed, split, turns)}")


def main() -> None:
    """Entry point: errors a user can act on are one line, not a traceback."""
    # Libraries' notes on optional packages and their loading bars would drown ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        Console(stderr=True).print(Text.assemble(("error: ", "bold red"), str(error)), highlight=False)
        sys.exit(2)
