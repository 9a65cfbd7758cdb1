"""Audits of trained rewards: hand-made scores whose gap is known."""

import json

import numpy as np
import pytest
import torch

from mtedit_fast.training.config import RewardConfig, TrainConfig
from mtedit_fast.training.overoptimization import audit
from mtedit_fast.training.report import write_report

JUDGE = RewardConfig(name="judge", path="a:b", audit="oracle")
ORACLE = RewardConfig(name="oracle", path="a:c", weight=0.0)


def chains(mean, spread=0.2, n=200, turns=3, seed=0):
    return mean + spread * torch.randn(n, turns, generator=torch.Generator().manual_seed(seed))


def test_a_judge_that_rises_with_its_audit_is_not_flagged():
    before = {"judge": chains(2.0), "oracle": chains(2.0, seed=1)}
    after = {name: value + 1 for name, value in before.items()}
    found = audit([JUDGE, ORACLE], before, after)["judge"]
    assert found.reward.mean == pytest.approx(1)
    assert found.truth.mean == pytest.approx(1)
    assert found.gap.mean == pytest.approx(0, abs=1e-6)
    assert not found.hacked
    assert "Reward hacking" not in found.describe("judge")


def test_a_judge_that_rises_alone_is_flagged_with_its_gap():
    before = {"judge": chains(2.0), "oracle": chains(2.0, seed=1)}
    after = {"judge": before["judge"] + 1, "oracle": before["oracle"] + 0.25}
    found = audit([JUDGE, ORACLE], before, after)["judge"]
    assert found.gap.mean == pytest.approx(0.75, abs=1e-5)
    assert found.hacked
    assert "Reward hacking" in found.describe("judge")
    assert found.as_dict()["hacked"] is True


def test_a_gap_within_noise_is_not_flagged():
    before = {"judge": chains(2.0), "oracle": chains(2.0, seed=1)}
    after = {"judge": before["judge"] + chains(0.02, 2.0, seed=2), "oracle": before["oracle"]}
    assert not audit([JUDGE, ORACLE], before, after)["judge"].hacked


def test_the_interval_is_that_of_a_normal_mean():
    noise = torch.randn(5000, generator=torch.Generator().manual_seed(3)).double()
    before = {"judge": torch.zeros(5000, 1), "oracle": torch.zeros(5000, 1)}
    found = audit([JUDGE, ORACLE], before, {"judge": noise[:, None], "oracle": torch.zeros(5000, 1)})["judge"]
    half = 1.96 * noise.std().item() / np.sqrt(5000)
    assert found.gap.high - found.gap.low == pytest.approx(2 * half, rel=0.05)


def test_undefined_chains_are_left_out():
    before = {"judge": chains(2.0, n=4), "oracle": chains(2.0, n=4, seed=1)}
    after = {"judge": before["judge"] + 1, "oracle": before["oracle"] + 1}
    after["judge"][0, 1] = torch.nan
    assert audit([JUDGE, ORACLE], before, after)["judge"].reward.mean == pytest.approx(1)
    after["judge"][:] = torch.nan
    assert audit([JUDGE, ORACLE], before, after) == {}


@pytest.mark.parametrize("audit_name", ["judge", "consistency", "nobody"])
def test_an_audit_must_be_a_reward_that_is_only_logged(audit_name):
    rewards = [
        {"name": "judge", "path": "a:b", "audit": audit_name},
        {"name": "consistency", "path": "a:d", "weight": 0.3},
        {"name": "oracle", "path": "a:c", "weight": 0.0},
    ]
    with pytest.raises(ValueError, match=r"judge.audit: expected the name of a reward of weight 0 \(oracle\)"):
        TrainConfig.model_validate({"data": {"path": "x"}, "rewards": rewards})


def test_report_draws_the_audit_and_names_hacking(tmp_path):
    before = {"judge": chains(2.0), "oracle": chains(2.0, seed=1)}
    after = {"judge": before["judge"] + 1, "oracle": before["oracle"] + 0.25}
    found = audit([JUDGE, ORACLE], before, after)["judge"]
    summary = {
        "iterations": 2,
        "seconds": 1.0,
        "max_ratio_error_first_update": None,
        "audits": {"judge": found.as_dict() | {"text": found.describe("judge")}},
    }
    lines = [{"iteration": i, "reward/judge": 2.0 + i, "reward/oracle": 2.0} for i in (1, 2)]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = write_report(tmp_path).read_text()
    assert "Can the reward be trusted?" in html
    assert "<b>judge +1.000, oracle +0.250. Reward hacking" in html
