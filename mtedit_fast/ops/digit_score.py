"""The score of a judge: the expectation over its score tokens instead of one sampled token."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtedit_fast.ops import _head_checks as checks
from mtedit_fast.ops import _linear_softmax as head
from mtedit_fast.ops._backend import choose_backend, unavailable_reason
from mtedit_fast.ops._crossover import vocab_backend
from mtedit_fast.ops._operator import Operator

SCORE, VARIANCE, ENTROPY, MEDIAN, MASS, TARGET = range(6)
MOST_TOKENS = 256  # that the kernel holds at once


class DigitScore(NamedTuple):
    """All [N] fp32 (fp64 for fp64 hidden), NaN in rows of NaN. With p the probabilities that `normalize` names, and q
    those of the softmax over the score tokens alone, whatever it names:"""

    score: Tensor
    """Σ k p_k, with gradient. Over the vocabulary p is not renormalised: mass lost to other tokens lowers the score."""
    variance: Tensor
    """Σ q_k (k − Σ k q_k)², detached."""
    entropy: Tensor
    """−Σ q_k log q_k in nats, detached."""
    median: Tensor
    """The smallest value that at least half of q does not exceed, detached: Bayes for absolute error, as the mean is
    for squared error."""
    mass: Tensor | None
    """Σ p_k over the vocabulary, with gradient; None for "set", where it would be 1. Low where the judge would rather
    say something that is no score."""
    target_log_prob: Tensor | None
    """log p of the row's target, with gradient; NaN where it is unknown, None without `target`."""


