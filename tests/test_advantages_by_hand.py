"""Transforms, fusions, filters and scales of the advantages, worked out by hand; and what they refuse."""

import math
import statistics

import pytest
import torch

from mtedit_fast.training.advantages import FILTERS, AdvantageConfig, advantages, shuffle_advantages
from mtedit_fast.training.fusion import rescale

NAN = float("nan")


def test_dense_ode_by_hand():
    """Two trajectories, one turn, two steps: gains 0.2 against 0.6, then 0.3 against 0.3."""
    f = torch.tensor([[[0.1, 0.3, 0.6]], [[0.2, 0.8, 1.1]]], dtype=torch.float64)
    config = AdvantageConfig(credit="dense_ode", eps=0.0)
    result = advantages({"f": f}, torch.zeros(2, dtype=torch.int64), config, weights={"f": 1.0})
    assert result.advantages.shape == (2, 1, 2)
    torch.testing.assert_close(result.advantages[:, 0, 0], torch.tensor([-1.0, 1.0]))
    assert result.stats["reward/f"] == pytest.approx(0.85)  # the finished images
    exact = torch.tensor([[[0.25, 0.5, 0.75]], [[0.5, 1.0, 1.25]]])
    result = advantages({"f": exact}, torch.zeros(2, dtype=torch.int64), config, weights={"f": 1.0})
    assert result.advantages[:, 0, 1].tolist() == [0, 0]
    assert result.keep.all()
    swapped = shuffle_advantages(result, seed=1).advantages
    assert swapped.equal(result.advantages) or swapped.equal(result.advantages.flip(0))


def test_dense_ode_expects_a_reward_per_state():
    groups, config = torch.tensor([0, 0]), AdvantageConfig(credit="dense_ode")
    for shape in ((2, 3), (2, 3, 1), (2, 3, 4, 5)):
        with pytest.raises(
            ValueError, match=r"\['f'\]: expected \[B, K, S\+1\], one reward per stored state with S >= 1"
        ):
            advantages({"f": torch.rand(shape)}, groups, config, weights={"f": 1.0})
    f = torch.rand(2, 3, 4)
    f[1, 2, 3] = torch.inf
    with pytest.raises(ValueError, match="infinite in row 1"):
        advantages({"f": f}, groups, config, weights={"f": 1.0})


def run(rewards, groups=None, weights=None, **config):
    rewards = {name: torch.as_tensor(value, dtype=torch.float64).reshape(-1, 1) for name, value in rewards.items()}
    groups = torch.zeros(len(next(iter(rewards.values()))), dtype=torch.int64) if groups is None else groups
    weights = weights or dict.fromkeys(rewards, 1.0)
    return advantages(rewards, torch.as_tensor(groups), AdvantageConfig(**config), weights=weights)


def test_win_rate_by_hand():
    """Wins over the others: 0, (1 + ½)/3, (1 + ½)/3, 3/3; equally spaced for z whatever the raw distances."""
    result = run({"f": [0.1, 0.2, 0.2, 9.0]}, transform="win_rate", eps=0.0).advantages[:, 0]
    torch.testing.assert_close(result, torch.tensor([-0.5, 0, 0, 0.5]) / math.sqrt(0.125))
    # an undefined member is no opponent: 0, ½, 1 among three
    result = run({"f": [0.1, NAN, 0.2, 9.0]}, transform="win_rate", eps=0.0).advantages[:, 0]
    torch.testing.assert_close(result, torch.tensor([-0.5, 0, 0, 0.5]) / math.sqrt(1 / 6))
    assert run({"f": [0.1, NAN, NAN, 0.1, 0.3]}, [0, 0, 0, 1, 1], transform="win_rate").advantages[0] == 0


