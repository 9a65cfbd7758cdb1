"""Maximum and Σ exp of hidden·weightᵀ per tile of the vocabulary, in registers; whoever needs them merges the tiles."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtedit_fast.kernels.row_sums import tree_sum
from mtedit_fast.kernels.seeded_noise import INTERPRETED, on_device

PARTIAL_BYTES = 64 << 20
# Fixed, whatever the number of rows: the order in which a row's products are added must not depend on it.
TILES = {"half": {"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_H": 64}, "fp32": {"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_H": 32}}
STAGES = 3
NUM_WARPS = 8
GROUP = 32  # row tiles that share a tile of the weight while both are in the L2 cache
FINAL = 512  # partial sums at a time when they are merged
NEGLIGIBLE = tl.constexpr(-1e3)  # exp is 0: stands in for −∞ where that would meet a 0
_UPCASTS = tl.constexpr(INTERPRETED)  # the interpreter's tl.dot is wrong for bf16


@triton.jit
def finite(peak):
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit(do_not_specialize=["count"])
def _partial_kernel(
    hidden_ptr,  # [N, H]
    weight_ptr,  # [V, H] at weight_stride
    bias_ptr,  # [V]
    target_ptr,  # [N]
    picked_ptr,  # [N], the targets' logits; NaN before
    partial_ptr,  # [2 or 3, N, tiles]: max m, Σ e^(z−m), Σ e^(z−m)(z−m)
    scale,
    count,
    vocab_size,
    width,
    weight_stride,
    tiles,
    ENTROPY: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    program = tl.program_id(0)
    first = program // (GROUP * tiles) * GROUP
    rows_here = tl.minimum(tl.cdiv(count, BLOCK_N) - first, GROUP)
    local = program % (GROUP * tiles)
    tile = local // rows_here
    first_row = (first + local % rows_here) * BLOCK_N
    row = tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_V)
    row_inside = row < count - first_row
    column_inside = column < vocab_size - tile * BLOCK_V
    row = first_row.to(tl.int64) + row

    # Rows and columns past the end read the first ones; what comes of them is dropped below.
    k = tl.arange(0, BLOCK_H)
    hidden = hidden_ptr + tl.where(row_inside, row, 0)[:, None] * width + k[None, :]
    token = tl.where(column_inside, tile.to(tl.int64) * BLOCK_V + column, 0)
    weight = weight_ptr + token[None, :] * weight_stride + k[:, None]
    logits = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, width, BLOCK_H):
        if EVEN:
            a = tl.load(hidden)
            b = tl.load(weight)
        else:
            a = tl.load(hidden, mask=(k < width - start)[None, :], other=0.0)
            b = tl.load(weight, mask=(k < width - start)[:, None], other=0.0)
        if _UPCASTS:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        logits = tl.dot(a, b, logits, input_precision="ieee")
        hidden += BLOCK_H
        weight += BLOCK_H

    if bias_ptr is not None:
        logits += tl.load(bias_ptr + tile * BLOCK_V + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    logits = tl.where(column_inside[None, :], logits * scale, float("-inf"))
    if target_ptr is not None:
        target = tl.load(target_ptr + row, mask=row_inside, other=-1)
        here = (target >= tile * BLOCK_V) & (target < tl.minimum((tile + 1) * BLOCK_V, vocab_size))
        place = tl.where(here, target - tile * BLOCK_V, -1).to(tl.int32)
        picked = tl.sum(tl.where(column[None, :] == place[:, None], logits, 0.0), axis=1)
        tl.store(picked_ptr + row, picked, mask=here)
    peak = tl.max(logits, axis=1)
    shifted = logits - finite(peak)[:, None]
    exp = tl.exp(shifted)
    out = partial_ptr + row * tiles + tile
    plane = count.to(tl.int64) * tiles
    tl.store(out, peak, mask=row_inside)
    tl.store(out + plane, tl.sum(exp, axis=1), mask=row_inside)
    if ENTROPY:
        moment = tl.sum(exp * tl.maximum(shifted, NEGLIGIBLE), axis=1)
        tl.store(out + 2 * plane, moment, mask=row_inside)


@triton.jit
def merge(partial_ptr, row, plane, tiles, ENTROPY: tl.constexpr, FINAL: tl.constexpr, LEVELS: tl.constexpr):
    """A row's log Σ e^z, and −Σ p log p (0 unless ENTROPY), [1] each: tiles in their order."""
    column = tl.arange(0, FINAL)[None, :]
    base = partial_ptr + row * tiles
    peaks = tl.full((1, FINAL), float("-inf"), tl.float32)
    for start in range(0, tiles, FINAL):
        inside = start + column < tiles
        peaks = tl.maximum(peaks, tl.load(base + start + column, mask=inside, other=float("-inf")))
    top = finite(tl.max(peaks, axis=1))
    sums = tl.zeros((1, FINAL), tl.float32)
    moments = tl.zeros((1, FINAL), tl.float32)
    for start in range(0, tiles, FINAL):
        inside = start + column < tiles
        shift = tl.load(base + start + column, mask=inside, other=float("-inf")) - top[:, None]
        weight = tl.exp(shift)
        part = tl.load(base + plane + start + column, mask=inside, other=0.0)
        sums += weight * part
        if ENTROPY:
            moment = tl.load(base + 2 * plane + start + column, mask=inside, other=0.0)
            moments += weight * (moment + part * tl.maximum(shift, NEGLIGIBLE))
    total = tree_sum(sums, LEVELS)
    lse = top + tl.log(total)
    entropy = tl.zeros((1,), tl.float32)
    if ENTROPY:
        entropy = tl.log(total) - tl.div_rn(tree_sum(moments, LEVELS), total)
    return lse, entropy


MERGE: dict[str, Any] = {"FINAL": FINAL, "LEVELS": FINAL.bit_length() - 1}


def blocks(dtype: torch.dtype) -> dict[str, int]:
    return TILES["fp32" if dtype == torch.float32 else "half"]


def slabs(hidden: Tensor, vocab_size: int, parts: int) -> Iterator[slice]:
    """Rows whose partial sums fit into `PARTIAL_BYTES`."""
    block = blocks(hidden.dtype)
    tiles = triton.cdiv(vocab_size, block["BLOCK_V"])
    rows = max(PARTIAL_BYTES // (4 * parts * tiles) // block["BLOCK_N"], 1) * block["BLOCK_N"]
    for start in range(0, hidden.shape[0], rows):
        yield slice(start, min(start + rows, hidden.shape[0]))


def partial_sums(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    picked: Tensor | None,
    scale: float,
    vocab_size: int,
    want_entropy: bool = False,
) -> Tensor:
    """Contiguous rows in; [2 or 3, N, tiles] fp32 out, and the targets' logits into `picked`."""
    count, width = hidden.shape
    block = blocks(hidden.dtype)
    tiles = triton.cdiv(vocab_size, block["BLOCK_V"])
    partial = torch.empty(2 + want_entropy, count, tiles, dtype=torch.float32, device=hidden.device)
    with on_device(hidden):
        _partial_kernel[(triton.cdiv(count, block["BLOCK_N"]) * tiles,)](
            hidden,
            weight,
            bias,
            targets,
            picked,
            partial,
            scale,
            count,
            vocab_size,
            width,
            weight.stride(0),
            tiles,
            ENTROPY=want_entropy,
            EVEN=width % block["BLOCK_H"] == 0,
            **block,
            GROUP=GROUP,
            num_warps=NUM_WARPS,
            num_stages=STAGES,
            enable_fp_fusion=False,
        )
    return partial
