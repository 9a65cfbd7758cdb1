"""One step of a stochastic flow sampler: next sample, its log-probability and its mean, in one pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtedit_fast.ops import seeded_noise as noise_op
from mtedit_fast.ops._backend import choose_backend
from mtedit_fast.ops._operator import Operator
from mtedit_fast.ops._samples import raise_if_not_finite, row_sum
from mtedit_fast.ops._step_checks import check_step
from mtedit_fast.ops.coefficients import SDECoefficients

LOG_PROB_MODES = {"none": 0, "gaussian": 1, "squared": 2}
HALF_LOG_TWO_PI = 0.9189385332046727


class SDEStepOutput(NamedTuple):
    prev_sample: Tensor
    """[B, ...] in the storage dtype."""
    log_prob: Tensor | None
    """[B] fp32 (fp64 for fp64), averaged over a sample's elements; None where every step, or this one, is
    deterministic."""
    mean: Tensor
    """[B, ...] fp32 (fp64 for fp64); empty with return_mean=False."""


def sde_step(
    sample: Tensor,
    velocity: Tensor,
    coefficients: SDECoefficients,
    step: int | Tensor,
    *,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    prev_sample: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    rounding: str = "before",
    return_mean: bool = True,
    check: bool = False,
    backend: str = "auto",
) -> SDEStepOutput:
    """mean = a·sample + b·velocity; prev_sample = mean + c·noise; and the log-probability of prev_sample.

    Arithmetic is fp32 whatever the inputs (fp64 if one of them is, on the reference). The log-probability is averaged
    over a sample's elements: with d = prev_sample - mean, it is -d²/2c² - ln c - ½ln 2π for "gaussian" coefficients
    (Flow-GRPO, arXiv 2505.05470) and -d² for "squared" ones (Coefficients-Preserving Sampling). Replaying a stored
    prev_sample gives the sampling call's log-probability bit for bit, and a sample's results do not depend on the rest
    of the batch. Gradients flow to velocity and sample; log_prob sees prev_sample as a constant.

    Args:
        sample, velocity: [B, ...] of one shape, each fp32, bf16, fp16 (or fp64).
        coefficients: from `sde_coefficients`, on the same device.
        step: index into the schedule, an int or an int64 tensor [] or [B] on the same device (never waited for: an
            index outside the schedule gives NaN there). With a tensor, a deterministic step's log_prob is 0, and one
            compiled graph serves every step.
        noise: [B, ...] standard normals, any float dtype. One of noise, seed and prev_sample, unless the step is
            deterministic.
        seed: [B] int64; draws `seeded_noise(seed, shape, step + 1)` inside the kernel.
        prev_sample: [B, ...] replayed: returned unchanged, and log_prob is taken on it.
        out_dtype: storage dtype of prev_sample. Default: sample's.
        rounding: "before": prev_sample is rounded to its storage dtype and log_prob taken on the rounded value.
            "after": log_prob is taken first, so that a later replay of the rounded value differs from it.
        return_mean: False does not write mean, which saves a rollout a quarter of the step's memory traffic.
        check: wait for the device, and raise on a sample or velocity that is not finite (not inside torch.compile).
            Without it a NaN in velocity becomes a NaN in that sample's prev_sample and log_prob.
        backend: "auto", "reference", "cpp" or "triton". An explicit one never falls back.

    Returns:
        prev_sample [B, ...] of out_dtype, log_prob [B] fp32 or None, mean [B, ...] fp32.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not match, a host step outside the schedule, no source or several
            sources of randomness, an unknown option, a backend that cannot run here, or (check=True) values that are
            not finite.
    """
    random = check_step(sample, velocity, coefficients, step, noise, seed, prev_sample, out_dtype, rounding)
    if check:
        raise_if_not_finite(sample=sample, velocity=velocity)
    mode = LOG_PROB_MODES[coefficients.log_prob] if random else 0
    replayed = prev_sample
    if not random:
        noise = seed = None
    storage = out_dtype or sample.dtype
    dtypes = (storage, *(t.dtype for t in (sample, velocity, noise, replayed) if t is not None))
    chosen = choose_backend(backend, sample.device, dtypes)
    host_step, device_step = (step, None) if isinstance(step, int) else (0, step)
    noise, seed, prev_sample = (t if t is None else t.contiguous() for t in (noise, seed, prev_sample))
    args = (
        sample.contiguous(),
        velocity.contiguous(),
        coefficients.table.contiguous(),
        device_step,
        host_step,
        noise,
        seed,
        prev_sample,
        storage,
        mode,
        rounding == "before",
        return_mean,
        chosen,
    )
    out, log_prob, mean = _op(*args)
    return SDEStepOutput(out if replayed is None else replayed, log_prob if mode else None, mean)


def _rows(table: Tensor, step: int | Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """a, b, c of the step, each [1, 1] or [B, 1]; NaN for a device step outside the schedule."""
    if isinstance(step, int):
        rows = table[step][None]
    else:
        inside = (step >= 0) & (step < table.shape[0])
        rows = table[step.clamp(0, table.shape[0] - 1)].masked_fill(~inside[..., None], torch.nan).reshape(-1, 4)
    return rows[:, :3].to(dtype).split(1, dim=1)


def reference_forward(
    sample: Tensor,
    velocity: Tensor,
    table: Tensor,
    step: int | Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    prev_sample: Tensor | None,
    out_dtype: torch.dtype,
    log_prob_mode: int,
    round_before: bool,
    want_mean: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Plain PyTorch; every back end has this signature. Returns prev_sample, log_prob [B], mean."""
    dtype = torch.float64 if torch.float64 in (sample.dtype, velocity.dtype) else torch.float32
    a, b, c = _rows(table, step, dtype)
    mean = a * sample.flatten(1).to(dtype) + b * velocity.flatten(1).to(dtype)
    if prev_sample is None:
        if seed is not None:
            noise = noise_op.reference(seed, mean.shape[1], step + 1, torch.float32)
        value = mean if noise is None else mean + c * noise.flatten(1).to(dtype)
        prev_sample = value.view(sample.shape).to(out_dtype, copy=True)
        if round_before:
            value = prev_sample.flatten(1).to(dtype)
    else:
        value = prev_sample.flatten(1).to(dtype)
    log_prob = None
    if log_prob_mode:
        c = c[:, 0]
        squared = row_sum((value - mean) ** 2) / mean.shape[1]
        log_prob = -squared
        if log_prob_mode == 1:
            log_prob = -squared / (2 * c * c) - torch.log(c) - HALF_LOG_TWO_PI
        log_prob = torch.where(c == 0, 0 * squared, log_prob)  # 0, or NaN where the velocity is
    return prev_sample, log_prob, mean.view(sample.shape) if want_mean else None