def digit_score(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Sequence[int],
    values: Sequence[float],
    *,
    normalize: str = "set",
    temperature: float = 1.0,
    bias: Tensor | None = None,
    target: Tensor | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> DigitScore:
    """Expected value of the score token: digits (Edit-R1, REAL, RAIL, TRACT), or yes and no (RewardDance).

        hidden = model.model(**inputs).last_hidden_state[:, -1]  # [N, H], where the score comes next
        ids = [tokenizer.convert_tokens_to_ids(str(k)) for k in range(6)]
        digit_score(hidden, model.lm_head.weight, ids, range(6)).score / 5

    Logits are z = (hidden·weightᵀ + bias)/temperature in fp32 whatever the inputs. Gradients of score, mass and
    target_log_prob flow to hidden, weight and bias, all at once if wanted: dŷ/dz_k = p_k(k − ŷ) over the set and
    p_k(k·[k is a score token] − ŷ) over the vocabulary. "set" reads K rows of the weight, and its gradient to a
    weight is dense, with zeros elsewhere: pass `weight[ids]` and `range(K)` for one of [K, H].

    "vocab" reads the whole weight but keeps at most 64 MiB of logits at a time, forward and backward; the backward
    makes them again. On CUDA "auto" makes them with library products, or from as many rows as were found to be worth
    it with a fused kernel, once `measure_crossover` has been run. With backend="triton", and with "set" on a GPU, a
    row's results do not depend on the rest of the batch, bit for bit; library products choose their order of
    summation by shape, so those of "reference", of "vocab" under "auto", and all gradients may.

    Args:
        hidden: [N, H] fp32, bf16, fp16 (or fp64), at the positions that predict the score token.
        weight: [V, H] of the same dtype, the rows of lm_head; may be padded at the end.
        token_ids: K distinct tokens in 0…vocab_size − 1. Ask the tokenizer for them.
        values: their K values, in any order; several tokens may have the same.
        normalize: "set", the softmax over the K tokens, or "vocab", the one over the whole vocabulary.
        temperature: > 0.
        bias: [V] of the same dtype.
        target: [N] int64, which of the K tokens is the true score, as an index into them; −1 where unknown. On CUDA
            other indices outside 0…K − 1 also count as unknown.
        vocab_size: how many rows of the weight are tokens (default: all).
        backend: "auto", "reference" or "triton" (K ≤ 256); "auto" is the reference on a CPU. An explicit one never
            falls back.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not match, tokens outside the vocabulary or given twice, a temperature
            that is not positive, a target out of range (on a CPU), or a backend that cannot run here.
    """
    vocab_size = checks.check_head(hidden, weight, bias, temperature, vocab_size)
    if hidden.ndim != 2:
        raise ValueError(f"hidden must be [N, H], got {list(hidden.shape)}; flatten it first")
    ids, numbers = _check_tokens(token_ids, values, vocab_size)
    if normalize not in ("set", "vocab"):
        raise ValueError(f"normalize must be 'set' or 'vocab', got {normalize!r}")
    if target is not None:
        checks.check_index("target", target, hidden.shape[:1], hidden.device)
        if checks.on_host(target) and not -1 <= int(target.min()) <= int(target.max()) < len(ids):
            got = f"{int(target.min())}…{int(target.max())}"
            raise ValueError(f"target must lie in 0…{len(ids) - 1}, the index of a token, or be -1; got {got}")
    chosen = _choose(backend, hidden, len(ids), normalize)
    args = (hidden, weight, bias, target, ids, numbers, 1 / temperature, vocab_size, normalize == "vocab", chosen)
    rows = _op(*args)[0].unbind()
    return DigitScore(
        rows[SCORE],
        rows[VARIANCE].detach(),
        rows[ENTROPY].detach(),
        rows[MEDIAN].detach(),
        rows[MASS] if normalize == "vocab" else None,
        None if target is None else rows[TARGET],
    )


def _check_tokens(token_ids: Sequence[int], values: Sequence[float], vocab_size: int) -> tuple[list[int], list[float]]:
    for name, sequence in (("token_ids", token_ids), ("values", values)):
        if isinstance(sequence, Tensor | str) or not isinstance(sequence, Sequence):
            raise TypeError(f"{name} must be a list of numbers, got {type(sequence).__name__}; use .tolist() on arrays")
    ids, numbers = list(token_ids), [float(value) for value in values]
    wrong = [token for token in ids if isinstance(token, bool) or not isinstance(token, int)]
    if wrong:
        raise TypeError(f"token_ids must be integers, got {wrong[0]!r}; ask the tokenizer for them")
    if not ids or len(set(ids)) < len(ids) or not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ValueError(f"token_ids must be distinct and lie in 0…{vocab_size - 1}, got {ids}")
    if len(numbers) != len(ids) or not all(map(math.isfinite, numbers)):
        raise ValueError(f"values must be {len(ids)} finite numbers, one for each of token_ids, got {numbers}")
    return ids, numbers


def _choose(backend: str, hidden: Tensor, count: int, normalize: str) -> str:
    kernel_reason = unavailable_reason("triton", hidden.device, (hidden.dtype,))
    if kernel_reason is None and count > MOST_TOKENS:
        kernel_reason = f"it takes at most {MOST_TOKENS} token_ids, not {count}"
    if kernel_reason is not None and backend == "triton":
        raise ValueError(f"backend='triton' is not available: {kernel_reason}; use backend='auto' or 'reference'")
    chosen = choose_backend(backend, hidden.device, (hidden.dtype,), offered=("reference", "triton"))
    if backend == "auto" and chosen == "triton":
        return "reference" if kernel_reason is not None else "auto" if normalize == "vocab" else "triton"
    return chosen


@lru_cache(maxsize=64)
def _constants(ids: tuple[int, ...], values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Any:
    """On the device, made once: a copy to a GPU is waited for, and cannot be captured in a graph."""
    with torch.inference_mode(False):
        return torch.tensor(ids, device=device), torch.tensor(values, dtype=dtype, device=device)


@head.full_precision
def set_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, scale: float) -> Tensor:
    """[N, K] scaled logits of the score tokens alone."""
    dtype = head.compute_dtype(hidden)
    logits = hidden.to(dtype) @ weight[ids].to(dtype).T
    if bias is not None:
        logits += bias[ids]
    return logits.mul_(scale)


def reference_statistics(logits: Tensor, lse: Tensor | None, values: Tensor, target: Tensor | None) -> Tensor:
    """logits [N, K] of the score tokens and, for "vocab", lse [N] -> [6, N], the fields of `DigitScore`; where one is
    None there, 1 for the mass and 0 for the target."""
    top = logits.amax(1, keepdim=True)
    shifted = logits - top
    exp = shifted.exp()
    total = exp.sum(1)
    q = exp / total[:, None]
    mean = (q * values).sum(1)
    variance = (q * (values - mean[:, None]).square()).sum(1)
    entropy = total.log() - (q * shifted.clamp(min=head.NEGLIGIBLE)).sum(1)
    below = exp @ (values[:, None] <= values).to(exp.dtype)  # [N, K]: of the tokens whose value is not above this one's
    reached = 2 * below >= below.amax(1, keepdim=True)
    median = torch.where(reached, values, torch.inf).amin(1)
    median = torch.where(mean.isnan(), torch.nan, median)

    log_p = shifted - total.log()[:, None] if lse is None else logits - lse[:, None]
    score, mass, target_log_prob = mean, torch.ones_like(mean), torch.zeros_like(mean)
    if lse is not None:
        p = log_p.exp()
        score, mass = (p * values).sum(1), p.sum(1)
    if target is not None:
        known = (target >= 0) & (target < len(values))
        picked = log_p.gather(1, target.clamp(0, len(values) - 1)[:, None])[:, 0]
        target_log_prob = torch.where(known, picked, torch.nan)
    return torch.stack((score, variance, entropy, median, mass, target_log_prob))


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    ids: Sequence[int],
    values: Sequence[float],
    scale: float,
    vocab_size: int,
    vocab: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fields [6, N], the score tokens' scaled logits [N, K], and lse [N] for "vocab" ([0] for "set").

    Back end "auto" is for "vocab" where the kernel can run: lse from library products or the fused kernel, whichever
    is faster for so many rows, and the rest from the kernel.
    """
    dtype = head.compute_dtype(hidden)
    tokens, numbers = _constants(tuple(ids), tuple(values), dtype, hidden.device)
    lse = None
    if backend == "auto":
        fused = vocab_backend(hidden.shape[0], weight.shape[1], vocab_size, hidden.dtype, hidden.device)[0] == "triton"
    else:
        fused = backend == "triton"
    if vocab and not fused:
        lse = head.log_sum_exp(hidden, weight, bias, None, scale, vocab_size)[0]
    if backend != "reference":
        from mtedit_fast.kernels import digit_score as triton

        return triton.digit_score(hidden, weight, bias, target, tokens, numbers, scale, vocab_size, vocab, lse)
    logits = set_logits(hidden, weight, bias, tokens, scale)
    statistics = reference_statistics(logits, lse, numbers, target)
    return statistics, logits, hidden.new_empty(0, dtype=dtype) if lse is None else lse


def _backward(
    grad: Tensor,
    statistics: Tensor,
    logits: Tensor,
    lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    ids: Sequence[int],
    values: Sequence[float],
    scale: float,
    vocab_size: int,
    vocab: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to hidden, weight and bias, given that of the fields [6, N]; empty where not needed."""
    dtype = logits.dtype
    tokens, numbers = _constants(tuple(ids), tuple(values), dtype, hidden.device)
    needs_hidden, needs_weight, needs_bias = needs
    grad_score, grad_mass = grad[SCORE, :, None], grad[MASS, :, None]
    chosen = torch.zeros_like(logits)
    grad_target = torch.zeros_like(grad_score)
    if target is not None:
        chosen = (target[:, None] == torch.arange(len(ids), device=target.device)).to(dtype)
        grad_target = torch.where(chosen.any(1, keepdim=True), grad[TARGET, :, None], 0)
    if vocab:
        p = (logits - lse[:, None]).exp()
        grad_logits = p * (grad_score * numbers + grad_mass) + grad_target * chosen
        grad_lse = -(grad_score[:, 0] * statistics[SCORE] + grad_mass[:, 0] * statistics[MASS] + grad_target[:, 0])
        columns = tokens.expand(len(hidden), -1)
        wanted = (needs_hidden, needs_weight, needs_bias)
        return head.softmax_backward(
            hidden, weight, bias, lse, None, grad_lse, None, columns, grad_logits, scale, vocab_size, wanted
        )
    return _set_backward(
        grad_score, grad_target, chosen, statistics, logits, hidden, weight, tokens, numbers, scale, needs
    )


@head.full_precision
def _set_backward(
    grad_score: Tensor,
    grad_target: Tensor,
    chosen: Tensor,
    statistics: Tensor,
    logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    numbers: Tensor,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Through the K score tokens' softmax alone."""
    needs_hidden, needs_weight, needs_bias = needs
    dtype, p = logits.dtype, logits.softmax(1)
    grad_logits = scale * (grad_score * p * (numbers - statistics[SCORE, :, None]) + grad_target * (chosen - p))
    grad_hidden, grad_weight, grad_bias = (weight.new_empty(0) for _ in range(3))
    if needs_hidden:
        grad_hidden = (grad_logits @ weight[tokens].to(dtype)).to(hidden.dtype)
    if needs_weight:
        rows = (grad_logits.T @ hidden.to(dtype)).to(weight.dtype)
        grad_weight = weight.new_zeros(weight.shape).index_copy_(0, tokens, rows)
    if needs_bias:
        grad_bias = weight.new_zeros(weight.shape[0]).index_copy_(0, tokens, grad_logits.sum(0).to(weight.dtype))
    return grad_hidden, grad_weight, grad_bias


def _fake(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    ids, vocab, count = others[3], others[7], hidden.shape[0]
    dtype = head.compute_dtype(hidden)
    shapes = ((6, count), (count, len(ids)), (count,) if vocab else (0,))
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in shapes)  # type: ignore[return-value]


def _fake_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return head.empty_gradients(args[4], args[5], args[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ids, values, scale, vocab_size, vocab, _ = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.options = list(ids), list(values), scale, vocab_size, vocab


def _autograd(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    grads = _backward_op(grad, *ctx.saved_tensors, *ctx.options, needs)
    return tuple(value if needed else None for value, needed in zip(grads, needs, strict=True))


_op = Operator("digit_score", _forward, _fake, keeps_memory=True)
_op.differentiate(_autograd, _setup_context, inputs=3)
_backward_op = Operator("digit_score_backward", _backward, _fake_backward, keeps_memory=True)
