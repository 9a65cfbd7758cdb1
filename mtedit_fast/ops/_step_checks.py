"""What `sde_step` asks of its arguments."""

import torch
from torch import Tensor

from mtedit_fast.ops._samples import check_samples
from mtedit_fast.ops.coefficients import SDECoefficients
from mtedit_fast.ops.seeded_noise import check_seed


def check_step(
    sample: Tensor,
    velocity: Tensor,
    coefficients: SDECoefficients,
    step: int | Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    prev_sample: Tensor | None,
    out_dtype: torch.dtype | None,
    rounding: str,
) -> bool:
    """Whether the step may be stochastic. Raises on bad arguments; never waits for a device."""
    optional = {"noise": noise, "prev_sample": prev_sample}
    check_samples(tuple(optional), sample=sample, velocity=velocity, **optional)
    if not isinstance(coefficients, SDECoefficients):
        raise TypeError(f"coefficients must come from sde_coefficients, got {type(coefficients).__name__}")
    table = coefficients.table
    if table.dtype != torch.float32 or table.ndim != 2 or table.shape[1] != 4:
        raise ValueError(f"coefficients.table must be [T, 4] float32, got {list(table.shape)} {table.dtype}")
    if table.device != sample.device:
        raise ValueError(
            f"coefficients must be on sample's device {sample.device}, got {table.device}; "
            "pass device= to sde_coefficients"
        )
    if rounding not in ("before", "after"):
        raise ValueError(f"rounding must be 'before' or 'after', got {rounding!r}")
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise TypeError(f"out_dtype must be a floating-point dtype, got {out_dtype}")

    random = coefficients.log_prob != "none"
    if isinstance(step, Tensor):
        if step.dtype != torch.int64:
            raise TypeError(f"step must be an int or an int64 tensor, got {step.dtype}")
        if tuple(step.shape) not in ((), (sample.shape[0],)):
            raise ValueError(f"step must have shape [] or [B] = [{sample.shape[0]}], got {list(step.shape)}")
        if step.device != sample.device:
            raise ValueError(f"step must be an int or on sample's device {sample.device}, got {step.device}")
        if sample.device.type == "cpu" and not torch.compiler.is_compiling() and step.numel():
            low, high = int(step.min()), int(step.max())
            if low < 0 or high >= table.shape[0]:
                raise ValueError(f"step must be within the schedule's steps 0…{table.shape[0] - 1}, got {low}…{high}")
    elif isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step must be an int or an int64 tensor, got {type(step).__name__}")
    elif not 0 <= step < table.shape[0]:
        raise ValueError(f"step must be within the schedule's steps 0…{table.shape[0] - 1}, got {step}")
    elif coefficients.stochastic:
        random = random and coefficients.stochastic[step]

    if seed is not None:
        check_seed(seed)
        if seed.shape[0] != sample.shape[0]:
            raise ValueError(f"seed must have shape [B] = [{sample.shape[0]}], got {list(seed.shape)}")
        if seed.device != sample.device:
            raise ValueError(f"seed must be on sample's device {sample.device}, got {seed.device}")
    sources = {"noise": noise, "seed": seed, "prev_sample": prev_sample}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"pass only one of noise, seed and prev_sample, got {' and '.join(given)}")
    if random and not given:
        raise ValueError("a stochastic step needs noise=, seed= or prev_sample= (to replay); got none of them")
    return random
