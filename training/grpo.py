"""GRPO and GRPO-Guard on the stored stochastic steps of a rollout."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mtedit_fast.attention import without_cudnn_attention
from mtedit_fast.editors import Editor
from mtedit_fast.ops import SDEStepOutput
from mtedit_fast.rollout import replay
from mtedit_fast.training.adapters import Adapters
from mtedit_fast.training.config import ObjectiveConfig
from mtedit_fast.training.objectives import grpo, grpo_guard, kl_to_reference
from mtedit_fast.training.update import Chunk, UpdateBatch, UpdateStats, chunked


class GRPO:
    """Replays stored steps with gradient.

    Exact (`forward_rows` None): each step in the rollout's own batch shape, its ratio against the log-prob stored at
    rollout, so that every ratio before the first optimizer step is exactly 1. Micro-batches without a kept row are
    left out.

    Compact (`forward_rows` n): kept rows alone, n (trajectory, step) samples per forward. The shape then is another,
    so old log-probs (and means, for Guard) are taken by the same path: for the first optimizer step they are the
    log-probs themselves, for the later ones a forward without gradient; the drift from the stored ones is reported.
    After a rollout in another precision the ratio is therefore between policies alone, and `importance_cap` weights
    each sample by min(exp(old log-prob − stored log-prob), cap): truncated importance sampling.
    """

    def __init__(self, editor: Editor, adapters: Adapters, config: ObjectiveConfig, forward_rows: int | None):
        self.editor, self.adapters, self.config = editor, adapters, config
        self.forward_rows = forward_rows

    @property
    def guard(self) -> bool:
        return self.config.name == "grpo_guard"

    def attention(self) -> AbstractContextManager[None]:
        return without_cudnn_attention() if self.forward_rows is None else nullcontext()

    def shares(self, batch: UpdateBatch, count: int) -> list[list[Chunk]]:
        trajectories = batch.trajectories
        turns, steps = trajectories.turns, len(trajectories.steps)
        if self.forward_rows is not None:
            kept = batch.keep.nonzero().flatten()
            # By group, not by place: the division is then the same on any number of processes.
            return [
                chunked(kept[trajectories.group[kept] % count == number], turns, steps, self.forward_rows)
                for number in range(count)
            ]
        rows = [
            torch.arange(rows.start, rows.stop, device=batch.keep.device)
            for rows in trajectories.micro_batches()
            if batch.keep[rows].any()
        ]
        return [
            [
                Chunk(part, turn, torch.full_like(part, position))
                for part in rows[number::count]
                for turn in range(turns)
                for position in range(steps)
            ]
            for number in range(count)
        ]

    @torch.no_grad()
    def prepare(self, batch: UpdateBatch, shares: list[list[Chunk]]) -> None:
        for chunk in (chunk for share in shares for chunk in share):
            if self.forward_rows is None:
                chunk.old_log_prob = _stored(batch, chunk)
                if self.guard:
                    assert batch.trajectories.means is not None
                    chunk.old_mean = batch.trajectories.means[chunk.rows, chunk.turn, chunk.index]
            elif not chunk.on_policy:
                out = self._replay(batch, chunk, return_mean=self.guard)
                chunk.old_log_prob, chunk.old_mean = _log_prob(out), out.mean if self.guard else None

    def loss(self, batch: UpdateBatch, chunk: Chunk, stats: UpdateStats) -> Tensor:
        config, trajectories = self.config, batch.trajectories
        out = self._replay(batch, chunk, return_mean=self.guard or config.kl_weight > 0)
        log_prob, keep = _log_prob(out), batch.keep[chunk.rows]
        old = log_prob.detach() if chunk.old_log_prob is None else chunk.old_log_prob
        dt, scale, std = (each[keep] for each in trajectories.step_constants(chunk.index))
        log_probs, advantage = (log_prob[keep], old[keep]), batch.advantage(chunk)[keep]
        clip: dict[str, Any] = {"clip_range": config.clip_range, "advantage_clip": config.advantage_clip}
        if self.guard:
            old_mean = out.mean.detach() if chunk.old_mean is None else chunk.old_mean
            clip |= {"dt": dt, "scale": scale, "mean_over": config.guard_mean}
            result = grpo_guard(*log_probs, advantage, out.mean[keep], old_mean[keep], **clip)
        else:
            result = grpo(*log_probs, advantage, **clip)
        losses = result.loss
        if config.importance_cap is not None:
            weight = (old - _stored(batch, chunk)).exp().clamp(max=config.importance_cap)[keep]
            stats.record(**{"importance/mean": weight, "importance/max_weight": weight})
            losses = losses * weight
        if config.kl_weight:
            with torch.no_grad(), self.adapters.reference():
                reference = self._replay(batch, chunk).mean
            kl = kl_to_reference(out.mean[keep], reference[keep], std=scale if config.kl_form == "exact" else std)
            stats.record(kl=kl)
            losses = losses + config.kl_weight * kl
        error = (result.ratio - 1).abs()
        stats.record(
            **{"ratio/mean": result.ratio, "ratio/max_error": error, "ratio/clip_fraction": result.clipped.float()}
        )
        if chunk.on_policy:
            drift = (log_prob.detach() - _stored(batch, chunk)).abs()
            stats.record(**{"ratio/max_error_first_update": error, "log_prob/max_drift_first_update": drift})
        stats.record(loss=losses)
        return losses.sum()

    def _replay(self, batch: UpdateBatch, chunk: Chunk, *, return_mean: bool = True) -> SDEStepOutput:
        return replay(self.editor, batch.trajectories, chunk.rows, chunk.turn, chunk.index, return_mean=return_mean)


def _log_prob(out: SDEStepOutput) -> Tensor:
    assert out.log_prob is not None  # stored steps are stochastic
    return out.log_prob


def _stored(batch: UpdateBatch, chunk: Chunk) -> Tensor:
    return batch.trajectories.log_probs[chunk.rows, chunk.turn, chunk.index]
