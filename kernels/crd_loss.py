"""One launch for the loss, its centring included; the gradient's launch is `nft_loss.velocity_loss_backward`."""

import triton
import triton.language as tl
from torch import Tensor

from mtedit_fast.kernels.nft_loss import floored, row_weight
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
from mtedit_fast.kernels.seeded_noise import BLOCK, NUM_WARPS, on_device

_COLUMNS = tl.constexpr(COLUMNS)


@triton.jit
def _centre(groups_ptr, rows, inside, residual_ptr, batch):
    """Mean residual over each row's group, added in the order of the batch, so that the rest of it does not matter."""
    group = tl.load(groups_ptr + rows, mask=inside, other=0)
    total = tl.zeros((ROWS,), tl.float32)
    count = tl.zeros((ROWS,), tl.float32)
    for other in range(0, batch):
        same = group == tl.load(groups_ptr + other)
        total += tl.where(same, tl.load(residual_ptr + other, cache_modifier=".cg"), 0.0)
        count += tl.where(same, 1.0, 0.0)
    return tl.div_rn(total, tl.where(inside, count, 1.0))


@triton.jit
def _forward_kernel(
    v_theta_ptr,  # [B, numel]
    v_old_ptr,  # [B, numel]
    v_target_ptr,  # [B, numel]
    v_ref_ptr,  # [B, numel]
    r_ptr,  # [B]
    groups_ptr,  # [B]
    centre_ptr,  # [B]
    weight_ptr,  # [B]
    loss_ptr,  # []
    rows_ptr,  # [3, B]: policy, implicit reward, kl
    coefficients_ptr,  # [3, B]
    residual_ptr,  # [B]
    partial_ptr,  # [COLUMNS, B, tiles, PARTS]
    arrived_ptr,  # [B + 1], zero before and after
    beta,
    scale,
    kl_weight,
    kl_floor,
    numel,
    tiles,
    ADAPTIVE: tl.constexpr,
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
        difference_old = load_tile(v_old_ptr, index, mask) - target
    if v_ref_ptr is not None:
        change = theta - load_tile(v_ref_ptr, index, mask)
    store_moments(partial_ptr, row, tile, tiles, 0, theta - target, BLOCK)
    if v_old_ptr is not None:
        store_moments(partial_ptr, row, tile, tiles, 2, difference_old, BLOCK)
    if v_ref_ptr is not None:
        store_sum(partial_ptr, row, tile, tiles, 4, change * change, BLOCK)

    if last_to_arrive(arrived_ptr + row, tiles):
        count = tl.cast(numel, tl.float32)
        STORED: tl.constexpr = 3 + (0 if v_old_ptr is None else 12) + (0 if v_ref_ptr is None else 16)
        sums = add_up(partial_ptr, row, tiles, _COLUMNS, STORED)
        width = 1.0
        if ADAPTIVE:
            width = floored(tl.div_rn(pick(sums, 0), count))
        implicit_reward = 0.0
        if v_old_ptr is not None:
            width_old = 1.0
            if ADAPTIVE:
                width_old = floored(tl.div_rn(pick(sums, 2), count))
            error_old = tl.div_rn(tl.div_rn(pick(sums, 3), count), width_old)
            implicit_reward = error_old - tl.div_rn(tl.div_rn(pick(sums, 1), count), width)
        kl = 0.0
        if v_ref_ptr is not None:
            kl = tl.div_rn(pick(sums, 4), count)

        r = tl.load(r_ptr + row)
        factor = tl.div_rn(2.0 * row_weight(weight_ptr, row, True, batch), count)
        tl.store(rows_ptr + batch + row, implicit_reward)
        tl.store(rows_ptr + 2 * batch + row, kl)
        tl.store(residual_ptr + row, beta * implicit_reward - r)
        # What the residual will be multiplied by, for now.
        tl.store(coefficients_ptr + row, tl.div_rn(factor * (-2.0 * scale), width))
        tl.store(coefficients_ptr + batch + row, 0.0)
        tl.store(coefficients_ptr + 2 * batch + row, factor * (kl_floor + r * (kl_weight - kl_floor)))

        if last_to_arrive(arrived_ptr + batch, batch):
            losses = tl.zeros((ROWS,), tl.float32)
            for start in range(0, batch, ROWS):
                rows = start + tl.arange(0, ROWS)
                inside = rows < batch
                residual = tl.load(residual_ptr + rows, mask=inside, other=0.0, cache_modifier=".cg")
                if centre_ptr is None:
                    residual -= _centre(groups_ptr, rows, inside, residual_ptr, batch)
                else:
                    residual -= tl.load(centre_ptr + rows, mask=inside, other=0.0)
                policy = tl.div_rn(scale, beta) * residual * residual
                tl.store(rows_ptr + rows, policy, mask=inside)
                slope = tl.load(coefficients_ptr + rows, mask=inside, other=0.0, cache_modifier=".cg")
                tl.store(coefficients_ptr + rows, slope * residual, mask=inside)
                kls = tl.load(rows_ptr + 2 * batch + rows, mask=inside, other=0.0, cache_modifier=".cg")
                rewards = tl.load(r_ptr + rows, mask=inside, other=0.0)
                terms = policy + (kl_floor + rewards * (kl_weight - kl_floor)) * kls
                losses += tl.where(inside, row_weight(weight_ptr, rows, inside, batch) * terms, 0.0)
            tl.store(loss_ptr, tl.sum(tree_sum(losses[None, :], 5), axis=0))


def crd_loss_forward(
    v_theta: Tensor,
    v_old: Tensor | None,
    v_target: Tensor,
    v_ref: Tensor | None,
    r: Tensor,
    groups: Tensor | None,
    centre: Tensor | None,
    weight: Tensor | None,
    beta: float,
    scale: float,
    adaptive: bool,
    kl_weight: float,
    kl_floor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous tensors in; loss [], policy, implicit reward and kl [3, B], and coefficients [3, B] out."""
    batch = v_theta.shape[0]
    loss = r.new_zeros(()) if batch == 0 else r.new_empty(())
    rows, coefficients = r.new_empty(3, batch), r.new_empty(3, batch)
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
            r,
            groups,
            centre,
            weight,
            loss,
            rows,
            coefficients,
            r.new_empty(batch),
            r.new_empty(COLUMNS * batch * tiles * PARTS),
            counters(batch + 1, r.device),  # one per row and one for the batch
            beta,
            scale,
            kl_weight,
            kl_floor,
            numel,
            tiles,
            ADAPTIVE=adaptive,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return loss, rows, coefficients
