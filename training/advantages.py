"""Rewards of multi-turn trajectories -> advantages: aggregate turns, standardise in groups, fuse, assign credit.

Aggregators, fusions, credits and filters are entries of the dictionaries below: a new one is one more entry, and the
configuration then accepts its name.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor

Aggregator = Callable[[Tensor], Tensor]  # [B, K] with NaN -> [B]


def _mean(values: Tensor) -> Tensor:
    return values.nanmean(dim=1)


def _last(values: Tensor) -> Tensor:
    return values[:, -1]


def _product(values: Tensor) -> Tensor:
    undefined = values.isnan()
    return values.masked_fill(undefined, 1.0).prod(dim=1).masked_fill(undefined.all(dim=1), torch.nan)


AGGREGATORS: dict[str, Aggregator] = {"mean": _mean, "last": _last, "product": _product}


def aggregate(values: Tensor, how: str = "mean") -> Tensor:
    """Aggregate per-turn values [B, K] over the turns -> [B].

    NaN marks an undefined turn: it is left out of `mean` and `product`; `last` is the value of turn K. A row with
    nothing left is NaN. ValueError for an unknown `how` or a shape other than [B, K] with K >= 1.
    """
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"values: expected shape [B, K] with K >= 1 turns, got {list(values.shape)}")
    if how not in AGGREGATORS:
        raise ValueError(f"how: expected one of {', '.join(AGGREGATORS)}, got {how!r}")
    return AGGREGATORS[how](values)


def group_zscore(
    values: Tensor,
    groups: Tensor,
    *,
    std: str = "group",
    unbiased: bool = False,
    eps: float = 1e-4,
    min_std: float = 0.0,
) -> Tensor:
    """(u − mean_group) / (std + eps) for `values` [B] or [B, M] (each column alone), `groups` int64 [B] of any ids.

    `std="group"` takes the standard deviation of each group, "global" that of the whole batch (flow_grpo's default);
    `unbiased` divides by n − 1 (Dance-GRPO, MixGRPO, there with eps 1e-8). NaN members leave the statistics and get 0,
    and so does a whole group whose own deviation is below `min_std`. A constant group is exactly 0.
    ValueError for wrong shapes and for a group of one, whose z-score is undefined. Computed in fp64, returned so.
    """
    if groups.ndim != 1 or values.shape[:1] != groups.shape or values.ndim not in (1, 2):
        raise ValueError(
            f"values: expected [B] or [B, M] with groups [B], got {list(values.shape)} and {list(groups.shape)}"
        )
    if std not in ("group", "global"):
        raise ValueError(f"std: expected 'group' or 'global', got {std!r}")
    _, index, sizes = groups.unique(return_inverse=True, return_counts=True)
    if (sizes == 1).any():
        lone = groups[sizes[index] == 1][0].item()
        raise ValueError(f"groups: a z-score needs at least 2 members per group, group {lone} has 1; raise group_size")
    u = values.double().reshape(len(groups), -1)
    defined = ~u.isnan()

    def group_sum(x: Tensor) -> Tensor:  # [B, M] -> [B, M], each row holding the sum of its group
        zeros = x.new_zeros(len(sizes), x.shape[1])
        return zeros.index_add(0, index, x.masked_fill(~defined, 0.0))[index]

    # Distances from the group's minimum instead of raw values: a constant group is then exactly zero.
    lowest = u.new_full((len(sizes), u.shape[1]), torch.inf)
    lowest = lowest.scatter_reduce(0, index[:, None].expand_as(u), u.masked_fill(~defined, torch.inf), "amin")[index]
    distance = (u - lowest).masked_fill(~defined, 0.0)
    count = group_sum(defined.double())
    centred = distance - group_sum(distance) / count.clamp_min(1)
    group_std = (group_sum(centred.square()) / (count - int(unbiased)).clamp_min(1)).sqrt()
    scale = group_std
    if std == "global":
        total = defined.sum(dim=0).double()
        mean = u.nanmean(dim=0)
        scale = ((u - mean).square().nansum(dim=0) / (total - int(unbiased)).clamp_min(1)).sqrt().expand_as(u)
    z = (centred / (scale + eps)).masked_fill(~defined | (group_std < min_std), 0.0)
    # eps may be 0: a constant group is 0/0 there, and 0 by definition.
    return z.masked_fill(centred == 0, 0.0).reshape(values.shape)


# A credit gives the scalar u[b, k] that turn k of trajectory b is judged by: [B, K], aggregator -> [B, K].


def _broadcast(values: Tensor, how: str) -> Tensor:
    return aggregate(values, how)[:, None].expand_as(values)


def _per_turn(values: Tensor, how: str) -> Tensor:
    return values


def _reward_to_go(values: Tensor, how: str) -> Tensor:
    return torch.stack([aggregate(values[:, turn:], how) for turn in range(values.shape[1])], dim=1)


CREDITS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "broadcast": _broadcast,
    "per_turn": _per_turn,
    "reward_to_go": _reward_to_go,
}

# A fusion turns {reward: u [B, K]} into advantages [B, K]; `z` standardises one [B, K] tensor in its groups.
Standardise = Callable[[Tensor], Tensor]


def _fuse_rewards(scalars: dict[str, Tensor], weights: Mapping[str, float], groups: Tensor, z: Standardise) -> Tensor:
    """z(Σ w u). A reward undefined for a whole group adds nothing there; undefined for one member, it excludes it."""
    index = groups.unique(return_inverse=True)[1]
    total = torch.zeros_like(next(iter(scalars.values())))
    some_defined = torch.zeros_like(total, dtype=torch.bool)
    for name, u in scalars.items():
        defined = (~u.isnan()).double()
        in_group = torch.zeros_like(defined).index_add(0, index, defined)[index] > 0
        total = total + weights[name] * u.masked_fill(~in_group, 0.0)
        some_defined |= in_group
    return z(total.masked_fill(~some_defined, torch.nan))


def _fuse_advantages(
    scalars: dict[str, Tensor], weights: Mapping[str, float], groups: Tensor, z: Standardise
) -> Tensor:
    """Σ w z(u): every reward is brought to the same scale first (MT-EditFlow's finding)."""
    return torch.stack([weights[name] * z(u) for name, u in scalars.items()]).sum(dim=0)


FUSIONS: dict[str, Callable[[dict[str, Tensor], Mapping[str, float], Tensor, Standardise], Tensor]] = {
    "reward": _fuse_rewards,
    "advantage": _fuse_advantages,
}


def _zero_std(advantages: Tensor, rewards: dict[str, Tensor], groups: Tensor) -> Tensor:
    """flow_grpo's filter: rows without any advantage, such as those of a group without spread, carry no gradient."""
    return (advantages != 0).any(dim=1)


# A filter picks the rows worth a forward: (advantages [B, K], rewards, groups) -> bool [B].
FILTERS: dict[str, Callable[[Tensor, dict[str, Tensor], Tensor], Tensor]] = {
    "none": lambda advantages, rewards, groups: torch.ones(len(advantages), dtype=torch.bool),
    "zero_std": _zero_std,
}


def _one_of(table: Mapping[str, object]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in table:
            raise ValueError(f"expected one of {', '.join(table)}, got {name!r}")
        return name

    return AfterValidator(check)


class AdvantageConfig(BaseModel):
    """How rewards become advantages."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    aggregator: Annotated[str, _one_of(AGGREGATORS)] = Field(
        default="mean", description="over turns: mean, last, product (of rewards >= 0)"
    )
    fusion: Annotated[str, _one_of(FUSIONS)] = Field(
        default="advantage", description="of several rewards: 'advantage' Σ w·z(h(r)), 'reward' z(Σ w·h(r))"
    )
    credit: Annotated[str, _one_of(CREDITS)] = Field(
        default="broadcast", description="over turns: broadcast, per_turn, reward_to_go"
    )
    std: Literal["group", "global"] = Field(
        default="group", description="deviation of each group, or of the whole batch"
    )
    unbiased: bool = Field(default=False, description="divide the variance by n - 1")
    eps: float = Field(default=1e-4, ge=0, description="added to the standard deviation")
    min_std: float = Field(default=0.0, ge=0, description="a group with a smaller deviation gets advantage 0")
    filter: Annotated[str, _one_of(FILTERS)] = Field(
        default="zero_std", description="rows left out of the update: none, zero_std (no advantage)"
    )


@dataclass(frozen=True)
class AdvantageResult:
    """advantages fp32 [B, K] (0 where excluded) and keep bool [B] on the rewards' device; stats: floats for the log."""

    advantages: Tensor
    keep: Tensor
    stats: dict[str, float]


def advantages(
    rewards: dict[str, Tensor], groups: Tensor, config: AdvantageConfig, *, weights: Mapping[str, float]
) -> AdvantageResult:
    """Advantages of B trajectories of K turns.

    rewards: {name: [B, K] float, NaN where undefined}; groups: int64 [B], one id per (reference image, instructions);
    weights: {name: weight}, e.g. content consistency at λ = 0.3 beside instruction following at 1.
    Computed in fp64 on the host, so that the result does not depend on the device. A reward that is NaN everywhere
    warns; when no reward is defined anywhere, or one is infinite, or shapes disagree, ValueError names it.
    """
    if not rewards:
        raise ValueError("rewards: expected at least one reward, got none")
    if missing := sorted(set(rewards) ^ set(weights)):
        raise ValueError(f"weights: expected one per reward, rewards and weights differ in {', '.join(missing)}")
    shape = next(iter(rewards.values())).shape
    for name, value in rewards.items():
        if value.ndim != 2 or value.shape != shape or value.numel() == 0:
            raise ValueError(
                f"rewards[{name!r}]: expected [B, K] = {list(shape)} like the rest, got {list(value.shape)}"
            )
        if value.isinf().any():
            row = value.isinf().any(dim=1).nonzero()[0].item()
            raise ValueError(f"rewards[{name!r}]: infinite in row {row}; return NaN where a reward is undefined")
    if groups.shape != shape[:1]:
        raise ValueError(f"groups: expected [B] = [{shape[0]}], one id per trajectory, got {list(groups.shape)}")
    device = next(iter(rewards.values())).device
    rewards = {name: value.detach().to("cpu", torch.float64) for name, value in rewards.items()}
    groups = groups.cpu()
    undefined = [name for name, value in rewards.items() if value.isnan().all()]
    if len(undefined) == len(rewards):
        raise ValueError(f"rewards: NaN for every trajectory and turn in {', '.join(undefined)}; nothing to learn from")
    if undefined:
        warnings.warn(f"reward {', '.join(undefined)} is NaN for every trajectory of this batch", stacklevel=2)

    def z(u: Tensor) -> Tensor:
        return group_zscore(u, groups, std=config.std, unbiased=config.unbiased, eps=config.eps, min_std=config.min_std)

    credit = CREDITS[config.credit]
    scalars = {name: credit(value, config.aggregator) for name, value in rewards.items()}
    result = FUSIONS[config.fusion](scalars, weights, groups, z).float()
    keep = FILTERS[config.filter](result, rewards, groups)
    stats = {"advantage/abs_mean": result.abs().mean().item(), "advantage/kept": keep.double().mean().item()}
    for name, value in rewards.items():
        stats[f"reward/{name}"] = value.nanmean().item()
        stats[f"reward_nan/{name}"] = value.isnan().double().mean().item()
    return AdvantageResult(result.to(device), keep.to(device), stats)


def shuffle_advantages(result: AdvantageResult, seed: int) -> AdvantageResult:
    """The control run: whole rows [K] of the batch's advantages, and `keep` with them, in a seeded random order.

    The distribution of advantages stays, their tie to the trajectories goes: a rise that remains is not the reward's.
    """
    order = torch.randperm(len(result.advantages), generator=torch.Generator().manual_seed(seed))
    order = order.to(result.advantages.device)
    return replace(result, advantages=result.advantages[order], keep=result.keep[order])
