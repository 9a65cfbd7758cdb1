"""Rewards by import path: what they get, what they may return, and errors that name them."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mtedit_fast.training import config as module_of_config
from mtedit_fast.training.config import RewardConfig
from mtedit_fast.training.config_file import load_config
from mtedit_fast.training.rewards import RewardBatch, RewardStream, check_rewards, load_reward, score

CONFIGS = Path(module_of_config.__file__).parent / "configs"
MODULE = """
import numpy as np, torch
NUMBER = 3
def brightness(batch): return batch.edits.mean(dim=(2, 3, 4)).double()
def success(batch): return batch.edits.mean(dim=(2, 3, 4)) > 0.5
def array(batch): return np.arange(6, dtype=np.float16).reshape(2, 3)
def some(batch): return [[1, None, 0.5], [float("nan"), 2, 3]]
def per_row(batch): return batch.edits.mean(dim=(1, 2, 3, 4))
def texts(batch): return [["a", "b", "c"]] * 2
def ragged(batch): return [[1, 2, 3], [1]]
def imaginary(batch): return torch.zeros(2, 3, dtype=torch.complex64)
def gradient(batch): return (batch.edits.mean(dim=(2, 3, 4)) * torch.ones((), requires_grad=True))
def records(batch): return [[float(len(i)) + r["bonus"] for i in t] for t, r in zip(batch.instructions, batch.records)]
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("import not_a_module_anywhere")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def batch():
    images = torch.rand(2, 4, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    records = [{"bonus": 0.5}, {"bonus": 10.0}]
    return RewardBatch(images[:, 0], images[:, 1:], [["a", "bb", "ccc"], ["dd", "e", "f"]], records)


def run(names, batch):
    return score([RewardConfig(name=name, path=f"my_rewards:{name}") for name in names], batch)


@pytest.mark.usefixtures("module")
def test_scores_are_fp32_whatever_a_reward_returns(batch):
    scores = run(["brightness", "success", "array", "some", "records", "gradient"], batch)
    mean = batch.edits.mean(dim=(2, 3, 4))
    torch.testing.assert_close(scores["brightness"], mean)
    assert scores["success"].tolist() == (mean > 0.5).float().tolist()
    assert scores["array"].tolist() == np.arange(6.0).reshape(2, 3).tolist()
    assert math.isnan(scores["some"][0, 1])
    assert math.isnan(scores["some"][1, 0])
    assert scores["some"][1, 1:].tolist() == [2, 3]
    assert scores["records"].tolist() == [[1.5, 2.5, 3.5], [12.0, 11.0, 11.0]]
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in scores.values())


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("per_row", ValueError, r"reward 'per_row' \(my_rewards:per_row\): expected \[B, K\] = \[2, 3\], got \[2\]"),
        ("texts", TypeError, r"reward 'texts'.*expected numbers \[B, K\], got could not convert"),
        ("ragged", TypeError, r"reward 'ragged'.*expected numbers \[B, K\]"),
        ("imaginary", TypeError, r"reward 'imaginary'.*expected real numbers, got torch.complex64"),
    ],
)
def test_wrong_returns_name_the_reward(name, error, message, batch):
    with pytest.raises(error, match=message):
        run([name], batch)


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_rewards", r"reward path 'my_rewards': expected package\.module:function"),
        ("my_rewards:", r"expected package\.module:function"),
        ("no_such_rewards:fn", r"cannot import no_such_rewards: No module named 'no_such_rewards'"),
        ("broken_rewards:fn", r"cannot import broken_rewards: No module named 'not_a_module_anywhere'"),
        ("my_rewards:brightnes", r"my_rewards has no 'brightnes'; did you mean 'brightness'\?"),
        ("my_rewards:zzz", r"my_rewards has no 'zzz'$"),
        ("my_rewards:NUMBER", r"expected a function, got int"),
    ],
)
def test_wrong_paths(path, message):
    with pytest.raises(ValueError, match=message):
        load_reward(path)


def test_installed_rewards_load_too():
    assert load_reward("math:sqrt") is math.sqrt


@pytest.mark.usefixtures("module")
def test_options_are_compared_with_what_a_reward_takes():
    plain = RewardConfig(name="plain", path="my_rewards:brightness")
    check_rewards([plain, RewardConfig(name="c", path="builtins:max", options={"key": len})])  # has no signature
    with pytest.raises(
        ValueError, match=r"reward 'plain' \(my_rewards:brightness\): options: .*'gain'; it takes \(batch"
    ):
        check_rewards([plain, plain.model_copy(update={"options": {"gain": 2}})])
    judge = RewardConfig(name="judge", path="mtedit_fast.training.judge_reward:instruction_following")
    with pytest.raises(ValueError, match=r"reward 'judge' .* options: missing a required.*'path'"):
        check_rewards([judge])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*_lora.yaml")) + sorted(CONFIGS.glob("*_*gpu.yaml")))
def test_rewards_of_the_shipped_configurations_exist(path):
    rewards = load_config(path).rewards
    assert [reward.name for reward in rewards] == ["instruction_following", "content_consistency"]
    check_rewards(rewards)


def test_batch_shapes_are_checked(batch):
    with pytest.raises(ValueError, match=r"edits: expected \[B, K, 3, H, W\], got \[2, 3, 5, 7\]"):
        RewardBatch(batch.references, batch.references, batch.instructions)
    with pytest.raises(ValueError, match=r"references: expected \[2, 3, 5, 7\] like edits, got \[1, 3, 5, 7\]"):
        RewardBatch(batch.references[:1], batch.edits, batch.instructions)
    with pytest.raises(ValueError, match=r"instructions: expected 2 lists of 3, got 2 lists of \[2\]"):
        RewardBatch(batch.references, batch.edits, [["a", "b"]] * 2)
    with pytest.raises(ValueError, match=r"records: expected 2 or none, got 1"):
        RewardBatch(batch.references, batch.edits, batch.instructions, [{}])


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_stream_scores_batches_in_order(device, batch):
    """On a GPU in a thread, meanwhile; on a CPU when the result is asked for."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    rewards = [RewardConfig(name=name, path=f"my_rewards:{name}") for name in ("brightness", "some")]
    parts = [replace(batch, edits=(batch.edits * scale).to(device)) for scale in (1.0, 0.5, 0.25)]
    with RewardStream(rewards) as stream:
        for part in parts:
            stream.submit(part)
        result = stream.result()
    for name, values in result.items():
        expected = torch.cat([score(rewards, part)[name] for part in parts])
        torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("module")
def test_an_exception_is_raised_with_the_result(batch):
    with RewardStream([RewardConfig(name="texts", path="my_rewards:texts")]) as stream:
        stream.submit(batch)
        with pytest.raises(TypeError, match="reward 'texts'"):
            stream.result()
