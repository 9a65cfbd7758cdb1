"""log p of one token per row: partial sums over the vocabulary, then one merge per row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtedit_fast.kernels.linear_logsumexp import MERGE, merge, partial_sums, slabs
from mtedit_fast.kernels.seeded_noise import on_device

NUM_WARPS = 4


@triton.jit(do_not_specialize=["count"])
def _merge_kernel(
    partial_ptr,  # [2 or 3, N, tiles]
    log_prob_ptr,  # [N], holds the targets' logits
    lse_ptr,  # [N]
    entropy_ptr,  # [N]
    count,
    tiles,
    ENTROPY: tl.constexpr,
    FINAL: tl.constexpr,
    LEVELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    one = row + tl.arange(0, 1)
    lse, entropy = merge(partial_ptr, row, count.to(tl.int64) * tiles, tiles, ENTROPY, FINAL, LEVELS)
    tl.store(log_prob_ptr + one, tl.load(log_prob_ptr + one) - lse)
    tl.store(lse_ptr + one, lse)
    if ENTROPY:
        tl.store(entropy_ptr + one, entropy)


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    vocab_size: int,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """log p [N] (NaN for a target outside the vocabulary), the entropy [N] ([0] unless wanted) and lse [N], fp32."""
    count, device = hidden.shape[0], hidden.device
    hidden = hidden.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    bias, targets = bias if bias is None else bias.contiguous(), targets.contiguous()
    log_prob = torch.full((count,), torch.nan, dtype=torch.float32, device=device)
    lse = torch.empty_like(log_prob)
    entropy = torch.empty(count if want_entropy else 0, dtype=torch.float32, device=device)
    for part in slabs(hidden, vocab_size, 2 + want_entropy):
        partial = partial_sums(
            hidden[part], weight, bias, targets[part], log_prob[part], scale, vocab_size, want_entropy
        )
        rows, tiles = partial.shape[1:]
        with on_device(hidden):
            _merge_kernel[(rows,)](
                partial,
                log_prob[part],
                lse[part],
                entropy[part],
                rows,
                tiles,
                ENTROPY=want_entropy,
                **MERGE,
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )
    return log_prob, entropy, lse
