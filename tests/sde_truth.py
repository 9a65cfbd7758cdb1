"""The samplers as their authors write them, in any dtype: in fp64 the truth, in fp32 what PyTorch makes of it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

VARIANTS = ("sde", "cps", "dance", "ddim", "wan")


def _per_sample(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(like).reshape(-1, *[1] * (like.ndim - 1))


def literal_step(
    variant: str,
    sample: Tensor,
    velocity: Tensor,
    sigmas: Sequence[float],
    steps: Sequence[int],
    eta: float,
    noise: Tensor | None = None,
    prev_sample: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """prev_sample, log_prob [B], mean and noise level of step steps[i] for sample i, in the dtype of the arguments."""
    sigma = _per_sample([sigmas[i] for i in steps], sample)
    after = _per_sample([sigmas[i + 1] for i in steps], sample)
    capped = _per_sample([sigmas[1] if sigmas[i] == 1 else sigmas[i] for i in steps], sample)
    dt = after - sigma
    clean, pure = sample - sigma * velocity, sample + (1 - sigma) * velocity
    if variant in ("cps", "ddim"):
        if variant == "cps":
            c = after * math.sin(eta * math.pi / 2)
        else:
            c = eta * after * torch.sqrt(1 - after**2 * (1 - sigma) ** 2 / (sigma**2 * (1 - after) ** 2))
        level = c
        mean = clean * (1 - after) + pure * torch.sqrt(after**2 - c**2)
    else:
        s = {
            "sde": torch.sqrt(sigma / (1 - capped)) * eta,
            "dance": torch.full_like(sigma, eta),
            "wan": sigmas[-1] + (sigmas[1] - sigmas[-1]) * sigma,
        }[variant]
        c = s * torch.sqrt(-dt)
        level = s if variant == "sde" else c
        score = -pure / sigma
        mean = sample + (velocity - s**2 / 2 * score) * dt
    if prev_sample is None:
        assert noise is not None
        prev_sample = mean + c * noise
    log_prob = -((prev_sample.detach() - mean) ** 2)
    if variant != "cps":
        log_prob = log_prob / (2 * c**2) - torch.log(c) - math.log(math.sqrt(2 * math.pi))
    return prev_sample, log_prob.flatten(1).mean(1), mean, level


def assert_as_good(ours: Tensor, torchs: Tensor, truth: Tensor) -> None:
    """Our error against the fp64 truth is no worse than PyTorch's own, plus 1e-5 of the truth's size."""
    size = truth.abs().max().clamp(min=1).item()
    error = (ours.double().cpu() - truth).abs().max().item()
    allowed = (torchs.double() - truth).abs().max().item() + 1e-5 * size
    assert error <= allowed, f"error {error:.3g}, PyTorch's own plus 1e-5: {allowed:.3g}"
