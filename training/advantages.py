"""Rewards of multi-turn trajectories -> advantages: transform, aggregate turns, standardise in groups, fuse, filter.

Aggregators, credits, transforms, fusions and filters are entries of dictionaries (`aggregation`, `fusion`, `filters`):
a new one is one more entry, and the configuration then accepts its name.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal, Self

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from mtedit_fast.training.aggregation import AGGREGATORS, CREDITS, STEP_CREDITS, aggregate
from mtedit_fast.training.filters import FILTERS
from mtedit_fast.training.fusion import FUSIONS, TRANSFORMS, rescale
from mtedit_fast.training.grouping import group_zscore
from mtedit_fast.training.reward_statistics import reward_statistics

__all__ = [
    "AGGREGATORS",
    "CREDITS",
    "FILTERS",
    "FUSIONS",
    "TRANSFORMS",
    "AdvantageConfig",
    "AdvantageResult",
    "advantages",
    "aggregate",
    "group_zscore",
    "reward_statistics",
    "shuffle_advantages",
]


def _one_of(table: Mapping[str, object]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in table:
            raise ValueError(f"expected one of {', '.join(table)}, got {name!r}")
        return name

    return AfterValidator(check)


class AdvantageConfig(BaseModel):
    """How rewards become advantages."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    transform: Annotated[str, _one_of(TRANSFORMS)] = Field(
        default="none", description="of the raw rewards: none, win_rate in the group, log_tame (of wide rewards)"
    )
    aggregator: Annotated[str, _one_of(AGGREGATORS)] = Field(
        default="mean",
        description="h over turns: mean, last, min, discounted; of rewards >= 0: product, geomean, prefix_product_mean",
    )
    gamma: float = Field(default=0.9, gt=0, le=1, description="discount per turn of the discounted aggregator")
    fusion: Annotated[str, _one_of(FUSIONS)] = Field(
        default="advantage",
        description="of several rewards: 'advantage' Σ w·z(h(r)), 'reward' z(Σ w·h(r)), gdpo, firm, pareto",
    )
    credit: Annotated[str, _one_of(CREDITS)] = Field(
        default="broadcast", description="over turns: broadcast, per_turn, reward_to_go; over steps: dense_ode"
    )
    std: Literal["group", "global"] = Field(
        default="group", description="deviation of each group, or of the whole batch"
    )
    unbiased: bool = Field(default=False, description="divide the variance by n - 1")
    eps: float = Field(default=1e-4, ge=0, description="added to the standard deviation")
    min_std: float = Field(default=0.0, ge=0, description="a group with a smaller deviation gets advantage 0")
    filter: Annotated[str, _one_of(FILTERS)] = Field(
        default="zero_std",
        description="rows left out of the update: none, zero_std (no advantage), edit_r1_and, edit_r1_or",
    )

    @model_validator(mode="after")
    def _gains_are_no_rewards(self) -> Self:
        if self.fusion == "firm" and self.credit in STEP_CREDITS:
            raise ValueError(
                f"fusion: firm multiplies rewards, and credit {self.credit} gives gains, which may be negative; "
                "expected another fusion or credit"
            )
        return self


@dataclass(frozen=True)
class AdvantageResult:
    """advantages fp32 [B, K], or [B, K, S] by step (0 where excluded), and keep bool [B] on the rewards' device;
    stats: floats for the log.
    """

    advantages: Tensor
    keep: Tensor
    stats: dict[str, float]


