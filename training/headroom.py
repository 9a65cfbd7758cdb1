"""Micro-batches that fit the device: chosen by the estimate, halved once when it was wrong, the estimate checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console

from mtedit_fast.training import distributed
from mtedit_fast.training.config import TrainConfig
from mtedit_fast.training.memory import MemoryEstimate, estimate

WITHOUT_GPU = 32
"""Samples per forward where no device sets a limit."""


def device_bytes(device: torch.device) -> int | None:
    """Memory of a GPU; None for others."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def choose_micro_batch(config: TrainConfig, limit: int | None, gpus: int = 1) -> int:
    """The largest micro-batch, of a GPU's whole share of an iteration halved again and again, whose estimate is in
    `limit` bytes.

    Raises:
        ValueError: one sample does not fit.
    """
    if limit is None:
        return WITHOUT_GPU
    rollout = config.rollout
    size = -(-rollout.groups_per_iteration // gpus) * rollout.group_size
    while True:
        need = estimate(_with(config, size), gpus).total
        if need <= limit:
            return size
        if size == 1:
            raise ValueError(
                f"rollout.micro_batch: expected a sample to fit {limit / 2**30:.1f} GiB, estimated {need / 2**30:.1f} "
                "GiB; set model.activation_checkpointing, a lower resolution, or run.sharding fsdp2 on more GPUs "
                "(mtedit-fast memory says what takes how much)"
            )
        size //= 2


def settle_micro_batch(config: TrainConfig, device: torch.device, gpus: int = 1) -> TrainConfig:
    """`config` with a number where it leaves `rollout.micro_batch` open."""
    if config.rollout.micro_batch is not None:
        return config
    limit = device_bytes(device)
    if limit is not None:  # of the smallest GPU: all processes must cut alike
        limit = -distributed.largest(-limit)
    return _with(config, choose_micro_batch(config, limit, gpus))


def _with(config: TrainConfig, micro_batch: int) -> TrainConfig:
    rollout = config.rollout.model_copy(update={"micro_batch": micro_batch})
    return config.model_copy(update={"rollout": rollout})


class FirstIteration:
    """Runs an iteration; out of memory in the first one halves the micro-batch, once, and begins it again.

    Args:
        trainer: its `config.rollout.micro_batch` and its objective's `forward_rows` are halved.
        gpus: processes of the run; with several, all would have to begin again, so none does.
    """

    def __init__(self, trainer: Any, gpus: int):
        self.trainer, self.gpus = trainer, gpus
        self.done = self.halved = False

    def __call__(self, step: Callable[[], dict[str, float]]) -> dict[str, float]:
        """step()'s metrics, in the first iteration with the memory it took on CUDA.

        Raises:
            torch.OutOfMemoryError: naming the estimated need and what to change.
        """
        if self.done:
            with self._explained():
                return step()
        cuda = self.trainer.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.trainer.device)
        metrics = self._attempt(step)
        if metrics is None:  # out here, where no traceback holds the failed attempt's tensors any more
            self._halve()
            with self._explained():
                metrics = step()
        self.done = True
        return metrics | self._peak() if cuda else metrics

    def _attempt(self, step: Callable[[], dict[str, float]]) -> dict[str, float] | None:
        """None where memory ran out and half a micro-batch may do."""
        try:
            return step()
        except torch.OutOfMemoryError:
            if self.gpus > 1 or self.trainer.config.rollout.micro_batch == 1:
                with self._explained():
                    raise
            return None

    def _halve(self) -> None:
        rollout, objective = self.trainer.config.rollout, self.trainer.objective
        before, self.halved = rollout.micro_batch, True
        rollout.micro_batch = before // 2
        if objective.forward_rows is not None:
            objective.forward_rows = max(1, objective.forward_rows // 2)
        self.trainer.optimizer.zero_grad()
        self.trainer.editor.invalidate()  # gradients that wait at shared references are of the attempt that failed
        self.trainer.sample.forget_graphs()
        if self.trainer.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(
            f"out of memory in the first iteration: rollout.micro_batch is now {rollout.micro_batch} instead of "
            f"{before}; set it in the configuration to begin so",
            stacklevel=3,
        )

    def _estimate(self) -> MemoryEstimate | None:
        """None for a model whose sizes are not known here, such as somebody's own on the hub."""
        try:
            return estimate(self.trainer.config, self.gpus)
        except ValueError:
            return None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            config, estimated = self.trainer.config, self._estimate()
            need = estimated.header() if estimated else "unknown"
            raise torch.OutOfMemoryError(
                f"out of memory with rollout.micro_batch {config.rollout.micro_batch}"
                f"{' after halving it' if self.halved else ''}; estimated need {need}. Lower "
                "rollout.micro_batch, set model.activation_checkpointing or optimizer.memory_gib, or take more GPUs "
                f"with run.sharding fsdp2 (mtedit-fast memory). torch says: {error}"
            ) from error

    def _peak(self) -> dict[str, float]:
        """What was taken, beside what was estimated; more than estimated is worth a warning."""
        taken, estimated = torch.cuda.max_memory_allocated(self.trainer.device), self._estimate()
        if estimated is None:
            return {"memory/peak_gib": taken / 2**30}
        expected = estimated.total
        if taken > expected:
            gib = f"{taken / 2**30:.1f} GiB, estimated {expected / 2**30:.1f}"
            Console(stderr=True).print(
                f"[yellow]memory: the first iteration took {gib}[/] (reward models are not in the estimate)"
            )
        return {"memory/peak_gib": taken / 2**30, "memory/estimated_gib": expected / 2**30}
