"""Coefficients of an SDE step: every sampler of the field as one affine map per step of a schedule."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LOG_PROBS = {"ode": "none", "sde": "gaussian", "dance": "gaussian", "ddim": "gaussian", "wan": "gaussian"}
LOG_PROBS |= {"cps": "squared"}


class SDECoefficients(NamedTuple):
    """A schedule's steps: mean = a·x + b·v and prev_sample = mean + c·noise."""

    table: Tensor
    """[T, 4] fp32: a, b, c and std, the noise level that Flow-GRPO's step returns fourth."""
    log_prob: str
    """"gaussian", "squared" (no normalising constants: cps) or "none" (every step is deterministic)."""
    stochastic: tuple[bool, ...] = ()
    """Per step, whether c may be non-zero, as the host knows it. Empty: not known."""


def sde_coefficients(
    sigmas: Tensor | Sequence[float],
    *,
    variant: str = "sde",
    eta: float = 0.7,
    sigma_max: float | None = None,
    sigma_min: float | None = None,
    sde_steps: Iterable[int] | None = None,
    device: torch.device | str | None = None,
) -> SDECoefficients:
    """The affine coefficients of every step of a flow-matching schedule, for `sde_step`.

    With σ = sigmas[i], σ' = sigmas[i+1] and dt = σ' - σ < 0, a stochastic step of noise level s is

        sde     s = η·√(σ/(1-σ̂)), σ̂ = sigma_max where σ = 1 and σ elsewhere; c = s·√(-dt)      (Flow-GRPO)
        dance   s = η; c = η·√(-dt)                                                            (DanceGRPO)
        wan     s = sigma_min + (sigma_max - sigma_min)·σ; c = s·√(-dt), without η             (Flow-GRPO on Wan)
                all three: mean = x + v·dt + (s²dt/2σ)·(x + (1-σ)·v)
        cps     c = σ'·sin(πη/2)                                           (Coefficients-Preserving Sampling)
        ddim    c = η·σ'·√(1 - σ'²(1-σ)²/(σ²(1-σ')²))                                          (DDIM, flow form)
                both: mean = (1-σ')·x̂₀ + √(σ'²-c²)·ε̂, x̂₀ = x - σ·v, ε̂ = x + (1-σ)·v
        ode     mean = x + v·dt, c = 0                                                         (Euler)

    Args:
        sigmas: [T+1], strictly decreasing within [0, 1]. Values on the host are checked; a tensor on a device is not
            (that would wait for the device), and is computed there in fp64.
        variant: one of the names above.
        eta: noise level η. 0 gives the ODE in every variant.
        sigma_max: for sde, stands in for σ = 1; for wan, the noise level at σ = 1. Default: the second sigma.
        sigma_min: for wan, the noise level at σ = 0. Default: the last sigma.
        sde_steps: indices of the stochastic steps; the others are deterministic. None: all of them.
        device: of the table. Default: that of sigmas.

    Raises:
        ValueError: unknown variant; eta negative or not finite, or above 1 for ddim; sigmas not 1-D, shorter than 2,
            not strictly decreasing within [0, 1]; sigma_max outside [0, 1) for sde; sde_steps outside the schedule.
    """
    if variant not in LOG_PROBS:
        raise ValueError(f"variant must be one of {sorted(LOG_PROBS)}, got {variant!r}")
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta, the noise level, must be finite and >= 0, got {eta}")
    if variant == "ddim" and eta > 1:
        raise ValueError(f"eta must be in [0, 1] for variant='ddim', got {eta}")
    if variant == "sde" and sigma_max is not None and not 0 <= sigma_max < 1:
        raise ValueError(f"sigma_max must be in [0, 1) for variant='sde', where it stands in for 1, got {sigma_max}")
    levels = torch.as_tensor(sigmas).to(torch.float64)
    if levels.ndim != 1 or levels.numel() < 2:
        raise ValueError(f"sigmas must be 1-D with at least two values, got shape {list(levels.shape)}")
    on_host = levels.device.type == "cpu"
    if on_host and not bool((levels[1:] < levels[:-1]).all() and levels[0] <= 1 and levels[-1] >= 0):
        raise ValueError(f"sigmas must decrease strictly within [0, 1], got {levels.tolist()}")
    count = levels.numel() - 1
    chosen = set(range(count)) if sde_steps is None else set(sde_steps)
    if not chosen <= set(range(count)):
        raise ValueError(f"sde_steps must be within the schedule's steps 0…{count - 1}, got {sorted(chosen)}")
    if eta == 0 or variant == "ode":
        chosen = set()

    sigma, after = levels[:-1], levels[1:]
    dt = after - sigma
    table = torch.stack([torch.ones_like(dt), dt, torch.zeros_like(dt), torch.zeros_like(dt)], dim=1)
    if chosen:
        top = levels[1] if sigma_max is None else sigma_max
        bottom = levels[-1] if sigma_min is None else sigma_min
        rows = _stochastic_rows(variant, eta, sigma, after, top, bottom)
        mask = torch.tensor([i in chosen for i in range(count)]).to(levels.device, non_blocking=True)
        table = torch.where((mask & (rows[:, 2] != 0))[:, None], rows, table)
    log_prob = LOG_PROBS[variant] if chosen else "none"
    stochastic = (table[:, 2] != 0).tolist() if on_host else [i in chosen for i in range(count)]
    return SDECoefficients(table.to(torch.float32).to(device or levels.device), log_prob, tuple(stochastic))


def _stochastic_rows(
    variant: str, eta: float, sigma: Tensor, after: Tensor, sigma_max: Tensor | float, sigma_min: Tensor | float
) -> Tensor:
    """sigma, after [T] fp64 -> [T, 4] fp64."""
    dt = after - sigma
    if variant in ("cps", "ddim"):
        if variant == "cps":
            c = after * math.sin(math.pi * eta / 2)
        else:
            c = eta * after * (1 - (after * (1 - sigma) / (sigma * (1 - after))) ** 2).sqrt()
        q = (after**2 - c**2).sqrt()
        return torch.stack([1 - after + q, (1 - sigma) * q - sigma * (1 - after), c, c], dim=1)
    if variant == "sde":
        # Schedules live in fp32, where the first sigma is exactly 1.
        s = eta * (sigma / (1 - torch.where(sigma.float() == 1, sigma_max, sigma))).sqrt()
    elif variant == "dance":
        s = torch.full_like(sigma, eta)
    else:
        s = sigma_min + (sigma_max - sigma_min) * sigma
    c = s * (-dt).sqrt()
    half = s**2 * dt / (2 * sigma)
    return torch.stack([1 + half, dt + half * (1 - sigma), c, s if variant == "sde" else c], dim=1)
