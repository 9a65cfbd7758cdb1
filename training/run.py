"""A whole training run: evaluate, train, evaluate again, report. What `mtedit-fast train` and `demo` call."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mtedit_fast.editors import EDITORS, Editor, KontextEditor
from mtedit_fast.progress import progress_bar
from mtedit_fast.training.config import TrainConfig
from mtedit_fast.training.data import EditChains
from mtedit_fast.training.dtypes import DTYPES
from mtedit_fast.training.evaluation import Evaluation
from mtedit_fast.training.overoptimization import audit
from mtedit_fast.training.plots import edit_grid
from mtedit_fast.training.report import read_metrics, success_summary, write_report
from mtedit_fast.training.rewards import check_rewards, load_reward
from mtedit_fast.training.trainer import Trainer

GRID_ROWS = 8


def load_editor(config: TrainConfig, device: torch.device | str = "cpu") -> Editor:
    """The configured editor; `model.path: null` is the committed playground pipeline.

    A transformer that will be sharded stays on the CPU, from where `shard` takes each rank's part.
    """
    model, dtype = config.model, DTYPES[config.model.dtype]
    options: dict[str, Any] = {"max_sequence_length": config.rollout.max_sequence_length}
    if model.path is None:
        if model.family != "kontext":
            raise ValueError(
                f"model.path: expected a pipeline folder or hub id of family {model.family}, got null; the playground "
                "has weights of family kontext alone"
            )
        from mtedit_fast.training.playground.models import load_pipeline

        pipeline: Any = load_pipeline(dtype=dtype)
        return KontextEditor(pipeline.to(device), **options)
    if model.family != "kontext" and config.rollout.guidance_scale > 1:
        options["negative_prompt"] = " " if model.family == "qwen_image_edit" else ""
    sharded = config.run.sharding != "none"
    start = "cpu" if sharded else device
    editor = EDITORS[model.family].from_pretrained(model.path, dtype=dtype, device=start, **options)
    if sharded:
        for name, module in editor.pipeline.components.items():
            if isinstance(module, torch.nn.Module) and name != "transformer":
                module.to(device)
    return editor


def train(config: TrainConfig, console: Console | None = None) -> dict[str, Any]:
    """Run `config` to its end, going on from its checkpoint if there is one; returns what summary.json holds.

    Under torchrun or `accelerate launch` the processes share the work; the first one writes, and the others return {}.

    Writes into `run.output_dir`: config.yaml, metrics.jsonl, TensorBoard files, checkpoints/, lora/ (for stock
    `pipe.load_lora_weights`), summary.json, report.html, and with held-out data evaluation.npz and edit_grid.png.
    """
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=config.run.timeout))
    main = state.is_main_process
    console = console or Console(quiet=not main)
    start = time.perf_counter()
    check_rewards(config.rewards)
    if config.evaluation.success is not None:
        load_reward(config.evaluation.success)
    resolution, turns, seed = config.data.size, config.rollout.turns, config.run.seed
    chains = EditChains(config.data.path, turns=turns, resolution=resolution, seed=seed)
    held_out = None
    if config.evaluation.path is not None:
        held_out = EditChains(config.evaluation.path, turns=turns, resolution=resolution, name="evaluation.path")
    editor = load_editor(config, state.device if torch.cuda.is_available() else "cpu")
    trainer = Trainer(editor, chains, config, held_out)
    output = trainer.output_dir
    console.print(
        f"[bold]{config.objective.name}[/] on {len(chains)} chains of {turns} turns, "
        f"{config.rollout.groups_per_iteration} groups × {config.rollout.group_size}, "
        f"{sum(p.numel() for p in trainer.update.parameters):,} LoRA parameters → {output}"
    )
    with progress_bar(console) as progress:
        before = _evaluate(trainer, progress, "before", reference=True)
        task = progress.add_task("train", total=config.run.iterations, shown="")
        if trainer.resume():
            console.print(f"resumed at iteration {trainer.iteration} from {output / 'checkpoints'}")
            progress.update(task, completed=trainer.iteration)
        for metrics in trainer.fit():
            progress.update(task, completed=trainer.iteration, shown=_shown(metrics))
            if not console.is_terminal:  # a log file has no live bar
                console.print(f"iteration {trainer.iteration}/{config.run.iterations}  {_shown(metrics)}")
        after = _evaluate(trainer, progress, "after")
    trainer.export()
    trainer.accelerator.end_training()
    if not main:
        return {}
    summary = _summary(config, output, before, after) | {"seconds": time.perf_counter() - start}
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    report = write_report(output)
    _print_summary(console, summary)
    console.print(f"report: {report}")
    return summary


def _evaluate(trainer: Trainer, progress: Progress, name: str, *, reference: bool = False) -> Evaluation | None:
    if trainer.held_out is None:
        return None
    count = min(trainer.config.evaluation.chains, len(trainer.held_out))
    task = progress.add_task(f"evaluate {name}", total=count * trainer.config.rollout.turns, shown="")
    advance: Callable[[int], None] = lambda edits: progress.advance(task, edits)  # noqa: E731
    result = trainer.evaluate(reference=reference, progress=advance)
    progress.update(task, shown=_shown(result.metrics()))
    if not progress.console.is_terminal:
        progress.console.print(f"held out, {name}: {_shown(result.metrics())}")
    return result


def _summary(config: TrainConfig, output: Path, before: Evaluation | None, after: Evaluation | None) -> dict[str, Any]:
    metrics = read_metrics(output / "metrics.jsonl")
    errors = [line["ratio/max_error_first_update"] for line in metrics if "ratio/max_error_first_update" in line]
    summary: dict[str, Any] = {
        "iterations": config.run.iterations,
        "control": config.run.control,
        "seed": config.run.seed,
        "max_ratio_error_first_update": max(errors, default=None),
    }
    if before is None or after is None:
        return summary
    summary["rewards"] = {
        name: {"before": before.rewards[name].nanmean().item(), "after": after.rewards[name].nanmean().item()}
        for name in before.rewards
    }
    if audits := audit(config.rewards, before.rewards, after.rewards):
        summary["audits"] = {name: found.as_dict() | {"text": found.describe(name)} for name, found in audits.items()}
    if before.success is not None and after.success is not None:
        arrays: dict[str, Any] = {"success_before": before.success.numpy(), "success_after": after.success.numpy()}
        if before.edit_types is not None:
            arrays["edit_types"] = np.array(before.edit_types)
        np.savez_compressed(output / "evaluation.npz", **arrays)
        summary = success_summary(before.success, after.success) | summary
    _save_grid(output, before, after)
    return summary


def _save_grid(output: Path, before: Evaluation, after: Evaluation) -> None:
    """The first chains whose outcome changed, then the first of the others, so that the grid has something to show."""
    changed = torch.zeros(len(before.images), dtype=torch.bool)
    if before.success is not None and after.success is not None:
        changed = (before.success != after.success).any(1)
    rows = torch.argsort(~changed, stable=True)[:GRID_ROWS]
    edit_grid(
        before.references[rows] / 255,
        before.images[rows] / 255,
        after.images[rows] / 255,
        [before.instructions[row] for row in rows.tolist()],
        None if before.success is None else before.success[rows],
        None if after.success is None else after.success[rows],
    ).save(output / "edit_grid.png")


def _shown(metrics: dict[str, float]) -> str:
    """The few figures worth a progress line."""
    names = {
        "reward/": "",
        "eval/": "",
        "ratio/clip_fraction": "clipped",
        "log_prob/max_drift_first_update": "drift",
    }
    shown = []
    for key, value in metrics.items():
        for prefix, label in names.items():
            if key.startswith(prefix) and "/" not in key.removeprefix(prefix):
                shown.append(f"{label or key.removeprefix(prefix)} {value:.3g}")
    return "  ".join(shown)


def _print_summary(console: Console, summary: dict[str, Any]) -> None:
    table = Table("", "before", "after")
    for key in ("image_success", "marginal_success"):
        for turn, (first, last) in enumerate(zip(*summary.get(key, {"": [], " ": []}).values(), strict=True), 1):
            table.add_row(f"{key.replace('_', ' ')}, turn {turn}", f"{first:.1%}", f"{last:.1%}")
    for name, values in summary.get("rewards", {}).items():
        table.add_row(name, f"{values['before']:.3f}", f"{values['after']:.3f}")
    if table.row_count:
        console.print(table)
    for found in summary.get("audits", {}).values():
        console.print(found["text"], style="bold red" if found["hacked"] else "")
    if (error := summary["max_ratio_error_first_update"]) is not None:
        console.print(f"largest |ratio − 1| at the first update: {error}")
