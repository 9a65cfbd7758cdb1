"""One launch per SDE step, forward or backward. Same results, whatever the batch around a sample."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtedit_fast.kernels.row_sums import PARTS, add_up, counters, last_to_arrive, load_tile, pick, store_sum
from mtedit_fast.kernels.seeded_noise import BLOCK, DRAWING_WARPS, NUM_WARPS, on_device, round_to, standard_normals

HALF_LOG_TWO_PI = tl.constexpr(0.9189385332046727)


@triton.jit
def _row(table_ptr, step_ptr, host_step, num_steps, sample, STEP: tl.constexpr):
    """The step's index and its a, b, c; NaN outside the schedule. STEP: 0 host int, 1 one for all, 2 per sample."""
    if STEP == 0:
        step = host_step.to(tl.int64)
    elif STEP == 1:
        step = tl.load(step_ptr)
    else:
        step = tl.load(step_ptr + sample)
    inside = (step >= 0) & (step < num_steps)
    row = table_ptr + step * 4
    a = tl.load(row, mask=inside, other=float("nan"))
    b = tl.load(row + 1, mask=inside, other=float("nan"))
    c = tl.load(row + 2, mask=inside, other=float("nan"))
    return step, a, b, c


@triton.jit
def _value(mean, c, step, index, mask, tile, noise_ptr, seed, BLOCK: tl.constexpr):
    """mean + c·noise, in fp32."""
    if noise_ptr is not None:
        return mean + c * load_tile(noise_ptr, index, mask)
    elif seed is not None:
        return mean + c * standard_normals(seed, step + 1, tile, BLOCK)
    else:
        return mean


