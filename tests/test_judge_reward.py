"""The judge as a reward of training: options from the configuration to scores."""

import pytest
import torch

from mtedit_fast.judge import HuggingFaceJudge, JudgePrompt
from mtedit_fast.training.config import RewardConfig
from mtedit_fast.training.judge_reward import instruction_following, load_judge
from mtedit_fast.training.playground.judge_model import load_judge as load_playground_judge
from mtedit_fast.training.playground.models import WEIGHTS
from mtedit_fast.training.rewards import RewardBatch, score

PATH = str(WEIGHTS / "judge")
REWARD = "mtedit_fast.training.judge_reward:instruction_following"


@pytest.fixture
def batch() -> RewardBatch:
    images = torch.rand(4, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images[1:, 0] = images[0, 0]  # a group
    return RewardBatch(images[:, 0], images[:, 1:], [["Remove red sign A", "Change the background to ocean"]] * 4)


def test_options_reach_the_judge(batch):
    options = {"path": PATH, "rubric": "Score each edit.", "dtype": "fp32"}
    scores = score([RewardConfig(name="judge", path=REWARD, options=options)], batch)["judge"]
    expected = load_playground_judge().score(batch.references, batch.edits, batch.instructions).score
    assert torch.equal(scores, expected)
    yes = instruction_following(batch, path=PATH, scale="yes_no", dtype="fp32")
    assert ((yes >= 0) & (yes <= 1)).all()
    bf16 = instruction_following(batch, path=PATH, rubric="Score each edit.")
    assert (bf16 - scores).abs().max() < 0.5
    assert not torch.equal(bf16, scores)


def test_a_judge_is_loaded_once(batch):
    one, other = (load_judge(PATH, None, JudgePrompt(), "fp32", "set", 0.0, torch.device("cpu")) for _ in range(2))
    assert one is other
    assert isinstance(one, HuggingFaceJudge)


def test_failures_are_nan_and_counted_in_a_warning(batch):
    with pytest.warns(UserWarning, match=r"scores left undefined: 8 mass"):
        scores = instruction_following(batch, path=PATH, dtype="fp32", normalize="vocab", min_mass=1.0)
    assert scores.isnan().all()


def test_errors_name_the_option(batch):
    with pytest.raises(ValueError, match=r"options.dtype: expected one of fp32, bf16, got 'int8'"):
        instruction_following(batch, path=PATH, dtype="int8")
    with pytest.raises(ValueError, match=r"options.model: expected the name of the model that http://localhost:1/v1"):
        instruction_following(batch, path="http://localhost:1/v1")
    with pytest.raises(ValueError, match=r"scale must be one of 1-5"):
        instruction_following(batch, path=PATH, scale="1-100")
