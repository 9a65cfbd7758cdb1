"""Columns of softmax(query·keyᵀ·scale): log-sum-exp of each query over tiles of keys, then the columns."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtedit_fast.kernels.linear_logsumexp import finite
from mtedit_fast.kernels.seeded_noise import INTERPRETED, on_device

STAGES = 3
BLOCK_C = 16  # columns at a time: the least that a product takes
# Rows that a program keeps, rows that it goes along and warps; by kernel ("few" looks at columns only) and whether rows
# are of half precision. A warp, or on sm_90 four, has rows of its own: what it multiplies a second time stays in it.
TILES = {
    ("lse", True): (128, 64, 4),
    ("lse", False): (32, 32, 8),
    ("grad_query", True): (64, 64, 4),
    ("grad_query", False): (32, 16, 8),
    ("grad_key", True): (64, 32, 4),
    ("grad_key", False): (32, 16, 8),
    ("few", True): (32, 0, 4),
    ("few", False): (16, 0, 8),
}
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
# Not specialised: a kernel for every one that is 1 would be compiled for nothing.
SIZES = ("heads", "groups", "queries", "keys", "count")
_UPCASTS = tl.constexpr(INTERPRETED)  # the interpreter's tl.dot is wrong for bf16


@triton.jit
def load_rows(tensor_ptr, row, inside, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
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
def columns_at(columns_ptr, mask_ptr, item, first, count, length, BLOCK_C: tl.constexpr):
    """Of columns first … first + BLOCK_C: their keys, which exist, and which of them count."""
    c = first + tl.arange(0, BLOCK_C)
    column = tl.load(columns_ptr + item * count + c, mask=c < count, other=-1)
    inside = (column >= 0) & (column < length)
    counted = inside
    if mask_ptr is not None:
        counted = tl.load(mask_ptr + item * length + column, mask=inside, other=0) != 0
    return column, inside, counted


@triton.jit
def probabilities(products, lse, scale):
    """exp(products·scale − lse), lse of a shape that broadcasts; by powers of two, which take one instruction each."""
    return tl.exp2(tl.fma(products, scale * LOG2_E, -LOG2_E * lse))


@triton.jit
def column_probabilities(q, k, lse, counted, scale):
    """[queries, BLOCK_C]"""
    p = probabilities(tl.dot(q, tl.trans(k), input_precision="ieee"), lse[:, None], scale)
    p = tl.where(p > 1.0, 1.0, p)  # by rounding only
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
    q = load_rows(query_ptr, row, row < queries, query_stride, D, BLOCK_D)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, keys, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        counted = column < keys
        if mask_ptr is not None:
            counted = tl.load(mask_ptr + item * keys + column, mask=counted, other=0) != 0
        k = load_rows(key_ptr, column, counted, key_stride, D, BLOCK_D)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)  # of base two
        logits = tl.where(counted[None, :], logits, float("-inf"))
        top = tl.maximum(peak, tl.max(logits, axis=1))
        shift = finite(top)
        total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(logits - shift[:, None]), axis=1)
        peak = top
    none = peak == float("-inf")
    lse = peak * LN_2 + tl.log(tl.where(none & (total == 0.0), 1.0, total))
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
    column, inside, counted = columns_at(columns_ptr, mask_ptr, item, first, count, keys, BLOCK_C)
    members = heads // groups
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for head in range(group * members, (group + 1) * members):
        q_ptr = query_ptr + item * query_batch_stride + head * query_head_stride
        k_ptr = key_ptr + item * key_batch_stride + head * key_head_stride
        q = load_rows(q_ptr, row, row < queries, query_stride, D, BLOCK_D)
        k = load_rows(k_ptr, column, counted, key_stride, D, BLOCK_D)
        lse = tl.load(lse_ptr + (item * heads + head) * queries + row, mask=row < queries, other=0.0)
        total += column_probabilities(q, k, lse, counted, scale)
    c = first + tl.arange(0, BLOCK_C)
    out = out_ptr + (pair * queries + row)[:, None] * count + c[None, :]
    tl.store(
        out,
        tl.where(inside[None, :], total / members, float("nan")),
        mask=(row < queries)[:, None] & (c < count)[None, :],
    )


def blocks(kernel: str, dtype: torch.dtype, width: int) -> dict[str, int]:
    """Depend on dtype and D alone, whatever the batch and the lengths, and with them the order of every sum."""
    kept, passed, warps = TILES[kernel, dtype != torch.float32]
    sizes = {"D": width, "BLOCK_M": kept, "BLOCK_D": max(triton.next_power_of_2(width), 16), "num_warps": warps}
    if passed:
        sizes["BLOCK_N"] = passed
    if kernel != "lse":
        sizes["BLOCK_C"] = BLOCK_C
    return sizes


def flags(mask: Tensor) -> Tensor:
    """As wide as fp32: the compiler lays out a product's operands by the narrowest type they depend on, and where that
    is a byte, halves as sm_80 cannot load them."""
    return mask.to(torch.int32, memory_format=torch.contiguous_format)


def launch(kernel: Any, programs: int, *arguments: Any, num_stages: int = STAGES, **blocks: int) -> None:
    if programs:
        kernel[(programs,)](*arguments, **blocks, num_stages=num_stages, enable_fp_fusion=False)


def attention_columns_forward(
    query: Tensor, key: Tensor, columns: Tensor, mask: Tensor | None, scale: float, mean: bool
) -> tuple[Tensor, Tensor]:
    """Rows contiguous, columns [B, C]; probabilities [B, Lq, C] or [B, H, Lq, C] and log-sum-exp [B, H, Lq], fp32."""
    batch, heads, queries, width = query.shape
    keys, count = key.shape[2], columns.shape[1]
    groups = 1 if mean else heads
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    found = torch.empty(batch, groups, queries, count, dtype=torch.float32, device=query.device)
    mask = mask if mask is None else flags(mask)
    strides = (*query.stride()[:3], *key.stride()[:3])
    tile, few = blocks("lse", query.dtype, width), blocks("few", query.dtype, width)
    with on_device(query):
        programs = batch * heads * triton.cdiv(queries, tile["BLOCK_M"])
        launch(_lse_kernel, programs, query, key, mask, lse, scale, heads, queries, keys, *strides, **tile)
        programs = batch * groups * triton.cdiv(queries, few["BLOCK_M"]) * triton.cdiv(count, BLOCK_C)
        sizes = (heads, groups, queries, keys, count)
        launch(_columns_kernel, programs, query, key, columns, mask, lse, found, scale, *sizes, *strides, **few)
    return (found[:, 0] if mean else found), lse
