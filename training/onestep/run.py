"""Whole runs: train a teacher, distil it, draw images, measure them. What `mtedit-fast rsd` calls."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from mtedit_fast.onestep import (
    EDMSampling,
    Features,
    FeatureStatistics,
    ImageSource,
    OneStepGenerator,
    TeacherSampler,
    load_denoiser,
    measure,
    open_writer,
)
from mtedit_fast.progress import progress_bar
from mtedit_fast.training.distributed import process, share
from mtedit_fast.training.onestep.config import OneStepConfig
from mtedit_fast.training.onestep.data import CorruptedImages, load_data, read_folder
from mtedit_fast.training.onestep.distill import StudentLoop
from mtedit_fast.training.onestep.loop import Loop
from mtedit_fast.training.onestep.teacher import TeacherLoop


def train_teacher(
    config: OneStepConfig, console: Console | None = None, *, data: CorruptedImages | None = None
) -> Path:
    """Run `config.teacher` to its end, going on from its checkpoint; returns output_dir/teacher/model."""
    loop = TeacherLoop(config, data or load_data(config.data, config.corruption.build()))
    _run(loop, console or Console())
    return loop.export()


def distill(
    config: OneStepConfig,
    console: Console | None = None,
    *,
    data: CorruptedImages | None = None,
    teacher: str | Path | None = None,
    features: Features | None = None,
) -> Path:
    """Run `config.distill` to its end, going on from its checkpoint; returns output_dir/student/model.

    teacher: folder; None takes output_dir/teacher/model. Raises ValueError where there is none.
    """
    teacher = teacher or Path(config.run.output_dir) / "teacher" / "model"
    if not Path(teacher).is_dir():
        raise ValueError(f"teacher: no folder {teacher}; train one first: mtedit-fast rsd teacher CONFIG")
    data = data or load_data(config.data, config.corruption.build())
    loop = StudentLoop(config, data, teacher, features)
    _run(loop, console or Console())
    return loop.export()


def _run(loop: Loop, console: Console) -> None:
    console.print(f"{loop.stage} on {len(loop.data)} images, {loop.corruption} → {loop.folder}", markup=False)
    with progress_bar(console) as progress:
        task = progress.add_task(loop.stage, total=loop.steps, shown="")
        if loop.resume():
            console.print(f"resumed at step {loop.iteration}")
            progress.update(task, completed=loop.iteration)
        for metrics in loop.fit():
            shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if "loss" in k or "fid" in k)
            progress.update(task, completed=loop.iteration, shown=shown)
            if not console.is_terminal and loop.iteration % 100 == 0:  # a log file has no live bar
                console.print(f"step {loop.iteration}/{loop.steps}  {shown}")


def load_source(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    compile: bool | dict[str, Any] = False,
    sampling: EDMSampling | None = None,
) -> ImageSource:
    """The generator of a student's folder, or the sampler of a teacher's.

    sampling: a teacher's; None for EDM's defaults.
    """
    denoiser, corruption, card = load_denoiser(folder, dtype=dtype, device=device)
    network: Any = denoiser.network
    size = network.config.sample_size
    channels, height, width = card.get("shape", (network.config.out_channels, size, size))
    shape = (channels, height, width)
    if "sigma_init" in card:
        if sampling is not None:
            raise ValueError(f"sampling: {folder} is a one-step generator, which takes no sampler's settings")
        return OneStepGenerator(denoiser, shape, corruption, sigma_init=card["sigma_init"], compile=compile)
    return TeacherSampler(denoiser, shape, corruption, sampling=sampling, compile=compile)


def write_images(
    source: ImageSource, path: str | Path, count: int, *, seed: int = 0, batch: int = 64, console: Console | None = None
) -> dict[str, str]:
    """Draw images 0 … count − 1 of `seed` into a folder, .zip or .npz; returns what could not be written, with reasons.

    On several processes each writes its share into the same folder. Prints images per second.
    """
    rank, world = process()
    if world > 1 and Path(path).suffix.lower() in (".zip", ".npz"):
        raise ValueError(f"path: expected a folder for {world} processes, which cannot share the archive {path}")
    mine, console, start = share(count, rank, world), console or Console(), time.perf_counter()
    with progress_bar(console) as progress, open_writer(path, len(mine)) as writer:
        task = progress.add_task("sample", total=len(mine), shown="")
        for indices, pixels in source.stream(mine, seed=seed, batch=batch):
            writer.write(indices, pixels)
            progress.advance(task, len(indices))
    seconds = time.perf_counter() - start
    console.print(
        f"{writer.written} images in {seconds:.1f} s, {writer.written / seconds:.1f}/s → {path}", markup=False
    )
    return writer.errors


def statistics_of(source: str | Path, features: Features, batch: int = 64) -> FeatureStatistics:
    """Feature statistics of a folder of images, or those saved in an .npz of mu and sigma."""
    if Path(source).suffix == ".npz":
        return FeatureStatistics.load(source)
    if not Path(source).is_dir():
        raise ValueError(f"images: expected a folder or .npz of mu and sigma, got {source}")
    return measure(features, pixel_batches(read_folder(Path(source)), batch))


def pixel_batches(images: Tensor, batch: int) -> Iterator[Tensor]:
    """uint8 [N, C, H, W] as batches [B, H, W, C]."""
    for part in images.split(batch):
        yield part.permute(0, 2, 3, 1)


def source_batches(source: ImageSource, indices: Sequence[int], *, seed: int = 0, batch: int = 64) -> Iterator[Tensor]:
    """The pixels of `ImageSource.stream` as tensors."""
    for _, pixels in source.stream(indices, seed=seed, batch=batch):
        yield torch.from_numpy(pixels)
