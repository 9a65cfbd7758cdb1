"""DPM-Solver++ 2M for flow matching: the deterministic second-order sampler of likelihood-free rollouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def dpm2m_coefficients(sigmas: Sequence[float] | Tensor) -> list[tuple[float, float, float]]:
    """Rows (a, b, c), one per step, of x' = a·x + b·v + c·x̂₀', where x̂₀' is x − σv of the step before.

    With α = 1 − σ, λ = log α/σ, h = λ' − λ, r = h_before/h and g = α' − ασ'/σ (Lu et al. 2022, multistep, midpoint):
    x' = σ'/σ·x + g·[(1 + 1/2r)·x̂₀ − 1/2r·x̂₀']. The first step and the last, to σ' = 0, are first order, which for a
    flow is Euler's step. Computed in fp64 on the host.

    Args:
        sigmas: T+1 noise levels, from at most 1 down to 0.

    Raises:
        ValueError: sigmas that do not fall strictly within [0, 1].
    """
    sigma = [float(s) for s in sigmas]
    if len(sigma) < 2 or any(b >= a for a, b in pairwise(sigma)) or sigma[0] > 1 or sigma[-1] < 0:
        raise ValueError(f"sigmas: expected at least 2, falling strictly within [0, 1], got {sigma}")
    log_snr = [math.inf if s == 0 else -math.inf if s == 1 else math.log((1 - s) / s) for s in sigma]
    rows = []
    for i, (now, after) in enumerate(pairwise(sigma)):
        gain = (1 - after) - (1 - now) * after / now
        extrapolation = 0.0
        if i > 0 and after > 0:
            extrapolation = (log_snr[i + 1] - log_snr[i]) / (log_snr[i] - log_snr[i - 1]) / 2  # 1/2r
        own = gain * (1 + extrapolation)
        rows.append((after / now + own, -now * own, -gain * extrapolation))
    return rows


def dpm2m_step(
    sample: Tensor, velocity: Tensor, previous: Tensor | None, coefficients: tuple[float, float, float]
) -> Tensor:
    """x' in fp32 for `sample`, `velocity` and the `previous` clean estimate [B, ...] (None at the first step)."""
    a, b, c = coefficients
    out = torch.add(sample.float() * a, velocity.float(), alpha=b)
    return out if previous is None or c == 0 else out.add_(previous, alpha=c)