def test_log_tame_by_hand():
    """h is 0.8 for the wide reward and 0 for the constant one, so the wide one alone is tamed."""
    wide, flat = [1.0, 9.0], [2.0, 2.0]
    result = run({"wide": wide, "flat": flat}, transform="log_tame", fusion="reward", std="global", eps=1.0)
    half = (math.log(10) - math.log(2)) / 2
    torch.testing.assert_close(result.advantages[:, 0], torch.tensor([-half, half]) / (half + 1))
    alone = run({"wide": wide}, transform="log_tame", eps=1.0).advantages[:, 0]
    torch.testing.assert_close(alone, torch.tensor([-4.0, 4.0]) / 5)
    # h is of the biased deviation, over what is defined: √3/2 exceeds 0.8, so the second reward is tamed
    a, b = [1.0, 9.0, NAN, NAN], [1.0, 1.0, 1.0, 5.0]
    tamed = run({"a": a, "b": b}, transform="log_tame", eps=1.0)
    by_hand = run({"a": a, "b": [math.log(1 + v) for v in b]}, eps=1.0)
    torch.testing.assert_close(tamed.advantages, by_hand.advantages)
    with pytest.raises(ValueError, match=r"rewards\['f'\]: transform log_tame expects rewards >= 0, got -0.5; give"):
        run({"f": [-0.5, 1.0]}, transform="log_tame")
    with pytest.warns(UserWarning, match="reward c is NaN"):
        undefined = run({"f": wide, "c": [NAN, NAN]}, transform="log_tame", eps=1.0)
    assert undefined.advantages[:, 0].equal(alone)


def test_gdpo_by_hand():
    """One reward, two groups: z is ±1 in one and 0 in the constant one, so the batch's deviation is √½."""
    result = run({"f": [0.0, 1.0, 0.5, 0.5]}, [0, 0, 1, 1], fusion="gdpo", eps=0.0)
    torch.testing.assert_close(result.advantages[:, 0], torch.tensor([-1, 1, 0, 0]) * math.sqrt(2))
    assert result.keep.tolist() == [True, True, False, False]
    # more rewards do not make larger advantages
    rewards = {name: [0.0, 1.0, 0.2, 0.4] for name in "abcdef"}
    many, one = (run(r, [0, 0, 1, 1], fusion="gdpo", eps=0.0) for r in (rewards, {"a": rewards["a"]}))
    torch.testing.assert_close(many.advantages, one.advantages)


def test_firm_by_hand():
    """R = Exec (0.6 + 0.4 Cons): nothing executed is worth nothing however consistent, weights play no part."""
    result = run({"e": [0.0, 1.0], "c": [1.0, 0.5]}, fusion="firm", eps=0.1, weights={"e": 2.0, "c": 0.3})
    torch.testing.assert_close(result.advantages[:, 0], torch.tensor([-0.4, 0.4]) / 0.5)
    # consistency undefined for a group: execution decides; for one member: it is excluded
    result = run({"e": [0.0, 1.0, 0.5, 0.7], "c": [NAN, NAN, 0.3, NAN]}, [0, 0, 1, 1], fusion="firm", eps=0.0)
    assert result.advantages[:, 0].tolist() == [-1, 1, 0, 0]
    # a reward of weight 0 is only logged
    third = {"e": [0.0, 1.0], "c": [1.0, 0.5], "log": [3.0, 4.0]}
    result = run(third, fusion="firm", eps=0.1, weights={"e": 1.0, "c": 1.0, "log": 0.0})
    torch.testing.assert_close(result.advantages[:, 0], torch.tensor([-0.8, 0.8]))
    assert result.stats["reward/log"] == 3.5
    for weights in ({"e": 1.0, "c": 1.0, "log": 1.0}, {"e": 1.0, "c": 0.0, "log": -1.0}, {"e": 1.0, "c": 0, "log": 0}):
        with pytest.raises(ValueError, match="fusion firm expects two of positive weight, execution first and consis"):
            run(third, fusion="firm", weights=weights)


