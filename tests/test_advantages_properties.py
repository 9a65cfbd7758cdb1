"""What must hold of any rewards, not only of those that one thought of."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_advantages_switches import TURN_CREDITS

from mtedit_fast.training.advantages import (
    AGGREGATORS,
    CREDITS,
    FILTERS,
    FUSIONS,
    TRANSFORMS,
    AdvantageConfig,
    advantages,
    aggregate,
    group_zscore,
)

pytestmark = pytest.mark.filterwarnings("ignore:reward .* is NaN")
WEIGHTS = {"f": 1.0, "c": 0.3}
# Invariant to a shift of every turn's reward; the others are products.
ADDITIVE = ["mean", "last", "min", "discounted"]
PRODUCTS = sorted(set(AGGREGATORS) - set(ADDITIVE))
COMBINATIONS = [pair for pair in itertools.product(FUSIONS, CREDITS) if pair != ("firm", "dense_ode")]
quick = settings(max_examples=15, deadline=None, derandomize=True, database=None)


@st.composite
def batches(draw, *, undefined=True, steps=True):
    """Rewards f and c on the grid {1/64 … 1}, in groups of unequal size in any order; columns of f without ties."""
    sizes = draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))
    turns, states = draw(st.integers(1, 3)), draw(st.integers(2, 4)) if steps else 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    ids = draw(st.lists(st.integers(-(2**62), 2**62), min_size=len(sizes), max_size=len(sizes), unique=True))
    groups = torch.tensor([i for i, size in zip(ids, sizes, strict=True) for _ in range(size)])
    groups = groups[torch.randperm(len(groups), generator=generator)]
    shape = (len(groups), turns, states)
    rewards = {name: torch.randint(1, 65, shape, generator=generator).double() / 64 for name in "fc"}
    if undefined:
        share = draw(st.sampled_from([0.0, 0.2, 0.7]))
        rewards["c"][torch.rand(shape, generator=generator) < share] = math.nan
        rewards["f"][torch.rand(shape, generator=generator) < share / 4] = math.nan
        rewards["f"][0] = 0.5  # something stays defined
    return rewards, groups


def fit(rewards, credit):
    """[B, K, S+1] for dense_ode, the finished image's [B, K] for the others."""
    return rewards if credit == "dense_ode" else {name: value[..., -1] for name, value in rewards.items()}


def run(rewards, groups, weights=WEIGHTS, **config):
    config = AdvantageConfig(**config)
    return advantages(fit(rewards, config.credit), groups, config, weights={name: weights[name] for name in rewards})


@pytest.mark.parametrize(("fusion", "credit"), COMBINATIONS)
@quick
@given(
    data=batches(),
    aggregator=st.sampled_from(sorted(AGGREGATORS)),
    transform=st.sampled_from(sorted(TRANSFORMS)),
    chosen=st.sampled_from(sorted(FILTERS)),
    std=st.sampled_from(["group", "global"]),
    seed=st.integers(0, 100),
)
def test_permutation_equivariance_and_finiteness(fusion, credit, data, aggregator, transform, chosen, std, seed):
    """Members may come in any order, groups may have any ids: the same advantages, finite, 0 where undefined."""
    rewards, groups = data
    switches = {
        "fusion": fusion,
        "credit": credit,
        "aggregator": aggregator,
        "transform": transform,
        "filter": chosen,
        "std": std,
    }
    straight = run(rewards, groups, **switches)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    renamed = groups.unique(return_inverse=True)[1] * 3 - 5
    permuted = run({name: value[order] for name, value in rewards.items()}, renamed[order], **switches)
    # A spread that is only rounding, over eps, is the tolerance.
    torch.testing.assert_close(permuted.advantages, straight.advantages[order], rtol=1e-6, atol=1e-9)
    assert straight.advantages.isfinite().all()
    nothing = torch.stack([value.flatten(1).isnan().all(dim=1) for value in fit(rewards, credit).values()]).all(dim=0)
    assert (straight.advantages[nothing] == 0).all()


@pytest.mark.parametrize(
    ("aggregator", "credit", "fusion"), itertools.product(ADDITIVE, CREDITS, sorted(set(FUSIONS) - {"firm"}))
)
@quick
@given(data=batches(), shift=st.integers(-512, 512))
def test_shift_invariance(aggregator, credit, fusion, data, shift):
    """A constant added to one reward changes nothing; the grid makes the sum exact, so that only z can differ."""
    rewards, groups = data
    shifted = {"f": rewards["f"] + shift / 64, "c": rewards["c"]}
    before, after = (
        run(r, groups, aggregator=aggregator, credit=credit, fusion=fusion).advantages for r in (rewards, shifted)
    )
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("aggregator", "credit"), itertools.product(ADDITIVE, CREDITS))
@quick
@given(data=batches(), scale=st.sampled_from([0.25, 3.0, 1000.0]), shift=st.integers(-64, 64))
def test_advantage_level_fusion_does_not_see_an_affine_map_of_one_reward(aggregator, credit, data, scale, shift):
    rewards, groups = data
    mapped = {"f": rewards["f"], "c": scale * rewards["c"] + shift}
    for fusion in ("advantage", "gdpo"):
        before, after = (
            run(r, groups, aggregator=aggregator, credit=credit, fusion=fusion, eps=1e-13).advantages
            for r in (rewards, mapped)
        )
        # z of a spread far above the floor and above rounding; constant groups are 0 exactly on the grid
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("credit", CREDITS)
def test_reward_level_fusion_sees_an_affine_map_of_one_reward(credit):
    generator = torch.Generator().manual_seed(4)
    rewards = {name: torch.rand(12, 2, 3, generator=generator, dtype=torch.float64) for name in "fc"}
    groups = torch.arange(3).repeat_interleave(4)
    mapped = {"f": rewards["f"], "c": 4 * rewards["c"] + 1}
    before, after = (run(r, groups, credit=credit, fusion="reward").advantages for r in (rewards, mapped))
    assert (before - after).abs().max() > 0.1


