"""The study of beam search: its arms, the best of n it compares with, and what it keeps."""

import json
from itertools import combinations

import numpy as np
import pytest
from rich.console import Console

from mtedit_fast.training.playground import beam_study
from mtedit_fast.training.playground.beam_study import ARMS, MEMBERS, best_of, run_arm, run_study


def test_best_of_n_is_the_mean_over_all_choices_of_n():
    generator = np.random.default_rng(0)
    reward, value = generator.normal(size=(2, 5, 6))
    for n in range(1, 7):
        expected = [
            np.mean([v[max(chosen, key=lambda i, r=r: r[i])] for chosen in combinations(range(6), n)])
            for r, v in zip(reward, value, strict=True)
        ]
        assert best_of(reward, value, n) == pytest.approx(expected)
    half = (best_of(reward, value, 2) + best_of(reward, value, 3)) / 2
    assert best_of(reward, value, 2.5) == pytest.approx(half)
    assert best_of(reward, reward, 6) == pytest.approx(reward.max(1))


def test_arms_judge_and_measure_the_same_chains():
    searched = run_arm("width2", 0, 0, chains=2)
    assert np.shape(searched["reward"]) == np.shape(searched["success"]) == (2,)
    assert all(1 <= value <= 5 for value in searched["reward"])
    assert set(searched["success"]) <= {0, 1}
    # 1 row before the first branching, 4 and 4 candidates, 3 steps of 2; later turns begin with 2
    assert searched["rows"] == 1 + 4 + 4 + 6 + 2 * (2 + 4 + 4 + 6)
    assert searched["scored"] == 3 * (4 + 4) + 2
    sampled = run_arm("samples", 0, 0, chains=2)
    assert np.shape(sampled["reward"]) == np.shape(sampled["success"]) == (2, MEMBERS)
    assert sampled["rows"] == 18


@pytest.fixture
def finished(tmp_path):
    """Results of two seeds and parts, as `main` writes them."""
    generator = np.random.default_rng(1)
    for seed in range(2):
        for part in range(2):
            folder = tmp_path / f"{seed}-{part}"
            folder.mkdir()
            for arm in ARMS:
                shape = (25, MEMBERS) if arm == "samples" else (25,)
                rows = 18 if arm == "samples" else 24 * int(arm[-1])
                result = {
                    "rows": rows,
                    "scored": 3,
                    "reward": generator.uniform(1, 5, shape).tolist(),
                    "success": generator.integers(0, 2, shape).tolist(),
                }
                (folder / f"{arm}.json").write_text(json.dumps(result))
    return tmp_path


def test_summary_of_finished_runs(finished, monkeypatch):
    monkeypatch.setattr(beam_study, "run_in_processes", lambda *a, **k: pytest.fail("nothing is left to run"))
    console = Console(record=True, width=160)
    page = finished / "page.md"
    page.write_text(f"head\n{beam_study.MARK}\nold\n")
    summary = run_study(finished, parts=2, seeds=2, page=page, console=console)
    assert page.read_text().startswith(f"head\n{beam_study.MARK}\n\n50 held-out chains of 3 turns, 2 seeds; ")
    assert "old" not in page.read_text()
    assert page.read_text().endswith("![reward and success](page.png)\n")
    assert (finished / "page.png").is_file()
    assert json.loads((finished / "summary.json").read_text()) == summary
    assert (finished / "beam.png").stat().st_size > 10_000
    assert summary["chains"] == 50

    def read(arm, key):
        files = [[finished / f"{seed}-{part}/{arm}.json" for part in (0, 1)] for seed in (0, 1)]
        return np.stack([np.concatenate([json.loads(file.read_text())[key] for file in row]) for row in files])

    line = summary["widths"][1]
    assert line["reward"]["mean"] == pytest.approx(read("width2", "reward").mean())
    assert line["success"]["per_seed"] == pytest.approx(read("width2", "success").mean(1))
    assert line["equal_n"] == pytest.approx(48 / 18)
    equal = best_of(*(read("samples", key).reshape(100, MEMBERS) for key in ("reward", "success")), 48 / 18)
    gain = read("width2", "success").mean() - equal.mean()
    assert line["success"]["against_best_of_n"]["mean"] == pytest.approx(gain)
    step = read("width2", "reward").mean() - read("width1", "reward").mean()
    assert line["reward"]["against_previous"]["mean"] == pytest.approx(step)
    assert "against_previous" not in summary["widths"][0]["reward"]
    assert summary["best_of"][0]["reward"] == pytest.approx(read("samples", "reward").mean())
    shown = console.export_text()
    assert "50 held-out chains of 3 turns, 2 seeds" in shown
    assert all(f"width {width}" in shown for width in (1, 2, 4))


def test_only_what_is_missing_is_run(finished, monkeypatch):
    (finished / "1-0/width4.json").unlink()
    seen = []

    def run(name, runs, *, finished, jobs, console):
        seen.append(([one.folder.name for one in runs], finished, jobs))
        for one in runs:
            beam_study.main(str(one.folder), *one.call[1:])

    ran = []
    content = {"rows": 96, "scored": 3, "reward": [3.0] * 25, "success": [1] * 25}
    monkeypatch.setattr(beam_study, "run_in_processes", run)
    monkeypatch.setattr(beam_study, "run_arm", lambda *a: ran.append(a) or content)
    run_study(finished, parts=2, seeds=2, jobs=3, console=Console(quiet=True))
    assert seen == [(["1-0"], 3, 3)]
    assert ran == [("width4", 1, 0)]


@pytest.mark.parametrize("bad", [{"parts": 0}, {"seeds": 0}])
def test_bad_arguments(tmp_path, bad):
    with pytest.raises(ValueError, match="parts, seeds: expected >= 1"):
        run_study(tmp_path, **bad)
