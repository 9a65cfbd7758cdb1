"""The training loop of judges: every method, resumption bit for bit, adapters, micro-batches, what is skipped."""

import json
import math
from itertools import islice

import pytest
import torch
from judge_training import RUBRIC, new_parts, settings, write_examples

from mtedit_fast.judge import HuggingFaceJudge, JudgePrompt
from mtedit_fast.training.judge.batch import Packer
from mtedit_fast.training.judge.config import load_judge_config
from mtedit_fast.training.judge.data import JudgeData
from mtedit_fast.training.judge.evaluation import predict
from mtedit_fast.training.judge.methods import Totals, new_metrics
from mtedit_fast.training.judge.parts import load_parts, load_prompt
from mtedit_fast.training.judge.run import train
from mtedit_fast.training.judge.trainer import JudgeTrainer


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_examples(tmp_path_factory.mktemp("data"), [1, 1, 2, 1])


@pytest.fixture(scope="module")
def fitted(path, tmp_path_factory):
    """Weights that have learned the form of an answer, so that sampled ones can be read."""
    trainer = new_trainer(
        path,
        tmp_path_factory.mktemp("fitted"),
        method={"name": "sft"},
        optimizer={"lr": 4e-3, "micro_batch": 4, "lr_schedule": "constant"},
        run={"steps": 24, "checkpoint_every": 100},
    )
    losses = [metrics["loss"] for metrics in trainer.fit()]
    assert losses[-1] < losses[0] / 4
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def new_trainer(path, output, weights=None, **sections):
    config = load_judge_config(settings(path, output, **sections))
    parts = new_parts()
    if weights is not None:
        parts.model.load_state_dict(weights)
    return JudgeTrainer(parts, JudgeData(path, config.prompt.prompt.answers, seed=config.run.seed), config)


def changed(trainer, before):
    return [name for name, value in trainer.tensors().items() if not torch.equal(value, before[name])]


def snapshot(trainer):
    return {name: value.clone() for name, value in trainer.tensors().items()}


@pytest.mark.parametrize(
    ("name", "thinking"),
    [
        *((name, True) for name in ("sft", "tract", "regression", "rloo", "grpo", "real")),
        *((name, False) for name in ("sft", "tract", "regression")),
    ],
)
def test_every_method_learns(path, fitted, tmp_path, name, thinking):
    prompt = {"thinking": thinking}
    trainer = new_trainer(path, tmp_path, fitted, method={"name": name, "beta": 0.0}, prompt=prompt)
    before, lines = snapshot(trainer), []
    for metrics in trainer.fit():
        lines.append(metrics)
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["skipped"] == 0
    assert [line["step"] for line in lines] == [0, 1]
    assert changed(trainer, before)
    if name in ("rloo", "grpo", "real"):
        assert lines[0]["valid"] > 0.3
        assert 0 < lines[0]["answer_tokens"] <= 12
        assert 1 <= lines[0]["distinct_answers"] <= 4
    else:
        assert lines[0]["squared_error"] > 0
    assert ("cross_entropy" in lines[0]) == (name in ("sft", "tract"))
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged == lines
    assert load_judge_config(tmp_path / "config.yaml") == trainer.config


