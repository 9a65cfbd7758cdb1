"""Cosine of pooled tokens, for pairs of rows of two feature banks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtedit_fast.ops._backend import choose_backend
from mtedit_fast.ops._operator import Operator


def token_similarity(
    a: Tensor,
    b: Tensor,
    pairs: Tensor | None = None,
    *,
    weights: Tensor | tuple[Tensor, Tensor] | None = None,
    normalize: bool = False,
    backend: str = "auto",
) -> Tensor:
    """cos(Σₙ wₙ aₙ, Σₙ wₙ bₙ) for pairs of rows of two banks of tokens: the cosine of the two weighted means.

    EdiVal's content consistency (arXiv 2509.13399) takes all three of its similarities from it:

        hidden = model(pixel_values=crops).last_hidden_state  # [M, 1 + N, D], crops of all images; pairs [P, 2] of rows
        token_similarity(hidden[:, :1], hidden[:, :1], pairs)  # of CLS
        token_similarity(hidden[:, 1:], hidden[:, 1:], pairs)  # of the mean patch token
        token_similarity(hidden[:, 1:], hidden[:, 1:], pairs, weights=keep, normalize=True)  # of the background

    Gradients flow to the tokens, so that it is a dense reward, too:

        before = model(pixel_values=references).last_hidden_state[:, 1:].detach()  # [R, N, D]
        after = model(pixel_values=edits).last_hidden_state[:, 1:]  # [B, N, D], with gradients to the edits
        pairs = torch.stack([owner, torch.arange(len(edits))], 1)  # edit i belongs to reference owner[i]
        (-token_similarity(before, after, pairs, weights=keep, normalize=True)).sum().backward()

    Arithmetic is fp32 whatever the inputs (fp64 if one of them is, on the reference). A pair's result does not depend
    on the other pairs and a row's gradient only on the pairs it is in, bit for bit. Rows are not repeated in memory,
    and views such as hidden[:, 1:] are not copied. The gradients of "reference" on CUDA are deterministic only under
    `torch.use_deterministic_algorithms`.

    Args:
        a: [M, N, D] tokens, fp32, bf16, fp16 (or fp64).
        b: [L, O, D] tokens of the same dtype on the same device.
        pairs: [P, 2] int64, pair i compares a[pairs[i, 0]] with b[pairs[i, 1]]. Default: row i with row i. On CUDA it
            is not waited for, and an index outside the bank gives NaN.
        weights: [P, N], of both sides (N == O), or a tuple of [P, N] and [P, O]; any float dtype or bool, no gradient.
            A token of weight 0 is not looked at, whatever it holds, so banks of unequal images may be padded.
            Default: 1, the plain mean.
        normalize: divide each token by its L2 norm first; a token of norm 0 then counts as 0.
        backend: "auto", "reference", "cpp" or "triton". An explicit one never falls back.

    Returns:
        [P] fp32 (fp64 for fp64 tokens). NaN, with a gradient of zero, where the cosine is undefined: all weights of a
        side are zero, or its mean is.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not match, an index outside the bank (on a CPU), or a backend that cannot
            run here.
    """
    index_a, index_b = _check(a, b, pairs, weights)
    weights_a, weights_b = weights if isinstance(weights, tuple) else (weights, weights)
    dtype = _compute_dtype(a)
    if weights_a is not None and weights_b is not None:
        weights_a, weights_b = weights_a.detach().to(dtype), weights_b.detach().to(dtype)
    needs_grad = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    chosen = choose_backend(backend, a.device, (a.dtype,))
    args = (_rows(a), _rows(b), index_a, index_b, weights_a, weights_b, normalize, needs_grad, chosen)
    return _op(*args)[0]


def _check(
    a: Tensor, b: Tensor, pairs: Tensor | None, weights: Tensor | tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Rows of a and rows of b, [P] each. Raises on bad arguments; never waits for a device."""
    for name, bank in (("a", a), ("b", b)):
        if not isinstance(bank, Tensor) or not bank.dtype.is_floating_point:
            got = bank.dtype if isinstance(bank, Tensor) else type(bank).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
        if bank.ndim != 3 or 0 in bank.shape[1:]:
            raise ValueError(f"{name} must be [rows, tokens, D] with at least one token, got {list(bank.shape)}")
    if b.dtype != a.dtype:
        raise TypeError(f"b must have a's dtype {a.dtype}, got {b.dtype}; cast one of them")
    if b.shape[2] != a.shape[2]:
        raise ValueError(f"b must have a's D = {a.shape[2]}, got {list(b.shape)}")
    if b.device != a.device:
        raise ValueError(f"b must be on a's device {a.device}, got {b.device}")

    if pairs is None:
        if a.shape[0] != b.shape[0]:
            raise ValueError(f"pairs must be given for banks of {a.shape[0]} and {b.shape[0]} rows; got None")
        rows = torch.arange(a.shape[0], device=a.device)
        index_a, index_b = rows, rows
    else:
        if not isinstance(pairs, Tensor) or pairs.dtype != torch.int64:
            got = pairs.dtype if isinstance(pairs, Tensor) else type(pairs).__name__
            raise TypeError(f"pairs must be an int64 tensor, got {got}; use torch.tensor(pairs)")
        if pairs.ndim != 2 or pairs.shape[1] != 2:
            raise ValueError(f"pairs must be [P, 2], got {list(pairs.shape)}")
        if pairs.device != a.device:
            raise ValueError(f"pairs must be on a's device {a.device}, got {pairs.device}")
        if pairs.shape[0] and 0 in (a.shape[0], b.shape[0]):
            raise ValueError(f"pairs must be empty for banks of {a.shape[0]} and {b.shape[0]} rows, got {len(pairs)}")
        index_a, index_b = pairs[:, 0].contiguous(), pairs[:, 1].contiguous()
        if pairs.device.type == "cpu" and not torch.compiler.is_compiling() and pairs.numel():
            for name, bank, index in (("a", a, index_a), ("b", b, index_b)):
                low, high = int(index.min()), int(index.max())
                if low < 0 or high >= bank.shape[0]:
                    raise ValueError(f"pairs must name rows 0…{bank.shape[0] - 1} of {name}, got {low}…{high}")

    if weights is not None:
        sides = weights if isinstance(weights, tuple) else (weights, weights)
        if len(sides) != 2 or not all(isinstance(side, Tensor) for side in sides):
            raise TypeError("weights must be a tensor, or a tuple of one for a and one for b")
        for name, bank, side in (("a", a, sides[0]), ("b", b, sides[1])):
            expected = [len(index_a), bank.shape[1]]
            if not (side.dtype.is_floating_point or side.dtype == torch.bool):
                raise TypeError(f"weights must be floating-point or bool, got {side.dtype}")
            if list(side.shape) != expected:
                raise ValueError(f"weights of {name} must be [P, tokens] = {expected}, got {list(side.shape)}")
            if side.device != a.device:
                raise ValueError(f"weights must be on a's device {a.device}, got {side.device}")
    return index_a, index_b