def advantages(
    rewards: dict[str, Tensor],
    groups: Tensor,
    config: AdvantageConfig,
    *,
    weights: Mapping[str, float],
    ranges: Mapping[str, Sequence[float] | None] | None = None,
    binarize: Mapping[str, float | None] | None = None,
    types: Sequence[Sequence[str]] | None = None,
) -> AdvantageResult:
    """Advantages of B trajectories of K turns: the whole batch, gathered from every rank, in groups of any sizes.

    rewards: {name: [B, K] float, NaN where undefined}, or [B, K, S+1] with credit dense_ode: the reward of the image
    decoded from the clean estimate at each stored state s = 0..S of each turn, from which step s -> s+1 gets the
    z-score, in the group and per turn and step, of its gain; several rewards are fused as they are otherwise.
    groups: int64 [B], one id per (reference image, instructions).
    weights: {name: weight}, e.g. content consistency at λ = 0.3 beside instruction following at 1; a reward of weight
    0 is logged and nothing else.
    ranges {name: (lo, hi)} and binarize {name: τ}: of raw scores, see `fusion.rescale`; types: B lists of K edit
    types, for the log. The log's means are of the scores as given.
    Computed in fp64 on the host, so that the result does not depend on the device. A reward that is NaN everywhere
    warns; when no reward is defined anywhere, or one is infinite, or shapes disagree, ValueError names it.
    """
    _check(rewards, groups, config, weights)
    device = next(iter(rewards.values())).device
    rewards = {name: value.detach().to("cpu", torch.float64) for name, value in rewards.items()}
    groups = groups.cpu()
    used = {name: value for name, value in rewards.items() if weights[name] != 0}
    undefined = [name for name, value in rewards.items() if value.isnan().all()]
    if set(used) <= set(undefined):
        raise ValueError(f"rewards: NaN for every trajectory and turn in {', '.join(used)}; nothing to learn from")
    if undefined:
        warnings.warn(f"reward {', '.join(undefined)} is NaN for every trajectory of this batch", stacklevel=2)

    z = partial(
        group_zscore, groups=groups, std=config.std, unbiased=config.unbiased, eps=config.eps, min_std=config.min_std
    )
    h = partial(aggregate, how=config.aggregator, gamma=config.gamma)
    credit, by_step = CREDITS[config.credit], config.credit in STEP_CREDITS
    scaled = rescale(rewards, ranges, binarize)
    scaled = {name: scaled[name] for name in used}
    transformed = TRANSFORMS[config.transform](scaled, groups)
    scalars = {name: credit(value, h) for name, value in transformed.items()}
    result = FUSIONS[config.fusion](scalars, weights, groups, z).float()
    keep = FILTERS[config.filter](
        result,
        lambda: {name: h(value[..., -1] if by_step else value) for name, value in scaled.items()},
        weights,
        groups,
    )
    stats = {"advantage/abs_mean": result.abs().mean().item(), "advantage/kept": keep.double().mean().item()}
    return AdvantageResult(result.to(device), keep.to(device), stats | reward_statistics(rewards, groups, types))


def _check(rewards: dict[str, Tensor], groups: Tensor, config: AdvantageConfig, weights: Mapping[str, float]) -> None:
    if not rewards:
        raise ValueError("rewards: expected at least one reward, got none")
    if missing := sorted(set(rewards) ^ set(weights)):
        raise ValueError(f"weights: expected one per reward, rewards and weights differ in {', '.join(missing)}")
    if not any(weights.values()):
        raise ValueError(f"weights: expected at least one that is not 0, got 0 for {', '.join(weights)}")
    shape = next(iter(rewards.values())).shape
    by_step = config.credit in STEP_CREDITS
    for name, value in rewards.items():
        if value.ndim != 2 + by_step or value.numel() == 0 or (by_step and value.shape[2] < 2):
            expected = "[B, K, S+1], one reward per stored state with S >= 1," if by_step else "[B, K]"
            hint = "" if by_step or value.ndim != 3 else "; rewards per state need advantage.credit=dense_ode"
            raise ValueError(
                f"rewards[{name!r}]: expected {expected} for credit {config.credit}, got {list(value.shape)}{hint}"
            )
        if value.shape != shape:
            raise ValueError(f"rewards[{name!r}]: expected {list(shape)} like the rest, got {list(value.shape)}")
        if value.isinf().any():
            row = value.isinf().flatten(1).any(dim=1).nonzero()[0].item()
            raise ValueError(f"rewards[{name!r}]: infinite in row {row}; return NaN where a reward is undefined")
    if groups.shape != shape[:1]:
        raise ValueError(f"groups: expected [B] = [{shape[0]}], one id per trajectory, got {list(groups.shape)}")


def shuffle_advantages(result: AdvantageResult, seed: int) -> AdvantageResult:
    """The control run: whole rows of the batch's advantages, and `keep` with them, in a seeded random order.

    The distribution of advantages stays, their tie to the trajectories goes: a rise that remains is not the reward's.
    """
    order = torch.randperm(len(result.advantages), generator=torch.Generator().manual_seed(seed))
    order = order.to(result.advantages.device)
    return replace(result, advantages=result.advantages[order], keep=result.keep[order])
