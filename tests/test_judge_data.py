"""Scored edits from JSONL: what is read, and every way a line can be wrong; configurations of judge training."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from judge_training import SIZE, settings, write_examples
from PIL import Image

import mtedit_fast.training.config as configs
from mtedit_fast.judge.prompts import SCALES
from mtedit_fast.training.config_file import dump_config
from mtedit_fast.training.judge.config import JudgeConfig, load_judge_config
from mtedit_fast.training.judge.data import JudgeData
from mtedit_fast.training.judge.run import load_data

SCALE = SCALES["1-5"]


def rewrite(path: Path, number: int, **changes) -> None:
    """Change one line; a value of ... removes its key."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[number] = {k: v for k, v in (lines[number] | changes).items() if v is not ...}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_lines_become_examples(tmp_path):
    path = write_examples(tmp_path, [1, 3], scores=[[2.5], [1, None, 5]])
    rewrite(path, 1, thought=..., thoughts=["a", "b"], model="klein")
    data = JudgeData(path, SCALE)
    one, three = data
    assert (one.id, one.image, one.edits) == ("e0", tmp_path / "original0.png", (tmp_path / "0_0.png",))
    assert one.thoughts == ("changed wanted, rest kept",)
    assert three.scores == (1.0, None, 5.0)
    assert three.thoughts == ("a", "b")
    assert three.line["model"] == "klein"
    assert len(three.files) == 4
    assert data.statistics() == {"examples": 2, "turns": 4, "scored": 3, "originals": 2, "skipped": 0}
    pixels = np.asarray(Image.open(one.image).convert("RGB"))
    image = data.image(one.image)
    assert image.dtype == torch.uint8
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), pixels)