@pytest.mark.parametrize(("name", "lora"), [("real", None), ("real", {"rank": 2, "alpha": 4}), ("sft", None)])
def test_a_killed_run_resumes_bit_for_bit(path, fitted, tmp_path, name, lora):
    sections = {
        "method": {"name": name, "beta": 0.1},
        "model": {"lora": lora},
        "optimizer": {"lr": 3e-3, "warmup": 2, "questions": 2, "micro_batch": 1},
        "run": {"steps": 4, "checkpoint_every": 2, "seed": 5},
    }
    whole = new_trainer(path, tmp_path / "a", fitted, **sections)
    expected = list(whole.fit())
    killed = new_trainer(path, tmp_path / "b", fitted, **sections)
    list(islice(killed.fit(), 3))  # the third step is lost: the checkpoint is of the second
    with (tmp_path / "b" / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 3, "los')
    torch.manual_seed(99)  # nothing depends on global randomness
    resumed = new_trainer(path, tmp_path / "b", fitted, **sections)
    got = list(resumed.fit())
    assert resumed.iteration == 4
    assert [line["step"] for line in got] == [2, 3]
    for name_, value in whole.tensors().items():
        assert torch.equal(resumed.tensors()[name_], value), name_

    def timeless(line):
        return {key: value for key, value in line.items() if not key.startswith("seconds/")}

    logged = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert list(map(timeless, logged)) == list(map(timeless, expected))


def test_a_checkpoint_of_another_method_is_refused(path, tmp_path):
    list(new_trainer(path, tmp_path, method={"name": "sft"}, run={"steps": 1}).fit())
    other = new_trainer(path, tmp_path, method={"name": "tract"}, run={"steps": 1})
    with pytest.raises(ValueError, match="a checkpoint of another model: expected fingerprint qwen3_vl, tract"):
        other.resume()


def test_lora_trains_the_adapter_alone_and_exports_the_whole_judge(path, fitted, tmp_path):
    trainer = new_trainer(
        path,
        tmp_path,
        fitted,
        method={"name": "tract"},
        model={"lora": {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "down_proj"]}},
        optimizer={"lr": 1e-2},
    )
    before = snapshot(trainer)
    assert all("lora_" in name and ("q_proj" in name or "down_proj" in name) for name in trainer.names)
    list(trainer.fit())
    assert changed(trainer, before)
    base = {n.replace(".base_layer", ""): v for n, v in trainer.model.state_dict().items() if "lora_" not in n}
    assert all(torch.equal(base[name], value) for name, value in fitted.items())
    scored = predict(trainer.packer, trainer.data.examples, samples=1, max_new_tokens=12)
    folder = trainer.export()
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()
    prompt = load_prompt(str(folder))
    assert prompt == JudgePrompt(rubric=RUBRIC, thinking=True)
    judge = HuggingFaceJudge.from_pretrained(str(folder), device="cpu")
    packer = Packer(judge.model, judge.tokenizer, judge.images, prompt, trainer.data.image)
    again = predict(packer, trainer.data.examples, samples=1, max_new_tokens=12)
    for one, other in zip(scored, again, strict=True):
        torch.testing.assert_close(
            torch.tensor(one.expected), torch.tensor(other.expected), rtol=1e-3, atol=1e-4, equal_nan=True
        )


def test_the_vision_tower_can_be_left_out(path, tmp_path):
    trainer = new_trainer(path, tmp_path, method={"name": "sft"}, model={"train_vision": False})
    assert not any("visual" in name for name in trainer.names)
    list(trainer.fit())


def gradient(trainer, questions):
    """Of all questions, in fp64: the terms of the loss cancel, and in fp32 what is left is mostly rounding."""
    trainer.model.double()
    totals = Totals(*map(sum, zip(*(q.totals() for q in questions), strict=True)))
    loss = trainer._accumulate(questions, totals, new_metrics())
    grads = [p.grad for p in trainer.parameters]
    trainer.optimizer.zero_grad()
    return loss.item(), grads


@pytest.mark.parametrize("name", ["real", "grpo", "tract"])
def test_neither_micro_batches_nor_checkpointing_change_the_gradient(path, fitted, tmp_path, name):
    plain = new_trainer(path, tmp_path, fitted, method={"name": name, "beta": 0.5}, optimizer={"micro_batch": 4})
    questions = plain.method.questions(plain.data.examples, 0, new_metrics())
    loss, expected = gradient(plain, questions)
    sections = [{"optimizer": {"micro_batch": 1}}, {"model": {"activation_checkpointing": True}}]
    for section in sections:
        other = new_trainer(path, tmp_path, fitted, method={"name": name, "beta": 0.5}, **section)
        value, grads = gradient(other, questions)
        assert value == pytest.approx(loss, rel=1e-6, abs=1e-8)
        for own, reference in zip(grads, expected, strict=True):
            assert own.dtype == torch.float64
            torch.testing.assert_close(own, reference, rtol=1e-8, atol=1e-8 * reference.abs().max().item())
    assert not plain.model.training


