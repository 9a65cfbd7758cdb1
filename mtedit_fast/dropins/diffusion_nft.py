"""Drop-ins for DiffusionNFT's ``flow_grpo_step`` and ``dance_grpo_step``.

Arithmetic is fp32 whatever the inputs, and log-probs are fp32: the originals run in the inputs' dtype. Samples come
back in the dtype of the originals, the promotion of ``model_output`` and ``latents``. ``sigmas`` is the whole schedule,
``[T+1]`` from 1 to 0; kept on the device, or on the host, it is never read back.
"""

import math
import operator

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from mtedit_fast.ops import SDECoefficients, SDEStepOutput, sde_step
from mtedit_fast.sampling.sigmas import cached_coefficients

Generator = torch.Generator | list[torch.Generator] | None
_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def flow_grpo_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    generator: Generator = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A Flow-GRPO SDE step, call-compatible with DiffusionNFT.

    Args:
        model_output: velocity ``[B, ...]``, fp32, bf16 or fp16.
        latents: x at ``sigmas[index]``, same shape.
        eta: noise level; 0 is Euler's step with log-prob 0 (the original returns NaN).
        sigmas: ``[T+1]`` schedule.
        index: step, 0 to T-1; an integer tensor of one element, too, for whose value the call waits.
        prev_sample: replay this next sample; None draws one.
        generator: for the noise, drawn with diffusers' ``randn_tensor`` in ``model_output``'s dtype.

    Returns:
        next sample, x̂0 = x − σv, log-prob fp32 ``[B]`` (mean over the non-batch dims, with all constants).

    Raises:
        ValueError: ``eta < 0``, ``index`` outside the schedule, shapes that do not fit, ``generator`` together with
            ``prev_sample``.
    """
    out, pred_original, log_prob = _flow_grpo(model_output, latents, eta, sigmas, index, prev_sample, generator)
    return out.prev_sample, pred_original, log_prob


def dance_grpo_step(
    model_output: Tensor, latents: Tensor, eta: float, sigmas: Tensor, index: int | Tensor, prev_sample: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A DanceGRPO SDE step, call-compatible with DiffusionNFT; arguments and errors as :func:`flow_grpo_step`.

    The noise comes from torch's global generator. As in the original the log-prob is *without* −ln c − ½ln2π.
    ``eta=0`` is Euler's step with log-prob 0 (the original raises a math domain error).

    Returns:
        next sample, x̂0 = x − σv, log-prob fp32 ``[B]``.
    """
    index = check_step(model_output, latents, eta, sigmas, index)
    coefficients = cached_coefficients(sigmas, variant="dance", eta=eta, device=model_output.device)
    noise = None
    if prev_sample is None:
        dtype = torch.promote_types(model_output.dtype, latents.dtype)
        noise = torch.randn(model_output.shape, device=model_output.device, dtype=dtype)
    out = affine_step(model_output, latents, coefficients, index, noise=noise, prev_sample=prev_sample)
    log_prob = without_constants(out, coefficients, index)
    return out.prev_sample, predict_original(model_output, latents, sigmas, index), log_prob


def _flow_grpo(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    generator: Generator,
) -> tuple[SDEStepOutput, Tensor, Tensor]:
    """The SDE step that DiffusionNFT and MixGRPO share: step output, x̂0, log-prob."""
    index = check_step(model_output, latents, eta, sigmas, index)
    if generator is not None and prev_sample is not None:
        raise ValueError(
            "generator and prev_sample were both given: pass prev_sample to replay, or generator to sample"
        )
    device = model_output.device
    coefficients = cached_coefficients(sigmas, variant="sde", eta=eta, device=device)
    noise = None
    if prev_sample is None:
        noise = randn_tensor(model_output.shape, generator=generator, device=device, dtype=model_output.dtype)
    out = affine_step(model_output, latents, coefficients, index, noise=noise, prev_sample=prev_sample)
    return out, predict_original(model_output, latents, sigmas, index), log_prob_of(out)


def check_step(model_output: Tensor, latents: Tensor, eta: float, sigmas: Tensor, index: int | Tensor) -> int:
    """`index` as an int, after what both projects' steps require of the arguments they share: ValueError, TypeError."""
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1:
        raise TypeError("sigmas must be a 1-D tensor, the whole schedule of T+1 values from 1 to 0")
    if isinstance(index, bool | float) or (isinstance(index, Tensor) and index.dtype == torch.bool):
        raise TypeError(f"index must be an int, the step in the schedule, got {index!r}")
    try:
        index = operator.index(index)
    except (TypeError, RuntimeError, ValueError):
        raise TypeError(f"index must be an int, the step in the schedule, got {index!r}") from None
    if not 0 <= index < len(sigmas) - 1:
        raise ValueError(f"index must be between 0 and {len(sigmas) - 2} for {len(sigmas)} sigmas, got {index}")
    if not eta >= 0:
        raise ValueError(f"eta must be 0 or more, got {eta}")
    if model_output.shape != latents.shape:
        raise ValueError(
            f"model_output and latents must have one shape, got {tuple(model_output.shape)} and {tuple(latents.shape)}"
        )
    return index


def affine_step(
    model_output: Tensor,
    latents: Tensor,
    coefficients: SDECoefficients,
    index: int,
    *,
    noise: Tensor | None = None,
    prev_sample: Tensor | None = None,
) -> SDEStepOutput:
    """:func:`sde_step` whose sample comes back in the promotion of both dtypes, as tensor arithmetic would."""
    return sde_step(
        latents,
        model_output,
        coefficients,
        index,
        noise=noise,
        prev_sample=prev_sample,
        out_dtype=torch.promote_types(model_output.dtype, latents.dtype),
    )


def log_prob_of(out: SDEStepOutput) -> Tensor:
    """The step's log-prob, 0 for a deterministic step."""
    return out.mean.new_zeros(out.mean.shape[0]) if out.log_prob is None else out.log_prob


def without_constants(out: SDEStepOutput, coefficients: SDECoefficients, index: int) -> Tensor:
    """The Gaussian log-prob with its constants −ln c − ½ln2π taken off."""
    if out.log_prob is None:
        return log_prob_of(out)
    return out.log_prob + (coefficients.table[index, 2].log() + _LOG_SQRT_2PI)


def predict_original(model_output: Tensor, latents: Tensor, sigmas: Tensor, index: int) -> Tensor:
    """x̂0 = x − σv in fp32, returned in the promotion of both dtypes."""
    sigma = sigmas[index].to(model_output.device, non_blocking=True)
    dtype = torch.promote_types(model_output.dtype, latents.dtype)
    return (latents.float() - sigma * model_output.float()).to(dtype)
