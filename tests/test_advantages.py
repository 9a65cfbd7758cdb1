"""Advantages against numpy fp64 formulas, and the properties every choice must keep."""

import itertools

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mtedit_fast.training.advantages import (
    AGGREGATORS,
    CREDITS,
    FUSIONS,
    AdvantageConfig,
    advantages,
    aggregate,
    group_zscore,
    shuffle_advantages,
)

NAN = float("nan")


def batch(n_groups=3, size=5, turns=3, seed=0):
    """Rewards 'f' and 'c' [B, K] in (0, 1) and shuffled, non-contiguous group ids [B]."""
    generator = torch.Generator().manual_seed(seed)
    n = n_groups * size
    groups = torch.arange(n_groups).repeat_interleave(size)[torch.randperm(n, generator=generator)] * 7 - 3
    rewards = {name: 0.05 + 0.9 * torch.rand(n, turns, generator=generator) for name in "fc"}
    return rewards, groups


def numpy_zscore(u, groups, std="group", unbiased=False, eps=1e-4):
    u, groups = np.asarray(u, np.float64), np.asarray(groups)
    out = np.zeros_like(u)
    for group in np.unique(groups):
        member = (groups == group) & ~np.isnan(u)
        if not member.any():
            continue
        spread = u[member] if std == "group" else u[~np.isnan(u)]
        out[member] = (u[member] - u[member].mean()) / (spread.std(ddof=int(unbiased)) + eps)
    return out


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [0.5, 0.25, 0.8, NAN]),
        ("last", [0.75, NAN, 0.8, NAN]),
        ("product", [0.25 * 0.5 * 0.75, 0.2 * 0.3, 0.8, NAN]),
    ],
)
def test_aggregate_leaves_undefined_turns_out(how, expected):
    values = torch.tensor([[0.25, 0.5, 0.75], [0.2, 0.3, NAN], [NAN, NAN, 0.8], [NAN, NAN, NAN]], dtype=torch.float64)
    np.testing.assert_allclose(aggregate(values, how).numpy(), expected, rtol=1e-15)


def test_aggregate_errors():
    with pytest.raises(ValueError, match=r"how: expected one of mean, last, product, got 'median'"):
        aggregate(torch.zeros(2, 3), "median")
    with pytest.raises(ValueError, match=r"values: expected shape \[B, K\].*got \[4\]"):
        aggregate(torch.zeros(4))
    with pytest.raises(ValueError, match=r"K >= 1 turns, got \[4, 0\]"):
        aggregate(torch.zeros(4, 0))


@pytest.mark.parametrize(
    ("std", "unbiased", "eps"), itertools.product(["group", "global"], [False, True], [1e-4, 1e-8])
)
def test_group_zscore_is_the_formula(std, unbiased, eps):
    rewards, groups = batch()
    u = rewards["f"][:, 0]
    u[4] = NAN
    z = group_zscore(u, groups, std=std, unbiased=unbiased, eps=eps)
    np.testing.assert_allclose(z.numpy(), numpy_zscore(u, groups, std, unbiased, eps), rtol=1e-12, atol=1e-13)
    assert z[4] == 0


def test_group_zscore_takes_columns_alone():
    rewards, groups = batch()
    values = rewards["f"].masked_fill(rewards["c"] < 0.3, NAN)
    both = group_zscore(values, groups, std="global")
    for turn in range(values.shape[1]):
        torch.testing.assert_close(both[:, turn], group_zscore(values[:, turn], groups, std="global"), rtol=0, atol=0)


def test_nan_member_leaves_the_statistics():
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    u = torch.tensor([0.1, 0.5, NAN, 0.3, NAN, NAN])
    z = group_zscore(u, groups)
    np.testing.assert_allclose(z[:2].numpy(), group_zscore(u[:2], groups[:2]).numpy(), rtol=1e-15)
    assert z[2:].tolist() == [0, 0, 0, 0]  # a single defined member is its own mean


@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_constant_group_is_exactly_zero(eps):
    u = torch.tensor([0.1] * 7 + [0.2, 0.9])
    groups = torch.tensor([5] * 7 + [2] * 2)
    z = group_zscore(u, groups, eps=eps)
    assert (z[:7] == 0).all()
    assert (z[7:] != 0).all()


def test_min_std_silences_nearly_constant_groups():
    u = torch.tensor([0.5, 0.5001, 0.1, 0.9])
    z = group_zscore(u, torch.tensor([0, 0, 1, 1]), min_std=0.01)
    assert z[:2].tolist() == [0, 0]
    assert z[3] > 0.99
    z = group_zscore(u, torch.tensor([0, 0, 1, 1]), min_std=0.01, std="global")
    assert z[:2].tolist() == [0, 0]


