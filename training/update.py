"""One iteration's policy update: cut the kept samples into forwards, accumulate their gradients, step the optimizer.

What an objective needs is in `training.grpo` and `training.nft`; this file knows how samples become optimizer steps, on
one process or many. Only rows of the current policy have a graph, and a sample that was filtered out is not here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mtedit_fast.training import distributed
from mtedit_fast.training.config import OptimizerConfig
from mtedit_fast.trajectories import Trajectories


@dataclass
class Chunk:
    """What goes through the transformer together: n samples (trajectory, index) of one turn.

    Attributes:
        rows: int64 [n], trajectories of the batch.
        index: int64 [n], the position of a stored step, or the number of a noise draw.
        on_policy: the first optimizer step is still to come, so the weights are those of the rollout.
        padding: only there so that this process runs as many forwards as the others; its loss does not count.
        old_log_prob: fp32 [n], where an objective needs it and it is not the chunk's own.
        old_mean: fp32 [n, N, C], likewise.
    """

    rows: Tensor
    turn: int
    index: Tensor
    on_policy: bool = True
    padding: bool = False
    old_log_prob: Tensor | None = None
    old_mean: Tensor | None = None


@dataclass(frozen=True)
class UpdateBatch:
    """The trajectories an iteration learns from.

    Attributes:
        advantages: fp32 [B, K], or [B, K, S] with one per step.
        keep: bool [B]; rows that are False only fill the shape of an exact replay and have no loss.
    """

    trajectories: Trajectories
    advantages: Tensor
    keep: Tensor

    def advantage(self, chunk: Chunk) -> Tensor:
        """[n] fp32."""
        of_turn = self.advantages[chunk.rows, chunk.turn]
        return of_turn if of_turn.ndim == 1 else of_turn.gather(1, chunk.index[:, None])[:, 0]


class Objective(Protocol):
    """How one kind of training turns trajectories into a loss."""

    def attention(self) -> AbstractContextManager[None]:
        """What forwards and backwards run under. In a backward checkpointed blocks run again, as before."""

    def shares(self, batch: UpdateBatch, count: int) -> list[list[Chunk]]:
        """The batch's chunks, divided over `count` optimizer steps (some may be empty)."""

    def prepare(self, batch: UpdateBatch, shares: list[list[Chunk]]) -> None:
        """Forwards without gradient that need the weights of the rollout, before the first optimizer step."""

    def loss(self, batch: UpdateBatch, chunk: Chunk, stats: UpdateStats) -> Tensor:
        """Sum of the losses of the chunk's kept samples, with gradient."""


@dataclass
class UpdateStats:
    """What to log about one iteration's updates: tensors, left on the device until the end."""

    values: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    steps: int = 0
    skipped: int = 0

    def record(self, **values: Tensor) -> None:
        """Values [..] of one chunk by name; `max_…` is reported as the largest, the others as their mean."""
        for name, value in values.items():
            self.values[name].append(value.detach().float().flatten())

    def metrics(self) -> dict[str, float]:
        """Figures over all processes."""
        local = {name: torch.cat(parts).cpu() for name, parts in self.values.items()}
        everywhere = distributed.gather_objects(local)
        result = {"update/steps": float(self.steps), "update/skipped": float(self.skipped)}
        for name in sorted({name for part in everywhere for name in part}):
            values = torch.cat([part[name] for part in everywhere if name in part])
            largest = name.rpartition("/")[2].startswith("max_")
            result[name] = (values.max() if largest else values.mean()).item()
        return result


class PolicyUpdate:
    """`update(batch)` takes `updates_per_iteration` optimizer steps.

    Gradients accumulate over chunks, so memory is that of one forward; each sample's loss is divided by the number of
    samples of its optimizer step on all processes, which makes the gradient that of the whole batch's mean.

    Args:
        after_backward: called when all chunks of an optimizer step have had their backward, before gradients are
            summed over processes.
        on_step: called after every optimizer step, when the policy is no longer what it was.
        sharded: the base weights are spread over processes, which must then all run equally many forwards.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        config: OptimizerConfig,
        *,
        after_backward: Callable[[], None] = lambda: None,
        on_step: Callable[[], None] = lambda: None,
        sharded: bool = False,
    ):
        self.parameters, self.optimizer = parameters, optimizer
        self.objective, self.config, self.sharded = objective, config, sharded
        self.after_backward, self.on_step = after_backward, on_step
        self._skipped_in_a_row = 0

    def __call__(self, batch: UpdateBatch) -> UpdateStats:
        """Raises FloatingPointError when the gradient was not finite `max_skipped` times in a row."""
        stats = UpdateStats()
        shares = self.objective.shares(batch, self.config.updates_per_iteration)
        totals = self._plan(batch, shares)
        self.objective.prepare(batch, shares)
        for share, samples in zip(shares, totals, strict=True):
            if samples == 0:
                continue
            with self.objective.attention():
                for chunk in share:
                    loss = self.objective.loss(batch, chunk, stats if not chunk.padding else UpdateStats())
                    (loss * (0.0 if chunk.padding else 1 / samples)).backward()
                self.after_backward()
            distributed.sum_gradients(self.parameters)
            self._step(stats)
        return stats

    def _plan(self, batch: UpdateBatch, shares: list[list[Chunk]]) -> list[int]:
        """Samples of every optimizer step over all processes; marks its chunks, and pads them if need be."""
        own = [(_samples(batch, share), len(share)) for share in shares]
        everywhere = distributed.gather_objects(own)
        totals, on_policy = [], True
        for number, share in enumerate(shares):
            samples, forwards = zip(*(process[number] for process in everywhere), strict=True)
            if self.sharded:
                share += [_padding(batch) for _ in range(max(forwards) - len(share))]
            for chunk in share:
                chunk.on_policy = on_policy
            totals.append(sum(samples))
            on_policy = on_policy and totals[-1] == 0
        return totals

    def _step(self, stats: UpdateStats) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        if torch.isfinite(norm):  # the same on every process, the gradients being summed
            self.optimizer.step()
            self.on_step()
            self._skipped_in_a_row = 0
            stats.steps += 1
            stats.record(grad_norm=norm)
        else:
            self._skipped_in_a_row += 1
            stats.skipped += 1
        self.optimizer.zero_grad()
        if self._skipped_in_a_row >= self.config.max_skipped:
            raise FloatingPointError(
                f"gradient: not finite in {self._skipped_in_a_row} optimizer steps in a row (optimizer.max_skipped); "
                "none of them was taken, the weights and the last checkpoint are good: lower optimizer.lr or look at "
                "the rewards, then start again to go on"
            )


def _samples(batch: UpdateBatch, share: list[Chunk]) -> int:
    """Kept samples of one optimizer step; waits for the device once."""
    return int(batch.keep[torch.cat([chunk.rows for chunk in share])].sum()) if share else 0


def _padding(batch: UpdateBatch) -> Chunk:
    row = torch.zeros(1, dtype=torch.int64, device=batch.keep.device)
    return Chunk(row, 0, row, padding=True)


def chunked(rows: Tensor, turns: int, indices: int, size: int) -> list[Chunk]:
    """Chunks of at most `size` samples (row, index) of every turn, rows outermost."""
    device = rows.device
    sample_rows = rows.repeat_interleave(indices)
    sample_index = torch.arange(indices, device=device).repeat(len(rows))
    return [
        Chunk(part_rows, turn, part_index)
        for turn in range(turns)
        for part_rows, part_index in zip(sample_rows.split(size), sample_index.split(size), strict=True)
        if len(part_rows)
    ]
