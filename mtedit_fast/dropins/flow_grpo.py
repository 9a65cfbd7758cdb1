"""Drop-in for flow_grpo's ``sde_step_with_logprob``."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn.functional import pad

from mtedit_fast.ops import sde_step
from mtedit_fast.sampling.sigmas import cached_coefficients, host_values, nearest_index

Timestep = float | Sequence[float] | Tensor


def sde_step_with_logprob(
    self: FlowMatchEulerDiscreteScheduler,
    model_output: Tensor,
    timestep: Timestep,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    sde_type: str = "sde",
    return_sqrt_dt: bool = False,
) -> tuple[Tensor, ...]:
    """One reverse-SDE step and its log-probability, call-compatible with flow_grpo.

    Given the same generator, samples are those of the original: the noise is drawn with diffusers' ``randn_tensor``
    in fp32, also where it is multiplied by zero. Nothing here waits for the device, unless a ``generator`` is of the
    CPU: its noise is drawn there and copied, as in the original.

    Args:
        self: the scheduler, after ``set_timesteps``; it is read only.
        model_output: velocity ``[B, ...]`` (packed ``[B, N, C]`` or ``[B, C, H, W]``), fp32, bf16 or fp16.
        timestep: elements of ``self.timesteps``, 1-D of length 1 or B. Floats and CPU tensors are checked at once;
            device tensors are looked up on the device, and a value outside the schedule gives a NaN log-prob.
        sample: x_t, like ``model_output``.
        noise_level: η. With 0 the step is Euler's and the log-prob is 0 (the original returns NaN, which turns any
            loss that touches it into NaN; 0 is a ratio of 1 without a gradient).
        prev_sample: replay this next sample instead of drawing one.
        generator: one, or one per sample.
        sde_type: ``"sde"`` (Flow-GRPO) or ``"cps"`` (Flow-CPS, log-prob without constants).
        return_sqrt_dt: also return √(−dt).

    Returns:
        ``prev_sample`` fp32, ``log_prob`` fp32 ``[B]``, ``prev_sample_mean`` fp32, ``std_dev_t`` fp32
        ``[len(timestep), 1, ..]`` (η√(σ/(1−σ)) for ``sde``, so *without* √(−dt); σ'·sin(πη/2) for ``cps``), and with
        ``return_sqrt_dt`` √(−dt) in that shape.

    Raises:
        ValueError: shapes or devices that do not fit, a host timestep outside the schedule, ``noise_level < 0``, an
            unknown ``sde_type``, ``generator`` together with ``prev_sample``, or a scheduler without ``set_timesteps``.

    Source of the formulas: Flow-GRPO (arXiv 2505.05470), Flow-CPS (arXiv 2509.05952); see :mod:`mtedit_fast.ops`.
    """
    if sde_type not in ("sde", "cps"):
        raise ValueError(f"sde_type must be 'sde' or 'cps', got {sde_type!r}")
    if not noise_level >= 0:
        raise ValueError(f"noise_level must be 0 or more, got {noise_level}")
    if generator is not None and prev_sample is not None:
        raise ValueError(
            "generator and prev_sample were both given: pass prev_sample to replay, or generator to sample"
        )
    if len(self.sigmas) != len(self.timesteps) + 1:
        raise ValueError("the scheduler has no schedule: call scheduler.set_timesteps(...) first")

    device, batch = model_output.device, model_output.shape[0]
    index, rows = _step_index(cast(Tensor, self.timesteps), timestep, batch, device)
    coefficients = cached_coefficients(self.sigmas, variant=sde_type, eta=noise_level, device=device)
    noise = None
    if prev_sample is None:
        noise = randn_tensor(model_output.shape, generator=generator, device=device, dtype=torch.float32)
    else:
        prev_sample = prev_sample.float()
    out = sde_step(
        sample, model_output, coefficients, index, noise=noise, prev_sample=prev_sample, out_dtype=torch.float32
    )
    log_prob = torch.zeros(batch, device=device) if out.log_prob is None else out.log_prob
    surely_stochastic = noise_level > 0 and isinstance(index, int) and index < len(self.timesteps) - 1
    if sde_type == "cps" and prev_sample is not None and not surely_stochastic:
        # cps drops the 1/2c² with the constants, so that it judges a replay where c = 0, the last step, too
        squared = -(prev_sample - out.mean).square().flatten(1).mean(1)
        log_prob = torch.where(_at(coefficients.table[:, 2], index) == 0, squared, log_prob)

    shape = (rows, *[1] * (sample.ndim - 1))
    std_dev_t = _at(coefficients.table[:, 3], index).expand(rows).reshape(shape)
    returned = (out.prev_sample, log_prob, out.mean, std_dev_t)
    if not return_sqrt_dt:
        return returned
    sigmas = self.sigmas.to(device, non_blocking=True)
    sqrt_dt = (sigmas[:-1] - sigmas[1:]).sqrt()
    return *returned, _at(sqrt_dt, index).expand(rows).reshape(shape)


def _step_index(schedule: Tensor, timestep: Timestep, batch: int, device: torch.device) -> tuple[int | Tensor, int]:
    """The step as a host int or int64 ``[B]`` on ``device``, and the length of ``timestep``."""
    wanted = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1)
    rows = len(wanted)
    if rows not in (1, batch):
        raise ValueError(f"timestep must have length 1 or the batch size {batch}, got {rows}")
    if wanted.device.type == "cpu":
        values = host_values(schedule)
        indices = [nearest_index(t, values) for t in wanted.tolist()]
        if len(set(indices)) == 1:
            return indices[0], rows
        return torch.tensor(indices).to(device, non_blocking=True), rows
    if wanted.device != device:
        raise ValueError(f"timestep is on {wanted.device} and model_output on {device}: move timestep to {device}")
    index = device_index(wanted, schedule.to(device, non_blocking=True))
    return (index[0] if rows == 1 else index), rows


def device_index(timestep: Tensor, schedule: Tensor) -> Tensor:
    """Index ``[B]`` int64 of each timestep ``[B]`` in ``schedule`` ``[T]``, T where it is not there; no host sync."""
    match = timestep[:, None] == schedule
    return torch.where(match.any(dim=1), match.int().argmax(dim=1), len(schedule))


def _at(values: Tensor, index: int | Tensor) -> Tensor:
    """``values[index]``, NaN at index T: what ``sde_step`` gives there."""
    return values[index] if isinstance(index, int) else pad(values, (0, 1), value=math.nan)[index]
