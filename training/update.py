"""One iteration's policy update: replay the stored steps with gradient, objective, optimizer step.

Exact mode (`steps_per_forward: 1`) replays each step in the rollout's own batch shape and takes the ratio against the
log-prob stored at rollout: before the first optimizer step every ratio is exactly 1. Several steps per forward are
faster; the shape then differs, so the old log-probs are computed by the same path, and the drift from the stored ones
is reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from mtedit_fast.editors import Editor
from mtedit_fast.ops import SDEStepOutput
from mtedit_fast.rollout import Trajectories, replay
from mtedit_fast.training.advantages import AdvantageResult
from mtedit_fast.training.config import ObjectiveConfig, OptimizerConfig
from mtedit_fast.training.objectives import Objective, grpo, grpo_guard, kl_to_reference


@dataclass
class UpdateStats:
    """Running statistics of one iteration's updates, kept on the device until the end."""

    losses: list[Tensor] = field(default_factory=list)
    ratios: list[Tensor] = field(default_factory=list)
    clipped: list[Tensor] = field(default_factory=list)
    drift: list[Tensor] = field(default_factory=list)
    first_errors: list[Tensor] = field(default_factory=list)
    grad_norms: list[Tensor] = field(default_factory=list)

    def record(self, objective: Objective, loss: Tensor) -> None:
        self.losses.append(loss.detach())
        self.ratios.append(objective.ratio)
        self.clipped.append(objective.clipped)

    def record_first(self, objective: Objective, out: SDEStepOutput, stored: Tensor) -> None:
        """Before the first optimizer step, the policy is still the one that made the rollout."""
        assert out.log_prob is not None
        self.drift.append((out.log_prob.detach() - stored).abs().max())
        self.first_errors.append((objective.ratio - 1).abs().max())

    def metrics(self) -> dict[str, float]:
        if not self.ratios:
            return {"update/skipped": 1.0}
        ratios, clipped = torch.cat(self.ratios), torch.cat(self.clipped)
        return {
            "loss": torch.stack(self.losses).sum().item() / len(self.grad_norms),
            "ratio/mean": ratios.mean().item(),
            "ratio/max_error": (ratios - 1).abs().max().item(),
            "ratio/max_error_first_update": torch.stack(self.first_errors).max().item(),
            "ratio/clip_fraction": clipped.float().mean().item(),
            "log_prob/max_drift_first_update": torch.stack(self.drift).max().item(),
            "grad_norm": torch.stack(self.grad_norms).mean().item(),
        }


class PolicyUpdate:
    """`update(trajectories, result)` takes `updates_per_iteration` optimizer steps.

    Each optimizer step sees its share of the rollout's micro-batches; gradients accumulate over turns and steps, so
    memory is that of one forward. Micro-batches whose rows are all filtered out cost nothing.
    """

    def __init__(
        self,
        editor: Editor,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        objective: ObjectiveConfig,
        config: OptimizerConfig,
    ):
        self.editor, self.optimizer, self.accelerator = editor, optimizer, accelerator
        self.objective, self.config = objective, config
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(self, trajectories: Trajectories, result: AdvantageResult) -> UpdateStats:
        stats, config = UpdateStats(), self.config
        exact = config.steps_per_forward == 1
        batches = [rows for rows in trajectories.micro_batches() if result.keep[rows].any()]
        shares = [batches[index :: config.updates_per_iteration] for index in range(config.updates_per_iteration)]
        old = {} if exact else self._old_log_probs(trajectories, batches)
        for number, share in enumerate(share for share in shares if share):
            kept = sum(int(result.keep[rows].sum()) for rows in share)
            for rows in share:
                weight = int(result.keep[rows].sum()) / kept / (trajectories.turns * len(trajectories.steps))
                for turn, steps in self._chunks(trajectories):
                    stored = trajectories.log_probs[rows, turn, steps.start : steps.stop].T.flatten()
                    old_log_prob = stored if exact else old[rows.start, turn, steps.start]
                    out, objective = self._objective(trajectories, result, rows, turn, steps, old_log_prob)
                    # A chunk's mean over kept rows becomes its part of the mean over the whole optimizer step.
                    loss = objective.loss * (weight * len(steps))
                    self.accelerator.backward(loss)
                    stats.record(objective, loss)
                    if number == 0:
                        stats.record_first(objective, out, stored)
            stats.grad_norms.append(torch.nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm))
            self.optimizer.step()
            self.optimizer.zero_grad()
        return stats

    def _objective(
        self,
        trajectories: Trajectories,
        result: AdvantageResult,
        rows: slice,
        turn: int,
        steps: range,
        old_log_prob: Tensor,
    ) -> tuple[SDEStepOutput, Objective]:
        """Forward of some steps of one micro-batch, and the objective on its kept rows (step-major, [s·b])."""
        config = self.objective
        needs_mean = config.name == "grpo_guard" or config.kl_weight > 0
        out = replay(self.editor, trajectories, rows, turn, steps, return_mean=needs_mean)
        assert out.log_prob is not None  # stored steps are stochastic
        keep = result.keep[rows].repeat(len(steps))
        advantage = result.advantages[rows, turn].repeat(len(steps))
        dt, std = trajectories.step_constants(rows, steps)
        clip = {"clip_range": config.clip_range, "advantage_clip": config.advantage_clip}
        if config.name == "grpo":
            objective = grpo(out.log_prob[keep], old_log_prob[keep], advantage[keep], **clip)
        else:
            assert trajectories.means is not None
            old_mean = trajectories.means[rows, turn, steps.start : steps.stop].transpose(0, 1).flatten(0, 1)
            objective = grpo_guard(
                out.log_prob[keep],
                old_log_prob[keep],
                advantage[keep],
                out.mean[keep],
                old_mean[keep],
                dt=dt[keep],
                std=std[keep],
                mean_over=config.guard_mean,
                **clip,
            )
        if config.kl_weight:
            with torch.no_grad(), self.reference_policy():
                mean_ref = replay(self.editor, trajectories, rows, turn, steps).mean
            kl = kl_to_reference(out.mean[keep], mean_ref[keep], std=std[keep], dt=dt[keep], form=config.kl_form)
            objective = objective._replace(loss=objective.loss + config.kl_weight * kl)
        return out, objective

    @torch.no_grad()
    def _old_log_probs(self, trajectories: Trajectories, batches: list[slice]) -> dict[tuple[int, int, int], Tensor]:
        """Log-probs under the rollout's weights in the update's batch shape, by (first row, turn, first step)."""
        result = {}
        for rows in batches:
            for turn, steps in self._chunks(trajectories):
                log_prob = replay(self.editor, trajectories, rows, turn, steps, return_mean=False).log_prob
                assert log_prob is not None
                result[rows.start, turn, steps.start] = log_prob
        return result

    def _chunks(self, trajectories: Trajectories) -> Iterator[tuple[int, range]]:
        """(turn, positions in the stored window) of every forward."""
        size, stored = self.config.steps_per_forward, len(trajectories.steps)
        for turn in range(trajectories.turns):
            for start in range(0, stored, size):
                yield turn, range(start, min(start + size, stored))

    @contextmanager
    def reference_policy(self) -> Iterator[None]:
        """The frozen model: the adapter switched off, never a second copy."""
        model = self.accelerator.unwrap_model(self.editor.transformer)
        model.disable_adapters()
        try:
            yield
        finally:
            model.enable_adapters()
