"""Several rewards into one advantage: the scale of each, transforms of the raw rewards, and fusions.

Everything here is fp64 with NaN where a reward is undefined, of shape [B, ...]; each column after the first dimension
(a turn, or a step of a turn) is treated alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

Rewards = dict[str, Tensor]


def rescale(
    rewards: Rewards,
    ranges: Mapping[str, Sequence[float] | None] | None = None,
    binarize: Mapping[str, float | None] | None = None,
) -> Rewards:
    """Raw scores to [0, 1]: (s − lo) / (hi − lo) by `ranges` {name: (lo, hi)}, or 1[s >= τ] by `binarize` {name: τ}.

    A judge that scores 1..5 has the range (1, 5), so that f = (s − 1) / 4; τ is in the raw score's units. A reward in
    neither mapping, or with None, stays as it is; NaN stays NaN.
    ValueError for a name without a reward, lo >= hi, τ outside (lo, hi], or a score outside its range.
    """
    ranges, binarize = ranges or {}, binarize or {}
    for argument, mapping in (("ranges", ranges), ("binarize", binarize)):
        if unknown := sorted(set(mapping) - set(rewards)):
            raise ValueError(f"{argument}: no reward named {', '.join(unknown)}; rewards are {', '.join(rewards)}")
    scaled = {}
    for name, value in rewards.items():
        bounds, threshold = ranges.get(name), binarize.get(name)
        if bounds is not None:
            lo, hi = _bounds(name, bounds)
            if threshold is not None and not lo < threshold <= hi:
                raise ValueError(f"binarize[{name!r}]: expected a threshold in ({lo:g}, {hi:g}], got {threshold:g}")
            slack = 1e-4 * (hi - lo)  # an expected score may leave its range by rounding
            outside = (value < lo - slack) | (value > hi + slack)
            if outside.any():
                raise ValueError(
                    f"rewards[{name!r}]: expected scores in its range [{lo:g}, {hi:g}], "
                    f"got {value[outside][0].item():g}; correct the range"
                )
        if threshold is not None:
            value = (value >= threshold).to(value.dtype).masked_fill(value.isnan(), torch.nan)
        elif bounds is not None:
            value = ((value - lo) / (hi - lo)).clamp(0, 1)
        scaled[name] = value
    return scaled


def _bounds(name: str, bounds: Sequence[float]) -> tuple[float, float]:
    if len(bounds) != 2 or not bounds[0] < bounds[1]:
        raise ValueError(f"ranges[{name!r}]: expected (lo, hi) with lo < hi, got {list(bounds)}")
    return bounds[0], bounds[1]


def _members(groups: Tensor) -> Iterator[Tensor]:
    """The row numbers of each group."""
    index = groups.unique(return_inverse=True)[1]
    return iter(index.argsort(stable=True).split(index.bincount().tolist()))


def _win_rate(rewards: Rewards, groups: Tensor) -> Rewards:
    """Pref-GRPO's reward: the share of the group's other members that one beats, a tie being half a win.

    Undefined members are no opponents and stay undefined; the only defined member of a group ties, ½.
    """
    rates = {}
    for name, value in rewards.items():
        rate = torch.full_like(value, torch.nan)
        for rows in _members(groups):
            x = value[rows]
            beats = (x[:, None] > x).double() + 0.5 * (x[:, None] == x).double()  # [n, n, ...]: i against j
            defined = ~x.isnan()
            wins = beats.sum(dim=1) - 0.5  # less the tie with itself
            opponents = defined.sum(dim=0) - 1
            rate[rows] = (wins / opponents).masked_fill(opponents == 0, 0.5).masked_fill(~defined, torch.nan)
        rates[name] = rate
    return rates


def _log_tame(rewards: Rewards, groups: Tensor) -> Rewards:
    """PaCo-RL's taming: log(1 + r) for every reward whose h = std / (mean + 1e-6) exceeds the mean h of all rewards.

    Over the whole batch, biased std, so a single reward is never tamed. ValueError for a reward below 0.
    """
    spread = {}
    for name, value in rewards.items():
        if (value < 0).any():
            raise ValueError(
                f"rewards[{name!r}]: transform log_tame expects rewards >= 0, "
                f"got {value[value < 0][0].item():g}; give the reward's range"
            )
        defined = value[~value.isnan()]
        if len(defined):
            spread[name] = defined.std(correction=0) / (defined.mean() + 1e-6)
    limit = torch.stack(list(spread.values())).mean()
    tamed = {name for name, h in spread.items() if h > limit}
    return {name: value.log1p() if name in tamed else value for name, value in rewards.items()}


# A transform maps the raw rewards {name: [B, ...]} to others of the same names and shapes, before aggregation.
TRANSFORMS: dict[str, Callable[[Rewards, Tensor], Rewards]] = {
    "none": lambda rewards, groups: rewards,
    "win_rate": _win_rate,
    "log_tame": _log_tame,
}

# A fusion turns {reward: u [B, ...]} into advantages [B, ...]; z(u) standardises one of them in its groups, with the
# keywords of `group_zscore` to change how.
Standardise = Callable[..., Tensor]
Fusion = Callable[[Rewards, Mapping[str, float], Tensor, Standardise], Tensor]


def _defined_in_group(u: Tensor, groups: Tensor) -> Tensor:
    """bool like u: some member of the group is defined in this column."""
    index = groups.unique(return_inverse=True)[1]
    defined = (~u.isnan()).double()
    return torch.zeros_like(defined).index_add(0, index, defined)[index] > 0


def _fuse_rewards(scalars: Rewards, weights: Mapping[str, float], groups: Tensor, z: Standardise) -> Tensor:
    """z(Σ w u). A reward undefined for a whole group adds nothing there; undefined for one member, it excludes it."""
    total = torch.zeros_like(next(iter(scalars.values())))
    some_defined = torch.zeros_like(total, dtype=torch.bool)
    for name, u in scalars.items():
        in_group = _defined_in_group(u, groups)
        total = total + weights[name] * u.masked_fill(~in_group, 0.0)
        some_defined |= in_group
    return z(total.masked_fill(~some_defined, torch.nan))


def _fuse_advantages(scalars: Rewards, weights: Mapping[str, float], groups: Tensor, z: Standardise) -> Tensor:
    """Σ w z(u): every reward is brought to the same scale first (MT-EditFlow's finding)."""
    return torch.stack([weights[name] * z(u) for name, u in scalars.items()]).sum(dim=0)


def _gdpo(scalars: Rewards, weights: Mapping[str, float], groups: Tensor, z: Standardise) -> Tensor:
    """GDPO (arXiv 2601.05242): Σ w z(u), then a z-score over the whole batch, whose scale then does not depend on how
    many rewards there are. Members without any defined reward leave the batch's statistics.
    """
    fused = _fuse_advantages(scalars, weights, groups, z)
    undefined = torch.stack([u.isnan() for u in scalars.values()]).all(dim=0)
    batch = z(fused.masked_fill(undefined, torch.nan), groups=torch.zeros_like(groups), min_std=0.0)
    # Every z(u) sums to 0 in its group, so the batch's mean is 0 up to rounding: no advantage stays no advantage.
    return batch.masked_fill(fused == 0, 0.0)


def _firm(scalars: Rewards, weights: Mapping[str, float], groups: Tensor, z: Standardise) -> Tensor:
    """z(R) of FIRM's base-and-bonus R = Exec · (0.6 + 0.4 · Cons) (arXiv 2603.12247), both in [0, 1].

    Exec is the first and Cons the second reward of the configuration; their weights only need to be positive. Where
    Cons is undefined for a whole group, R = Exec; where either is undefined for one member, it is excluded.
    """
    if len(scalars) != 2 or min(weights[name] for name in scalars) <= 0:
        given = ", ".join(f"{name} ({weights[name]:g})" for name in scalars)
        raise ValueError(
            f"rewards: fusion firm expects two of positive weight, execution first and consistency second, got {given}"
        )
    execution, consistency = scalars.values()
    bonus = consistency.masked_fill(~_defined_in_group(consistency, groups), 1.0)
    return z(execution * (0.6 + 0.4 * bonus))


def _pareto(scalars: Rewards, weights: Mapping[str, float], groups: Tensor, z: Standardise) -> Tensor:
    """Σ w z(u) for the members that no other of their group dominates, 0 for the rest (after Parrot's selection).

    One dominates another when it is no worse in any reward and better in one; the sign of a weight says which way is
    better, and an undefined reward counts as the group's mean.
    """
    scores = torch.stack([weights[name] * z(u) for name, u in scalars.items()])  # [rewards, B, ...]
    fused = scores.sum(dim=0)
    for rows in _members(groups):
        i, j = scores[:, rows, None], scores[:, None, rows]
        dominates = (i >= j).all(dim=0) & (i > j).any(dim=0)  # [n, n, ...]
        fused[rows] = fused[rows].masked_fill(dominates.any(dim=0), 0.0)
    return fused


FUSIONS: dict[str, Fusion] = {
    "reward": _fuse_rewards,
    "advantage": _fuse_advantages,
    "gdpo": _gdpo,
    "firm": _firm,
    "pareto": _pareto,
}
