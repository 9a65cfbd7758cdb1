"""Advantages against numpy fp64 formulas, and the properties every choice must keep."""

import itertools

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mtedit_fast.training.advantages import (
    AGGREGATORS,
    AdvantageConfig,
    advantages,
    aggregate,
    group_zscore,
    shuffle_advantages,
)

NAN = float("nan")
TURN_CREDITS = ["broadcast", "per_turn", "reward_to_go"]


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
        ("min", [0.25, 0.2, 0.8, NAN]),
        ("geomean", [(0.25 * 0.5 * 0.75) ** (1 / 3), (0.2 * 0.3) ** 0.5, 0.8, NAN]),
        ("discounted", [(0.25 + 0.25 + 0.1875) / 1.75, (0.2 + 0.15) / 1.5, 0.8, NAN]),
        ("prefix_product_mean", [(0.25 + 0.125 + 0.09375) / 3, (0.2 + 0.06) / 2, 0.8, NAN]),
    ],
)
def test_aggregate_leaves_undefined_turns_out(how, expected):
    values = torch.tensor([[0.25, 0.5, 0.75], [0.2, 0.3, NAN], [NAN, NAN, 0.8], [NAN, NAN, NAN]], dtype=torch.float64)
    np.testing.assert_allclose(aggregate(values, how, gamma=0.5).numpy(), expected, rtol=1e-15)


@pytest.mark.parametrize("how", AGGREGATORS)
def test_aggregate_of_one_turn_is_that_turn(how):
    values = torch.tensor([[0.25], [0.0], [NAN]], dtype=torch.float64)
    np.testing.assert_allclose(aggregate(values, how).numpy(), [0.25, 0, NAN], rtol=1e-15)


def test_aggregate_at_the_ends():
    zeros = torch.tensor([[0.5, 0.0, 0.9]], dtype=torch.float64)
    assert aggregate(zeros, "geomean").item() == aggregate(zeros, "product").item() == 0
    np.testing.assert_allclose(aggregate(zeros, "prefix_product_mean"), [0.5 / 3], rtol=1e-15)
    np.testing.assert_allclose(aggregate(zeros, "discounted", gamma=1.0), aggregate(zeros), rtol=1e-15)
    middle = torch.tensor([[0.5, NAN, 0.9]], dtype=torch.float64)
    np.testing.assert_allclose(aggregate(middle, "discounted", gamma=0.5), [(0.5 + 0.225) / 1.25], rtol=1e-15)
    np.testing.assert_allclose(aggregate(middle, "prefix_product_mean"), [(0.5 + 0.45) / 2], rtol=1e-15)
    assert aggregate(-zeros, "min").item() == -0.9


def test_aggregate_errors():
    with pytest.raises(ValueError, match=r"how: expected one of mean, last, product, min, .*got 'median'"):
        aggregate(torch.zeros(2, 3), "median")
    with pytest.raises(ValueError, match=r"values: expected shape \[B, K\].*got \[4\]"):
        aggregate(torch.zeros(4))
    with pytest.raises(ValueError, match=r"K >= 1 turns, got \[4, 0\]"):
        aggregate(torch.zeros(4, 0))
    for how in ("product", "geomean", "prefix_product_mean"):
        with pytest.raises(ValueError, match=r"product over turns expects rewards >= 0, got -0.25; give the reward's"):
            aggregate(torch.tensor([[0.5, -0.25]]), how)
    for gamma in (0.0, 1.5, NAN):
        with pytest.raises(ValueError, match=r"gamma: expected a discount in \(0, 1\], got"):
            aggregate(torch.zeros(2, 3), "discounted", gamma=gamma)


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
    deep = group_zscore(values.reshape(-1, 1, 3, 1), groups, std="global")
    assert deep.equal(both.reshape(-1, 1, 3, 1))


def test_large_ids_stay_apart():
    """Ids that fp32 or fp64 would merge are different groups."""
    u = torch.tensor([0.0, 1.0, 5.0, 6.0])
    groups = torch.tensor([2**53, 2**53, 2**53 + 1, 2**53 + 1])
    assert group_zscore(u, groups).sign().tolist() == [-1, 1, -1, 1]


