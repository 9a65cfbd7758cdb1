"""log Σ exp over logits hidden·weightᵀ that are never all in memory, and its gradient: chunks of library products."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

# Of the logits of a chunk, and of a copy of weights in another dtype. A CPU's malloc hands larger ones back to the
# system, and zeroes the next ones page by page.
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
MAX_ROWS = 4096  # of a chunk: enough for a product to run at full speed
NEGLIGIBLE = -1e3  # exp is 0 in any dtype: stands in for −∞ where that would meet a 0


def compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 (fp64); half-precision pairs are multiplied as they are on CUDA, with sums and results in fp32."""
    dtype = compute_dtype(a)
    if a.dtype == b.dtype and a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def scaled_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """(hidden·weightᵀ + bias)·scale in fp32 (fp64)."""
    logits = product(hidden, weight.T)
    if bias is not None:
        logits += bias
    return logits.mul_(scale)


def chunk_shape(hidden: Tensor, columns: int, *, casts: bool) -> tuple[int, int]:
    """Rows and vocabulary columns of a chunk: `CHUNK_BYTES` of logits at most, and of cast weights if it `casts`."""
    count, width = hidden.shape
    limit = CHUNK_BYTES[hidden.device.type]
    itemsize = compute_dtype(hidden).itemsize
    rows = max(min(count, MAX_ROWS), 1)
    allowed = limit // (itemsize * rows)
    if casts:
        allowed = min(allowed, limit // (itemsize * width))
    return rows, max(min(columns, allowed), 1)


def full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Outside autocast, which would round the products of fp32 operands; the first argument has the device."""

    @wraps(function)
    def run(tensor: Tensor, *args: Any, **options: Any) -> Any:
        with torch.autocast(tensor.device.type, enabled=False):
            return function(tensor, *args, **options)

    return run


@full_precision
def log_sum_exp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    scale: float,
    vocab_size: int,
    want_entropy: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Plain PyTorch. lse [N] of the scaled logits, the targets' own logits [N] (NaN for one outside the vocabulary),
    and the entropy [N] in nats, in fp32 (fp64)."""
    dtype = compute_dtype(hidden)
    rows, width = chunk_shape(hidden, vocab_size, casts=hidden.dtype != dtype and not hidden.is_cuda)
    lse = hidden.new_empty(hidden.shape[0], dtype=dtype)
    picked = None if targets is None else torch.full_like(lse, torch.nan)
    entropy = torch.empty_like(lse) if want_entropy else None
    for row in range(0, hidden.shape[0], rows):
        part = slice(row, row + rows)
        partials = []
        for start in range(0, vocab_size, width):
            block = slice(start, min(start + width, vocab_size))
            logits = scaled_logits(hidden[part], weight[block], bias if bias is None else bias[block], scale)
            if targets is not None and picked is not None:
                local = targets[part] - start
                inside = (local >= 0) & (local < logits.shape[1])
                found = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
                picked[part] = torch.where(inside, found, picked[part])
            partials.append(_partial_sums(logits, want_entropy))
        lse[part], merged = _merge(*(torch.stack(column) for column in zip(*partials, strict=True)))
        if entropy is not None and merged is not None:
            entropy[part] = merged
    return lse, picked, entropy


def _partial_sums(logits: Tensor, want_moment: bool) -> tuple[Tensor, ...]:
    """Of a chunk, which is overwritten: maximum m, Σ e^(z−m) and, if wanted, Σ e^(z−m)(z−m), [rows] each."""
    peak = logits.amax(1)
    logits.sub_(torch.where(peak == -torch.inf, 0, peak)[:, None])
    if not want_moment:
        return peak, logits.exp_().sum(1)
    exp = logits.exp()
    return peak, exp.sum(1), exp.mul_(logits.clamp_(min=NEGLIGIBLE)).sum(1)


def _merge(peaks: Tensor, sums: Tensor, moments: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """[chunks, rows] partial sums -> log Σ e^z and −Σ p log p, [rows]."""
    top = peaks.amax(0)
    top = torch.where(top == -torch.inf, 0, top)
    shift = peaks - top
    weights = shift.exp()
    total = (weights * sums).sum(0)
    if moments is None:
        return top + total.log(), None
    moment = (weights * (moments + sums * shift.clamp(min=NEGLIGIBLE))).sum(0)
    return top + total.log(), total.log() - moment / total


@full_precision
def softmax_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    entropy: Tensor | None,
    grad_lse: Tensor,
    grad_entropy: Tensor | None,
    columns: Tensor,
    grad_columns: Tensor,
    scale: float,
    vocab_size: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to hidden, weight and bias, each empty unless it is in `needs`, of what has the gradient

        ∂/∂z = p·(grad_lse − grad_entropy·(log p + entropy)) + grad_columns at `columns`

    with respect to the scaled logits z, p = e^(z − lse). Logits are made again, a chunk at a time. Sums over the rows
    and over the vocabulary are fp32 (fp64) and rounded once; on CUDA ∂/∂z is rounded to bf16 before it is multiplied
    with bf16 tensors, as a softmax in PyTorch is.

    Args:
        columns: [N, K] int64, distinct within a row; one outside the vocabulary is left out.
        grad_columns: [N, K].
    """
    dtype = compute_dtype(hidden)
    # fp16 does not reach down to the small probabilities that a vocabulary is full of.
    lower = hidden.dtype if hidden.is_cuda and hidden.dtype == torch.bfloat16 else dtype
    single = hidden.dtype == dtype
    # Unless it is fp32 itself, a chunk of the weight's gradient is summed in fp32 and takes the room of a cast one.
    rows, width = chunk_shape(hidden, vocab_size, casts=hidden.dtype != lower or (needs[1] and not single))
    grad_hidden = hidden.new_zeros(hidden.shape if needs[0] else 0, dtype=dtype)
    grad_weight = weight.new_empty(weight.shape if needs[1] else 0)
    grad_weight[vocab_size if len(hidden) else 0 :].zero_()
    grad_bias = weight.new_zeros(weight.shape[0] if needs[2] else 0, dtype=dtype)
    for start in range(0, vocab_size, width):
        block = slice(start, min(start + width, vocab_size))
        total: Tensor | None = None
        for row in range(0, hidden.shape[0], rows):
            part = slice(row, row + rows)
            grad = scaled_logits(hidden[part], weight[block], bias if bias is None else bias[block], scale)
            grad.sub_(lse[part, None])
            if entropy is not None and grad_entropy is not None:
                slope = (grad.clamp(min=NEGLIGIBLE) + entropy[part, None]).mul_(-grad_entropy[part, None])
                grad.exp_().mul_(slope.add_(grad_lse[part, None]))
            else:
                grad.exp_().mul_(grad_lse[part, None])
            local = columns[part] - start
            inside = (local >= 0) & (local < grad.shape[1])
            grad.scatter_add_(1, local.clamp(0, grad.shape[1] - 1), torch.where(inside, grad_columns[part], 0))
            grad.mul_(scale)
            if needs[2]:
                grad_bias[block] += grad.sum(0)
            grad = grad.to(lower)
            if needs[0]:
                grad_hidden[part] += product(grad, weight[block])
            if needs[1] and single:
                grad_weight[block].addmm_(grad.T, hidden[part], beta=float(row > 0))
            elif needs[1]:
                piece = product(grad.T, hidden[part])
                total = piece if total is None else total.add_(piece)
        if total is not None:
            grad_weight[block] = total
    return grad_hidden.to(hidden.dtype), grad_weight, grad_bias.to(weight.dtype)


def empty_gradients(hidden: Tensor, weight: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Of the shapes that `softmax_backward` returns."""
    needs_hidden, needs_weight, needs_bias = needs
    return (
        weight.new_empty(hidden.shape if needs_hidden else 0),
        weight.new_empty(weight.shape if needs_weight else 0),
        weight.new_empty(weight.shape[0] if needs_bias else 0),
    )
