"""Cosine of pooled tokens, for pairs of rows: partial sums, then one cosine per pair; gradients gathered per row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtedit_fast.kernels.seeded_noise import on_device, round_to

TOKENS = 32  # of one partial sum
TILE = 4096  # elements in registers
NUM_WARPS = 8


@triton.jit
def _inverse_norm(squared):
    zero = squared == 0.0
    return tl.where(zero, 0.0, tl.div_rn(1.0, tl.sqrt_rn(tl.where(zero, 1.0, squared))))


@triton.jit
def _partial_sum(
    tokens_ptr,  # [rows, tokens, D] at row_stride and token_stride
    index_ptr,  # [P]
    weights_ptr,  # [P, tokens]
    rows,
    tokens,
    row_stride,
    token_stride,
    width,
    pair,
    tile,
    NORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Σ over the tokens of a tile, [BLOCK_D]; NaN for a row outside the bank."""
    row = tl.load(index_ptr + pair)
    inside = (row >= 0) & (row < rows)
    column = tl.arange(0, BLOCK_D)
    count = tl.where(inside, tokens, 0)
    total = tl.zeros((BLOCK_D,), tl.float32) + tl.where(inside, 0.0, float("nan"))
    for start in range(0, TOKENS, BLOCK_N):
        token = tile * TOKENS + start + tl.arange(0, BLOCK_N)
        used = token < count
        weight = tl.full((BLOCK_N,), 1.0, tl.float32)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + pair * tokens + token, mask=used, other=0.0)
            used = used & (weight != 0.0)
        address = tokens_ptr + row * row_stride + token.to(tl.int64)[:, None] * token_stride + column[None, :]
        mask = used[:, None] & (column < width)[None, :]
        values = tl.load(address, mask=mask, other=0.0).to(tl.float32)
        if NORMALIZE:
            weight = weight * _inverse_norm(tl.sum(values * values, axis=1))
        total += tl.sum(weight[:, None] * values, axis=0)
    return total


