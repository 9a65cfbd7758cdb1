"""Rewards of a batch as flat numbers for the log: per reward, per turn and per edit type."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtedit_fast.training.grouping import group_moments


def reward_statistics(
    rewards: dict[str, Tensor], groups: Tensor, types: Sequence[Sequence[str]] | None = None
) -> dict[str, float]:
    """Statistics of rewards {name: [B, K], NaN where undefined} in groups int64 [B], over whatever is defined.

    For each reward r (turns count from 1; a statistic of nothing is NaN):

    - `reward/r`, `reward/r/turn{k}`, `reward/r/type/{type}`: means over the batch, of a turn, of the turns whose edit
      is of that type (`types`: B lists of K names; None: left out)
    - `reward_std/r`: standard deviation (biased) among the members of a group, mean over groups and turns
    - `reward_zero_std/r`: share of groups in which no turn has any spread, so that r teaches nothing there
    - `reward_nan/r`: share of undefined values

    A reward may be [B, K, S+1], of the images decoded along the way: then the last of them, the finished edit, is what
    counts, and `reward_nan` is over all. ValueError for shapes that do not fit.
    """
    stats: dict[str, float] = {}
    for name, value in rewards.items():
        if value.ndim not in (2, 3) or value.shape[:1] != groups.shape or value.numel() == 0:
            raise ValueError(
                f"rewards[{name!r}]: expected [B, K] or [B, K, S+1] with groups [B], "
                f"got {list(value.shape)} and {list(groups.shape)}"
            )
        final = (value if value.ndim == 2 else value[..., -1]).double()
        stats[f"reward/{name}"] = final.nanmean().item()
        for turn, mean in enumerate(final.nanmean(dim=0).tolist(), start=1):
            stats[f"reward/{name}/turn{turn}"] = mean
        if types is not None:
            stats |= _by_type(f"reward/{name}/type/", final, types)
        moments = group_moments(final, groups)
        some = moments.count > 0
        known = some.any(dim=1)
        flat = (moments.std == 0).all(dim=1)
        stats[f"reward_std/{name}"] = moments.std[some].mean().item()
        stats[f"reward_zero_std/{name}"] = flat[known].double().mean().item()
        stats[f"reward_nan/{name}"] = value.isnan().double().mean().item()
    return stats


def _by_type(prefix: str, values: Tensor, types: Sequence[Sequence[str]]) -> dict[str, float]:
    batch, turns = values.shape
    if len(types) != batch or any(isinstance(row, str) or len(row) != turns for row in types):
        lengths = sorted({1 if isinstance(row, str) else len(row) for row in types})
        raise ValueError(f"types: expected {batch} lists of {turns} edit types, got {len(types)} lists of {lengths}")
    flat = [name for row in types for name in row]
    values = values.flatten()
    return {
        prefix + kind: values[torch.tensor([name == kind for name in flat])].nanmean().item()
        for kind in sorted(set(flat))
    }
