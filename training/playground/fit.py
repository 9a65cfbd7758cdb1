"""A seeded training loop that resumes bit for bit: all randomness is a function of (seed, step)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn


def generator_for(seed: int, step: int) -> torch.Generator:
    """The random generator of one step of one stage."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def save_atomic(state: object, path: Path) -> None:
    """torch.save that leaves either the old or the new file, never a partial one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}"),
    )


class Muon(torch.optim.Muon):
    """torch.optim.Muon with AdamW's update size, also for convolutions, whose kernels it takes as [out, in·h·w]."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        self.tensors = list(parameters)
        # the flattened parameters share memory with the tensors, only gradients must be handed over
        self.matrices = [nn.Parameter(p.detach().flatten(1)) for p in self.tensors]
        super().__init__(self.matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    def step(self, closure: Any = None) -> Any:
        for matrix, tensor in zip(self.matrices, self.tensors, strict=True):
            matrix.grad = None if tensor.grad is None else tensor.grad.flatten(1)
        return super().step(closure)


def muon_and_adamw(
    hidden: Iterable[Tensor], rest: Iterable[Tensor], muon_lr: float, adamw_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon on hidden matrices and convolutions, AdamW on everything else."""
    return [Muon(hidden, muon_lr), torch.optim.AdamW(list(rest), lr=adamw_lr, weight_decay=0.0)]


def fit(
    name: str,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    loss: Callable[[int], tuple[Tensor, dict[str, float]]],
    *,
    steps: int,
    schedule: Callable[[int], float],
    checkpoint: Path,
    save_every: int,
    ema_decay: float = 0.0,
    resume: bool = True,
    on_save: Callable[[int], None] | None = None,
) -> None:
    """Trains `model` in place for `steps` steps and leaves it with its (averaged) weights.

    loss: step -> (scalar, metrics to show); its randomness must depend on the step alone. schedule: step -> factor on
    the learning rate. ema_decay: 0 for none; it warms up as (1 + t) / (10 + t). checkpoint: file written every
    `save_every` steps and at the end; when it exists and `resume`, training goes on from it, with results
    bit-identical to an uninterrupted run. on_save: called with the step while `model` holds the averaged weights.
    """
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters]
    base = [[g["lr"] for g in o.param_groups] for o in optimizers]
    start = 0
    if resume and checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        start = state["step"]
        model.load_state_dict(state["model"])
        for optimizer, value in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(value)
        for a, value in zip(average, state["average"], strict=True):
            a.copy_(value)

    def save(step: int) -> None:
        state = {
            "step": step,
            "model": model.state_dict(),
            "optimizers": [o.state_dict() for o in optimizers],
            "average": average,
        }
        save_atomic(state, checkpoint)
        if on_save is not None:
            live = [p.detach().clone() for p in parameters]
            _assign(parameters, average)
            on_save(step)
            _assign(parameters, live)

    model.train()
    with progress_bar() as progress:
        task = progress.add_task(name, total=steps, completed=start, metrics="")
        for step in range(start, steps):
            for optimizer, rates in zip(optimizers, base, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * schedule(step)
            model.zero_grad()
            value, metrics = loss(step)
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            decay = min(ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
            shown = " ".join(f"{k} {v:.4g}" for k, v in {"loss": value.item(), **metrics}.items())
            progress.update(task, advance=1, metrics=shown)
            if (step + 1) % save_every == 0 or step + 1 == steps:
                save(step + 1)
                progress.console.print(f"{name} {step + 1}/{steps}: {shown}")
    _assign(parameters, average)
    model.eval()


@torch.no_grad()
def _assign(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)
