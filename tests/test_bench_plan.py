"""The bench of the planner: what a row says follows from its parts, and memory, which has no noise, is as predicted."""

import csv
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench_plan

PHASES = ("rollout", "reward", "update")


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_follows_from_its_parts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_plan, "BASE", (*bench_plan.BASE[1:], "rollout.groups_per_iteration=2"))
    out = tmp_path / "plan.csv"
    arguments = ["--out", str(out), "--repetitions", "1", "--change", "base", "--device", "cpu"]
    bench_plan.main(arguments)
    (row,) = rows(out)
    for kind, total in (("", "measured_s"), ("predicted_", "predicted_s")):
        assert sum(float(row[f"{kind}{phase}_s"]) for phase in PHASES) == pytest.approx(float(row[total]), abs=2e-4)
    assert row["p20_s"] == row["p80_s"] == row["measured_s"]  # one repetition
    apart = 100 * (float(row["predicted_s"]) / float(row["measured_s"]) - 1)
    assert float(row["error_percent"]) == pytest.approx(apart, abs=0.2)
    assert abs(float(row["error_bytes_percent"])) < 15
    assert "update's memory" in capsys.readouterr().out
    bench_plan.main(arguments)  # of this commit already
    assert len(rows(out)) == 1


def test_only_a_cpu_has_the_playground(capsys):
    with pytest.raises(SystemExit):
        bench_plan.main(["--device", "cuda"])
    assert "mtedit-fast plan --probe" in capsys.readouterr().err


def test_every_change_is_a_configuration(tmp_path):
    for change in bench_plan.CHANGES:
        assert bench_plan.settings(tmp_path, change).rollout.group_size
