"""Objectives of teachers, fake scores and generators, per sample. Images are [B, C, H, W], noise levels [B]."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mtedit_fast.onestep import Operator, loss_weight

Denoiser = Callable[..., Tensor]
"""D(x, σ) or D(x, σ, mask)."""


def noise_objective(denoise: Denoiser, y: Tensor, sigma: Tensor, noise: Tensor, sigma_n: float) -> Tensor:
    """Learn E[x | x + σ ε] from y = x + σ_n ε alone, for σ ≥ σ_n; lower levels are raised to σ_n, where nothing is
    learnt. With σ_n = 0 it is EDM's objective.

    What a noisier x_σ = y + √(σ² − σ_n²) ε says about y is (σ_n² x_σ + (σ² − σ_n²) E[x | x_σ]) / σ² (Tweedie), so the
    denoiser is trained through that (Daras et al., "Consistent diffusion meets Tweedie", ICML 2024).

    Returns [B]: means over an image of w(σ) · squared errors.
    """
    sigma = sigma.clamp_min(sigma_n)
    square, share = _wide(sigma).square(), sigma_n**2 / _wide(sigma).square()
    noisy = y + (square - sigma_n**2).clamp_min(0).sqrt() * noise
    said = share * noisy + (1 - share) * denoise(noisy, sigma)
    return loss_weight(sigma) * (said - y).square().flatten(1).mean(1)


def masked_objective(
    denoise: Denoiser, y: Tensor, operator: Operator, further: Operator, sigma: Tensor, noise: Tensor, *, on: Operator
) -> Tensor:
    """Learn E[x | what is seen] from measurements with masks: the network sees less than was measured, Â^H Â (x + σ ε)
    and its mask, and so cannot tell what it will be asked for (Daras et al., "Ambient diffusion", NeurIPS 2023; for MRI
    Aali et al., "Ambient diffusion posterior sampling").

    y: A x. operator: A. further: Â, which measures a part of it. on: A or Â, where the loss is taken, in image space.
    Returns [B]: means over an image of w(σ) · squared errors; where Â hides a pixel, w(∞) (see `EDMDenoiser`).
    """
    sigma_wide = _wide(sigma)
    seen = further.adjoint(y) + further.normal(sigma_wide * noise)
    estimate = denoise(seen, sigma, further.mask)
    difference = on.normal(estimate) - on.adjoint(y)
    if further.hides_pixels and further.mask is not None:
        sigma_wide = sigma_wide / further.mask
    return (loss_weight(sigma_wide) * difference.square()).flatten(1).mean(1)


def score_gap(method: str, image: Tensor, real: Tensor, fake: Tensor, alpha: float) -> Tensor:
    """The generator's loss by "sid", "dmd" or "sds", [B], summed over an image.

    image: A x_g, with gradient. real, fake: what teacher and fake score make of its noisy version, for "sid" with
    gradient through their inputs.

    sid: Σ (real − fake) ⊙ [(real − image) − α (real − fake)] / mean |image − real| (Zhou et al., "Score identity
    distillation", ICML 2024). dmd: the gradient (fake − real) / mean |image − real| (Yin et al., CVPR 2024). sds: the
    same without a fake score, (image − real) / mean |image − real|, which forgets diversity.
    """
    scale = (image - real).detach().abs().flatten(1).mean(1).clamp_min(1e-5)
    if method == "sid":
        gap = real - fake
        return (gap * ((real - image) - alpha * gap)).flatten(1).sum(1) / scale
    against = fake if method == "dmd" else image
    gradient = (against - real).detach() / _wide(scale)
    # ½ ‖x − stopgrad(x − g)‖² has the gradient g.
    return 0.5 * (image - (image - gradient).detach()).square().flatten(1).sum(1)


def teacher_levels(normal: Tensor, p_mean: float, p_std: float) -> Tensor:
    """σ = exp(p_mean + p_std · normal)."""
    return (p_mean + p_std * normal).exp()


def generator_levels(
    uniform: Tensor, t_max: float, sigma_n: float = 0.0, low: float = 0.002, high: float = 80.0, rho: float = 7.0
) -> Tensor:
    """EDM's levels for uniform numbers in (0, 1): from `low` up to t_max / 1000 of the way (in σ^(1/ρ)) to `high`.

    The public code's direction: t_max = 800 cuts the *high* levels off, at 24.4. With noisy measurements they start at
    σ_n: below it, teacher and fake score have learnt nothing that could be compared.
    """
    bottom, top = low ** (1 / rho), high ** (1 / rho)
    last = bottom + (t_max / 1000) * (top - bottom)
    first = min(max(low, sigma_n) ** (1 / rho), last)
    return (first + uniform * (last - first)) ** rho


def _wide(value: Tensor) -> Tensor:
    return value.view(-1, 1, 1, 1)
