"""From the rewards of K turns to the scalar that judges each turn: aggregators over turns, and credit assignment."""

from collections.abc import Callable

import torch
from torch import Tensor

Aggregator = Callable[[Tensor, float], Tensor]  # [B, K] with NaN, gamma -> [B]


def _mean(values: Tensor, gamma: float) -> Tensor:
    return values.nanmean(dim=1)


def _last(values: Tensor, gamma: float) -> Tensor:
    return values[:, -1]


def _min(values: Tensor, gamma: float) -> Tensor:
    undefined = values.isnan()
    return values.masked_fill(undefined, torch.inf).amin(dim=1).masked_fill(undefined.all(dim=1), torch.nan)


def _discounted(values: Tensor, gamma: float) -> Tensor:
    weights = gamma ** torch.arange(values.shape[1], dtype=values.dtype, device=values.device)
    weights = weights.masked_fill(values.isnan(), 0.0)
    return (weights * values.nan_to_num(0.0)).sum(dim=1) / weights.sum(dim=1)


def _product(values: Tensor, gamma: float) -> Tensor:
    undefined = values.isnan()
    return _nonnegative(values).masked_fill(undefined, 1.0).prod(dim=1).masked_fill(undefined.all(dim=1), torch.nan)


def _geomean(values: Tensor, gamma: float) -> Tensor:
    return _product(values, gamma).pow(1 / (~values.isnan()).sum(dim=1, dtype=values.dtype))


def _prefix_product_mean(values: Tensor, gamma: float) -> Tensor:
    undefined = values.isnan()
    prefixes = _nonnegative(values).masked_fill(undefined, 1.0).cumprod(dim=1)
    return prefixes.masked_fill(undefined, torch.nan).nanmean(dim=1)


def _nonnegative(values: Tensor) -> Tensor:
    if (values < 0).any():
        raise ValueError(
            f"values: a product over turns expects rewards >= 0, got {values[values < 0][0].item():g}; "
            "give the reward's range, or aggregate by mean, last, min or discounted"
        )
    return values


AGGREGATORS: dict[str, Aggregator] = {
    "mean": _mean,
    "last": _last,
    "product": _product,
    "min": _min,
    "geomean": _geomean,
    "discounted": _discounted,
    "prefix_product_mean": _prefix_product_mean,
}


def aggregate(values: Tensor, how: str = "mean", *, gamma: float = 0.9) -> Tensor:
    """Aggregate per-turn values [B, K] over the turns -> [B].

    mean; last; min; product (matches success of the whole chain); geomean, its K-th root; discounted,
    Σ γ^(k−1) v_k / Σ γ^(k−1); prefix_product_mean, the mean over k of v_1 · … · v_k.
    NaN marks an undefined turn: it is left out, as a term, as a factor and from the count of turns that a mean divides
    by; `last` is the value of turn K. A row with nothing left is NaN.
    ValueError for an unknown `how`, a shape other than [B, K] with K >= 1, gamma outside (0, 1], or a negative value
    in one of the three products.
    """
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"values: expected shape [B, K] with K >= 1 turns, got {list(values.shape)}")
    if how not in AGGREGATORS:
        raise ValueError(f"how: expected one of {', '.join(AGGREGATORS)}, got {how!r}")
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma: expected a discount in (0, 1], got {gamma}")
    return AGGREGATORS[how](values, gamma)


# A credit gives the scalar u that turn k (or step s of turn k) of trajectory b is judged by: rewards [B, K] and the
# aggregator h -> [B, K], or [B, K, S+1] -> [B, K, S] for those in STEP_CREDITS.


def _broadcast(values: Tensor, h: Callable[[Tensor], Tensor]) -> Tensor:
    return h(values)[:, None].expand_as(values)


def _per_turn(values: Tensor, h: Callable[[Tensor], Tensor]) -> Tensor:
    return values


def _reward_to_go(values: Tensor, h: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([h(values[:, turn:]) for turn in range(values.shape[1])], dim=1)


def _dense_ode(values: Tensor, h: Callable[[Tensor], Tensor]) -> Tensor:
    """The gain of each denoising step: reward of the clean image after it minus that before it.

    DenseGRPO's step-wise reward gain (arXiv 2601.20218), TP-GRPO's incremental reward (arXiv 2602.06422) without its
    turning points. A step whose image before or after has no reward is undefined.
    """
    return values.diff(dim=2)


CREDITS: dict[str, Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]] = {
    "broadcast": _broadcast,
    "per_turn": _per_turn,
    "reward_to_go": _reward_to_go,
    "dense_ode": _dense_ode,
}
STEP_CREDITS = frozenset({"dense_ode"})
