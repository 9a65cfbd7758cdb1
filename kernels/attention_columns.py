"""Columns of softmax(query·keyᵀ·scale): log-sum-exp of each query over tiles of keys, then the columns; gradients by
making the logits again, one pass for each of query and key."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtedit_fast.kernels.seeded_noise import INTERPRETED, NUM_WARPS, on_device, round_to

STAGES = 3
BLOCK_C = 16  # columns at a time: the least that a product takes
# Rows that a program keeps and rows that it goes along; by kernel ("few" looks at columns only) and whether rows are
# of half precision.
TILES = {
    ("lse", True): (128, 64),
    ("lse", False): (32, 32),
    ("grad", True): (64, 64),
    ("grad", False): (32, 32),
    ("few", True): (32, 0),
    ("few", False): (16, 0),
}
# Not specialised: a kernel for every one that is 1 would be compiled for nothing.
SIZES = ("heads", "groups", "queries", "keys", "count")
_UPCASTS = tl.constexpr(INTERPRETED)  # the interpreter's tl.dot is wrong for bf16


@triton.jit
def _load_rows(tensor_ptr, row, inside, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D]; 0 past D and for rows that are not inside."""
    width = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if D != BLOCK_D:
        mask = mask & (width < D)[None, :]
    values = tl.load(tensor_ptr + row.to(tl.int64)[:, None] * stride + width[None, :], mask=mask, other=0.0)
    if _UPCASTS:
        values = values.to(tl.float32)
    return values


@triton.jit
def _store_rows(tensor_ptr, values, row, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    width = tl.arange(0, BLOCK_D)
    out = tensor_ptr + row.to(tl.int64)[:, None] * D + width[None, :]
    tl.store(out, round_to(values, tensor_ptr.dtype.element_ty), mask=inside[:, None] & (width < D)[None, :])


@triton.jit
def _finite(values):
    return tl.where(values == float("-inf"), 0.0, values)


@triton.jit
def _product(values, rows, total, EXACT: tl.constexpr):
    """total + values·rows, the values fp32. Of half-precision rows: tf32 holds all of one, and EXACT says not to round
    the values to bf16, either. fp16 would not reach down to small values."""
    if rows.dtype == tl.float32:
        total = tl.dot(values, rows, total, input_precision="ieee")
    elif rows.dtype == tl.bfloat16 and not EXACT:
        total = tl.dot(values.to(tl.bfloat16), rows, total)
    else:
        total = tl.dot(values, rows.to(tl.float32), total, input_precision="tf32")
    return total


@triton.jit
def _columns(columns_ptr, mask_ptr, item, first, count, length, BLOCK_C: tl.constexpr):
    """Of columns first … first + BLOCK_C: their keys, which exist, and which of them count."""
    c = first + tl.arange(0, BLOCK_C)
    column = tl.load(columns_ptr + item * count + c, mask=c < count, other=-1)
    inside = (column >= 0) & (column < length)
    counted = inside
    if mask_ptr is not None:
        counted = tl.load(mask_ptr + item * length + column, mask=inside, other=0) != 0
    return column, inside, counted


@triton.jit
def _column_probabilities(q, k, lse, counted, scale):
    """[queries, BLOCK_C]"""
    log_p = tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None]
    p = tl.exp(tl.where(log_p > 0.0, 0.0, log_p))  # above 0 by rounding only
    return tl.where(counted[None, :] & (lse != float("-inf"))[:, None], p, 0.0)