@triton.jit(do_not_specialize=["host_step", "num_steps"])
def _forward_kernel(
    sample_ptr,  # [B, numel]
    velocity_ptr,  # [B, numel]
    table_ptr,  # [num_steps, 4]
    step_ptr,  # [] or [B]
    noise_ptr,  # [B, numel]
    seed_ptr,  # [B]
    replayed_ptr,  # [B, numel]
    out_ptr,  # [B, numel]
    mean_ptr,  # [B, numel]
    log_prob_ptr,  # [B]
    partial_ptr,  # [B, tiles, PARTS]
    arrived_ptr,  # [B], zero before and after
    host_step,
    num_steps,
    numel,
    tiles,
    STEP: tl.constexpr,
    MODE: tl.constexpr,
    ROUND_BEFORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    step, a, b, c = _row(table_ptr, step_ptr, host_step, num_steps, sample, STEP)
    offsets = tile * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    index = sample * numel + offsets
    x = load_tile(sample_ptr, index, mask)
    v = load_tile(velocity_ptr, index, mask)
    mean = a * x + b * v
    if replayed_ptr is not None:
        value = load_tile(replayed_ptr, index, mask)
    else:
        seed = None
        if seed_ptr is not None:
            seed = tl.load(seed_ptr + sample)
        value = _value(mean, c, step, index, mask, tile, noise_ptr, seed, BLOCK)
        stored = round_to(value, out_ptr.dtype.element_ty)
        tl.store(out_ptr + index, stored, mask=mask)
        if ROUND_BEFORE:
            value = stored.to(tl.float32)
    if mean_ptr is not None:  # after everything is loaded: a load would wait for it
        tl.store(mean_ptr + index, mean, mask=mask)

    if MODE != 0:
        difference = value - mean
        if seed_ptr is not None:  # all that is loaded is 0 past the end
            difference = tl.where(mask, difference, 0.0)
        store_sum(partial_ptr, sample, tile, tiles, 0, difference * difference, BLOCK)
        # The last block of a sample to arrive adds up the partial sums, in the order of the tiles.
        if last_to_arrive(arrived_ptr + sample, tiles):
            sums = add_up(partial_ptr, sample, tiles, 1, 1)
            squared = tl.div_rn(pick(sums, 0), tl.cast(numel, tl.float32))
            log_prob = -squared
            if MODE == 1:
                width = tl.where(c == 0.0, 1.0, c)
                log_prob = tl.div_rn(log_prob, 2.0 * width * width) - tl.log(width) - HALF_LOG_TWO_PI
            log_prob = tl.where(c == 0.0, 0.0 * squared, log_prob)  # 0, or NaN where the velocity is
            tl.store(log_prob_ptr + sample, log_prob)


@triton.jit(do_not_specialize=["host_step", "num_steps"])
def _backward_kernel(
    sample_ptr,  # [B, numel]
    velocity_ptr,  # [B, numel]
    table_ptr,  # [num_steps, 4]
    step_ptr,  # [] or [B]
    noise_ptr,  # [B, numel]
    seed_ptr,  # [B]
    replayed_ptr,  # [B, numel]
    grad_prev_ptr,  # [B, numel]
    grad_log_prob_ptr,  # [B]
    grad_mean_ptr,  # [B, numel]
    grad_sample_ptr,  # [B, numel]
    grad_velocity_ptr,  # [B, numel]
    host_step,
    num_steps,
    numel,
    tiles,
    STEP: tl.constexpr,
    MODE: tl.constexpr,
    ROUNDED: tl.constexpr,  # the dtype that the value of log_prob was rounded to
    BLOCK: tl.constexpr,
):
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    step, a, b, c = _row(table_ptr, step_ptr, host_step, num_steps, sample, STEP)
    offsets = tile * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    index = sample * numel + offsets
    grad = tl.zeros((BLOCK,), tl.float32)
    if MODE != 0 and grad_log_prob_ptr is not None:
        x = load_tile(sample_ptr, index, mask)
        v = load_tile(velocity_ptr, index, mask)
        mean = a * x + b * v
        if replayed_ptr is not None:
            value = load_tile(replayed_ptr, index, mask)
        else:
            seed = None
            if seed_ptr is not None:
                seed = tl.load(seed_ptr + sample)
            value = _value(mean, c, step, index, mask, tile, noise_ptr, seed, BLOCK)
            value = round_to(value, ROUNDED).to(tl.float32)
        slope = 2.0
        if MODE == 1:
            width = tl.where(c == 0.0, 1.0, c)
            slope = tl.div_rn(1.0, width * width)
        grad_log_prob = tl.load(grad_log_prob_ptr + sample).to(tl.float32)
        scale = tl.div_rn(grad_log_prob * tl.where(c == 0.0, 0.0, slope), tl.cast(numel, tl.float32))
        grad = scale * (value - mean)
    if grad_prev_ptr is not None:
        grad += load_tile(grad_prev_ptr, index, mask)
    if grad_mean_ptr is not None:
        grad += load_tile(grad_mean_ptr, index, mask)
    if grad_sample_ptr is not None:
        tl.store(grad_sample_ptr + index, round_to(a * grad, grad_sample_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_velocity_ptr + index, round_to(b * grad, grad_velocity_ptr.dtype.element_ty), mask=mask)


def _step_arguments(step: int | Tensor) -> tuple[Tensor | None, int, int]:
    """step_ptr, host_step and STEP of the kernels."""
    if isinstance(step, Tensor):
        return step.contiguous(), 0, 1 if step.ndim == 0 else 2
    return None, step, 0


def sde_step_forward(
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
    """Contiguous tensors in; prev_sample (the given one on replay), log_prob [B] or None and mean or None out."""
    batch, device = sample.shape[0], sample.device
    out = torch.empty(sample.shape, dtype=out_dtype, device=device) if prev_sample is None else None
    mean = torch.empty(sample.shape, dtype=torch.float32, device=device) if want_mean else None
    log_prob = torch.empty(batch, dtype=torch.float32, device=device) if log_prob_mode else None
    result = prev_sample if out is None else out
    assert result is not None
    if batch == 0:
        return result, log_prob, mean
    numel = sample.numel() // batch
    tiles = triton.cdiv(numel, BLOCK)
    step_ptr, host_step, kind = _step_arguments(step)
    with on_device(sample):
        _forward_kernel[(batch * tiles,)](
            sample,
            velocity,
            table,
            step_ptr,
            noise,
            seed,
            prev_sample,
            out,
            mean,
            log_prob,
            torch.empty(batch * tiles * PARTS, dtype=torch.float32, device=device) if log_prob_mode else None,
            counters(batch, device) if log_prob_mode else None,
            host_step,
            table.shape[0],
            numel,
            tiles,
            STEP=kind,
            MODE=log_prob_mode,
            ROUND_BEFORE=round_before,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS if seed is None else DRAWING_WARPS,
            enable_fp_fusion=False,
        )
    return result, log_prob, mean


_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def sde_step_backward(
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
    """Contiguous tensors in; gradients of sample (or None) and velocity out, in their dtypes."""
    batch = sample.shape[0]
    grad_sample = torch.empty_like(sample) if needs_sample else None
    grad_velocity = torch.empty_like(velocity)
    if batch == 0:
        return grad_sample, grad_velocity
    numel = sample.numel() // batch
    tiles = triton.cdiv(numel, BLOCK)
    step_ptr, host_step, kind = _step_arguments(step)
    with on_device(sample):
        _backward_kernel[(batch * tiles,)](
            sample,
            velocity,
            table,
            step_ptr,
            noise,
            seed,
            prev_sample,
            grad_prev,
            grad_log_prob,
            grad_mean,
            grad_sample,
            grad_velocity,
            host_step,
            table.shape[0],
            numel,
            tiles,
            STEP=kind,
            MODE=log_prob_mode,
            ROUNDED=_TRITON_DTYPES[out_dtype] if round_before else tl.float32,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS if seed is None else DRAWING_WARPS,
            enable_fp_fusion=False,
        )
    return grad_sample, grad_velocity