def test_group_zscore_errors():
    with pytest.raises(ValueError, match=r"at least 2 members per group, group 9 has 1; raise group_size"):
        group_zscore(torch.zeros(3), torch.tensor([4, 4, 9]))
    with pytest.raises(ValueError, match=r"expected \[B\] or \[B, M\] with groups \[B\], got \[3\] and \[2\]"):
        group_zscore(torch.zeros(3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"std: expected 'group' or 'global', got 'batch'"):
        group_zscore(torch.zeros(2), torch.zeros(2, dtype=torch.int64), std="batch")


NUMPY_AGGREGATORS = {"mean": np.nanmean, "last": lambda v, axis: v[:, -1], "product": np.nanprod}


@pytest.mark.parametrize(
    ("aggregator", "fusion", "credit"),
    itertools.product(AGGREGATORS, FUSIONS, ["broadcast", "per_turn", "reward_to_go"]),
)
def test_advantages_are_the_formula(aggregator, fusion, credit):
    rewards, groups = batch(seed=1)
    weights = {"f": 1.0, "c": 0.3}
    config = AdvantageConfig(aggregator=aggregator, fusion=fusion, credit=credit, std="global")
    result = advantages(rewards, groups, config, weights=weights)
    h = NUMPY_AGGREGATORS[aggregator]
    f, c = (rewards[name].double().numpy() for name in "fc")
    for turn in range(3):
        if credit == "broadcast":
            uf, uc = h(f, axis=1), h(c, axis=1)
        elif credit == "per_turn":
            uf, uc = f[:, turn], c[:, turn]
        else:
            uf, uc = h(f[:, turn:], axis=1), h(c[:, turn:], axis=1)
        if fusion == "reward":
            expected = numpy_zscore(uf + 0.3 * uc, groups, "global")
        else:
            expected = numpy_zscore(uf, groups, "global") + 0.3 * numpy_zscore(uc, groups, "global")
        np.testing.assert_allclose(result.advantages[:, turn].numpy(), expected, rtol=2e-7, atol=1e-12)
    assert result.advantages.dtype == torch.float32
    assert result.stats["reward/f"] == pytest.approx(f.mean(), rel=1e-12)


@pytest.mark.parametrize(
    ("aggregator", "fusion", "credit", "std"), itertools.product(AGGREGATORS, FUSIONS, CREDITS, ["group", "global"])
)
def test_permutation_equivariance(aggregator, fusion, credit, std):
    rewards, groups = batch(seed=2)
    rewards["c"][3, 1] = NAN
    weights = {"f": 1.0, "c": 0.3}
    config = AdvantageConfig(aggregator=aggregator, fusion=fusion, credit=credit, std=std)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(5))
    straight = advantages(rewards, groups, config, weights=weights)
    permuted = advantages({k: v[order] for k, v in rewards.items()}, groups[order], config, weights=weights)
    torch.testing.assert_close(permuted.advantages, straight.advantages[order], rtol=1e-6, atol=1e-7)
    assert permuted.keep.equal(straight.keep[order])


@pytest.mark.parametrize(("aggregator", "credit"), itertools.product(["mean", "last"], CREDITS))
def test_shift_invariance(aggregator, credit):
    rewards, groups = batch(seed=3)
    weights = {"f": 1.0, "c": 0.3}
    for fusion in FUSIONS:
        config = AdvantageConfig(aggregator=aggregator, fusion=fusion, credit=credit)
        shifted = {"f": rewards["f"].double() - 2.5, "c": rewards["c"].double()}
        torch.testing.assert_close(
            advantages(shifted, groups, config, weights=weights).advantages,
            advantages(rewards, groups, config, weights=weights).advantages,
            rtol=1e-6,
            atol=1e-6,
        )


@pytest.mark.parametrize("credit", CREDITS)
def test_affine_map_of_one_reward(credit):
    """Advantage-level fusion does not see a positive affine map of one reward, reward-level fusion does."""
    rewards, groups = batch(seed=4)
    mapped = {"f": rewards["f"], "c": 4 * rewards["c"].double() + 1}
    changed = {}
    for fusion in FUSIONS:
        config = AdvantageConfig(fusion=fusion, credit=credit, eps=1e-12)
        before, after = (advantages(r, groups, config, weights={"f": 1.0, "c": 0.3}) for r in (rewards, mapped))
        changed[fusion] = (after.advantages - before.advantages).abs().max().item()
    assert changed["advantage"] < 1e-6
    assert changed["reward"] > 0.1