def test_groups_of_unequal_size_in_any_order():
    """What ranks gather: their groups one after another, of any size; another order moves rows, no more."""
    generator = torch.Generator().manual_seed(8)
    groups = torch.tensor([4] * 2 + [1] * 7 + [9] * 3)
    u = torch.rand(12, 3, generator=generator)
    parts = [(group, u[groups == group]) for group in (9, 1, 4)]
    reordered = group_zscore(torch.cat([x for _, x in parts]), torch.cat([torch.full((len(x),), g) for g, x in parts]))
    whole = group_zscore(u, groups)
    torch.testing.assert_close(reordered, torch.cat([whole[groups == g] for g, _ in parts]), rtol=0, atol=0)
    for group, x in parts:
        alone = group_zscore(x, torch.full((len(x),), group))
        torch.testing.assert_close(whole[groups == group], alone, rtol=0, atol=0)


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
    assert group_zscore(torch.tensor([0.0, 1.0]), torch.tensor([0, 0]), min_std=0.5, eps=0).tolist() == [-1, 1]
    z = group_zscore(u, torch.tensor([0, 0, 1, 1]), min_std=0.01, std="global")
    assert z[:2].tolist() == [0, 0]


def test_group_zscore_errors():
    with pytest.raises(ValueError, match=r"at least 2 members per group, group 9 has 1; raise group_size"):
        group_zscore(torch.zeros(3), torch.tensor([4, 4, 9]))
    with pytest.raises(ValueError, match=r"expected \[B, ...\] with groups \[B\], got \[3\] and \[2\]"):
        group_zscore(torch.zeros(3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"std: expected 'group' or 'global', got 'batch'"):
        group_zscore(torch.zeros(2), torch.zeros(2, dtype=torch.int64), std="batch")
    with pytest.raises(TypeError, match=r"groups: expected integer ids, got torch.float32, in which large ids merge"):
        group_zscore(torch.zeros(2), torch.zeros(2))


NUMPY_AGGREGATORS = {"mean": np.nanmean, "last": lambda v, axis: v[:, -1], "product": np.nanprod}


@pytest.mark.parametrize(
    ("aggregator", "fusion", "credit"),
    itertools.product(NUMPY_AGGREGATORS, ["reward", "advantage"], TURN_CREDITS),
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
        (
            {"f": f, "c": f[:, :1]},
            groups,
            {"f": 1.0, "c": 1.0},
            r"rewards\['c'\]: expected \[4, 2\] like the rest, got \[4, 1\]",
        ),
        ({"f": f[0]}, groups, {"f": 1.0}, r"rewards\['f'\]: expected \[B, K\].*got \[2\]"),
        ({"f": f[:0]}, groups[:0], {"f": 1.0}, r"rewards\['f'\]: expected \[B, K\] for credit broadcast, got \[0, 2\]"),
        (
            {"f": f[..., None]},
            groups,
            {"f": 1.0},
            r"got \[4, 2, 1\]; rewards per state need advantage.credit=dense_ode",
        ),
        ({"f": f}, groups, {"f": 0.0}, r"weights: expected at least one that is not 0, got 0 for f"),
        ({"f": f, "c": nothing}, groups, {"f": 0.0, "c": 1.0}, r"rewards: NaN for every trajectory and turn in c"),
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
    with pytest.raises(ValidationError, match=r"expected one of mean, last, product, min, geomean, .*got 'median'"):
        AdvantageConfig(aggregator="median")
    with pytest.raises(ValidationError, match="extra"):
        AdvantageConfig(aggregatr="mean")
    for key in ("transform", "fusion", "credit", "filter"):
        with pytest.raises(ValidationError, match=r"expected one of .*got 'nothing'"):
            AdvantageConfig(**{key: "nothing"})
    for gamma in (0.0, 1.01):
        with pytest.raises(ValidationError, match="gamma"):
            AdvantageConfig(gamma=gamma)
    with pytest.raises(ValidationError, match="fusion: firm multiplies rewards, and credit dense_ode gives gains"):
        AdvantageConfig(fusion="firm", credit="dense_ode")
