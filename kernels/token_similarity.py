"""Cosine of pooled tokens, for pairs of rows: partial sums, then one cosine per pair; gradients gathered per row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtedit_fast.kernels.seeded_noise import on_device, round_to

TOKENS = 32  # of one partial sum
TILE = 8192  # elements in registers, half as many in the gradient
CHUNK = 256  # elements that a warp loads at once: 16 bytes of halves per thread
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
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Σ over the tokens of a tile, [CHUNKS, CHUNK]; NaN for a row outside the bank.

    A chunk is what a warp loads of a token at a time, and those of a token lie as far apart as there are tokens, mostly
    one for each warp: a token's sum of squares stays within a warp, a column's sum within a thread until the end.
    """
    row = tl.load(index_ptr + pair)
    inside = (row >= 0) & (row < rows)
    piece = tl.arange(0, CHUNKS * BLOCK_N)
    local = piece % BLOCK_N
    column = (piece // BLOCK_N * CHUNK)[:, None] + tl.arange(0, CHUNK)[None, :]
    count = tl.where(inside, tokens, 0)
    total = tl.zeros((CHUNKS * BLOCK_N, CHUNK), tl.float32)
    first_ptr = tokens_ptr + row * row_stride + tile.to(tl.int64) * TOKENS * token_stride
    left = tl.minimum(count - tile * TOKENS, TOKENS)  # not known when compiling, where the loop would be unrolled
    for start in range(0, left, BLOCK_N):
        token = start + local
        used = token < left
        weight = tl.full((CHUNKS * BLOCK_N,), 1.0, tl.float32)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + pair * tokens + tile * TOKENS + token, mask=used, other=0.0)
            used = used & (weight != 0.0)
        address = first_ptr + token.to(tl.int64)[:, None] * token_stride + column
        values = tl.load(address, mask=used[:, None] & (column < width), other=0.0).to(tl.float32)
        if NORMALIZE:
            squares = tl.reshape(values * values, (CHUNKS, BLOCK_N, CHUNK))
            inverse = _inverse_norm(tl.sum(tl.sum(squares, axis=0), axis=1))
            inverse = tl.broadcast_to(inverse[None, :], (CHUNKS, BLOCK_N))
            weight = weight * tl.reshape(inverse, (CHUNKS * BLOCK_N,))
        total += weight[:, None] * values
    return tl.sum(tl.reshape(total, (CHUNKS, BLOCK_N, CHUNK)), axis=1) + tl.where(inside, 0.0, float("nan"))


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
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if tile < a_tiles:
        total = _partial_sum(
            a_ptr, index_a_ptr, weights_a_ptr, a_rows, a_tokens, a_row_stride, a_token_stride, width, pair, tile,
            NORMALIZE, TOKENS, BLOCK_N, CHUNKS, CHUNK,
        )  # fmt: skip
    else:
        total = _partial_sum(
            b_ptr, index_b_ptr, weights_b_ptr, b_rows, b_tokens, b_row_stride, b_token_stride, width, pair,
            tile - a_tiles, NORMALIZE, TOKENS, BLOCK_N, CHUNKS, CHUNK,
        )  # fmt: skip
    column = (tl.arange(0, CHUNKS) * CHUNK)[:, None] + tl.arange(0, CHUNK)[None, :]
    tl.store(partial_ptr + (pair * tiles + tile) * width + column, total, mask=column < width)


@triton.jit
def _tile_sum(partial_ptr, first, last, width, BLOCK_D: tl.constexpr, AT_ONCE: tl.constexpr):
    """Σ of partial sums first … last, [BLOCK_D]."""
    column = tl.arange(0, BLOCK_D)[None, :]
    total = tl.zeros((AT_ONCE, BLOCK_D), tl.float32)
    for start in range(first, last, AT_ONCE):
        tile = start + tl.arange(0, AT_ONCE)[:, None]
        mask = (tile < last) & (column < width)
        total += tl.load(partial_ptr + tile * width + column, mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _cosine_kernel(
    partial_ptr,  # [P, tiles, D]
    similarity_ptr,  # [P]
    slopes_ptr,  # [P, 2, D]
    width,
    a_tiles,
    tiles,
    BLOCK_D: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    mask = column < width
    a = _tile_sum(partial_ptr + pair * tiles * width, 0, a_tiles, width, BLOCK_D, AT_ONCE)
    b = _tile_sum(partial_ptr + pair * tiles * width, a_tiles, tiles, width, BLOCK_D, AT_ONCE)
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


def blocks(kernel: str, width: int) -> dict[str, int]:
    """Depend on D alone, so that a pair's result does not depend on the other pairs."""
    block = triton.next_power_of_2(width)
    rows = min(TOKENS, max(1, TILE // block))
    chunk = min(block, CHUNK)
    return {
        "pool": {"TOKENS": TOKENS, "BLOCK_N": rows, "CHUNKS": block // chunk, "CHUNK": chunk},
        "cosine": {"BLOCK_D": block, "AT_ONCE": min(max(1, TILE // block), 8)},
        "gradient": {"BLOCK_N": min(TOKENS, max(1, TILE // 2 // block)), "BLOCK_D": block},
    }[kernel]


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
            **blocks("pool", width),
            **options,
        )
        sizes = blocks("cosine", width)
        _cosine_kernel[(count,)](partial, similarity, slopes, width, a_tiles, tiles, **sizes, **options)
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
    tile = blocks("gradient", width)
    tiles = triton.cdiv(count, tile["BLOCK_N"])
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
            **tile,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return out
