"""Attention probabilities of a few keys; the matrix of all of them is never formed."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mtedit_fast.ops._backend import choose_backend, unavailable_reason
from mtedit_fast.ops._operator import Operator

MOST_WIDTH = 128  # D that the kernels hold at once
# Of a chunk of the matrix: on a CPU little enough to stay in cache, and enough that threads seldom wait for each other.
CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
MIN_ROWS = 16  # of a chunk, however long: a product of fewer rows reads the keys for little


def attention_columns(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    reduce: str = "heads",
    backend: str = "auto",
) -> Tensor:
    """What every query attends to a few of the keys: columns of softmax(query·keyᵀ·scale) over all keys.

    Fused attention never has these probabilities, which are the attention maps of text tokens over an image: EBAMA
    (arXiv 2404.07389) steers a denoiser along the gradient of an energy of them. With text and image in one sequence

        text, image = slice(0, 512), slice(512, None)
        maps = attention_columns(query[:, :, image], key, tokens)  # [B, H·W, C], of the tokens in the text
        maps = maps.unflatten(1, (height, width)).movedim(-1, 1)  # [B, C, H, W]

    A range of queries is a view of them, and is not copied. For a softmax over the text alone, as that of
    cross-attention, leave the other keys out by `mask`.

    Gradients flow to query and key. With p the probabilities and g_qc the gradient of that of query q and column c,

        ∂/∂logit_qj = p_qj·(Σ_c g_qc·[j = c] − δ_q),  δ_q = Σ_c g_qc·p_qc

    by softmax's Jacobian. It touches every key, so the backward makes the logits again, tile by tile as in
    FlashAttention-2 (arXiv 2307.08691), and keeps for that at most a log-sum-exp per query beside the inputs. Memory is
    O(B·H·(Lq + Lk)·(D + C)), forward and backward.

    Arithmetic is fp32 whatever the inputs (fp64 for fp64, on the reference); the kernels multiply bf16 queries and keys
    as they are, with fp32 sums, and as fused attention does they round ∂/∂logit to bf16 before those products, except
    that of the columns themselves. Items of a batch do not depend on each other, bit for bit. The gradients of
    "reference" on CUDA are deterministic only under `torch.use_deterministic_algorithms`.

    Args:
        query: [B, H, Lq, D] fp32, bf16, fp16 (or fp64).
        key: [B, H, Lk, D] of the same dtype on the same device.
        columns: [C] or [B, C] int64, indices of keys, in any order; one may come up twice. On CUDA they are not waited
            for, and an index outside 0…Lk − 1 gives NaN and no gradient.
        scale: of the logits. Default: 1/√D.
        mask: [B, Lk] bool, True for keys that count. The probability of others is 0, and they may hold anything.
            Default: all count.
        reduce: "heads", the mean over them, or "none".
        backend: "auto", "reference" or "triton" (D ≤ 128); "auto" is the reference on a CPU. An explicit one never
            falls back.

    Returns:
        [B, Lq, C], or [B, H, Lq, C] for "none"; fp32 (fp64 for fp64). Where no key counts it is 0, with no gradient.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not match, an index outside the keys (on a CPU), or a backend that cannot
            run here.
    """
    _check(query, key, columns, scale, mask, reduce)
    chosen = _choose(backend, query)
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)
    columns = columns.expand(query.shape[0], columns.shape[-1]).contiguous()
    return _op(_rows(query), _rows(key), columns, mask, scale, reduce == "heads", chosen)[0]


def _check(query: Tensor, key: Tensor, columns: Tensor, scale: float | None, mask: Tensor | None, reduce: str) -> None:
    """Raises on bad arguments; never waits for a device."""
    for name, tensor in (("query", query), ("key", key)):
        if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
        if tensor.ndim != 4 or 0 in (tensor.shape[1], tensor.shape[3]):
            raise ValueError(f"{name} must be [B, H, length, D] with at least one head, got {list(tensor.shape)}")
    if key.dtype != query.dtype:
        raise TypeError(f"key must have query's dtype {query.dtype}, got {key.dtype}; cast one of them")
    if key.device != query.device:
        raise ValueError(f"key must be on query's device {query.device}, got {key.device}")
    batch, heads, _, width = query.shape
    length = key.shape[2]
    if key.shape[:2] != query.shape[:2] or key.shape[3] != width:
        raise ValueError(
            f"key must be [B, H, length, D] = [{batch}, {heads}, length, {width}], got {list(key.shape)}; repeat the "
            "heads that queries share"
        )
    if length == 0:
        raise ValueError(f"key must hold at least one key, got {list(key.shape)}")
    if not isinstance(columns, Tensor) or columns.dtype != torch.int64:
        got = columns.dtype if isinstance(columns, Tensor) else type(columns).__name__
        raise TypeError(f"columns must be an int64 tensor, got {got}; use torch.tensor(columns)")
    if columns.ndim not in (1, 2) or (columns.ndim == 2 and columns.shape[0] != batch):
        raise ValueError(f"columns must be [C] or [B, C] = [{batch}, C], got {list(columns.shape)}")
    if columns.device != query.device:
        raise ValueError(f"columns must be on query's device {query.device}, got {columns.device}")
    if columns.device.type == "cpu" and not torch.compiler.is_compiling() and columns.numel():
        low, high = int(columns.min()), int(columns.max())
        if low < 0 or high >= length:
            raise ValueError(f"columns must name keys 0…{length - 1}, got {low}…{high}")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor, True for keys that count, got {got}")
        if mask.shape != (batch, length):
            raise ValueError(f"mask must be [B, Lk] = [{batch}, {length}], got {list(mask.shape)}")
        if mask.device != query.device:
            raise ValueError(f"mask must be on query's device {query.device}, got {mask.device}")
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
    if reduce not in ("heads", "none"):
        raise ValueError(f"reduce must be 'heads' or 'none', got {reduce!r}")


def _choose(backend: str, query: Tensor) -> str:
    kernel_reason = unavailable_reason("triton", query.device, (query.dtype,))
    if kernel_reason is None and query.shape[3] > MOST_WIDTH:
        kernel_reason = f"it takes D up to {MOST_WIDTH}, not {query.shape[3]}"
    if kernel_reason is not None and backend == "triton":
        raise ValueError(f"backend='triton' is not available: {kernel_reason}; use backend='auto' or 'reference'")
    chosen = choose_backend(backend, query.device, (query.dtype,), offered=("reference", "triton"))
    return "reference" if kernel_reason is not None else chosen


def _rows(tensor: Tensor) -> Tensor:
    """Each row contiguous; the other dimensions at any stride."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunks(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float
) -> Iterator[tuple[int, slice, slice, Tensor, Tensor, Tensor]]:
    """Item, heads and rows of a chunk, its queries·scale [heads, rows, D], keys [heads, Lk, D] and all their
    probabilities [heads, rows, Lk]. Their shapes do not depend on the batch."""
    dtype = _compute_dtype(query)
    batch, heads, count, _ = query.shape
    length = key.shape[2]
    most = CHUNK_BYTES[query.device.type] // (dtype.itemsize * length)  # rows of the matrix
    rows = max(min(count, max(most, MIN_ROWS)), 1)
    together = max(min(heads, most // rows), 1)
    for item in range(batch):
        for head in range(0, heads, together):
            group = slice(head, min(head + together, heads))
            k = key[item, group].to(dtype)
            if mask is not None:
                k = k.masked_fill(~mask[item, :, None], 0)  # so that 0·k is 0
            for row in range(0, count, rows):
                part = slice(row, min(row + rows, count))
                q = query[item, group, part].to(dtype) * scale
                logits = torch.bmm(q, k.mT)
                if mask is not None:
                    logits.masked_fill_(~mask[item], torch.finfo(dtype).min)  # −∞ in all of a row would be NaN
                yield item, group, part, q, k, logits.softmax(-1)


def _inside(key: Tensor, columns: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Columns that can be looked up, which of them are keys, and which of those count: [B, C] each."""
    inside = (columns >= 0) & (columns < key.shape[2])
    index = torch.where(inside, columns, 0)
    return index, inside, inside if mask is None else inside & mask.gather(1, index)


def reference_forward(
    query: Tensor, key: Tensor, columns: Tensor, mask: Tensor | None, scale: float, mean: bool
) -> tuple[Tensor, Tensor | None]:
    """Plain PyTorch; every back end has this signature.

    Returns the probabilities [B, Lq, C] if `mean`, or [B, H, Lq, C], and what the backward wants to be told: the
    log-sum-exp [B, H, Lq], or None where that is made again.
    """
    index, inside, counted = _inside(key, columns, mask)
    batch, heads, count, _ = query.shape
    found = query.new_zeros(batch, 1 if mean else heads, count, columns.shape[1], dtype=_compute_dtype(query))
    for item, group, rows, _, _, p in _chunks(query, key, mask, scale):
        picked = p.index_select(2, index[item]).masked_fill_(~counted[item], 0)
        if mean:
            found[item, 0, rows] += picked.sum(0) / heads
        else:
            found[item, group, rows] = picked
    found.masked_fill_(~inside[:, None, None], torch.nan)
    return (found[:, 0] if mean else found), None


def reference_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    mask: Tensor | None,
    lse: Tensor | None,
    scale: float,
    mean: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to query and key, given that of the probabilities; None where not needed."""
    index, _, counted = _inside(key, columns, mask)
    heads, dtype = query.shape[1], _compute_dtype(query)
    grad = grad[:, None] / heads if mean else grad
    grad_query = query.new_empty(query.shape) if needs[0] else None
    grad_key = key.new_zeros(key.shape, dtype=dtype) if needs[1] else None
    for item, group, rows, q, k, p in _chunks(query, key, mask, scale):
        g = grad[item, slice(None) if mean else group, rows]
        weighted = (g * p.index_select(2, index[item])).masked_fill_(~counted[item], 0)
        slope = p.mul_(-weighted.sum(-1, keepdim=True)).index_add_(2, index[item], weighted)
        if grad_query is not None:
            grad_query[item, group, rows] = torch.bmm(slope, k).mul_(scale)
        if grad_key is not None:
            grad_key[item, group].baddbmm_(slope.mT, q)
    return grad_query, None if grad_key is None else grad_key.to(key.dtype)


def _implementation(backend: str) -> tuple[Any, Any]:
    if backend == "triton":
        from mtedit_fast.kernels.attention_columns import attention_columns_forward
        from mtedit_fast.kernels.attention_columns_backward import attention_columns_backward

        return attention_columns_forward, attention_columns_backward
    return reference_forward, reference_backward


def _forward(
    query: Tensor, key: Tensor, columns: Tensor, mask: Tensor | None, scale: float, mean: bool, backend: str
) -> tuple[Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):  # it would round the products
        found, lse = _implementation(backend)[0](query, key, columns, mask, scale, mean)
    return found, found.new_empty(0) if lse is None else lse


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    scale: float,
    mean: bool,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        grads = _implementation(backend)[1](grad.contiguous(), query, key, columns, mask, lse, scale, mean, needs)
    return tuple(query.new_empty(0) if grad is None else grad for grad in grads)  # type: ignore[return-value]


def _fake(query: Tensor, key: Tensor, columns: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    (batch, heads, count, _), (*_, mean, backend) = query.shape, others
    dtype, number = _compute_dtype(query), columns.shape[1]
    shape = (batch, count, number) if mean else (batch, heads, count, number)
    kept = (batch, heads, count) if backend == "triton" else (0,)
    return query.new_empty(shape, dtype=dtype), query.new_empty(kept, dtype=dtype)


def _fake_backward(grad: Tensor, query: Tensor, key: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    needs = others[-2]
    return query.new_empty(query.shape if needs[0] else 0), key.new_empty(key.shape if needs[1] else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale, mean, backend = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.options = scale, mean, backend


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    scale, mean, backend = ctx.options
    needs = list(ctx.needs_input_grad[:2])
    grads = _backward_op(grad, *ctx.saved_tensors, scale, mean, needs, backend)
    return tuple(value if needed else None for value, needed in zip(grads, needs, strict=True))


_op = Operator("attention_columns", _forward, _fake)
_op.differentiate(_autograd, _setup_context, inputs=2)
_backward_op = Operator("attention_columns_backward", _backward, _fake_backward)
