"""What judges are trained by, as pure functions; `trainer` decides on which tokens.

Throughout, c is a thought, ŷ = Σ_k k·p(k | x, c) the expected score under the full-vocabulary softmax (not
renormalised: `ops.digit_score` with normalize="vocab"), y the true score and log p(y) the
log-probability of writing it.

Sources: REAL, arXiv 2603.17145, and its authors' code; TRACT, arXiv 2503.04381; RAIL, arXiv 2403.04182; RLOO, arXiv
2402.14740; GRPO, arXiv 2402.03300.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def score_weights(targets: Tensor, values: Sequence[float]) -> Tensor:
    """How true scores fall on the values of a scale: weights w [..., K], fp32, each row summing to 1.

    A score on the scale has all its weight there. One between two values a < y < b is shared by them linearly,
    w_b = (y − a)/(b − a), so that Σ_k w_k·k = y. Where a likelihood is asked for, log p(y) = Σ_k w_k·log p_k: the
    cross-entropy whose optimum is p = w and hence ŷ = y.

    Args:
        targets: [...], scores within the scale.
        values: K ascending values.

    Raises:
        ValueError: values that do not ascend, or a target outside them (NaN included).
    """
    scale = torch.tensor(list(values), dtype=torch.float64, device=targets.device)
    if len(scale) < 2 or not bool((scale.diff() > 0).all()):
        raise ValueError(f"values: expected at least two, ascending, got {list(values)}")
    y = targets.to(torch.float64)
    if not bool(((y >= scale[0]) & (y <= scale[-1])).all()):
        raise ValueError(f"targets: expected scores from {scale[0].item():g} to {scale[-1].item():g}, got {y.tolist()}")
    upper = torch.searchsorted(scale, y.contiguous()).clamp(min=1)
    low, high = scale[upper - 1], scale[upper]
    share = ((y - low) / (high - low)).unsqueeze(-1)
    weights = torch.zeros(*y.shape, len(scale), dtype=torch.float64, device=y.device)
    weights.scatter_(-1, upper.unsqueeze(-1), share)
    weights.scatter_(-1, upper.unsqueeze(-1) - 1, 1 - share)
    return weights.float()


def leave_one_out(rewards: Tensor) -> Tensor:
    """RLOO: A_i = R_i − mean_{j≠i} R_j = n/(n−1)·(R_i − R̄). rewards [..., n] -> [..., n]; 0 for n = 1."""
    n = rewards.shape[-1]
    return _centred(rewards) * (n / (n - 1) if n > 1 else 0.0)


def group_normalized(rewards: Tensor, *, eps: float = 1e-6) -> Tensor:
    """GRPO: A_i = (R_i − R̄)/(s + eps) with s² = Σ(R_j − R̄)²/(n − 1). rewards [..., n] -> [..., n]; 0 for n = 1."""
    centred, n = _centred(rewards), rewards.shape[-1]
    return centred / ((centred.square().sum(-1, keepdim=True) / max(n - 1, 1)).sqrt() + eps)


def leave_one_out_normalized(rewards: Tensor, *, eps: float = 1e-8) -> Tensor:
    """REAL's code: the leave-one-out advantages over their own population deviation, A_i/(σ(A) + eps).

    The factor n/(n − 1) cancels: but for eps this is √(n/(n−1)) times `group_normalized`. rewards [..., n] -> [..., n].
    """
    advantage = leave_one_out(rewards)
    return advantage / (advantage.square().mean(-1, keepdim=True).sqrt() + eps)


def _centred(rewards: Tensor) -> Tensor:
    """R − R̄, exactly 0 where all are equal: their rounding errors must not be blown up to unit deviation."""
    shifted = rewards - rewards[..., :1]
    return shifted - shifted.mean(-1, keepdim=True)


ADVANTAGES = {"leave_one_out": leave_one_out_normalized, "group": group_normalized}


def real_advantage(
    squared_error: Tensor,
    log_prob: Tensor,
    *,
    likelihood_weight: float,
    form: str = "leave_one_out",
    reward: str = "probability",
    clip: float = 1.0,
) -> Tensor:
    """REAL's advantage of a thought: clamp(N(−(ŷ − y)²), ±clip) + λ·clamp(N(r), ±clip), without gradient.

    N normalises within the group of thoughts about one question; r = p(y) as in the authors' code, or log p(y) as in
    the paper. An answer that never comes to a score has log p(y) = −∞; as a log-probability it counts like the least
    likely one of its group.

    Args:
        squared_error, log_prob: [..., n], (ŷ − y)² and log p(y) of the n thoughts of each question.
        likelihood_weight: λ.
        form: N, "leave_one_out" (`leave_one_out_normalized`) or "group" (`group_normalized`).
        reward: r, "probability" or "log_probability".
        clip: bound of each part; infinity for none.

    Raises:
        ValueError: an unknown `form` or `reward`.
    """
    if form not in ADVANTAGES:
        raise ValueError(f"form: expected one of {', '.join(ADVANTAGES)}, got {form!r}")
    if reward not in ("probability", "log_probability"):
        raise ValueError(f"reward: expected probability or log_probability, got {reward!r}")
    normalize = ADVANTAGES[form]
    advantage = normalize(-squared_error.detach()).clamp(-clip, clip)
    if likelihood_weight:
        log_prob = log_prob.detach()
        likelihood = normalize(log_prob.exp() if reward == "probability" else _floored(log_prob))
        advantage = advantage + likelihood_weight * likelihood.clamp(-clip, clip)
    return advantage


def _floored(log_prob: Tensor) -> Tensor:
    """−∞ replaced by the least finite value of the group, 0 where there is none."""
    finite = log_prob.isfinite()
    least = log_prob.masked_fill(~finite, torch.inf).amin(-1, keepdim=True)
    return torch.where(finite, log_prob, torch.where(least.isfinite(), least, 0.0))


def policy_loss(log_prob: Tensor, advantage: Tensor, count: float) -> Tensor:
    """−Σ A·log π / count over tokens: no ratio and no clipping, every sample being used once by the policy it is from.

    log_prob, advantage: [T]; count: the tokens of the whole step, for their mean.
    """
    return -(advantage.detach() * log_prob).sum() / count


def refinement_loss(squared_error: Tensor, log_prob: Tensor, *, likelihood_weight: float) -> Tensor:
    """REAL's second term before β and its mean: (ŷ − y)² − λ·log p(y), elementwise, with gradient."""
    return squared_error - likelihood_weight * log_prob if likelihood_weight else squared_error