@triton.jit(do_not_specialize=SIZES)
def _lse_kernel(
    query_ptr,  # [B, H, Lq, D] at strides
    key_ptr,  # [B, H, Lk, D] at strides
    mask_ptr,  # [B, Lk]
    lse_ptr,  # [B, H, Lq]
    scale,
    heads,
    queries,
    keys,
    query_batch_stride,
    query_head_stride,
    query_stride,
    key_batch_stride,
    key_head_stride,
    key_stride,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(queries, BLOCK_M)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    item, head = pair // heads, pair % heads
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    query_ptr += item * query_batch_stride + head * query_head_stride
    key_ptr += item * key_batch_stride + head * key_head_stride
    q = _load_rows(query_ptr, row, row < queries, query_stride, D, BLOCK_D)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, keys, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        counted = column < keys
        if mask_ptr is not None:
            counted = tl.load(mask_ptr + item * keys + column, mask=counted, other=0) != 0
        k = _load_rows(key_ptr, column, counted, key_stride, D, BLOCK_D)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        logits = tl.where(counted[None, :], logits, float("-inf"))
        top = tl.maximum(peak, tl.max(logits, axis=1))
        shift = _finite(top)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        peak = top
    none = peak == float("-inf")
    lse = peak + tl.log(tl.where(none & (total == 0.0), 1.0, total))
    tl.store(lse_ptr + pair * queries + row, lse, mask=row < queries)


@triton.jit(do_not_specialize=SIZES)
def _columns_kernel(
    query_ptr,  # [B, H, Lq, D] at strides
    key_ptr,  # [B, H, Lk, D] at strides
    columns_ptr,  # [B, C]
    mask_ptr,  # [B, Lk]
    lse_ptr,  # [B, H, Lq]
    out_ptr,  # [B, groups, Lq, C]
    scale,
    heads,
    groups,  # of heads: 1 where they are averaged
    queries,
    keys,
    count,
    query_batch_stride,
    query_head_stride,
    query_stride,
    key_batch_stride,
    key_head_stride,
    key_stride,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(queries, BLOCK_M)
    column_tiles = tl.cdiv(count, BLOCK_C)
    program = tl.program_id(0)
    first = program % column_tiles * BLOCK_C
    row = program // column_tiles % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    pair = (program // (column_tiles * tiles)).to(tl.int64)
    item, group = pair // groups, pair % groups
    column, inside, counted = _columns(columns_ptr, mask_ptr, item, first, count, keys, BLOCK_C)
    members = heads // groups
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for head in range(group * members, (group + 1) * members):
        q_ptr = query_ptr + item * query_batch_stride + head * query_head_stride
        k_ptr = key_ptr + item * key_batch_stride + head * key_head_stride
        q = _load_rows(q_ptr, row, row < queries, query_stride, D, BLOCK_D)
        k = _load_rows(k_ptr, column, counted, key_stride, D, BLOCK_D)
        lse = tl.load(lse_ptr + (item * heads + head) * queries + row, mask=row < queries, other=0.0)
        total += _column_probabilities(q, k, lse, counted, scale)
    c = first + tl.arange(0, BLOCK_C)
    out = out_ptr + (pair * queries + row)[:, None] * count + c[None, :]
    tl.store(
        out,
        tl.where(inside[None, :], total / members, float("nan")),
        mask=(row < queries)[:, None] & (c < count)[None, :],
    )


@triton.jit(do_not_specialize=SIZES)
def _slopes_kernel(
    grad_ptr,  # [B, groups, Lq, C]
    query_ptr,  # [B, H, Lq, D] at strides
    key_ptr,  # [B, H, Lk, D] at strides
    columns_ptr,  # [B, C]
    times_ptr,  # [B, C], how often a column comes up
    mask_ptr,  # [B, Lk]
    lse_ptr,  # [B, H, Lq]
    slopes_ptr,  # [B, H, Lq, C], a column's share of ∂/∂logit
    delta_ptr,  # [B, H, Lq]
    scale,
    heads,
    groups,
    queries,
    keys,
    count,
    query_batch_stride,
    query_head_stride,
    query_stride,
    key_batch_stride,
    key_head_stride,
    key_stride,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(queries, BLOCK_M)
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    item, head = pair // heads, pair % heads
    query_ptr += item * query_batch_stride + head * query_head_stride
    key_ptr += item * key_batch_stride + head * key_head_stride
    members = heads // groups
    grad_ptr += (item * groups + head // members) * queries * count
    q = _load_rows(query_ptr, row, row < queries, query_stride, D, BLOCK_D)
    lse = tl.load(lse_ptr + pair * queries + row, mask=row < queries, other=0.0)
    delta = tl.zeros((BLOCK_M,), tl.float32)
    # Twice over the columns: a slope needs the sum of all.
    for second in tl.static_range(2):
        for first in range(0, count, BLOCK_C):
            column, _, counted = _columns(columns_ptr, mask_ptr, item, first, count, keys, BLOCK_C)
            k = _load_rows(key_ptr, column, counted, key_stride, D, BLOCK_D)
            p = _column_probabilities(q, k, lse, counted, scale)
            c = first + tl.arange(0, BLOCK_C)
            place = row.to(tl.int64)[:, None] * count + c[None, :]
            wanted = (row < queries)[:, None] & counted[None, :]
            grad = tl.load(grad_ptr + place, mask=wanted, other=0.0) / members
            if second:
                times = tl.load(times_ptr + item * count + c, mask=c < count, other=1.0)
                slope = tl.where(counted[None, :], p * (grad - delta[:, None] / times[None, :]), 0.0)
                out = slopes_ptr + pair * queries * count + place
                tl.store(out, slope, mask=(row < queries)[:, None] & (c < count)[None, :])
            else:
                delta += tl.sum(grad * p, axis=1)
    tl.store(delta_ptr + pair * queries + row, delta, mask=row < queries)


@triton.jit(do_not_specialize=SIZES)
def _grad_query_kernel(
    query_ptr,  # [B, H, Lq, D] at strides
    key_ptr,  # [B, H, Lk, D] at strides
    columns_ptr,  # [B, C]
    others_ptr,  # [B, Lk], keys that count and are no column
    mask_ptr,  # [B, Lk]
    lse_ptr,  # [B, H, Lq]
    slopes_ptr,  # [B, H, Lq, C]
    delta_ptr,  # [B, H, Lq]
    out_ptr,  # [B, H, Lq, D]
    scale,
    heads,
    queries,
    keys,
    count,
    query_batch_stride,
    query_head_stride,
    query_stride,
    key_batch_stride,
    key_head_stride,
    key_stride,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(queries, BLOCK_M)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    item, head = pair // heads, pair % heads
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    query_ptr += item * query_batch_stride + head * query_head_stride
    key_ptr += item * key_batch_stride + head * key_head_stride
    q = _load_rows(query_ptr, row, row < queries, query_stride, D, BLOCK_D)
    lse = _finite(tl.load(lse_ptr + pair * queries + row, mask=row < queries, other=0.0))
    mean_key = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, keys, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        other = tl.load(others_ptr + item * keys + column, mask=column < keys, other=0) != 0
        k = _load_rows(key_ptr, column, other, key_stride, D, BLOCK_D)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        p = tl.where(other[None, :], tl.exp(logits - lse[:, None]), 0.0)
        mean_key = _product(p, k, mean_key, False)
    delta = tl.load(delta_ptr + pair * queries + row, mask=row < queries, other=0.0)
    total = mean_key * -delta[:, None]
    for first in range(0, count, BLOCK_C):
        column, _, counted = _columns(columns_ptr, mask_ptr, item, first, count, keys, BLOCK_C)
        k = _load_rows(key_ptr, column, counted, key_stride, D, BLOCK_D)
        c = first + tl.arange(0, BLOCK_C)
        slope = slopes_ptr + (pair * queries + row)[:, None] * count + c[None, :]
        slope = tl.load(slope, mask=(row < queries)[:, None] & (c < count)[None, :], other=0.0)
        total = _product(slope, k, total, True)
    _store_rows(out_ptr + pair * queries * D, total * scale, row, row < queries, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def _grad_key_kernel(
    query_ptr,  # [B, H, Lq, D] at strides
    key_ptr,  # [B, H, Lk, D] at strides
    columns_ptr,  # [B, C]
    others_ptr,  # [B, Lk], keys that count and are no column
    lse_ptr,  # [B, H, Lq]
    slopes_ptr,  # [B, H, Lq, C]
    delta_ptr,  # [B, H, Lq]
    out_ptr,  # [B, H, Lk, D]
    scale,
    heads,
    queries,
    keys,
    count,
    query_batch_stride,
    query_head_stride,
    query_stride,
    key_batch_stride,
    key_head_stride,
    key_stride,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(keys, BLOCK_M)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    item, head = pair // heads, pair % heads
    first_key = tl.program_id(0) % tiles * BLOCK_M
    column = first_key + tl.arange(0, BLOCK_M)
    query_ptr += item * query_batch_stride + head * query_head_stride
    key_ptr += item * key_batch_stride + head * key_head_stride
    other = tl.load(others_ptr + item * keys + column, mask=column < keys, other=0) != 0
    k = _load_rows(key_ptr, column, other, key_stride, D, BLOCK_D)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, queries, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        q = _load_rows(query_ptr, row, row < queries, query_stride, D, BLOCK_D)
        lse = _finite(tl.load(lse_ptr + pair * queries + row, mask=row < queries, other=0.0))
        delta = tl.load(delta_ptr + pair * queries + row, mask=row < queries, other=0.0)
        logits = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
        slope = tl.where(other[:, None], tl.exp(logits - lse[None, :]) * -delta[None, :], 0.0)
        total = _product(slope, q, total, False)
    # Few tiles hold a column: they go over the queries once more, in fp32.
    for first in range(0, count, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        place = tl.load(columns_ptr + item * count + c, mask=c < count, other=-1) - first_key
        here = (place >= 0) & (place < BLOCK_M)
        if tl.sum(here.to(tl.int32), axis=0) > 0:
            sums = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
            for start in range(0, queries, BLOCK_N):
                row = start + tl.arange(0, BLOCK_N)
                q = _load_rows(query_ptr, row, row < queries, query_stride, D, BLOCK_D)
                slope = slopes_ptr + (pair * queries + row)[None, :] * count + c[:, None]
                slope = tl.load(slope, mask=(row < queries)[None, :] & here[:, None], other=0.0)
                sums = _product(slope, q, sums, True)
            for i in range(0, tl.minimum(BLOCK_C, count - first)):
                mine = tl.arange(0, BLOCK_C) == i
                gradient = tl.sum(tl.where(mine[:, None], sums, 0.0), axis=0)
                at = tl.sum(tl.where(mine & here, place + 1, 0), axis=0) - 1  # −1: not in this tile
                total += tl.where((tl.arange(0, BLOCK_M) == at)[:, None], gradient[None, :], 0.0)
    _store_rows(out_ptr + pair * keys * D, total * scale, column, column < keys, D, BLOCK_D)


def blocks(kernel: str, dtype: torch.dtype, width: int) -> dict[str, int]:
    """Depend on dtype and D alone, whatever the batch and the lengths, and with them the order of every sum."""
    kept, passed = TILES[kernel, dtype != torch.float32]
    sizes = {"D": width, "BLOCK_M": kept, "BLOCK_D": max(triton.next_power_of_2(width), 16)}
    if passed:
        sizes["BLOCK_N"] = passed
    if kernel != "lse":
        sizes["BLOCK_C"] = BLOCK_C
    return sizes


def _launch(kernel: Any, programs: int, *arguments: Any, **blocks: int) -> None:
    if programs:
        kernel[(programs,)](*arguments, **blocks, num_warps=NUM_WARPS, num_stages=STAGES, enable_fp_fusion=False)


def attention_columns_forward(
    query: Tensor, key: Tensor, columns: Tensor, mask: Tensor | None, scale: float, mean: bool
) -> tuple[Tensor, Tensor]:
    """Rows contiguous, columns [B, C]; probabilities [B, Lq, C] or [B, H, Lq, C] and log-sum-exp [B, H, Lq], fp32."""
    batch, heads, queries, width = query.shape
    keys, count = key.shape[2], columns.shape[1]
    groups = 1 if mean else heads
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    found = torch.empty(batch, groups, queries, count, dtype=torch.float32, device=query.device)
    mask = mask if mask is None else mask.contiguous()
    strides = (*query.stride()[:3], *key.stride()[:3])
    tile, few = blocks("lse", query.dtype, width), blocks("few", query.dtype, width)
    with on_device(query):
        programs = batch * heads * triton.cdiv(queries, tile["BLOCK_M"])
        _launch(_lse_kernel, programs, query, key, mask, lse, scale, heads, queries, keys, *strides, **tile)
        programs = batch * groups * triton.cdiv(queries, few["BLOCK_M"]) * triton.cdiv(count, BLOCK_C)
        sizes = (heads, groups, queries, keys, count)
        _launch(_columns_kernel, programs, query, key, columns, mask, lse, found, scale, *sizes, *strides, **few)
    return (found[:, 0] if mean else found), lse


def attention_columns_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    scale: float,
    mean: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to query and key in their dtype, given that of the probabilities, contiguous; None where not needed."""
    batch, heads, queries, width = query.shape
    keys, count, device = key.shape[2], columns.shape[1], query.device
    mask = mask if mask is None else mask.contiguous()
    times = (columns[:, :, None] == columns[:, None]).sum(2, dtype=torch.float32)
    # A place past the last key takes the columns that are none.
    others = torch.ones(batch, keys + 1, dtype=torch.bool, device=device)
    others.scatter_(1, torch.where((columns >= 0) & (columns < keys), columns, keys), False)
    others = others[:, :keys].contiguous() if mask is None else others[:, :keys] & mask

    slopes = torch.empty(batch, heads, queries, count, dtype=torch.float32, device=device)
    delta = torch.empty(batch, heads, queries, dtype=torch.float32, device=device)
    grad_query = query.new_empty(query.shape) if needs[0] else None
    grad_key = key.new_empty(key.shape) if needs[1] else None
    sizes, strides = (heads, queries, keys, count), (*query.stride()[:3], *key.stride()[:3])
    tile, few = blocks("grad", query.dtype, width), blocks("few", query.dtype, width)
    tensors: tuple[Tensor | None, ...]
    with on_device(query):
        programs = batch * heads * triton.cdiv(queries, few["BLOCK_M"])
        tensors = (grad, query, key, columns, times, mask, lse, slopes, delta)
        groups = 1 if mean else heads
        _launch(_slopes_kernel, programs, *tensors, scale, heads, groups, queries, keys, count, *strides, **few)
        if grad_query is not None:
            programs = batch * heads * triton.cdiv(queries, tile["BLOCK_M"])
            tensors = (query, key, columns, others, mask, lse, slopes, delta, grad_query)
            _launch(_grad_query_kernel, programs, *tensors, scale, *sizes, *strides, **tile)
        if grad_key is not None:
            programs = batch * heads * triton.cdiv(keys, tile["BLOCK_M"])
            tensors = (query, key, columns, others, lse, slopes, delta, grad_key)
            _launch(_grad_key_kernel, programs, *tensors, scale, *sizes, *strides, **tile)
    return grad_query, grad_key
