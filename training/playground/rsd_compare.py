"""Corrupted, teacher's, student's and clean images of the playground side by side: grids, and Fréchet distances."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mtedit_fast.figures import INK, paste
from mtedit_fast.onestep import (
    Features,
    FeatureStatistics,
    frechet_distance,
    load_denoiser,
    measure,
    save_denoiser,
    to_uint8,
)
from mtedit_fast.training.onestep.config import OneStepConfig, load_onestep_config
from mtedit_fast.training.onestep.data import CorruptedImages, Part, load_data, part_seed, read_images
from mtedit_fast.training.onestep.proximal import visible
from mtedit_fast.training.onestep.run import distill, load_source, source_batches, train_teacher

from .models import WEIGHTS
from .rsd import dino_features

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CORRUPTIONS = ("denoising", "inpainting", "deblurring", "super_resolution")
ROWS = ("corrupted", "teacher", "student", "clean")
MARK = "<!-- results: written by mtedit-fast rsd study -->"
HELD_OUT = 2**20
"""Seed of clean images that are in no training set."""
SHORT = (
    "data.count=4000", "teacher.steps=400", "teacher.batch=32", "teacher.ema_kimg=2.0", "distill.steps=120",
    "distill.batch=32", "distill.ema_kimg=1.0", "evaluation.every=40", "evaluation.samples=500",
)  # fmt: skip
"""Overrides of the demo: both stages run, neither to the end of its learning."""
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5 % quantiles, by number of seeds."""


