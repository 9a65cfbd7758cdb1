"""Gradients of columns of softmax(query·keyᵀ·scale): the logits made again, in one pass for each of query and key."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtedit_fast.kernels.attention_columns import (
    SIZES,
    blocks,
    column_probabilities,
    columns_at,
    flags,
    launch,
    load_rows,
    probabilities,
)
from mtedit_fast.kernels.linear_logsumexp import finite
from mtedit_fast.kernels.seeded_noise import on_device, round_to

SLOPES_STAGES = 2  # one or two steps over the columns; with three, registers spill on sm_80


@triton.jit
def _store_rows(tensor_ptr, values, row, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    width = tl.arange(0, BLOCK_D)
    out = tensor_ptr + row.to(tl.int64)[:, None] * D + width[None, :]
    tl.store(out, round_to(values, tensor_ptr.dtype.element_ty), mask=inside[:, None] & (width < D)[None, :])


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
    q = load_rows(query_ptr, row, row < queries, query_stride, D, BLOCK_D)
    lse = tl.load(lse_ptr + pair * queries + row, mask=row < queries, other=0.0)
    delta = tl.zeros((BLOCK_M,), tl.float32)
    # Twice over the columns: a slope needs the sum of all.
    for second in tl.static_range(2):
        for first in range(0, count, BLOCK_C):
            column, _, counted = columns_at(columns_ptr, mask_ptr, item, first, count, keys, BLOCK_C)
            k = load_rows(key_ptr, column, counted, key_stride, D, BLOCK_D)
            p = column_probabilities(q, k, lse, counted, scale)
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
    q = load_rows(query_ptr, row, row < queries, query_stride, D, BLOCK_D)
    lse = finite(tl.load(lse_ptr + pair * queries + row, mask=row < queries, other=0.0))
    mean_key = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, keys, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        other = tl.load(others_ptr + item * keys + column, mask=column < keys, other=0) != 0
        k = load_rows(key_ptr, column, other, key_stride, D, BLOCK_D)
        p = probabilities(tl.dot(q, tl.trans(k), input_precision="ieee"), lse[:, None], scale)
        p = tl.where(other[None, :], p, 0.0)
        mean_key = _product(p, k, mean_key, False)
    delta = tl.load(delta_ptr + pair * queries + row, mask=row < queries, other=0.0)
    total = mean_key * -delta[:, None]
    for first in range(0, count, BLOCK_C):
        column, _, counted = columns_at(columns_ptr, mask_ptr, item, first, count, keys, BLOCK_C)
        k = load_rows(key_ptr, column, counted, key_stride, D, BLOCK_D)
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
    k = load_rows(key_ptr, column, other, key_stride, D, BLOCK_D)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, queries, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        q = load_rows(query_ptr, row, row < queries, query_stride, D, BLOCK_D)
        lse = finite(tl.load(lse_ptr + pair * queries + row, mask=row < queries, other=0.0))
        delta = tl.load(delta_ptr + pair * queries + row, mask=row < queries, other=0.0)
        p = probabilities(tl.dot(k, tl.trans(q), input_precision="ieee"), lse[None, :], scale)
        slope = tl.where(other[:, None], p * -delta[None, :], 0.0)
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
                q = load_rows(query_ptr, row, row < queries, query_stride, D, BLOCK_D)
                slope = slopes_ptr + (pair * queries + row)[None, :] * count + c[:, None]
                slope = tl.load(slope, mask=(row < queries)[None, :] & here[:, None], other=0.0)
                sums = _product(slope, q, sums, True)
            for i in range(0, tl.minimum(BLOCK_C, count - first)):
                mine = tl.arange(0, BLOCK_C) == i
                gradient = tl.sum(tl.where(mine[:, None], sums, 0.0), axis=0)
                at = tl.sum(tl.where(mine & here, place + 1, 0), axis=0) - 1  # −1: not in this tile
                total += tl.where((tl.arange(0, BLOCK_M) == at)[:, None], gradient[None, :], 0.0)
    _store_rows(out_ptr + pair * keys * D, total * scale, column, column < keys, D, BLOCK_D)


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
    times = (columns[:, :, None] == columns[:, None]).sum(2, dtype=torch.float32)
    # A place past the last key takes the columns that are none.
    others = torch.ones(batch, keys + 1, dtype=torch.int32, device=device)
    others.scatter_(1, torch.where((columns >= 0) & (columns < keys), columns, keys), 0)
    counts = mask if mask is None else flags(mask)
    others = others[:, :keys].contiguous() if counts is None else others[:, :keys] * counts

    slopes = torch.empty(batch, heads, queries, count, dtype=torch.float32, device=device)
    delta = torch.empty(batch, heads, queries, dtype=torch.float32, device=device)
    grad_query = query.new_empty(query.shape) if needs[0] else None
    grad_key = key.new_empty(key.shape) if needs[1] else None
    sizes, strides = (heads, queries, keys, count), (*query.stride()[:3], *key.stride()[:3])
    few = blocks("few", query.dtype, width)
    tensors: tuple[Tensor | None, ...]
    with on_device(query):
        programs = batch * heads * triton.cdiv(queries, few["BLOCK_M"])
        tensors = (grad, query, key, columns, times, counts, lse, slopes, delta)
        groups = 1 if mean else heads
        arguments = (*tensors, scale, heads, groups, queries, keys, count, *strides)
        launch(_slopes_kernel, programs, *arguments, num_stages=SLOPES_STAGES, **few)
        if grad_query is not None:
            tile = blocks("grad_query", query.dtype, width)
            programs = batch * heads * triton.cdiv(queries, tile["BLOCK_M"])
            tensors = (query, key, columns, others, counts, lse, slopes, delta, grad_query)
            launch(_grad_query_kernel, programs, *tensors, scale, *sizes, *strides, **tile)
        if grad_key is not None:
            tile = blocks("grad_key", query.dtype, width)
            programs = batch * heads * triton.cdiv(keys, tile["BLOCK_M"])
            tensors = (query, key, columns, others, lse, slopes, delta, grad_key)
            launch(_grad_key_kernel, programs, *tensors, scale, *sizes, *strides, **tile)
    return grad_query, grad_key