def _rows(tokens: Tensor) -> Tensor:
    """Each token contiguous; rows and tokens at any stride."""
    return tokens if tokens.stride(2) == 1 else tokens.contiguous()


def _compute_dtype(tokens: Tensor) -> torch.dtype:
    return torch.float64 if tokens.dtype == torch.float64 else torch.float32


def _sum_tokens(values: Tensor) -> Tensor:
    """[..., N, D] -> [..., D], halves added to halves: the order does not depend on the batch or the thread count."""
    while (count := values.shape[-2]) > 1:
        first, second = values.split([count - count // 2, count // 2], dim=-2)
        halves = first[..., : count // 2, :] + second
        values = torch.cat([halves, first[..., count // 2 :, :]], dim=-2) if count % 2 else halves
    return values[..., 0, :]


def _inverse_norm(values: Tensor) -> Tensor:
    """1 / |values| over the last dimension, which is kept; 0 where the norm is 0."""
    norm = values.square().sum(-1, keepdim=True).double().sqrt()  # torch's fp32 square root on CPU is not the IEEE one
    return torch.where(norm == 0, 0, 1 / norm).to(values.dtype)


def _pool(tokens: Tensor, index: Tensor, weights: Tensor | None, normalize: bool) -> Tensor:
    """Weighted sums of the tokens of rows `index`, [P, D]."""
    dtype = _compute_dtype(tokens)
    scale = _inverse_norm(tokens.to(dtype)) if normalize else None
    if weights is None:
        return _sum_tokens(tokens.to(dtype) if scale is None else scale * tokens).index_select(0, index)
    weights = weights[..., None]
    factor = weights if scale is None else weights * scale.index_select(0, index)
    return _sum_tokens(torch.where(weights == 0, 0, tokens.index_select(0, index).to(dtype).mul_(factor)))


def reference_forward(
    a: Tensor,
    b: Tensor,
    index_a: Tensor,
    index_b: Tensor,
    weights_a: Tensor | None,
    weights_b: Tensor | None,
    normalize: bool,
    want_slopes: bool,
    pool: Callable[..., Tensor] = _pool,
) -> tuple[Tensor, Tensor | None]:
    """Plain PyTorch; every back end has this signature, but for `pool`, which sums tokens.

    Returns the similarities [P] and slopes [P, 2, D]: their gradient with respect to each side's pooled token.
    """
    inside = (index_a >= 0) & (index_a < a.shape[0]) & (index_b >= 0) & (index_b < b.shape[0])
    pooled = torch.stack(
        [
            pool(a, index_a.clamp(0, max(a.shape[0] - 1, 0)), weights_a, normalize),
            pool(b, index_b.clamp(0, max(b.shape[0] - 1, 0)), weights_b, normalize),
        ],
        dim=1,
    )  # [P, 2, D]
    inverse = _inverse_norm(pooled)
    unit = pooled * inverse
    similarity = (unit[:, 0] * unit[:, 1]).sum(-1)
    defined = inside & (inverse != 0).all(1)[:, 0]
    slopes = None
    if want_slopes:
        slopes = (unit.flip(1) - similarity[:, None, None] * unit) * inverse
    return torch.where(defined, similarity, torch.nan), slopes


def reference_backward(
    tokens: Tensor,
    index: Tensor,
    weights: Tensor | None,
    similarity: Tensor,
    slope: Tensor,
    grad: Tensor,
    normalize: bool,
) -> Tensor:
    """Gradient of one bank [M, N, D], given its side of the slopes [P, D] and the similarities' gradient [P]."""
    index, scaled = _pooled_gradient(index, similarity, slope, grad)
    total = scaled.new_zeros(tokens.shape)
    if weights is None:
        total += scaled.new_zeros(tokens.shape[0], tokens.shape[2]).index_add_(0, index, scaled)[:, None]
    else:
        total.index_add_(0, index, weights[:, :, None] * scaled[:, None])
    if normalize:
        values = tokens.to(slope.dtype)
        inverse = _inverse_norm(values)
        unit = values * inverse
        projected = (total - unit * (unit * total).sum(-1, keepdim=True)) * inverse
        total = torch.where((total != 0).any(-1, keepdim=True), projected, 0)  # weightless tokens may hold anything
    return total.to(tokens.dtype)


def _pooled_gradient(index: Tensor, similarity: Tensor, slope: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Rows, and the gradient of their pooled tokens [P, D]; row 0 and zeros where the similarity is undefined."""
    defined = ~similarity.isnan()
    return torch.where(defined, index, 0), torch.where(defined[:, None], grad[:, None].to(slope.dtype) * slope, 0)


def _cpp_backward(
    tokens: Tensor,
    index: Tensor,
    weights: Tensor | None,
    similarity: Tensor,
    slope: Tensor,
    grad: Tensor,
    normalize: bool,
) -> Tensor:
    from mtedit_fast.ops import _cpp

    index, scaled = _pooled_gradient(index, similarity, slope, grad)
    return _cpp.token_pool_backward(tokens, index, weights, scaled, normalize)


def _implementation(backend: str) -> tuple[Any, Any]:
    if backend == "triton":
        from mtedit_fast.kernels import token_similarity as triton

        return triton.token_similarity_forward, triton.token_similarity_backward
    if backend == "cpp":
        from mtedit_fast.ops import _cpp

        return partial(reference_forward, pool=_cpp.token_pool), _cpp_backward
    return reference_forward, reference_backward


def _forward(
    a: Tensor,
    b: Tensor,
    index_a: Tensor,
    index_b: Tensor,
    weights_a: Tensor | None,
    weights_b: Tensor | None,
    normalize: bool,
    want_slopes: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    similarity, slopes = _implementation(backend)[0](
        a, b, index_a, index_b, weights_a, weights_b, normalize, want_slopes
    )
    return similarity, similarity.new_empty(0) if slopes is None else slopes


def _fake(a: Tensor, b: Tensor, index_a: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    want_slopes, count, dtype = others[-2], index_a.shape[0], _compute_dtype(a)
    shape = (count, 2, a.shape[2]) if want_slopes else (0,)
    return a.new_empty(count, dtype=dtype), a.new_empty(shape, dtype=dtype)


def _backward(
    tokens: Tensor,
    index: Tensor,
    weights: Tensor | None,
    similarity: Tensor,
    slope: Tensor,
    grad: Tensor,
    normalize: bool,
    backend: str,
) -> Tensor:
    return _implementation(backend)[1](tokens, index, weights, similarity, slope, grad.contiguous(), normalize)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, normalize, _, backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = normalize, backend


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    a, b, index_a, index_b, weights_a, weights_b, similarity, slopes = ctx.saved_tensors
    sides = ((a, index_a, weights_a), (b, index_b, weights_b))
    grads = [
        _backward_op(*side, similarity, slopes[:, i], grad, *ctx.options) if ctx.needs_input_grad[i] else None
        for i, side in enumerate(sides)
    ]
    return tuple(grads)


_op = Operator("token_similarity", _forward, _fake)
_op.differentiate(_autograd, _setup_context, inputs=2)
_backward_op = Operator("token_similarity_backward", _backward, lambda tokens, *_: tokens.new_empty(tokens.shape))
