"""`mtedit-fast judge`: train, evaluate, score, and train again on what was scored."""

import json

import pytest
import yaml
from judge_training import RUBRIC, new_parts, settings, write_examples
from typer.testing import CliRunner

from mtedit_fast.cli_judge import _named, _thoughts, judge_app
from mtedit_fast.judge import JudgePrompt
from mtedit_fast.training.judge.parts import save_judge


def run(*arguments):
    """Output of `mtedit-fast judge ARGUMENTS`."""
    result = CliRunner().invoke(judge_app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    write_examples(folder / "data", [1, 2, 1, 1])
    save_judge(folder / "tiny", new_parts(), JudgePrompt(rubric=RUBRIC))
    save_judge(folder / "thinker" / "model", new_parts(1), JudgePrompt(rubric=RUBRIC, thinking=True))
    return folder


def test_train_takes_overrides(work, tmp_path):
    config = settings(work / "data" / "examples.jsonl", tmp_path / "out", model={"path": str(work / "tiny")})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    output = run("train", tmp_path / "config.yaml", "method.name=sft", "run.steps=1")
    assert "sft on 4 examples, 5 turns" in output
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["method"] == "sft"
    assert (tmp_path / "out" / "model" / "judge.json").exists()


def test_eval_compares_judges(work, tmp_path):
    data, out = work / "data" / "examples.jsonl", tmp_path / "judge"
    output = run("eval", work / "tiny", "--data", data, "--out", out, "--samples", 3, "--resamples", 20)
    assert "tiny: 5 true scores; invalid: 0 of 5 expected, 0 of 15 sampled" in " ".join(output.split())
    arguments = ("--samples", 2, "--max-new-tokens", 4, "--resamples", 20, "--limit", 3, "--dtype", "bf16")
    run("eval", work / "thinker" / "model", f"b={work / 'tiny'}", "--data", data, "--out", out, *arguments)
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["models"]) == ["tiny", "thinker", "b"]
    tiny, thinker, b = summary["models"].values()
    assert (tiny["thinking"], thinker["thinking"], b["thinking"]) == (False, True, False)
    assert (tiny["scores"], thinker["scores"], b["scores"]) == (5, 4, 4)
    assert set(tiny["expected"]["pearson"]) == {"mean", "low", "high", "n"}
    assert len((out / "predictions" / "tiny.jsonl").read_text().splitlines()) == 4
    assert "thinker" in (out / "report.html").read_text()
    # other data: nothing to compare with
    write_examples(tmp_path / "other", [1, 1])
    run("eval", work / "tiny", "--data", tmp_path / "other" / "examples.jsonl", "--out", out, "--thinking",
        "--samples", 1, "--max-new-tokens", 2, "--scale", "0-5")  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["models"]) == ["tiny"]
    assert (summary["models"]["tiny"]["thinking"], summary["models"]["tiny"]["scale"]) == (True, "0-5")


def test_score_writes_lines_that_can_be_trained_on(work, tmp_path):
    data = tmp_path / "bare.jsonl"
    lines = [json.loads(line) for line in (work / "data" / "examples.jsonl").read_text().splitlines()]
    for line in lines:
        line["image"], line["edits"] = f"{work}/data/{line['image']}", [f"{work}/data/{e}" for e in line["edits"]]
    del lines[0]["scores"], lines[0]["thought"]
    lines[3]["image"] = "gone.png"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "deep" / "scores.jsonl"
    output = run("score", work / "tiny", "--data", data, "-o", out, "--skip-unreadable")
    assert "3 examples scored, 0 scores invalid, 1 skipped" in " ".join(output.split())
    scored = [json.loads(line) for line in out.read_text().splitlines()]
    assert [len(line["judged"]) for line in scored] == [1, 2, 1]
    assert (out.parent / scored[1]["edits"][1]).resolve() == work / "data" / "1_1.png"
    assert (scored[1]["scores"], scored[1]["thought"]) == (lines[1]["scores"], lines[1]["thought"])
    again = tmp_path / "again.jsonl"
    run("score", work / "tiny", "--data", out, "-o", again)
    judged = [json.loads(line)["judged"] for line in again.read_text().splitlines()]
    assert judged == [line["judged"] for line in scored]
    run("score", work / "tiny", "--data", data, "-o", out, "--skip-unreadable", "--thinking", "--max-new-tokens", 3)
    thought = [json.loads(line) for line in out.read_text().splitlines()]
    assert all("thought" not in line and line["thoughts"] == [] for line in thought)  # it cannot think yet


def test_thoughts_of_answers():
    answers = [
        "<Thought> a b </Thought><Score>1</Score>",
        "<Thought>a b</Thought>",
        "<Thought>cut",
        "",
        "<Thought></Thought>",
    ]
    assert _thoughts(answers) == ["a b"]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("runs/real/model", "real"),
        ("runs/real/model/", "real"),
        ("Qwen/Qwen3-VL-8B-Instruct", "Qwen3-VL-8B-Instruct"),
        ("http://localhost:8000/v1", "localhost-8000"),
        ("x=runs/real/model", "x"),
    ],
)
def test_names_of_judges(model, name):
    assert _named(model) == (name, model.removeprefix("x="))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "missing.yaml"], "no file missing.yaml"),
        (["eval", "a", "--data", "missing.jsonl"], r"^data: no file missing\.jsonl"),
        (["eval", "TINY", "x=TINY", "tiny=TINY", "--data", "DATA"], "MODEL: expected distinct names, got"),
        (["eval", "TINY", "--data", "DATA", "--scale", "1-7"], "scale must be one of"),
        (
            ["eval", "TINY", "--data", "DATA", "--dtype", "fp8"],
            "expected one of auto, fp32, bf16, fp16, got 'fp8'",
        ),
        (["score", "http://localhost:1/v1", "--data", "DATA", "-o", "out.jsonl"], "expected --served-model"),
        (["score", "TINY", "--data", "DATA", "-o", "out.jsonl", "--scale", "binary"], "number from 0 to 1"),
    ],
)
def test_errors_say_what_to_do(work, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    places = {"TINY": str(work / "tiny"), "DATA": str(work / "data" / "examples.jsonl")}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    with pytest.raises(ValueError, match=message):
        run(*arguments)