def test_scores_are_optional_where_only_edits_are_judged(tmp_path):
    path = write_examples(tmp_path, [2])
    rewrite(path, 0, scores=...)
    assert JudgeData(path, SCALE, scored=False)[0].scores == (None, None)
    with pytest.raises(ValueError, match=r"examples.jsonl:1: scores: expected 2 numbers or nulls"):
        JudgeData(path, SCALE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": ...}, r"examples\.jsonl:2: id: expected a text, got None"),
        ({"id": "e0"}, r":2: id: expected a unique text, 'e0' is already at .*:1"),
        ({"image": 3}, r":2: image: expected a text, got 3"),
        ({"image": "gone.png"}, r":2: image: .*gone\.png: no such file; skip_unreadable"),
        ({"edits": ["1_0.png"]}, r":2: edits: expected 2 paths, one per instruction, got 1"),
        ({"edits": "1_0.png"}, r":2: edits: expected a list of at least one text"),
        ({"edits": ["1_0.png", "gone.png"]}, r":2: edits\[1\]: .*gone\.png: no such file"),
        ({"edits": ["1_0.png", "broken.png"]}, r":2: edits\[1\]: .*broken\.png: "),
        ({"edits": ["1_0.png", "cut.png"]}, r":2: edits\[1\]: .*cut\.png: "),
        ({"instructions": ["Add", " "]}, r":2: instructions: expected a list of at least one text, none of them empty"),
        ({"instructions": []}, r":2: instructions: expected a list"),
        ({"scores": [1]}, r":2: scores: expected 2 numbers or nulls, one per instruction, got \[1\]"),
        ({"scores": [1, "4"]}, r":2: scores\[1\]: expected a number from 1 to 5 or null, got '4'"),
        ({"scores": [True, 2]}, r":2: scores\[0\]: expected a number"),
        ({"scores": [0, 2]}, r":2: scores\[0\]: expected a number from 1 to 5 or null, got 0"),
        ({"scores": [float("nan"), 2]}, r":2: scores\[0\]: expected a number"),
        ({"scores": [None, None]}, r":2: scores: expected at least one number"),
        ({"thought": ""}, r":2: thought: expected a list of at least one text"),
        ({"thoughts": "a"}, r":2: thoughts: expected a list"),
    ],
)
def test_errors_name_line_and_key(tmp_path, changes, message):
    path = write_examples(tmp_path, [1, 2])
    (tmp_path / "broken.png").write_bytes(b"no image")
    whole = (tmp_path / "1_0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    rewrite(path, 1, **changes)
    with pytest.raises(ValueError, match=message):
        JudgeData(path, SCALE)


def test_errors_of_whole_files(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path: no file .*none\.jsonl"):
        JudgeData(tmp_path / "none.jsonl", SCALE)
    path = write_examples(tmp_path, [1])
    for text, message in (("{", ":1: not valid JSON"), ("[1]", ":1: expected an object"), ("\n", "the file is empty")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            JudgeData(path, SCALE)


def test_unreadable_images_can_be_skipped_and_are_counted(tmp_path):
    path = write_examples(tmp_path, [1, 1, 2])
    (tmp_path / "1_0.png").unlink()
    data = JudgeData(path, SCALE, skip_unreadable=True)
    assert [example.id for example in data] == ["e0", "e2"]
    assert list(data.skipped) == ["e1"]
    assert "1_0.png: no such file" in data.skipped["e1"]
    assert data.statistics()["skipped"] == 1
    for name in ("0_0.png", "2_1.png"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="expected at least one example, 3 were skipped for their images"):
        JudgeData(path, SCALE, skip_unreadable=True)


def test_order_is_a_function_of_seed_and_step(tmp_path):
    path = write_examples(tmp_path, [1] * 5)
    data, again, other = (JudgeData(path, SCALE, seed=seed) for seed in (3, 3, 4))
    drawn = [example.id for step in range(5) for example in data.draw(step, 3)]
    assert drawn == [example.id for step in range(5) for example in again.draw(step, 3)]
    assert drawn != [example.id for step in range(5) for example in other.draw(step, 3)]
    for epoch in range(3):
        assert sorted(drawn[5 * epoch : 5 * epoch + 5]) == [f"e{i}" for i in range(5)]


def test_large_data_is_not_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("mtedit_fast.training.judge.data.CACHE_BYTES", 3 * SIZE * SIZE)
    data = JudgeData(write_examples(tmp_path, [2]), SCALE)
    assert len(data._cache) == 1
    for file in data[0].files:
        assert torch.equal(data.image(file), data.image(file))


@pytest.mark.parametrize(
    ("method", "thinking", "message"),
    [
        ("sft", True, r":2: thought: expected a text to imitate"),
        ("tract", True, r":1: scores\[1\]: expected a number, because whole answers are imitated, got null"),
        ("sft", False, None),
        ("real", True, None),
    ],
)
def test_what_a_method_needs_is_checked_before_the_run(tmp_path, method, thinking, message):
    path = write_examples(tmp_path, [2, 1], scores=[[3, None if method != "sft" or not thinking else 4], [2]])
    rewrite(path, 1, thought=...)
    config = load_judge_config(settings(path, tmp_path / "out", method={"name": method}, prompt={"thinking": thinking}))
    if message is None:
        assert len(load_data(config)[0]) == 2
    else:
        with pytest.raises(ValueError, match=message):
            load_data(config)


# ---- configurations


def test_the_full_size_example_documents_every_key(tmp_path):
    path = Path(configs.__file__).parent / "configs" / "judge_real.yaml"
    text = path.read_text(encoding="utf-8")
    config = load_judge_config(path)
    assert config.model.path == "Qwen/Qwen3-VL-8B-Instruct"
    assert config.method.name == "real"
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("# "))
    assert head + dump_config(config, comments=True) == text
    for comments in (False, True):
        again = tmp_path / "again.yaml"
        again.write_text(dump_config(config, comments=comments), encoding="utf-8")
        assert load_judge_config(again) == config


def test_overrides():
    config = load_judge_config(
        {"data": {"path": "x"}},
        ["method.beta=1e-1", "model.lora.rank=4", "optimizer.betas=[0.8, 0.9]", "prompt.scale=0-5", "run.seed=2"],
    )
    assert (config.method.beta, config.model.lora.rank, config.run.seed) == (0.1, 4, 2)
    assert config.optimizer.betas == [0.8, 0.9]
    assert config.prompt.prompt.answers is SCALES["0-5"]
    assert load_judge_config({"data": {"path": "x"}}) == JudgeConfig.model_validate({"data": {"path": "x"}})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.bta=1", r"method\.bta: unknown key; did you mean 'beta'\?"),
        ("metod.beta=1", r"metod: unknown key; did you mean 'method'\?"),
        ("model.lora.ranc=4", r"model\.lora\.ranc: unknown key; did you mean 'rank'\?"),
        ("data.foo=4", r"data\.foo: unknown key; expected one of path, skip_unreadable"),
        ("method.beta=-1", r"method\.beta: .*greater than or equal to 0, got -1"),
        ("method.name=ppo", r"method\.name: .*'real'.*got 'ppo'"),
        ("prompt.thinking=false", r"method\.name: real learns from sampled thoughts"),
        ("optimizer.warmup=999", r"optimizer\.warmup: expected at most run\.steps = 200, got 999"),
        ("data=3", r"data: "),
        ("method", r"override 'method': expected key=value"),
    ],
)
def test_wrong_configurations(override, message):
    with pytest.raises(ValueError, match=message):
        load_judge_config({"data": {"path": "x"}}, [override])


def test_wrong_configuration_files(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*none\.yaml; expected a YAML file, or one of demo, .*judge_real"):
        load_judge_config(tmp_path / "none.yaml")
    path = tmp_path / "config.yaml"
    for text, message in (
        ("a: [", "not valid YAML"),
        ("- 1", "expected sections"),
        ("data: {}", "data.path: required"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_judge_config(path)
    path.write_text(yaml.safe_dump({"data": {"path": "x"}}))
    assert load_judge_config(str(path)).data.path == "x"