@pytest.mark.parametrize("aggregator", PRODUCTS)
def test_products_see_a_shift_before_aggregation(aggregator):
    generator = torch.Generator().manual_seed(5)
    f = torch.rand(12, 3, 1, generator=generator, dtype=torch.float64)
    groups = torch.arange(3).repeat_interleave(4)
    before, after = (run({"f": x}, groups, aggregator=aggregator).advantages for x in (f, f + 1))
    assert (before - after).abs().max() > 0.05


@pytest.mark.parametrize("aggregator", AGGREGATORS)
@quick
@given(data=batches(undefined=False), scale=st.sampled_from([0.5, 7.0]), shift=st.integers(-8, 8))
def test_no_aggregator_sees_an_affine_map_after_aggregation(aggregator, data, scale, shift):
    rewards, groups = data
    u = aggregate(rewards["f"][..., -1], aggregator)
    u = (u * 2**20).round() / 2**20  # so that equal members stay equal under the map
    z, mapped = (group_zscore(x, groups, eps=1e-13) for x in (u, scale * u + shift))
    torch.testing.assert_close(mapped, z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("credit", CREDITS)
@quick
@given(data=batches(), power=st.sampled_from([0.5, 3.0]))
def test_win_rate_sees_only_the_order(credit, data, power):
    """Any increasing map of a reward leaves its win rates, and the mean win rate of a group's defined members is ½."""
    rewards, groups = data
    before, after = (
        run(r, groups, transform="win_rate", credit=credit).advantages
        for r in (rewards, {name: value**power for name, value in rewards.items()})
    )
    assert after.equal(before)
    rates = TRANSFORMS["win_rate"](rewards, groups)["c"]
    for group in groups.unique():
        mean = rates[groups == group].nanmean(dim=0)
        torch.testing.assert_close(mean[~mean.isnan()], torch.full_like(mean[~mean.isnan()], 0.5))


@pytest.mark.parametrize("credit", TURN_CREDITS)
@quick
@given(data=batches())
def test_pareto_keeps_someone_of_every_group_and_only_undominated(credit, data):
    rewards, groups = data
    plain, masked = (
        run(rewards, groups, fusion=fusion, credit=credit, filter="none").advantages
        for fusion in ("advantage", "pareto")
    )
    kept = masked != 0
    assert masked[kept].equal(plain[kept])
    for group in groups.unique():
        rows = groups == group
        best = plain[rows] == plain[rows].amax(dim=0)  # the best sum is never dominated
        assert (masked[rows] == plain[rows])[best].all()


@pytest.mark.parametrize(("fusion", "std"), itertools.product(["advantage", "reward"], ["group", "global"]))
@quick
@given(data=batches(undefined=False), eps=st.sampled_from([0.0, 1e-4, 0.1]))
def test_advantages_of_a_group_sum_to_zero(fusion, std, data, eps):
    rewards, groups = data
    result = run(rewards, groups, fusion=fusion, std=std, eps=eps, credit="per_turn").advantages.double()
    for group in groups.unique():
        torch.testing.assert_close(
            result[groups == group].sum(dim=0), torch.zeros(result.shape[1], dtype=torch.float64), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("fusion", FUSIONS)
@quick
@given(data=batches(undefined=False, steps=False))
def test_extremes(fusion, data):
    """A constant group is 0, an undefined one is 0, and neither changes the others while deviations are per group."""
    rewards, groups = data
    size = 3
    more = torch.cat([groups, torch.full((size,), 2**62 + 1), torch.full((size,), 2**62 + 2)])
    constant = {name: torch.full((size, *value.shape[1:]), 0.1) for name, value in rewards.items()}
    nothing = torch.full_like(constant["f"], math.nan)
    extended = {name: torch.cat([value, constant[name], nothing]) for name, value in rewards.items()}
    before, after = run(rewards, groups, fusion=fusion), run(extended, more, fusion=fusion)
    assert (after.advantages[len(groups) :] == 0).all()
    assert not after.keep[len(groups) :].any()
    if fusion != "gdpo":  # whose second z-score is over the batch
        assert after.advantages[: len(groups)].equal(before.advantages)