@triton.jit
def _pool_kernel(
    a_ptr,  # [a_rows, a_tokens, D]
    b_ptr,  # [b_rows, b_tokens, D]
    index_a_ptr,  # [P]
    index_b_ptr,  # [P]
    weights_a_ptr,  # [P, a_tokens]
    weights_b_ptr,  # [P, b_tokens]
    partial_ptr,  # [P, a_tiles + b_tiles, D]
    a_rows,
    b_rows,
    a_tokens,
    b_tokens,
    a_row_stride,
    b_row_stride,
    a_token_stride,
    b_token_stride,
    width,
    a_tiles,
    tiles,
    NORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if tile < a_tiles:
        total = _partial_sum(
            a_ptr, index_a_ptr, weights_a_ptr, a_rows, a_tokens, a_row_stride, a_token_stride, width, pair, tile,
            NORMALIZE, TOKENS, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        total = _partial_sum(
            b_ptr, index_b_ptr, weights_b_ptr, b_rows, b_tokens, b_row_stride, b_token_stride, width, pair,
            tile - a_tiles, NORMALIZE, TOKENS, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    column = tl.arange(0, BLOCK_D)
    tl.store(partial_ptr + (pair * tiles + tile) * width + column, total, mask=column < width)


@triton.jit
def _cosine_kernel(
    partial_ptr,  # [P, tiles, D]
    similarity_ptr,  # [P]
    slopes_ptr,  # [P, 2, D]
    width,
    a_tiles,
    tiles,
    BLOCK_D: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    mask = column < width
    a = tl.zeros((BLOCK_D,), tl.float32)
    b = tl.zeros((BLOCK_D,), tl.float32)
    for tile in range(0, a_tiles):
        a += tl.load(partial_ptr + (pair * tiles + tile) * width + column, mask=mask, other=0.0)
    for tile in range(a_tiles, tiles):
        b += tl.load(partial_ptr + (pair * tiles + tile) * width + column, mask=mask, other=0.0)
    inverse_a = _inverse_norm(tl.sum(a * a, axis=0))
    inverse_b = _inverse_norm(tl.sum(b * b, axis=0))
    a = a * inverse_a
    b = b * inverse_b
    similarity = tl.sum(a * b, axis=0)
    if slopes_ptr is not None:
        slopes = slopes_ptr + pair * 2 * width + column
        tl.store(slopes, (b - similarity * a) * inverse_a, mask=mask)
        tl.store(slopes + width, (a - similarity * b) * inverse_b, mask=mask)
    undefined = (inverse_a == 0.0) | (inverse_b == 0.0)
    tl.store(similarity_ptr + pair, tl.where(undefined, float("nan"), similarity))


@triton.jit
def _gradient_kernel(
    tokens_ptr,  # [rows, tokens, D] at row_stride and token_stride
    order_ptr,  # [P] pairs, those of a row side by side
    bounds_ptr,  # [rows + 1] where a row's pairs begin
    weights_ptr,  # [P, tokens]
    similarity_ptr,  # [P]
    slope_ptr,  # [P, D] at slope_stride
    grad_ptr,  # [P]
    out_ptr,  # [rows, tokens, D]
    tokens,
    row_stride,
    token_stride,
    slope_stride,
    width,
    tiles,
    NORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    token = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    mask = (token < tokens)[:, None] & (column < width)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for i in range(tl.load(bounds_ptr + row), tl.load(bounds_ptr + row + 1)):
        pair = tl.load(order_ptr + i)
        similarity = tl.load(similarity_ptr + pair)
        grad = tl.load(grad_ptr + pair)
        slope = tl.load(slope_ptr + pair * slope_stride + column, mask=column < width, other=0.0)
        slope = tl.where(similarity == similarity, grad * slope, 0.0)
        weight = tl.full((BLOCK_N,), 1.0, tl.float32)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + pair * tokens + token, mask=token < tokens, other=0.0)
        total += weight[:, None] * slope[None, :]
    if NORMALIZE:
        address = tokens_ptr + row * row_stride + token.to(tl.int64)[:, None] * token_stride + column[None, :]
        values = tl.load(address, mask=mask, other=0.0).to(tl.float32)
        inverse = _inverse_norm(tl.sum(values * values, axis=1))[:, None]
        unit = values * inverse
        projected = (total - unit * tl.sum(unit * total, axis=1)[:, None]) * inverse
        used = tl.max((total != 0.0).to(tl.int32), axis=1) > 0  # weightless tokens may hold anything
        total = tl.where(used[:, None], projected, 0.0)
    out = out_ptr + (row * tokens + token)[:, None] * width + column[None, :]
    tl.store(out, round_to(total, out_ptr.dtype.element_ty), mask=mask)


def _blocks(width: int) -> dict[str, int]:
    """Depend on D alone, so that a pair's result does not depend on the other pairs."""
    block = triton.next_power_of_2(width)
    return {"BLOCK_N": min(TOKENS, max(1, TILE // block)), "BLOCK_D": block}


def token_similarity_forward(
    a: Tensor,
    b: Tensor,
    index_a: Tensor,
    index_b: Tensor,
    weights_a: Tensor | None,
    weights_b: Tensor | None,
    normalize: bool,
    want_slopes: bool,
) -> tuple[Tensor, Tensor | None]:
    """Banks of contiguous tokens in; similarities [P] and slopes [P, 2, D] or None out, both fp32."""
    count, width, device = index_a.shape[0], a.shape[2], a.device
    similarity = torch.empty(count, dtype=torch.float32, device=device)
    slopes = torch.empty(count, 2, width, dtype=torch.float32, device=device) if want_slopes else None
    if count == 0:
        return similarity, slopes
    a_tiles, b_tiles = triton.cdiv(a.shape[1], TOKENS), triton.cdiv(b.shape[1], TOKENS)
    tiles = a_tiles + b_tiles
    partial = torch.empty(count, tiles, width, dtype=torch.float32, device=device)
    weights_a, weights_b = (w if w is None else w.contiguous() for w in (weights_a, weights_b))
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
    with on_device(a):
        _pool_kernel[(count * tiles,)](
            a,
            b,
            index_a,
            index_b,
            weights_a,
            weights_b,
            partial,
            a.shape[0],
            b.shape[0],
            a.shape[1],
            b.shape[1],
            a.stride(0),
            b.stride(0),
            a.stride(1),
            b.stride(1),
            width,
            a_tiles,
            tiles,
            NORMALIZE=normalize,
            TOKENS=TOKENS,
            **_blocks(width),
            **options,
        )
        block = triton.next_power_of_2(width)
        _cosine_kernel[(count,)](partial, similarity, slopes, width, a_tiles, tiles, BLOCK_D=block, **options)
    return similarity, slopes


def token_similarity_backward(
    tokens: Tensor,
    index: Tensor,
    weights: Tensor | None,
    similarity: Tensor,
    slope: Tensor,
    grad: Tensor,
    normalize: bool,
) -> Tensor:
    """Gradient of one bank [rows, tokens, D] in its dtype; slope [P, D] is that side's."""
    rows, count, width = tokens.shape
    out = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    if out.numel() == 0:
        return out
    ordered, order = index.sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(rows + 1, device=index.device))
    blocks = _blocks(width)
    tiles = triton.cdiv(count, blocks["BLOCK_N"])
    with on_device(tokens):
        _gradient_kernel[(rows * tiles,)](
            tokens,
            order,
            bounds,
            weights if weights is None else weights.contiguous(),
            similarity,
            slope,
            grad,
            out,
            count,
            tokens.stride(0),
            tokens.stride(1),
            slope.stride(0),
            width,
            tiles,
            NORMALIZE=normalize,
            **blocks,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return out
