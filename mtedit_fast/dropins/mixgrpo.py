"""Drop-ins for MixGRPO's (and Pref-GRPO's) ``flow_grpo_step`` and ``dance_grpo_step``.

Dtypes and the schedule are treated as in :mod:`mtedit_fast.dropins.diffusion_nft`.
"""

import torch
from torch import Tensor

from mtedit_fast.dropins.diffusion_nft import (
    Generator,
    _flow_grpo,
    affine_step,
    check_step,
    log_prob_of,
    predict_original,
    without_constants,
)
from mtedit_fast.dropins.diffusion_nft import dance_grpo_step as _dance_grpo_step
from mtedit_fast.ops import SDECoefficients
from mtedit_fast.sampling.sigmas import cached_coefficients


def flow_grpo_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    generator: Generator = None,
    determistic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A Flow-GRPO SDE step, call-compatible with MixGRPO.

    Args:
        model_output, latents, eta, sigmas, index, prev_sample, generator: as
            :func:`mtedit_fast.dropins.diffusion_nft.flow_grpo_step`, with the same errors.
        determistic: (the original's spelling) the next sample is Euler's, also when ``prev_sample`` is given; log-prob
            and mean stay those of the SDE step. The noise is drawn all the same, which keeps ``generator`` in step.

    Returns:
        next sample, x̂0 = x − σv, log-prob fp32 ``[B]``, mean fp32, and the noise scale c = s√(−dt) (fp32, 0-dim).
    """
    index = check_step(model_output, latents, eta, sigmas, index)
    out, pred_original, log_prob = _flow_grpo(model_output, latents, eta, sigmas, index, prev_sample, generator)
    coefficients = cached_coefficients(sigmas, variant="sde", eta=eta, device=model_output.device)
    if determistic:
        euler = _euler(model_output, latents, sigmas, index)
        out = affine_step(model_output, latents, coefficients, index, prev_sample=euler)
        log_prob = log_prob_of(out)
    return out.prev_sample, pred_original, log_prob, out.mean, coefficients.table[index, 2]


def dance_grpo_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    grpo: bool,
    sde_solver: bool,
) -> tuple[Tensor, ...]:
    """A DanceGRPO step, call-compatible with MixGRPO; errors as :func:`flow_grpo_step`.

    Args:
        model_output, latents, eta, sigmas, index, prev_sample: as in :func:`flow_grpo_step`.
        grpo: False returns the mean alone.
        sde_solver: False is Euler's step: its mean is x + v·dt and, unless ``prev_sample`` is given, the next sample
            is that mean, with log-prob 0; a given ``prev_sample`` is judged under a Gaussian of scale η√(−dt).

    Returns:
        next sample, x̂0, log-prob fp32 ``[B]`` without −ln c − ½ln2π (as the original); mean and x̂0 if not ``grpo``.
    """
    if grpo and sde_solver:
        return _dance_grpo_step(model_output, latents, eta, sigmas, index, prev_sample)
    index = check_step(model_output, latents, eta, sigmas, index)
    pred_original = predict_original(model_output, latents, sigmas, index)
    dance = cached_coefficients(sigmas, variant="dance", eta=eta, device=model_output.device)
    if not grpo and sde_solver:
        mean = affine_step(model_output, latents, dance, index, prev_sample=latents).mean
        return mean.to(torch.promote_types(model_output.dtype, latents.dtype)), pred_original
    if not grpo or prev_sample is None:
        euler = _euler(model_output, latents, sigmas, index)
        log_prob = euler.new_zeros(len(euler), dtype=torch.float32)
        return (euler, pred_original, log_prob) if grpo else (euler, pred_original)
    ode = cached_coefficients(sigmas, variant="ode", eta=0.0, device=model_output.device)
    judged = SDECoefficients(torch.cat([ode.table[:, :2], dance.table[:, 2:]], dim=1), dance.log_prob)
    out = affine_step(model_output, latents, judged, index, prev_sample=prev_sample)
    return out.prev_sample, pred_original, without_constants(out, judged, index)


def _euler(model_output: Tensor, latents: Tensor, sigmas: Tensor, index: int) -> Tensor:
    ode = cached_coefficients(sigmas, variant="ode", eta=0.0, device=model_output.device)
    return affine_step(model_output, latents, ode, index).prev_sample