def reference_backward(
    sample: Tensor,
    velocity: Tensor,
    table: Tensor,
    step: int | Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    prev_sample: Tensor | None,
    out_dtype: torch.dtype,
    log_prob_mode: int,
    round_before: bool,
    grad_prev: Tensor | None,
    grad_log_prob: Tensor | None,
    grad_mean: Tensor | None,
    needs_sample: bool,
) -> tuple[Tensor | None, Tensor]:
    """Gradients to sample (or None) and velocity.

    The first ten arguments are the forward's; its result may stand in as prev_sample for the noise or seed if log_prob
    was taken on it. grad_prev is None where prev_sample was replayed.
    """
    dtype = torch.float64 if torch.float64 in (sample.dtype, velocity.dtype) else torch.float32
    a, b, c = _rows(table, step, dtype)
    grad = torch.zeros(sample.shape, dtype=dtype, device=sample.device).flatten(1)
    if grad_log_prob is not None and log_prob_mode:
        if not round_before and prev_sample is None:
            out_dtype = dtype
        value, _, mean = reference_forward(
            sample, velocity, table, step, noise, seed, prev_sample, out_dtype, 0, round_before
        )
        assert mean is not None
        scale = torch.where(c == 0, 0, 1 / (c * c)) if log_prob_mode == 1 else torch.where(c == 0, 0, 2.0)
        scale = grad_log_prob[:, None].to(dtype) * scale / grad.shape[1]
        grad = scale * (value.to(dtype) - mean).flatten(1)
    for other in (grad_prev, grad_mean):
        if other is not None:
            grad = grad + other.flatten(1).to(dtype)
    grad_sample = (a * grad).view(sample.shape).to(sample.dtype) if needs_sample else None
    return grad_sample, (b * grad).view(sample.shape).to(velocity.dtype)


