"""log p of given tokens, without the logits of all of them: for a judge's reasoning, or a text given an image."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from mtedit_fast.ops import _head_checks as checks
from mtedit_fast.ops import _linear_softmax as head
from mtedit_fast.ops._backend import choose_backend
from mtedit_fast.ops._crossover import vocab_backend
from mtedit_fast.ops._operator import Operator


@overload
def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = ...,
    bias: Tensor | None = ...,
    vocab_size: int | None = ...,
    ignore_index: int = ...,
    return_entropy: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = ...,
    bias: Tensor | None = ...,
    vocab_size: int | None = ...,
    ignore_index: int = ...,
    return_entropy: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax((hidden·weightᵀ + bias)/temperature) at `targets`: −cross-entropy per token, nothing reduced.

        hidden = model.model(**inputs).last_hidden_state  # [B, T, H]
        log_p = token_log_probs(hidden[:, :-1], model.lm_head.weight, labels[:, 1:])  # [B, T − 1]

    It is fp32 whatever the inputs, and differentiable with respect to hidden, weight and bias. At most 64 MiB of
    logits are in memory at a time (the entropy and its gradient take a second such chunk), forward and backward; the
    backward makes them again. On CUDA "auto" makes them with library products, or from as many tokens as were found
    to be worth it with a fused kernel, once `measure_crossover` has been run. With backend="triton" a token's results
    do not depend on the others, bit for bit; library products choose their order of summation by shape, so those of
    the other back ends and all gradients may. Leave long stretches of ignored tokens out beforehand: they cost as
    much as others.

    Args:
        hidden: [..., H] fp32, bf16, fp16 (or fp64), at the positions that predict `targets`.
        weight: [V, H] of the same dtype, the rows of lm_head; may be padded at the end.
        targets: [...] int64, in 0…vocab_size − 1, or ignore_index. On CUDA one outside is NaN, without gradient.
        temperature: > 0.
        bias: [V] of the same dtype.
        vocab_size: how many rows of the weight are tokens (default: all).
        ignore_index: where targets hold it, results are 0 without gradient, whatever hidden holds there.
        return_entropy: also return the entropy of each position's distribution, in nats, differentiable as well.
        backend: "auto", "reference" or "triton"; "auto" is the reference on a CPU. An explicit one never falls back.

    Returns:
        [...] fp32 (fp64 for fp64 hidden); with return_entropy a tuple of two.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not match, a target outside the vocabulary (on a CPU), a temperature that
            is not positive, or a backend that cannot run here.
    """
    vocab_size = checks.check_head(hidden, weight, bias, temperature, vocab_size)
    checks.check_index("targets", targets, hidden.shape[:-1], hidden.device)
    ignored = targets == ignore_index
    if checks.on_host(targets):
        wrong = targets[((targets < 0) | (targets >= vocab_size)) & ~ignored]
        if wrong.numel():
            expected = f"lie in 0…{vocab_size - 1} or be ignore_index = {ignore_index}"
            raise ValueError(f"targets must {expected}, got {int(wrong[0])}")
    chosen = choose_backend(backend, hidden.device, (hidden.dtype,), offered=("reference", "triton"))
    if backend == "auto" and chosen == "triton":
        chosen = "auto"
    # Zeros, so that what padding holds, NaN perhaps, reaches neither the weight's gradient nor its own.
    rows = hidden.masked_fill(ignored[..., None], 0).reshape(-1, hidden.shape[-1])
    args = (rows, weight, bias, targets.reshape(-1), 1 / temperature, vocab_size, return_entropy, chosen)
    log_prob, entropy, _ = _op(*args)
    log_prob = log_prob.reshape(targets.shape).masked_fill(ignored, 0)
    if not return_entropy:
        return log_prob
    return log_prob, entropy.reshape(targets.shape).masked_fill(ignored, 0)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    vocab_size: int,
    want_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """log p [N], the entropy [N] ([0] unless wanted), and lse [N].

    Back end "auto" is for devices where the kernel can run: it or library products, whichever is faster for so many
    rows.
    """
    if backend == "auto":
        backend, _ = vocab_backend(hidden.shape[0], weight.shape[1], vocab_size, hidden.dtype, hidden.device)
    if backend == "triton":
        from mtedit_fast.kernels import token_log_probs as triton

        return triton.token_log_probs(hidden, weight, bias, targets, scale, vocab_size, want_entropy)
    lse, picked, entropy = head.log_sum_exp(hidden, weight, bias, targets, scale, vocab_size, want_entropy)
    assert picked is not None
    return picked.sub_(lse), lse.new_empty(0) if entropy is None else entropy, lse


def _backward(
    grad_log_prob: Tensor,
    grad_entropy: Tensor,
    entropy: Tensor,
    lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    vocab_size: int,
    want_entropy: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to hidden, weight and bias; empty where not needed."""
    known = (targets >= 0) & (targets < vocab_size)
    grad = torch.where(known, grad_log_prob, 0)
    needs_hidden, needs_weight, needs_bias = needs
    return head.softmax_backward(
        hidden,
        weight,
        bias,
        lse,
        entropy if want_entropy else None,
        -grad,
        grad_entropy if want_entropy else None,
        targets[:, None],
        grad[:, None],
        scale,
        vocab_size,
        (needs_hidden, needs_weight, needs_bias),
    )


def _fake(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    count, want_entropy = hidden.shape[0], others[5]
    empty = hidden.new_empty(count, dtype=head.compute_dtype(hidden))
    return empty, empty.new_empty(count if want_entropy else 0), torch.empty_like(empty)


def _fake_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return head.empty_gradients(args[4], args[5], args[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, scale, vocab_size, want_entropy, _ = inputs
    ctx.save_for_backward(*output[1:], hidden, weight, bias, targets)
    ctx.options = scale, vocab_size, want_entropy


def _autograd(ctx: Any, grad_log_prob: Tensor, grad_entropy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    grads = _backward_op(grad_log_prob, grad_entropy, *ctx.saved_tensors, *ctx.options, needs)
    return tuple(value if needed else None for value, needed in zip(grads, needs, strict=True))


_op = Operator("token_log_probs", _forward, _fake)
_op.differentiate(_autograd, _setup_context, inputs=3)
_backward_op = Operator("token_log_probs_backward", _backward, _fake_backward)
