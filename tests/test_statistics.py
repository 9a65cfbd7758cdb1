"""Statistics of rewards against plain loops over floats."""

import math
import statistics

import pytest
import torch

from mtedit_fast.training.advantages import AdvantageConfig, advantages
from mtedit_fast.training.reward_statistics import reward_statistics

NAN = float("nan")
KINDS = ["color_alter", "subject_add", "text_change"]


def mean(values):
    kept = [v for v in values if not math.isnan(v)]
    return statistics.fmean(kept) if kept else NAN


def slow_statistics(name, rows, groups, types):
    """rows: [B][K] floats."""
    turns = range(len(rows[0]))
    stats = {f"reward/{name}": mean(v for row in rows for v in row)}
    for k in turns:
        stats[f"reward/{name}/turn{k + 1}"] = mean(row[k] for row in rows)
    for kind in {kind for row in types for kind in row}:
        pairs = [(v, t) for row, chain in zip(rows, types, strict=True) for v, t in zip(row, chain, strict=True)]
        stats[f"reward/{name}/type/{kind}"] = mean(v for v, t in pairs if t == kind)
    deviations, flat = [], []
    for group in set(groups):
        columns = [[row[k] for row, g in zip(rows, groups, strict=True) if g == group] for k in turns]
        columns = [kept for column in columns if (kept := [v for v in column if not math.isnan(v)])]
        deviations += [statistics.pstdev(kept) for kept in columns]
        if columns:
            flat.append(all(min(kept) == max(kept) for kept in columns))
    stats[f"reward_std/{name}"] = mean(deviations)
    stats[f"reward_zero_std/{name}"] = mean(map(float, flat))
    stats[f"reward_nan/{name}"] = mean(float(math.isnan(v)) for row in rows for v in row)
    return stats


def batch(seed=0):
    """Groups of 2, 3 and 5 members, shuffled; NaN here and there, one constant group, one undefined in f."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.tensor([7] * 2 + [-2] * 3 + [40] * 5)[torch.randperm(10, generator=generator)]
    rewards = {name: torch.rand(10, 3, generator=generator, dtype=torch.float64) for name in ("if", "cc")}
    for value in rewards.values():
        value[torch.rand(10, 3, generator=generator) < 0.15] = NAN
    rewards["if"][groups == -2] = NAN
    rewards["cc"][groups == 7] = 0.3
    types = [[KINDS[int(i)] for i in row] for row in torch.randint(3, (10, 3), generator=generator)]
    return rewards, groups, types


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_slow_loops(seed):
    rewards, groups, types = batch(seed)
    stats = reward_statistics(rewards, groups, types)
    expected = {}
    for name, value in rewards.items():
        expected |= slow_statistics(name, value.tolist(), groups.tolist(), types)
    assert stats == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert {f"reward/if/turn{k}" for k in (1, 2, 3)} | {f"reward/cc/type/{kind}" for kind in KINDS} <= set(stats)
    without = reward_statistics(rewards, groups)
    assert without == pytest.approx({k: v for k, v in expected.items() if "/type/" not in k}, rel=1e-12, nan_ok=True)


def test_by_hand():
    value = torch.tensor([[0.0, 1.0], [0.5, NAN], [0.25, 0.25], [0.25, 0.25]])
    types = [["a", "b"], ["a", "b"], ["b", "a"], ["b", "a"]]
    assert reward_statistics({"if": value}, torch.tensor([0, 0, 1, 1]), types) == {
        "reward/if": 2.5 / 7,
        "reward/if/turn1": 0.25,
        "reward/if/turn2": 0.5,
        "reward/if/type/a": 0.25,
        "reward/if/type/b": 0.5,
        "reward_std/if": 0.25 / 4,
        "reward_zero_std/if": 0.5,
        "reward_nan/if": 1 / 8,
    }


def test_nothing_defined():
    value = torch.full((4, 2), NAN)
    stats = reward_statistics({"if": value}, torch.tensor([0, 0, 1, 1]), [["a", "b"]] * 4)
    assert stats.pop("reward_nan/if") == 1
    assert all(math.isnan(v) for v in stats.values())
    value[0, 0] = 0.75  # one member has no spread
    stats = reward_statistics({"if": value}, torch.tensor([0, 0, 1, 1]))
    assert (stats["reward/if/turn1"], stats["reward_std/if"], stats["reward_zero_std/if"]) == (0.75, 0, 1)
    assert math.isnan(stats["reward/if/turn2"])


def test_rewards_per_state_count_the_finished_image():
    rewards, groups, types = batch()
    states = torch.rand(10, 3, 4, dtype=torch.float64)
    states[..., -1] = rewards["cc"]
    states[..., 0] = NAN
    stats = reward_statistics({"cc": states}, groups, types)
    expected = reward_statistics({"cc": rewards["cc"]}, groups, types)
    assert stats.pop("reward_nan/cc") == pytest.approx((1 + expected.pop("reward_nan/cc")) / 4)
    assert stats == expected


def test_advantages_log_them():
    rewards, groups, types = batch()
    weights = {"if": 1.0, "cc": 0.0}
    result = advantages(rewards, groups, AdvantageConfig(), weights=weights, types=types)
    expected = reward_statistics(rewards, groups, types)
    kept = result.keep.double().mean().item()
    expected |= {"advantage/abs_mean": result.advantages.abs().mean().item(), "advantage/kept": kept}
    assert result.stats == pytest.approx(expected, nan_ok=True)
    assert 0 < kept < 1


def test_errors():
    value, groups = torch.rand(4, 2), torch.tensor([0, 0, 1, 1])
    for wrong in (value[:3], value[:, 0], value[:, :0], value[..., None, None]):
        with pytest.raises(
            ValueError, match=r"rewards\['if'\]: expected \[B, K\] or \[B, K, S\+1\] with groups \[B\], got"
        ):
            reward_statistics({"if": wrong}, groups)
    for types, got in (
        ([["a", "b"]] * 3, r"3 lists of \[2\]"),
        ([["a", "b"]] * 3 + [["a"]], r"4 lists of \[1, 2\]"),
        (["ab"] * 4, r"4 lists of \[1\]"),
    ):
        with pytest.raises(ValueError, match=r"types: expected 4 lists of 2 edit types, got " + got):
            reward_statistics({"if": value}, groups, types)
