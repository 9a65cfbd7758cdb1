"""The multi-turn study: one real run, and the table's figures from results written by hand."""

import json

import numpy as np
import pytest
from rich.console import Console

from mtedit_fast.training.playground import study
from mtedit_fast.training.playground.data import write_dataset
from mtedit_fast.training.playground.study import ARMS, BASE, Arm, read_results, run_arm, run_study, study_config
from mtedit_fast.training.playground.study_report import MARK, against_base, gains, table, write_study

SMALL = ("rollout.groups_per_iteration=2", "rollout.group_size=2", "rollout.micro_batch=4", "evaluation.chains=4")


def test_an_arm_trains_and_is_scored_over_three_turns(tmp_path):
    for split in ("train", "heldout"):
        write_dataset(tmp_path / "data", 6, split=split)
    arm = Arm("turns", "K=1", ("rollout.turns=1", *SMALL))
    run_arm(arm, tmp_path / "turns-K1-0", 0, 2)
    result = json.loads((tmp_path / "turns-K1-0" / "result.json").read_text())
    assert np.shape(result["success"]) == (4, 3)
    assert len(result["consistency"]) == 3
    assert result["iterations"] == 2
    assert np.shape(json.loads((tmp_path / "untrained.json").read_text())["success"]) == (4, 3)


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.folder)
def test_every_arm_is_a_valid_configuration_with_as_many_edits(arm, tmp_path):
    config = study_config(arm, tmp_path / "run", 3, 7)
    rollout = config.rollout
    assert rollout.groups_per_iteration * rollout.group_size * rollout.turns == 8 * 8 * 3
    assert (config.run.seed, config.run.iterations) == (3, 7)
    base = study_config(BASE, tmp_path / "run", 3, 7)
    assert (config == base) == (arm is BASE)


def write(folder, name, seed, success, consistency=0.9):
    run = folder / f"{name}-{seed}"
    run.mkdir(parents=True)
    content = {"success": success, "consistency": [0.99, 0.95, consistency], "iterations": 10}
    (run / "result.json").write_text(json.dumps(content))


@pytest.fixture
def results(tmp_path):
    """Four chains of three turns: untrained 1 of 4, the base 3 and 2 of 4, K=1 1 of 4 twice."""
    good, bad = [1, 1, 1], [1, 0, 1]
    (tmp_path / "untrained.json").write_text(json.dumps({"success": [good, bad, bad, bad]}))
    write(tmp_path, "base-base", 0, [good, good, good, bad])
    write(tmp_path, "base-base", 1, [good, good, bad, bad])
    for seed in (0, 1):
        write(tmp_path, "turns-K1", seed, [good, bad, bad, bad], 0.8)
    return tmp_path


def test_figures_of_the_table(results):
    untrained, (base, single) = read_results(results)
    assert gains(untrained, base).mean(1).tolist() == [0.5, 0.25]
    assert gains(untrained, single).mean() == 0
    assert against_base(base, base) is None
    mean, low, high = against_base(single, base)
    assert mean == -0.375  # (1 − 3)/4 and (1 − 2)/4
    assert low <= mean <= high <= 0
    text = table(untrained, [base, single])
    assert "| | untrained | | 100.0 / 25.0 / 25.0 % |" in text
    assert "| base | base | 2 | 100.0 / 62.5 / 62.5 % | +37.5 [" in text
    assert "| +50.0, +25.0 |" in text
    assert "| turns | K=1 | 2 | 100.0 / 25.0 / 25.0 % |" in text
    assert "-37.5 [" in text
    assert "| 0.800 |" in text


def test_page_keeps_what_stands_above_the_mark(results, tmp_path):
    page = tmp_path / "docs" / "multi_turn.md"
    write_study(results, page)
    text = page.read_text()
    page.write_text("# Findings\n\nours\n\n" + text[text.index(MARK) :] + "\nold")
    write_study(results, page)
    again = page.read_text()
    assert again.startswith("# Findings\n\nours\n")
    assert "old" not in again
    assert page.with_suffix(".png").stat().st_size > 1000


def test_finished_runs_are_kept_and_errors_are_named(results, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"only: expected one of .*turns.*, got 'turn'"):
        run_study(results, seeds=1, iterations=1, jobs=1, only="turn", console=Console(quiet=True))
    with pytest.raises(ValueError, match="no finished run; start one with"):
        read_results(tmp_path / "empty")
    monkeypatch.setattr(study, "ARMS", (BASE, Arm("turns", "K=1")))
    (results / "data").mkdir()
    (results / "data" / "heldout.jsonl").touch()
    before = (results / "base-base-0" / "result.json").stat().st_mtime_ns
    with pytest.raises(
        ValueError, match=r"iterations: expected 10, the length of the finished run in .*got 1; .*--output"
    ):
        run_study(results, seeds=2, iterations=1, jobs=1, only=None, console=Console(quiet=True))
    run_study(results, seeds=2, iterations=10, jobs=1, only=None, console=Console(quiet=True))
    assert (results / "base-base-0" / "result.json").stat().st_mtime_ns == before


def test_a_run_that_fails_is_named_after_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "ARMS", (BASE,))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "heldout.jsonl").write_text("not JSON")
    (tmp_path / "data" / "train.jsonl").write_text("not JSON")
    with pytest.raises(ChildProcessError, match=r"runs that failed: base-base-0; see log.txt"):
        run_study(tmp_path, seeds=1, iterations=1, jobs=1, only=None, console=Console())
    assert "run 1/1  base base, seed 0" in capsys.readouterr().out
    assert "not valid JSON" in (tmp_path / "base-base-0" / "log.txt").read_text()
