"""One launch for the loss, one for its gradient. Same results for a row, whatever the batch around it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtedit_fast.kernels.row_sums import (
    COLUMNS,
    PARTS,
    ROWS,
    add_up,
    counters,
    last_to_arrive,
    load_tile,
    pick,
    store_moments,
    store_sum,
    tree_sum,
)
from mtedit_fast.kernels.seeded_noise import BLOCK, NUM_WARPS, on_device, round_to

_COLUMNS = tl.constexpr(COLUMNS)
SMALLEST_SIZE = tl.constexpr(1e-5)


@triton.jit
def row_weight(weight_ptr, row, mask, batch):
    """The given weight, or 1/B. `row` is one row or several."""
    if weight_ptr is None:
        return tl.where(mask, tl.div_rn(1.0, batch.to(tl.float32)), 0.0)
    else:
        return tl.load(weight_ptr + row, mask=mask, other=0.0)


@triton.jit
def _forward_kernel(
    v_theta_ptr,  # [B, numel]
    v_old_ptr,  # [B, numel]
    v_target_ptr,  # [B, numel]
    v_ref_ptr,  # [B, numel]
    t_ptr,  # [B]
    r_ptr,  # [B]
    weight_ptr,  # [B]
    loss_ptr,  # []
    rows_ptr,  # [2, B]: policy, kl
    coefficients_ptr,  # [3, B]
    partial_ptr,  # [COLUMNS, B, tiles, PARTS]
    arrived_ptr,  # [B + 1], zero before and after
    beta,
    scale,
    kl_weight,
    numel,
    tiles,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    batch = tl.num_programs(0) // tiles
    offsets = tile * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    index = row * numel + offsets
    # Nothing is loaded after a store, which it would wait for.
    theta = load_tile(v_theta_ptr, index, mask)
    target = load_tile(v_target_ptr, index, mask)
    if v_old_ptr is not None:
        old = load_tile(v_old_ptr, index, mask)
    if v_ref_ptr is not None:
        change = theta - load_tile(v_ref_ptr, index, mask)
    if v_old_ptr is None:
        store_moments(partial_ptr, row, tile, tiles, 0, theta - target, BLOCK)
    else:
        offset = old - target
        step = beta * (theta - old)
        store_moments(partial_ptr, row, tile, tiles, 0, offset + step, BLOCK)
        store_moments(partial_ptr, row, tile, tiles, 2, offset - step, BLOCK)
    if v_ref_ptr is not None:
        store_sum(partial_ptr, row, tile, tiles, 4, change * change, BLOCK)

    if last_to_arrive(arrived_ptr + row, tiles):
        count = tl.cast(numel, tl.float32)
        STORED: tl.constexpr = 3 + (0 if v_old_ptr is None else 12) + (0 if v_ref_ptr is None else 16)
        sums = add_up(partial_ptr, row, tiles, _COLUMNS, STORED)
        plus = tl.div_rn(pick(sums, 0), count)
        square_plus = tl.div_rn(pick(sums, 1), count)
        minus = plus
        square_minus = square_plus
        if v_old_ptr is not None:
            minus = tl.div_rn(pick(sums, 2), count)
            square_minus = tl.div_rn(pick(sums, 3), count)
        kl = 0.0
        if v_ref_ptr is not None:
            kl = tl.div_rn(pick(sums, 4), count)

        t = tl.load(t_ptr + row)
        r = tl.load(r_ptr + row)
        weight = row_weight(weight_ptr, row, True, batch)
        slope_plus = tl.div_rn(scale * r * t * t, floored(t * plus))
        slope_minus = tl.div_rn(scale * (1.0 - r) * t * t, floored(t * minus))
        policy = tl.div_rn(slope_plus * square_plus + slope_minus * square_minus, beta)
        factor = tl.div_rn(2.0 * weight, count)
        tl.store(rows_ptr + row, policy)
        tl.store(rows_ptr + batch + row, kl)
        tl.store(coefficients_ptr + row, factor * (slope_plus - slope_minus))
        tl.store(coefficients_ptr + batch + row, factor * (beta * (slope_plus + slope_minus)))
        tl.store(coefficients_ptr + 2 * batch + row, factor * kl_weight)

        if last_to_arrive(arrived_ptr + batch, batch):
            losses = tl.zeros((ROWS,), tl.float32)
            for start in range(0, batch, ROWS):
                rows = start + tl.arange(0, ROWS)
                inside = rows < batch
                policies = tl.load(rows_ptr + rows, mask=inside, other=0.0, cache_modifier=".cg")
                kls = tl.load(rows_ptr + batch + rows, mask=inside, other=0.0, cache_modifier=".cg")
                losses += row_weight(weight_ptr, rows, inside, batch) * (policies + kl_weight * kls)
            tl.store(loss_ptr, tl.sum(tree_sum(losses[None, :], 5), axis=0))


@triton.jit
def floored(size):
    """max(size, 1e-5), and NaN where size is NaN."""
    return tl.where(size < SMALLEST_SIZE, SMALLEST_SIZE, size)


@triton.jit
def _backward_kernel(
    v_theta_ptr,  # [B, numel]
    v_old_ptr,  # [B, numel]
    v_target_ptr,  # [B, numel]
    v_ref_ptr,  # [B, numel]
    coefficients_ptr,  # [3, B]
    grad_ptr,  # []
    out_ptr,  # [B, numel]
    numel,
    tiles,
    BLOCK: tl.constexpr,
):
    # From the end: what the forward read last may still be in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    tile = (program % tiles).to(tl.int64)
    batch = tl.num_programs(0) // tiles
    offsets = tile * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    index = row * numel + offsets
    grad = tl.load(grad_ptr).to(tl.float32)
    theta = load_tile(v_theta_ptr, index, mask)
    target = load_tile(v_target_ptr, index, mask)
    if v_old_ptr is None:
        result = (theta - target) * (grad * tl.load(coefficients_ptr + row))
    else:
        old = load_tile(v_old_ptr, index, mask)
        result = (old - target) * (grad * tl.load(coefficients_ptr + row))
        result += (theta - old) * (grad * tl.load(coefficients_ptr + batch + row))
    if v_ref_ptr is not None:
        change = theta - load_tile(v_ref_ptr, index, mask)
        result += change * (grad * tl.load(coefficients_ptr + 2 * batch + row))
    tl.store(out_ptr + index, round_to(result, out_ptr.dtype.element_ty), mask=mask)


def nft_loss_forward(
    v_theta: Tensor,
    v_old: Tensor | None,
    v_target: Tensor,
    v_ref: Tensor | None,
    t: Tensor,
    r: Tensor,
    weight: Tensor | None,
    beta: float,
    scale: float,
    kl_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous tensors in; loss [], policy and kl [2, B], and the gradient's coefficients [3, B] out."""
    batch = v_theta.shape[0]
    loss = r.new_zeros(()) if batch == 0 else r.new_empty(())
    rows, coefficients = r.new_empty(2, batch), r.new_empty(3, batch)
    if batch == 0:
        return loss, rows, coefficients
    numel = v_theta.numel() // batch
    tiles = triton.cdiv(numel, BLOCK)
    with on_device(v_theta):
        _forward_kernel[(batch * tiles,)](
            v_theta,
            v_old,
            v_target,
            v_ref,
            t,
            r,
            weight,
            loss,
            rows,
            coefficients,
            r.new_empty(COLUMNS * batch * tiles * PARTS),
            counters(batch + 1, r.device),  # one per row and one for the batch
            beta,
            scale,
            kl_weight,
            numel,
            tiles,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return loss, rows, coefficients


def velocity_loss_backward(
    v_theta: Tensor, v_old: Tensor | None, v_target: Tensor, v_ref: Tensor | None, coefficients: Tensor, grad: Tensor
) -> Tensor:
    """Contiguous tensors in; the gradient to v_theta, in its dtype, out."""
    out = torch.empty_like(v_theta)
    batch = v_theta.shape[0]
    if batch == 0:
        return out
    numel = v_theta.numel() // batch
    tiles = triton.cdiv(numel, BLOCK)
    with on_device(v_theta):
        _backward_kernel[(batch * tiles,)](
            v_theta,
            v_old,
            v_target,
            v_ref,
            coefficients,
            grad,
            out,
            numel,
            tiles,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return out
