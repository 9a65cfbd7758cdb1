"""The command: the demo and a user's own data end to end, and errors that fit in a line."""

import json
import subprocess
import sys

import pytest
from tiny import tiny_editor
from tiny_detector import tiny_detector, tiny_tokenizer

from mtedit_fast import cli
from mtedit_fast.training.playground.data import write_dataset
from mtedit_fast.training.playground.models import load_dino

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
        (["demo", "rewards.0.path=no_such:fn"], "reward path 'no_such:fn': cannot import no_such"),
        (["demo", "evaluation.success=math:sqr"], "math has no 'sqr'; did you mean 'sqrt'?"),
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


def test_edival_demo_and_its_steps_one_by_one(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "edival", "demo", "--chains", 6, "--output", "demo", "--seed", 2) == 0
    report = json.loads((tmp_path / "demo/report.json").read_text())
    assert (report["chains"], report["turns"], report["skipped"]) == (6, 3, [])
    assert all(line["instruction_following"]["n"] == 6 for line in report["per_turn"])
    assert "<img" in (tmp_path / "demo/report.html").read_text()
    # the same images and instructions through `evaluate`: the same figures
    arguments = [
        "evaluate",
        "--playground",
        "--images",
        "demo/images",
        "--bench",
        "demo/bench.csv",
        "--output",
        "again",
    ]
    assert run(monkeypatch, *arguments) == 0
    again = json.loads((tmp_path / "again/report.json").read_text())
    assert again["per_turn"] == report["per_turn"]
    assert run(monkeypatch, *arguments) == 0
    assert "6 of 6 chains are done already" in capsys.readouterr().out
    # decompose and instruct: the demo's instructions are drawn with another seed, so only their form is compared
    assert run(monkeypatch, "edival", "decompose", "demo/images", "--playground", "--output", "objects.jsonl") == 0
    assert run(monkeypatch, "edival", "decompose", "demo/images", "--playground", "--output", "objects.jsonl") == 0
    assert len((tmp_path / "objects.jsonl").read_text().splitlines()) == 6
    made = ["edival", "instruct", "objects.jsonl", "--output", "bench.csv", "--turns", 2]
    assert run(monkeypatch, *made, "--playground") == 0
    assert "6 images with 2 turns" in capsys.readouterr().out
    (tmp_path / "values.json").write_text('{"objects": ["dragon"], "backgrounds": []}')
    assert run(monkeypatch, *made, "--values", "values.json", "--seed", 5) == 0
    shown = (tmp_path / "bench.csv").read_text()
    assert "dragon" in shown
    assert "background_change" not in shown
    assert run(monkeypatch, "edival", "leaderboard", "demo", "again", "--output", "board.html") == 0
    board = (tmp_path / "board.html").read_text()
    assert "<td>demo<td>" in board
    assert "Seedream" not in board  # published figures are of other images


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--images", "i", "--bench", "b.csv", "--output", "o"], "bench: no file b.csv"),
        (["evaluate", "--images", "i", "--bench", "here", "--output", "o"], "must have the columns"),
        (["edival", "decompose", ".", "--output", "o"], "images: no .png"),
        (["edival", "instruct", "nowhere", "--output", "o.csv"], "objects: no file nowhere"),
        (["edival", "instruct", "nowhere", "--output", "o"], "output: expected a name ending in .csv or .jsonl, got o"),
        (["edival", "instruct", "here", "--output", "o.csv"], "here:1: not a line of `mtedit-fast edival decompose`"),
        (["edival", "instruct", "none", "--output", "o.csv", "--values", "here"], "values: here is not JSON"),
        (["edival", "instruct", "none", "--output", "o.csv", "--values", "list"], "must be an object of lists"),
        (["edival", "leaderboard", "."], "report.json: missing"),
    ],
)
def test_edival_errors_are_one_message(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name, text in (("here", "not a line\n"), ("none", ""), ("list", "[1]")):
        (tmp_path / name).write_text(text)
    assert run(monkeypatch, *arguments) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert message in shown
    assert "Traceback" not in shown


def test_models_of_edival_are_asked_for_in_time(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path, 1)
    (tmp_path / "my_quality.py").write_text("def none():\n    return 3\n")
    common = ["evaluate", "--images", "train", "--bench", "bench.csv", "--output", "o"]
    (tmp_path / "train/000000_0.png").write_bytes((tmp_path / "train/000000.png").read_bytes())
    from mtedit_fast.edival.benchmark import write_benchmark

    write_benchmark("bench.csv", [])
    for extra, message in (
        ([], "vlm: expected the URL of an OpenAI-compatible server"),
        (["--vlm", "localhost"], "base_url must begin with http"),
        (["--vlm", "http://localhost:1/v1", "--detector", "./nowhere"], "detector: nothing at ./nowhere"),
        (["--playground", "--replace", "both"], "replace must be 'code' or 'paper', got 'both'"),
        (["--playground", "--quality", "my_quality:none"], "expected a factory of objects with a score method"),
        (["--playground", "--registers", "keep"], "registers must be 'drop' or 'edival_compat', got 'keep'"),
    ):
        assert run(monkeypatch, *common, *extra) == 2
        assert message in " ".join(capsys.readouterr().err.split())


@pytest.fixture
def checkpoints(tmp_path):
    """A tiny random Grounding DINO and the playground's DINO as folders that `from_pretrained` opens."""
    tiny_tokenizer(("dog", "cat", "kite")).save_pretrained(tmp_path / "detector")
    tiny_detector("grounding-dino").save_pretrained(tmp_path / "detector")
    load_dino().save_pretrained(tmp_path / "dino")
    return ["--detector", tmp_path / "detector"], ["--dino", tmp_path / "dino"]


def test_edival_with_models_of_ones_own(monkeypatch, tmp_path, capsys, checkpoints):
    from test_edival_vlm import Server

    detector, dino = checkpoints
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path, 2)  # images 000000 and 000001
    broken = {"status": 200}

    def script(text, attempt):
        if "List the objects" in text:
            return broken["status"], '{"objects": [{"object": "dog"}, {"object": "cat", "text": "HI"}]}', 0
        return broken["status"], '{"value": "kite"}' if "JSON" in text else "Yes", 0

    server = Server(script)
    vlm = ["--vlm", server.url, "--vlm-api-key", "secret"]
    decompose = ["edival", "decompose", "train", "--output", "objects.jsonl", "--size", 64, *detector, *vlm]
    (tmp_path / "train/000002.png").write_bytes(b"no image")
    assert run(monkeypatch, *decompose) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "skipped 000002" in shown
    assert "2 images in objects.jsonl, 1 skipped" in shown
    assert server.requests[0][1]["Authorization"] == "Bearer secret"
    lines = [json.loads(line) for line in (tmp_path / "objects.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == [f"train/{i:06d}.png" for i in range(2)]
    assert all(one["boxes"] for line in lines for one in line["objects"])
    instruct = ["edival", "instruct", "objects.jsonl", "--output", "bench.csv", "--turns", 2, *vlm]
    assert run(monkeypatch, *instruct) == 0
    assert "2 images with 2 turns" in capsys.readouterr().out
    for turn in range(3):
        (tmp_path / f"train/000000_{turn}.png").write_bytes((tmp_path / "train/000000.png").read_bytes())
    (tmp_path / "sharp.py").write_text(
        "class Mean:\n    def score(self, images, instructions):\n        return images.mean((1, 2, 3))\n"
    )
    files = ["--images", "train", "--bench", "bench.csv", "--output", "out", "--quality", "sharp:Mean", "--size", 64]
    assert run(monkeypatch, "evaluate", *files, *detector, *dino, *vlm) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["chains"] == 1
    assert report["skipped"] == [{"image_index": "000001", "reason": "no images of this image_index"}]
    assert report["settings"]["consistency"] == [str(tmp_path / "dino"), "drop"]
    assert report["settings"]["detector"] == str(tmp_path / "detector")
    assert report["settings"]["vlm"] == "Qwen/Qwen2-VL-7B-Instruct"
    assert all(0 < line["quality"]["mean"] < 1 for line in report["per_turn"])
    broken["status"] = 403
    for command in (instruct, [*decompose[:4], "others.jsonl", *decompose[5:]]):
        assert run(monkeypatch, *command) == 2
        shown = " ".join(capsys.readouterr().err.split())
        assert "403" in shown
        assert "see to the server and run the command again" in shown


@pytest.mark.parametrize("command", ["train", "memory"])
def test_a_typo_is_told_before_anything_slow_is_imported(command):
    script = (
        "import sys\nfrom mtedit_fast import cli\nsys.argv = ['mtedit-fast', *sys.argv[1:]]\n"
        "try:\n    cli.main()\nexcept SystemExit as stop:\n    print(stop.code, 'diffusers' in sys.modules)"
    )
    arguments = [sys.executable, "-c", script, command, "demo", "rollout.group_sise=8"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]
    assert "did you mean 'group_size'?" in done.stderr
