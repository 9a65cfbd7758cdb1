"""EDM's second-order samplers of a diffusion teacher, deterministic and stochastic: Algorithms 1 and 2 of the paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mtedit_fast.onestep.corruption import Stream
from mtedit_fast.ops import seeded_noise

Denoise = Callable[[Tensor, Tensor], Tensor]
"""D(x [B, C, H, W] fp32, σ [B] fp32) -> [B, C, H, W]."""


@dataclass(frozen=True)
class EDMSampling:
    """Settings of `edm_sample`; the defaults are the deterministic sampler of 18 steps, 35 evaluations.

    sigma_min: of a teacher trained on noisy images, no less than its σ_n: below it, it has learnt nothing.
    churn, churn_min, churn_max, churn_noise: S_churn, S_tmin, S_tmax, S_noise; churn 0 is deterministic.
    """

    steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = float("inf")
    churn_noise: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps: expected at least 2, got {self.steps}")
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min: expected 0 < sigma_min < sigma_max, got {self.sigma_min}, {self.sigma_max}")
        if self.churn < 0:
            raise ValueError(f"churn: expected ≥ 0, got {self.churn}")

    @property
    def evaluations(self) -> int:
        """Of the denoiser, per image: Heun's two per step, the last step Euler's one."""
        return 2 * self.steps - 1

    def sigmas(self) -> list[float]:
        """Eq. 5, then 0: steps + 1 noise levels, computed in fp64."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        levels = [(high + i / (self.steps - 1) * (low - high)) ** self.rho for i in range(self.steps)]
        return [*levels, 0.0]

    def raised(self, sigma: float) -> float:
        """The noise level to which the stochastic sampler raises `sigma` before its step."""
        if not self.churn_min <= sigma <= self.churn_max:
            return sigma
        return sigma * (1 + min(self.churn / self.steps, 2**0.5 - 1))


@torch.no_grad()
def edm_sample(denoise: Denoise, seed: Tensor, shape: tuple[int, ...], sampling: EDMSampling | None = None) -> Tensor:
    """Draw images from a diffusion model.

    denoise: the model. seed: [B] int64 on its device; image i is a function of seed[i] (and, through the model's
    rounding, of the batch). shape: [C, H, W] of an image.
    The state is fp64, the model sees fp32. Returns [B, *shape] fp32, not clamped.
    """
    sampling = sampling or EDMSampling()
    sigmas = sampling.sigmas()
    x = seeded_noise(seed, shape, Stream.LATENT).double() * sigmas[0]
    level = torch.empty(len(seed), device=seed.device)

    def slope(x: Tensor, sigma: float) -> Tensor:
        return (x - denoise(x.float(), level.fill_(sigma)).double()) / sigma

    for step, (sigma, lower) in enumerate(pairwise(sigmas)):
        raised = sampling.raised(sigma)
        if raised > sigma:
            noise = seeded_noise(seed, shape, Stream.CHURN + step).double()
            x = x + (raised**2 - sigma**2) ** 0.5 * sampling.churn_noise * noise
        first_slope = slope(x, raised)
        ahead = x + (lower - raised) * first_slope
        if lower > 0:
            ahead = x + (lower - raised) * (first_slope + slope(ahead, lower)) / 2
        x = ahead
    return x.float()