def test_pareto_by_hand():
    """(0, 0) and (½, ½) are dominated by (½, 1); (1, 0) is not."""
    f, c = [0.0, 1.0, 0.5, 0.5], [0.0, 0.0, 0.5, 1.0]
    plain, masked = (run({"f": f, "c": c}, fusion=fusion) for fusion in ("advantage", "pareto"))
    assert masked.keep.tolist() == [False, True, False, True]
    assert masked.advantages[masked.keep].equal(plain.advantages[masked.keep])
    # the lower the better where the weight is negative: (0, 0) and (1, 0) and (½, ½) … only by the sign
    masked = run({"f": f, "c": c}, fusion="pareto", weights={"f": 1.0, "c": -1.0})
    assert masked.keep.tolist() == [False, True, False, False]
    # never across groups
    assert run({"f": [0.0, 0.5, 0.6, 1.0]}, [0, 0, 1, 1], fusion="pareto").keep.tolist() == [False, True, False, True]


def filtered(name, f, **extra):
    return run({"f": f}, torch.arange(3).repeat_interleave(4), filter=name, **extra).keep[::4].tolist()


def test_edit_r1_filters():
    solved, high, middle = [0.97, 0.98, 0.99, 0.96], [1.0, 1.0, 1.0, 0.7], [0.2, 0.9, 0.4, 0.3]
    # std 0.011, mean 0.975 · std 0.13, mean 0.925 · std 0.27
    assert filtered("edit_r1_and", solved + high + middle) == [False, True, True]
    assert filtered("edit_r1_or", solved + high + middle) == [False, False, True]
    narrow = [0.50, 0.51, 0.52, 0.53]
    assert filtered("edit_r1_and", narrow + [0.3] * 4 + middle) == [True, False, True]  # no spread: no gradient
    assert filtered("edit_r1_or", narrow + [0.3] * 4 + middle) == [False, False, True]


@pytest.mark.parametrize("name", ["edit_r1_and", "edit_r1_or"])
def test_edit_r1_scores_are_weighted_means_of_what_is_defined(name):
    f, c = [0.95, 0.96, 0.95, 0.1, 0.2, 0.9], [NAN, NAN, NAN, 0.9, 0.2, NAN]
    result = run({"f": f, "c": c}, [0, 0, 0, 1, 1, 1], weights={"f": 1.0, "c": 0.5}, filter=name)
    assert result.keep.tolist() == [False] * 3 + [True] * 3
    scores = [(0.1 + 0.45) / 1.5, 0.2, 0.9]
    assert statistics.pstdev(scores) > 0.05
    with pytest.raises(ValueError, match=r"\['f'\]: filter edit_r1 expects rewards in \[0, 1\], got 1 to 4; give the"):
        run({"f": [1.0, 4.0]}, filter=name)
    with pytest.raises(ValueError, match=r"weights\['f'\]: filter edit_r1 expects positive weights, got -1"):
        run({"f": [0.1, 0.4]}, filter=name, weights={"f": -1.0})


def test_edit_r1_looks_at_the_declared_range_and_the_finished_image():
    groups = torch.arange(2).repeat_interleave(2)
    scores = torch.tensor([5.0, 4.9, 1.0, 3.0])
    config = AdvantageConfig(filter="edit_r1_and")
    result = advantages({"f": scores[:, None]}, groups, config, weights={"f": 1.0}, ranges={"f": (1, 5)})
    assert result.keep.tolist() == [False, False, True, True]
    states = torch.stack([torch.ones(4), 1 + torch.arange(4) / 4, scores], dim=1)[:, None]
    config = AdvantageConfig(filter="edit_r1_and", credit="dense_ode")
    result = advantages({"f": states}, groups, config, weights={"f": 1.0}, ranges={"f": (1, 5)})
    assert result.keep.tolist() == [False, False, True, True]