def compare(
    output: Path,
    *,
    corruptions: Sequence[str] = CORRUPTIONS,
    seeds: int = 1,
    samples: int = 2000,
    overrides: Sequence[str] = (),
    short: bool = False,
    keep: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train what is not there yet, draw, measure; returns what output/summary.json holds.

    The distances are to held-out clean images, in the playground's DINO features. Finished runs are kept, stopped ones
    go on; those of further seeds, where there are any, count as well.

    short: take the repository's weights where it has some, else train for minutes; the table tells which.
    keep: folder for the networks of seed 0 in bf16, keep/CORRUPTION/{teacher,student}: how the repository's were made.

    Raises:
        ValueError: an unknown corruption, or too many seeds for `STUDENT_T`.
    """
    console = console or Console()
    for name in corruptions:
        if not (CONFIGS / f"rsd_{name}.yaml").is_file():
            raise ValueError(f"corruptions: expected some of {', '.join(CORRUPTIONS)}, got {name!r}")
    if not 1 <= seeds <= max(STUDENT_T):
        raise ValueError(f"seeds: expected 1 … {max(STUDENT_T)}, got {seeds}")
    features = dino_features()
    results: dict[str, dict[str, Any]] = {}
    for name in corruptions:
        for seed in range(max(STUDENT_T)):
            folder = output / name / f"seed{seed}"
            settings = [f"run.output_dir={folder}", f"run.seed={seed}", *(SHORT if short else ()), *overrides]
            config = load_onestep_config(CONFIGS / f"rsd_{name}.yaml", settings)
            wanted = {"samples": samples, "config": config.model_dump()}
            # A file per run, so that several processes can share the work, each with some of the corruptions.
            path = folder / "result.json"
            known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
            if known is None or known["settings"] != wanted:
                if seed >= seeds:
                    break
                known = _one(config, folder, name, features, samples, console, short=short) | {"settings": wanted}
                _write(path, known)
            results.setdefault(name, {})[str(seed)] = known
        if keep is not None:
            for kind in ("teacher", "student"):
                trained = output / name / "seed0" / kind / "model"
                save_denoiser(keep / name / kind, *load_denoiser(trained, dtype=torch.bfloat16))
    summary = {"runs": results, "table": {name: _row(list(runs.values())) for name, runs in results.items()}}
    _write(output / "summary.json", summary)
    console.print(table(summary["table"]))
    console.print(f"grids and summary.json → {output}", markup=False)
    return summary


def _one(
    config: OneStepConfig,
    folder: Path,
    name: str,
    features: Features,
    samples: int,
    console: Console,
    *,
    short: bool,
) -> dict[str, Any]:
    data = load_data(config.data, config.corruption.build())
    committed = WEIGHTS / "rsd" / name
    if short and committed.is_dir():
        folders = {"teacher": committed / "teacher", "student": committed / "student"}
        trained = "the repository's weights"
    else:
        folders = {"teacher": train_teacher(config, console, data=data)}
        folders["student"] = distill(config, console, data=data, teacher=folders["teacher"], features=features)
        trained = f"{config.teacher.steps} + {config.distill.steps} steps"
    clean = CorruptedImages(read_images(_held_out(config, samples)), data.corruption)
    reference = _measured(features, clean, samples)
    distances = {
        "corrupted": frechet_distance(_measured(features, data, samples, corrupted=True), reference),
        # How far two sets of clean images of this size are from each other: what nobody can beat.
        "clean": frechet_distance(_measured(features, data, samples), reference),
    }
    pictures = {"corrupted": visible(*clean[torch.arange(8)]), "clean": _clean(clean, torch.arange(8))}
    seed = part_seed(config.run.seed, Part.EVALUATION)
    for kind, path in folders.items():
        source = load_source(path)
        batches = list(source_batches(source, range(samples), seed=seed))
        distances[kind] = frechet_distance(measure(features, batches), reference)
        pictures[kind] = batches[0][:8]
    folder.mkdir(parents=True, exist_ok=True)
    grid([pictures[row] for row in ROWS], ROWS).save(folder / "grid.png")
    console.print(f"{name}: {', '.join(f'{row} {distances[row]:.2f}' for row in ROWS)} → {folder / 'grid.png'}")
    return {"distances": distances, "trained": trained}


def _held_out(config: OneStepConfig, samples: int) -> Any:
    return config.data.model_copy(update={"count": samples, "seed": HELD_OUT})


def _measured(features: Features, data: CorruptedImages, samples: int, *, corrupted: bool = False) -> FeatureStatistics:
    parts = torch.arange(min(samples, len(data))).split(250)
    return measure(features, (visible(*data[part]) if corrupted else _clean(data, part) for part in parts))


def _clean(data: CorruptedImages, indices: Tensor) -> Tensor:
    return to_uint8(data.clean(indices))


def grid(rows: Sequence[Tensor], names: Sequence[str], cell: int = 96) -> Image.Image:
    """A labelled row of pictures for each of `rows`, uint8 [n, H, W, 1 or 3]."""
    gap, left = 6, 90
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (left + columns * (cell + gap), len(rows) * (cell + gap) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for y, (row, name) in enumerate(zip(rows, names, strict=True)):
        top = gap + y * (cell + gap)
        draw.text((gap, top + cell // 2 - 6), name, fill=INK)
        for x, image in enumerate(row):
            paste(canvas, image.permute(2, 0, 1).expand(3, -1, -1) / 255, (left + x * (cell + gap), top), cell)
    return canvas


def _row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and of student − teacher the 95 % interval by Student's t (None for one seed)."""
    gains = [run["distances"]["student"] - run["distances"]["teacher"] for run in runs]
    half = STUDENT_T[len(gains)] * stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
    return {
        **{row: fmean(run["distances"][row] for run in runs) for row in ROWS},
        "seeds": len(runs),
        "student_minus_teacher": fmean(gains),
        "interval": None if half is None else [fmean(gains) - half, fmean(gains) + half],
        "trained": runs[0]["trained"],
    }


def table(rows: dict[str, Any]) -> Table:
    """`summary["table"]` for a terminal."""
    shown = Table(
        "corruption", *ROWS, "student − teacher", "seeds", "trained", title="Fréchet distance to clean images"
    )
    for name, row in rows.items():
        gain = f"{row['student_minus_teacher']:+.2f}"
        if row["interval"] is not None:
            gain += " [{:+.2f}, {:+.2f}]".format(*row["interval"])
        shown.add_row(name, *(f"{row[kind]:.2f}" for kind in ROWS), gain, str(row["seeds"]), row["trained"])
    return shown


def write_page(summary: dict[str, Any], output: Path, page: Path) -> None:
    """Put the table and seed 0's grids under the mark in `page`; what stands above it stays."""
    lines = [
        "| corruption | corrupted | teacher | student | student − teacher, 95 % | of each seed |",
        "|---|---|---|---|---|---|",
    ]
    pictures = []
    page.parent.mkdir(parents=True, exist_ok=True)
    for name, row in summary["table"].items():
        runs = [run["distances"] for run in summary["runs"][name].values()]
        interval = "" if row["interval"] is None else " [{:+.2f}, {:+.2f}]".format(*row["interval"])
        gain = f"{row['student_minus_teacher']:+.2f}{interval}"
        each = ", ".join(f"{run['student'] - run['teacher']:+.2f}" for run in runs)
        kind = name.replace("_", "-")
        lines.append(
            f"| {kind} | {row['corrupted']:.1f} | {row['teacher']:.2f} | {row['student']:.2f} | {gain} | {each} |"
        )
        picture = page.with_name(f"{page.stem}_{name}.png")
        shutil.copy(output / name / "seed0" / "grid.png", picture)
        pictures.append(f"{kind.capitalize()}:\n\n![corrupted, teacher, student and clean images]({picture.name})")
    kept = page.read_text(encoding="utf-8").partition(MARK)[0] if page.is_file() else ""
    page.write_text("\n\n".join([kept + MARK, "\n".join(lines), *pictures]) + "\n", encoding="utf-8")


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
