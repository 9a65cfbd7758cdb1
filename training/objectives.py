"""Policy-gradient objectives on per-step log-probs.

GRPO as in Flow-GRPO; GRPO-Guard normalises the ratio of every step so that clipping acts alike at all noise levels.
The log-prob of a step is the mean over its elements, so clip ranges are small (1e-5 … 1e-3).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Objective(NamedTuple):
    """The loss of every row and what to log about it."""

    loss: Tensor  # [n] fp32
    ratio: Tensor  # [n] fp32, detached
    clipped: Tensor  # [n] bool, where the clipped branch was taken


def grpo(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, *, clip_range: float, advantage_clip: float = 5.0
) -> Objective:
    """Clipped surrogate, L = max(−Aρ, −A·clip(ρ, 1±ε)), ρ = exp(logp − logp_old).

    A is clamped to ±`advantage_clip` first.

    Args:
        log_prob: [n] fp32, with gradient.
        old_log_prob: [n] fp32, stored at rollout.
        advantage: [n] fp32.
    """
    ratio = torch.exp(log_prob - old_log_prob)
    return _clipped(ratio, advantage, clip_range, advantage_clip)


def grpo_guard(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    mean: Tensor,
    old_mean: Tensor,
    *,
    dt: Tensor,
    scale: Tensor,
    clip_range: float,
    advantage_clip: float = 5.0,
    mean_over: str = "sample",
) -> Objective:
    """GRPO-Guard: ρ = exp((logp − logp_old + mean((μ−μ_old)²)/(2c²))·c), the loss divided by −dt.

    For Gaussian log-probs. The added term removes the ratio's negative bias; c, the scale of the step's noise, evens
    out its spread over noise levels. It is each row's own; where all rows are at one step, as in the public code, it is
    that code's mean over the batch.

    Args:
        log_prob, old_log_prob, advantage: [n] fp32.
        mean, old_mean: [n, ...] step means, now and at rollout.
        dt: [n] σ' − σ < 0.  scale: [n] c, s·√(−dt) for sde and dance.
        mean_over: "sample" takes mean((μ−μ_old)²) per row, as derived; "batch_mean" over the whole batch, as the
            public code does.

    Raises:
        ValueError: unknown `mean_over`.
    """
    shift = (mean - old_mean).float().square().flatten(1).mean(1)
    if mean_over == "batch_mean":
        shift = shift.mean().expand_as(shift)
    elif mean_over != "sample":
        raise ValueError(f'mean_over: expected "sample" or "batch_mean", got {mean_over!r}')
    ratio = torch.exp((log_prob - old_log_prob + shift / (2 * scale.square())) * scale)
    return _clipped(ratio, advantage, clip_range, advantage_clip, weight=1 / -dt)


def kl_to_reference(mean: Tensor, mean_ref: Tensor, *, std: Tensor) -> Tensor:
    """mean((μ−μ_ref)²)/(2·std²), [n] fp32: the KL of two Gaussian steps with the same variance, mean over elements.

    Args:
        mean, mean_ref: [n, ...]; `mean_ref` without gradient.
        std: [n] the scale c of the step's noise; flow_grpo's code takes std_dev_t in its place, for sde without √(−dt).
    """
    return (mean - mean_ref).float().square().flatten(1).mean(1) / (2 * std.square())


def _clipped(
    ratio: Tensor, advantage: Tensor, clip_range: float, advantage_clip: float, weight: Tensor | float = 1.0
) -> Objective:
    advantage = advantage.clamp(-advantage_clip, advantage_clip)
    plain = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(plain, clipped) * weight
    return Objective(loss, ratio.detach(), (clipped > plain).detach())