def test_a_question_without_advantage_is_not_run(path, tmp_path):
    trainer = new_trainer(path, tmp_path, method={"name": "rloo"}, run={"steps": 1})  # nothing can be read yet
    before = snapshot(trainer)
    (metrics,) = trainer.fit()
    assert metrics["valid"] == 0
    assert metrics["loss"] == 0
    assert "advantage_size" not in metrics
    assert not changed(trainer, before)


def test_steps_that_are_not_finite_are_skipped_and_counted(path, tmp_path):
    trainer = new_trainer(
        path, tmp_path, method={"name": "sft"}, optimizer={"max_skipped": 2}, run={"steps": 3, "checkpoint_every": 1}
    )
    trainer.parameters[-1].data.fill_(math.nan)
    before = snapshot(trainer)
    steps = trainer.fit()
    metrics = next(steps)
    assert metrics["skipped"] == 1
    assert changed(trainer, before) == [trainer.names[-1]]  # NaN is not equal to itself
    again = new_trainer(path, tmp_path, method={"name": "sft"}, optimizer={"max_skipped": 2}, run={"steps": 3})
    again.resume()
    assert again.skipped_in_a_row == 1
    with pytest.raises(FloatingPointError, match=r"not finite in 2 steps in a row \(optimizer\.max_skipped\)"):
        next(steps)


def test_learning_rate(path, tmp_path):
    optimizer = {"lr": 1.0, "lr_schedule": "linear", "warmup": 1}
    trainer = new_trainer(path, tmp_path, method={"name": "sft"}, optimizer=optimizer, run={"steps": 4})
    rates = []
    for trainer.iteration in range(4):
        rates.append(trainer._set_learning_rate())
        assert trainer.optimizer.param_groups[0]["lr"] == rates[-1]
    assert rates == [0.5, 0.75, 0.5, 0.25]


def test_thoughts_are_drawn_by_step(path, tmp_path):
    lines = [json.loads(line) for line in path.read_text().splitlines()][:1]
    lines[0] |= {"thoughts": ["yes", "no", "kept"], "image": str(path.parent / lines[0]["image"])}
    lines[0]["edits"] = [str(path.parent / edit) for edit in lines[0]["edits"]]
    other = tmp_path / "thoughts.jsonl"
    other.write_text(json.dumps(lines[0]))
    trainer = new_trainer(other, tmp_path / "out", method={"name": "sft"})

    def drawn():
        rows = [trainer.method.questions(trainer.data.examples, step, new_metrics())[0].row for step in range(12)]
        return [trainer.packer.text(row.branches[0].ids[1]) for row in rows]

    assert drawn() == drawn()
    assert set(drawn()) == {"yes", "no", "kept"}


def test_half_precision_keeps_weights_in_fp32(path, fitted, tmp_path):
    trainer = new_trainer(path, tmp_path, fitted, method={"name": "real"}, model={"dtype": "bf16"})
    before = snapshot(trainer)
    list(trainer.fit())
    assert all(value.dtype == torch.float32 for value in trainer.tensors().values())
    assert changed(trainer, before)


def test_a_whole_run(path, fitted, tmp_path, capsys):
    start = tmp_path / "start"
    trainer = new_trainer(path, tmp_path / "x", fitted)
    trainer.output_dir = start
    folder = trainer.export()
    config = load_judge_config(
        settings(
            path,
            tmp_path / "out",
            model={"path": str(folder), "dtype": "bf16", "lora": {"rank": 2, "alpha": 2}},
            evaluation={"path": str(path), "examples": 2, "every": 1, "samples": 2},
            optimizer={"questions": 2},
        )
    )
    assert load_parts(config.model).model.dtype == torch.bfloat16
    summary = train(config)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    figures = summary["models"]["real"]
    assert figures["examples"] == 2
    assert {"expected", "sampled", "expected_one", "sampled_one"} <= set(figures)
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [math.isfinite(line["eval/expected/rmse"]) for line in logged] == [True, True]
    assert (tmp_path / "out" / "report.html").exists()
    assert (tmp_path / "out" / "model" / "preprocessor_config.json").exists()
    assert "report:" in capsys.readouterr().out
    again = train(config)  # finished: evaluated once more, to the same figures
    assert again["models"] == summary["models"]
