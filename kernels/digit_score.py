"""Score tokens: their logits from a product of their own, the softmax, and what is made of it, in one launch."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtedit_fast.kernels.linear_logsumexp import MERGE, NEGLIGIBLE, NUM_WARPS, merge, partial_sums, slabs
from mtedit_fast.kernels.row_sums import tree_sum
from mtedit_fast.kernels.seeded_noise import on_device

TILE = 8192  # weights in registers


@triton.jit
def _over_tokens(values, LEVELS: tl.constexpr):
    """Σ over the tokens, a scalar."""
    return tl.sum(tree_sum(values[None, :], LEVELS), axis=0)


@triton.jit(do_not_specialize=["count"])
def _score_kernel(
    hidden_ptr,  # [N, H]
    weight_ptr,  # [V, H] at weight_stride
    bias_ptr,  # [V]
    ids_ptr,  # [K]
    values_ptr,  # [K]
    target_ptr,  # [N]
    partial_ptr,  # [2, N, tiles], None for the softmax over the set
    statistics_ptr,  # [6, N]
    logits_ptr,  # [N, K]
    lse_ptr,  # [N]
    scale,
    count,
    total,
    tokens,
    width,
    weight_stride,
    tiles,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    LEVELS_K: tl.constexpr,
    LEVELS_H: tl.constexpr,
    FINAL: tl.constexpr,
    LEVELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    used = k < tokens
    ids = tl.load(ids_ptr + k, mask=used, other=0)
    values = tl.load(values_ptr + k, mask=used, other=0.0)
    column = tl.arange(0, BLOCK_H)
    sums = tl.zeros((BLOCK_K, BLOCK_H), tl.float32)
    for start in range(0, width, BLOCK_H):
        inside = column < width - start
        hidden = tl.load(hidden_ptr + row * width + start + column, mask=inside, other=0.0).to(tl.float32)
        address = weight_ptr + ids[:, None] * weight_stride + (start + column)[None, :]
        weight = tl.load(address, mask=used[:, None] & inside[None, :], other=0.0).to(tl.float32)
        sums += weight * hidden[None, :]
    logits = tree_sum(sums, LEVELS_H)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + ids, mask=used, other=0.0).to(tl.float32)
    logits = tl.where(used, logits * scale, float("-inf"))
    tl.store(logits_ptr + row * tokens + k, logits, mask=used)

    top = tl.max(logits, axis=0)
    shifted = logits - top
    exp = tl.where(used, tl.exp(shifted), 0.0)
    sum_exp = _over_tokens(exp, LEVELS_K)
    log_sum = tl.log(sum_exp)
    q = tl.div_rn(exp, sum_exp)
    mean = _over_tokens(q * values, LEVELS_K)
    variance = _over_tokens(q * (values - mean) * (values - mean), LEVELS_K)
    entropy = log_sum - _over_tokens(tl.where(used, q * tl.maximum(shifted, NEGLIGIBLE), 0.0), LEVELS_K)

    median = float("inf")
    for i in range(0, tokens):
        value = tl.load(values_ptr + i)
        below = _over_tokens(tl.where(values <= value, exp, 0.0), LEVELS_K)
        median = tl.where((2.0 * below >= sum_exp) & (value < median), value, median)
    median = tl.where(mean == mean, median, float("nan"))

    score = mean
    mass = 1.0
    log_p = shifted - log_sum
    if partial_ptr is not None:
        lse, _ = merge(partial_ptr, row, count.to(tl.int64) * tiles, tiles, False, FINAL, LEVELS)
        tl.store(lse_ptr + row + tl.arange(0, 1), lse)
        log_p = logits - tl.sum(lse, axis=0)
        p = tl.where(used, tl.exp(log_p), 0.0)
        score = _over_tokens(p * values, LEVELS_K)
        mass = _over_tokens(p, LEVELS_K)
    target_log_prob = 0.0
    if target_ptr is not None:
        target = tl.load(target_ptr + row)
        picked = _over_tokens(tl.where(used & (k == target), log_p, 0.0), LEVELS_K)
        target_log_prob = tl.where((target >= 0) & (target < tokens), picked, float("nan"))
    out = statistics_ptr + row
    tl.store(out, score)
    tl.store(out + total, variance)
    tl.store(out + 2 * total, entropy)
    tl.store(out + 3 * total, median)
    tl.store(out + 4 * total, mass)
    tl.store(out + 5 * total, target_log_prob)


def blocks(tokens: int, width: int) -> dict[str, Any]:
    """Tile sizes for K tokens of width H."""
    block_k = triton.next_power_of_2(tokens)
    block_h = min(triton.next_power_of_2(width), max(TILE // block_k, 1))
    levels = {"LEVELS_K": block_k.bit_length() - 1, "LEVELS_H": block_h.bit_length() - 1}
    return {"BLOCK_K": block_k, "BLOCK_H": block_h} | levels | MERGE


def digit_score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    ids: Tensor,
    values: Tensor,
    scale: float,
    vocab_size: int,
    vocab: bool,
    lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics [6, N], scaled logits of the score tokens [N, K], and lse [N] ([0] unless `vocab`), all fp32.

    lse: that of the vocabulary, where it is known; the fused kernel makes it otherwise.
    """
    (count, width), tokens, device = hidden.shape, ids.shape[0], hidden.device
    hidden = hidden.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    bias, target = (tensor if tensor is None else tensor.contiguous() for tensor in (bias, target))
    statistics = torch.empty(6, count, dtype=torch.float32, device=device)
    logits = torch.empty(count, tokens, dtype=torch.float32, device=device)
    out_lse = torch.empty(count if vocab else 0, dtype=torch.float32, device=device)
    fused = vocab and lse is None
    for part in slabs(hidden, vocab_size, 2) if fused else ([slice(0, count)] if count else []):
        rows = hidden[part]
        partial = None
        if fused:
            partial = partial_sums(rows, weight, bias, None, None, scale, vocab_size)
        elif lse is not None:
            partial = torch.stack((lse, torch.ones_like(lse)))[..., None]  # one tile, the sum of its exponentials 1
        with on_device(hidden):
            _score_kernel[(rows.shape[0],)](
                rows,
                weight,
                bias,
                ids,
                values,
                target if target is None else target[part],
                partial,
                statistics[:, part],
                logits[part],
                out_lse[part],
                scale,
                rows.shape[0],
                count,
                tokens,
                width,
                weight.stride(0),
                1 if partial is None else partial.shape[2],
                **blocks(tokens, width),
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )
    return statistics, logits, out_lse