def _implementation(backend: str) -> tuple[Any, Any]:
    if backend == "triton":
        from mtedit_fast.kernels import sde_step as triton

        return triton.sde_step_forward, triton.sde_step_backward
    if backend == "cpp":
        from mtedit_fast.ops import _cpp

        return _cpp.sde_step_forward, _cpp.sde_step_backward
    return reference_forward, reference_backward


def _forward(
    sample: Tensor,
    velocity: Tensor,
    table: Tensor,
    device_step: Tensor | None,
    host_step: int,
    noise: Tensor | None,
    seed: Tensor | None,
    prev_sample: Tensor | None,
    out_dtype: torch.dtype,
    log_prob_mode: int,
    round_before: bool,
    want_mean: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """An operator's outputs are tensors that alias no input: what is absent is empty."""
    step = host_step if device_step is None else device_step
    out, log_prob, mean = _implementation(backend)[0](
        sample, velocity, table, step, noise, seed, prev_sample, out_dtype, log_prob_mode, round_before, want_mean
    )
    return (
        out if prev_sample is None else table.new_empty(0),
        table.new_empty(0) if log_prob is None else log_prob,
        table.new_empty(0) if mean is None else mean,
    )


def _fake(sample: Tensor, velocity: Tensor, table: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    prev_sample, out_dtype, log_prob_mode, _, want_mean, _ = others[4:]
    dtype = torch.float64 if torch.float64 in (sample.dtype, velocity.dtype) else torch.float32
    return (
        sample.new_empty(sample.shape, dtype=out_dtype) if prev_sample is None else table.new_empty(0),
        sample.new_empty(sample.shape[0], dtype=dtype) if log_prob_mode else table.new_empty(0),
        sample.new_empty(sample.shape, dtype=dtype) if want_mean else table.new_empty(0),
    )


def _backward(
    sample: Tensor,
    velocity: Tensor,
    table: Tensor,
    device_step: Tensor | None,
    host_step: int,
    noise: Tensor | None,
    seed: Tensor | None,
    prev_sample: Tensor | None,
    out_dtype: torch.dtype,
    log_prob_mode: int,
    round_before: bool,
    grad_prev: Tensor | None,
    grad_log_prob: Tensor | None,
    grad_mean: Tensor | None,
    needs_sample: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    step = host_step if device_step is None else device_step
    grads = [g if g is None else g.contiguous() for g in (grad_prev, grad_log_prob, grad_mean)]
    grad_sample, grad_velocity = _implementation(backend)[1](
        sample,
        velocity,
        table,
        step,
        noise,
        seed,
        prev_sample,
        out_dtype,
        log_prob_mode,
        round_before,
        *grads,
        needs_sample,
    )
    return table.new_empty(0) if grad_sample is None else grad_sample, grad_velocity


def _fake_backward(sample: Tensor, velocity: Tensor, table: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    needs_sample = others[-2]
    return torch.empty_like(sample) if needs_sample else table.new_empty(0), torch.empty_like(velocity)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    sample, velocity, table, device_step, host_step, noise, seed, prev_sample, *options = inputs
    out_dtype, mode, round_before, want_mean, backend = options
    ctx.set_materialize_grads(False)
    ctx.replayed = prev_sample is not None
    if not ctx.replayed and round_before:
        noise, seed, prev_sample = None, None, output[0]
    ctx.save_for_backward(sample, velocity, table, device_step, noise, seed, prev_sample)
    ctx.options = host_step, out_dtype, mode, round_before, want_mean, backend


def _autograd(
    ctx: Any, grad_prev: Tensor | None, grad_log_prob: Tensor | None, grad_mean: Tensor | None
) -> tuple[Tensor | None, ...]:
    sample, velocity, table, device_step, noise, seed, prev_sample = ctx.saved_tensors
    host_step, out_dtype, mode, round_before, want_mean, backend = ctx.options
    grad_sample, grad_velocity = _backward_op(
        sample,
        velocity,
        table,
        device_step,
        host_step,
        noise,
        seed,
        prev_sample,
        out_dtype,
        mode,
        round_before,
        None if ctx.replayed else grad_prev,
        grad_log_prob if mode else None,
        grad_mean if want_mean else None,
        ctx.needs_input_grad[0],
        backend,
    )
    return grad_sample if ctx.needs_input_grad[0] else None, grad_velocity


_op = Operator("sde_step", _forward, _fake, keeps_memory=True)
_op.differentiate(_autograd, _setup_context, inputs=2)
_backward_op = Operator("sde_step_backward", _backward, _fake_backward)
