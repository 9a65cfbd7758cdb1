"""Which rows of the batch are worth a forward of the update."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from mtedit_fast.training.grouping import group_moments

# Gives {reward: [B] aggregated over turns, NaN where undefined}; called by the filters that look at rewards.
Scores = Callable[[], dict[str, Tensor]]

# Edit-R1's thresholds on the mean and the deviation of a group's scores in [0, 1].
HIGH_MEAN, LOW_STD = 0.9, 0.05


def _everything(advantages: Tensor, scores: Scores, weights: Mapping[str, float], groups: Tensor) -> Tensor:
    return torch.ones(len(advantages), dtype=torch.bool)


def _zero_std(advantages: Tensor, scores: Scores, weights: Mapping[str, float], groups: Tensor) -> Tensor:
    """flow_grpo's filter: rows without any advantage, such as those of a group without spread, carry no gradient."""
    return (advantages != 0).flatten(1).any(dim=1)


def _edit_r1(advantages: Tensor, scores: Scores, weights: Mapping[str, float], groups: Tensor, *, mode: str) -> Tensor:
    """Edit-R1's filter of groups that are solved already, and rows without any advantage besides.

    A row's score is the weighted mean of its defined rewards in [0, 1]. `mode` "and", as its paper has it, drops a
    group with mean > 0.9 and deviation < 0.05; "or", as its code does, keeps only mean < 0.9 and deviation > 0.05.
    ValueError for a reward outside [0, 1] and for a negative weight.
    """
    aggregated = scores()
    for name, score in aggregated.items():
        low, high = score.nan_to_num(0.5).aminmax()
        if low < 0 or high > 1:
            raise ValueError(
                f"rewards[{name!r}]: filter edit_r1 expects rewards in [0, 1], got {low.item():g} to {high.item():g}; "
                "give the reward's range"
            )
        if weights[name] < 0:
            raise ValueError(f"weights[{name!r}]: filter edit_r1 expects positive weights, got {weights[name]:g}")
    stacked = torch.stack(list(aggregated.values()))  # [rewards, B]
    weight = stacked.new_tensor([weights[name] for name in aggregated])[:, None].masked_fill(stacked.isnan(), 0.0)
    moments = group_moments((weight * stacked.nan_to_num(0.0)).sum(dim=0) / weight.sum(dim=0), groups)
    mean, std = moments.mean[:, 0], moments.std[:, 0]
    keep = (mean < HIGH_MEAN) & (std > LOW_STD) if mode == "or" else ~((mean > HIGH_MEAN) & (std < LOW_STD))
    return keep[moments.index] & _zero_std(advantages, scores, weights, groups)


# (advantages [B, K] or [B, K, S], scores, {reward: weight}, groups [B]) -> bool [B].
FILTERS: dict[str, Callable[[Tensor, Scores, Mapping[str, float], Tensor], Tensor]] = {
    "none": _everything,
    "zero_std": _zero_std,
    "edit_r1_and": partial(_edit_r1, mode="and"),
    "edit_r1_or": partial(_edit_r1, mode="or"),
}