def test_product_sees_a_shift_before_but_not_after_aggregation():
    rewards, groups = batch(seed=5)
    config = AdvantageConfig(aggregator="product", eps=1e-12)
    before = advantages({"f": rewards["f"]}, groups, config, weights={"f": 1.0}).advantages
    after = advantages({"f": rewards["f"] + 1}, groups, config, weights={"f": 1.0}).advantages
    assert (before - after).abs().max() > 0.05
    u = aggregate(rewards["f"].double(), "product")
    torch.testing.assert_close(
        group_zscore(3 * u + 7, groups, eps=1e-12).float(), group_zscore(u, groups, eps=1e-12).float()
    )


def test_reward_level_fusion_with_undefined_rewards():
    """Undefined for the whole group: the other reward decides. Undefined for one member: that member is excluded."""
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    f = torch.tensor([[0.1], [0.4], [0.9], [0.2], [0.6], [0.7]])
    c = torch.tensor([[NAN], [NAN], [NAN], [0.5], [NAN], [0.9]])
    result = advantages({"f": f, "c": c}, groups, AdvantageConfig(fusion="reward"), weights={"f": 1.0, "c": 0.5})
    expected = numpy_zscore([0.1, 0.4, 0.9, 0.45, NAN, 1.15], groups)
    np.testing.assert_allclose(result.advantages[:, 0].numpy(), expected, rtol=1e-6, atol=1e-9)
    assert result.keep.tolist() == [True, True, True, True, False, True]
    assert result.stats["reward_nan/c"] == pytest.approx(4 / 6)


def test_zero_std_filter_drops_rows_without_advantage():
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    f = torch.tensor([[0.3, 0.3]] * 3 + [[0.1, 0.2], [0.5, 0.5], [NAN, NAN]])
    result = advantages({"f": f}, groups, AdvantageConfig(), weights={"f": 1.0})
    assert result.keep.tolist() == [False, False, False, True, True, False]
    assert result.stats["advantage/kept"] == pytest.approx(2 / 6)
    everything = advantages({"f": f}, groups, AdvantageConfig(filter="none"), weights={"f": 1.0})
    assert everything.keep.all()
    assert everything.advantages.equal(result.advantages)


def test_shuffle_moves_whole_rows():
    rewards, groups = batch(n_groups=4, seed=6)
    rewards["f"][groups == groups[0]] = 0.5
    del rewards["c"]
    result = advantages(rewards, groups, AdvantageConfig(credit="per_turn"), weights={"f": 1.0})
    shuffled = shuffle_advantages(result, seed=3)
    assert not shuffled.advantages.equal(result.advantages)
    assert sorted(shuffled.advantages.tolist()) == sorted(result.advantages.tolist())
    assert shuffled.keep.equal((shuffled.advantages != 0).any(dim=1))
    assert shuffle_advantages(result, seed=3).advantages.equal(shuffled.advantages)
    assert not shuffle_advantages(result, seed=4).advantages.equal(shuffled.advantages)


def test_advantages_errors():
    f = torch.rand(4, 2)
    groups = torch.tensor([0, 0, 1, 1])
    nothing = torch.full_like(f, NAN)
    config = AdvantageConfig()
    cases = [
        ({}, groups, {}, r"rewards: expected at least one reward"),
        ({"f": f}, groups, {"g": 1.0}, r"weights: expected one per reward, rewards and weights differ in f, g"),
        ({"f": f, "c": f[:, :1]}, groups, {"f": 1.0, "c": 1.0}, r"rewards\['c'\]: expected \[B, K\] = \[4, 2\]"),
        ({"f": f[0]}, groups, {"f": 1.0}, r"rewards\['f'\]: expected \[B, K\].*got \[2\]"),
        ({"f": f}, groups[:3], {"f": 1.0}, r"groups: expected \[B\] = \[4\].*got \[3\]"),
        ({"f": f}, torch.tensor([0, 0, 0, 1]), {"f": 1.0}, r"group 1 has 1; raise group_size"),
        ({"f": f / 0}, groups, {"f": 1.0}, r"rewards\['f'\]: infinite in row 0; return NaN"),
        ({"judge": nothing}, groups, {"judge": 1.0}, r"rewards: NaN for every trajectory and turn in judge"),
    ]
    for rewards, ids, weights, message in cases:
        with pytest.raises(ValueError, match=message):
            advantages(rewards, ids, config, weights=weights)
    with pytest.warns(UserWarning, match="reward judge is NaN for every trajectory"):
        result = advantages({"f": f, "judge": nothing}, groups, config, weights={"f": 1.0, "judge": 1.0})
    assert result.advantages.equal(advantages({"f": f}, groups, config, weights={"f": 1.0}).advantages)


def test_config_rejects_unknown_names():
    with pytest.raises(ValidationError, match="expected one of mean, last, product, got 'median'"):
        AdvantageConfig(aggregator="median")
    with pytest.raises(ValidationError, match="extra"):
        AdvantageConfig(aggregatr="mean")