@pytest.mark.parametrize("name", FILTERS)
def test_filters_return_a_row_mask_for_either_shape(name):
    groups = torch.arange(3).repeat_interleave(4)
    for shape, credit in (((12, 2), "per_turn"), ((12, 2, 3), "dense_ode")):
        f = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        f[:4] = 0.5
        config = AdvantageConfig(filter=name, credit=credit)
        result = advantages({"f": f}, groups, config, weights={"f": 1.0})
        assert result.keep.shape == (12,)
        assert result.keep.dtype == torch.bool
        assert result.keep.tolist() == [name == "none"] * 4 + [True] * 8
        assert result.stats["advantage/kept"] == result.keep.double().mean().item()


def test_rescale():
    scores = {"judge": torch.tensor([[1.0, 3.0, 5.0, 5.0001, NAN]], dtype=torch.float64), "c": torch.tensor([[0.3]])}
    scaled = rescale(scores, {"judge": [1, 5], "c": None})
    torch.testing.assert_close(
        scaled["judge"], torch.tensor([[0, 0.5, 1, 1, NAN]], dtype=torch.float64), equal_nan=True, rtol=0, atol=0
    )
    assert scaled["c"] is scores["c"]
    binary = rescale(scores, {"judge": (1, 5)}, {"judge": 3.0, "c": None})["judge"]
    torch.testing.assert_close(
        binary, torch.tensor([[0, 1, 1, 1, NAN]], dtype=torch.float64), equal_nan=True, rtol=0, atol=0
    )
    assert rescale(scores, binarize={"c": 0.5})["c"].tolist() == [[0.0]]
    cases = [
        ({"if": (1, 5)}, None, r"ranges: no reward named if; rewards are judge, c"),
        (None, {"if": 3}, r"binarize: no reward named if; rewards are judge, c"),
        ({"judge": (5, 1)}, None, r"ranges\['judge'\]: expected \(lo, hi\) with lo < hi, got \[5, 1\]"),
        ({"judge": (5,)}, None, r"ranges\['judge'\]: expected \(lo, hi\)"),
        (
            {"judge": (0, 4)},
            None,
            r"rewards\['judge'\]: expected scores in its range \[0, 4\], got 5; correct the range",
        ),
        (
            {"judge": (2, 6)},
            None,
            r"rewards\['judge'\]: expected scores in its range \[2, 6\], got 1; correct the range",
        ),
        ({"judge": (1, 5)}, {"judge": 1}, r"binarize\['judge'\]: expected a threshold in \(1, 5\], got 1"),
        ({"judge": (1, 5)}, {"judge": 5.5}, r"binarize\['judge'\]: expected a threshold in \(1, 5\], got 5.5"),
    ]
    for ranges, binarize, message in cases:
        with pytest.raises(ValueError, match=message):
            rescale(scores, ranges, binarize)


def test_advantages_of_binary_and_of_rescaled_scores():
    groups, weights = torch.tensor([0, 0, 0, 1, 1, 1]), {"judge": 1.0}
    scores = {"judge": torch.tensor([[1.0, 4.0], [2.0, 5.0], [5.0, 3.0], [3.0, 3.0], [4.0, NAN], [1.0, 2.0]])}
    config = AdvantageConfig(aggregator="product")
    binary = advantages(scores, groups, config, weights=weights, binarize={"judge": 3.0})
    by_hand = {"judge": torch.tensor([[0, 1.0], [0, 1], [1, 1], [1, 1], [1, NAN], [0, 0]])}
    assert binary.advantages.equal(advantages(by_hand, groups, config, weights=weights).advantages)
    assert binary.stats["reward/judge"] == pytest.approx(33 / 11)  # logged as given
    fine = advantages(scores, groups, config, weights=weights, ranges={"judge": (1, 5)})
    by_hand = {"judge": (scores["judge"].double() - 1) / 4}
    assert fine.advantages.equal(advantages(by_hand, groups, config, weights=weights).advantages)
    assert not fine.advantages.equal(binary.advantages)
