"""The command: the demo and a user's own data end to end, and errors that fit in a line."""

import json
import sys

import pytest
from tiny import tiny_editor

from mtedit_fast import cli
from mtedit_fast.training.playground.data import write_dataset

SHORT = ["rollout.groups_per_iteration=2", "rollout.group_size=4", "evaluation.chains=6"]


def run(monkeypatch, *arguments):
    """Exit status of `mtedit-fast ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["mtedit-fast", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


def test_demo_writes_summary_report_and_lora_and_goes_on(monkeypatch, tmp_path, capsys):
    out = tmp_path / "demo"
    assert run(monkeypatch, "demo", *SHORT, "run.iterations=1", "--output", out, "--seed", 3) == 0
    summary = json.loads((out / "summary.json").read_text())
    for key in ("image_success", "marginal_success"):
        assert [len(summary[key][when]) for when in ("before", "after")] == [3, 3]
    assert summary["max_ratio_error_first_update"] == 0.0
    assert (summary["n_scenes"], summary["iterations"], summary["seed"]) == (6, 1, 3)
    assert summary["seconds"] > 0
    assert "<img" in (out / "report.html").read_text()
    assert (out / "edit_grid.png").exists()
    tiny_editor().pipeline.load_lora_weights(out / "lora")
    # more iterations: goes on from the checkpoint, and the base is evaluated as before
    assert run(monkeypatch, "demo", *SHORT, "run.iterations=2", "--output", out, "--seed", 3) == 0
    assert "resumed at iteration 1" in capsys.readouterr().out
    again = json.loads((out / "summary.json").read_text())
    assert again["image_success"]["before"] == summary["image_success"]["before"]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    assert run(monkeypatch, "report", out) == 0


def test_train_on_a_users_folder_with_a_reward_of_their_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "mine", 5, turns=2)
    (tmp_path / "my_rewards.py").write_text("def redness(batch):\n    return batch.edits[:, :, 0].mean((2, 3))\n")
    (tmp_path / "config.yaml").write_text(
        "data: {path: mine/train.jsonl, resolution: 64}\n"
        "rollout: {turns: 2, num_steps: 2, group_size: 2, groups_per_iteration: 2, max_sequence_length: 16}\n"
        'rewards: [{name: redness, path: "my_rewards:redness"}]\n'
        "evaluation: {path: mine/train.jsonl, chains: 4}\n"
        "run: {iterations: 1, output_dir: out}\n"
    )
    assert run(monkeypatch, "train", "config.yaml", "optimizer.lr=0.01") == 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert set(summary["rewards"]["redness"]) == {"before", "after"}
    assert "image_success" not in summary
    assert "redness" in (tmp_path / "out/report.html").read_text()
    assert (tmp_path / "out/lora/pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "missing.yaml"], "no file missing.yaml"),
        (["demo", "rollout.group_sise=4"], "did you mean 'group_size'"),
        (["demo", "model.path=./nowhere"], "expected a pipeline folder"),
        (["demo", "--control", "sometimes"], "run.control"),
        (["report", "nowhere"], "summary.json: missing"),
    ],
)
def test_errors_are_one_message_and_exit_with_2(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert message in shown
    assert "Traceback" not in shown


def test_help_teaches(monkeypatch, capsys):
    assert run(monkeypatch, "train", "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "instructions" in shown
    assert "rollout.group_size=16" in shown


def test_playground_data_is_what_train_reads(monkeypatch, tmp_path):
    assert (
        run(monkeypatch, "playground", "data", tmp_path / "d", "--chains", 3, "--split", "heldout", "--turns", 2) == 0
    )
    lines = [json.loads(line) for line in (tmp_path / "d/heldout.jsonl").read_text().splitlines()]
    assert [len(line["instructions"]) for line in lines] == [2, 2, 2]
