"""Rewards of beam search: their forms, what they see, those that fail; and bad arguments."""

from functools import partial

import pytest
import torch
from test_beam_search import GUIDANCE, PROMPTS, SIZE, STEPS, TURNS, four_images, redness, search
from tiny import tiny_editor

from mtedit_fast.rollout import RolloutConfig, rollout, sample_seeds


@pytest.fixture(scope="module")
def editor():
    return tiny_editor()


@pytest.fixture(scope="module")
def images():
    return four_images()


@pytest.mark.parametrize("form", ["list", "array", "double"])
def test_rewards_may_return_numbers_of_any_kind(editor, images, form):
    forms = {"list": lambda v: v.tolist(), "array": lambda v: v.numpy(), "double": lambda v: v.double()}
    found = search(editor, images[:1], reward=lambda batch: forms[form](redness(batch)))
    assert torch.equal(found.images, search(editor, images[:1]).images)


def test_rewards_see_the_chain_so_far(editor, images):
    def reward(batch):
        turns = batch.edits.shape[1]
        assert batch.edits.shape == (len(batch.references), turns, 3, SIZE, SIZE)
        owner = [images[:2].sub(reference).abs().amax((1, 2, 3)).argmin() for reference in batch.references]
        assert batch.instructions == [PROMPTS[i][:turns] for i in owner]
        assert batch.records == []
        return redness(batch)

    search(editor, images[:2], reward=reward)


def test_a_candidate_without_a_score_loses(editor, images):
    prompts = [chain[:1] for chain in PROMPTS[:2]]
    # judged along the ODE to the end, so that what wins is the best edit
    options = {"width": 1, "branching": 3, "lookahead": STEPS, "variant": "ode", "branch_at": (0,)}
    judged = []

    def remember(batch):
        judged.append(redness(batch)[:, 0].view(2, -1))
        return redness(batch)

    def spoil(batch):
        values = redness(batch)
        if len(values) > 2:
            values[judged[0][0].argmax()] = torch.nan
        return values

    plain = search(editor, images[:2], prompts, remember, **options)
    found = search(editor, images[:2], prompts, spoil, **options)
    ranked = judged[0].sort(dim=1, descending=True).values
    assert torch.allclose(plain.scores.flatten(), ranked[:, 0], atol=1e-5)
    assert torch.allclose(found.scores.flatten(), torch.stack([ranked[0, 1], ranked[1, 0]]), atol=1e-5)
    assert found.undefined.tolist() == [1, 0]
    assert plain.undefined.tolist() == [0, 0]


def test_an_image_without_any_score_is_edited_plainly(editor, images):
    def reward(batch):
        values = redness(batch)
        values[(batch.references - images[0]).abs().amax((1, 2, 3)) == 0] = torch.nan
        return values

    with pytest.warns(UserWarning, match=r"reward .*reward: NaN for every candidate of images \[0\]"):
        found = search(editor, images[:2], reward=reward, width=1, branching=2, variant="ode", branch_at=(0,))
    config = RolloutConfig(group_size=1, num_steps=STEPS, guidance_scale=GUIDANCE, variant="ode")
    plain = rollout(editor, images[:2], PROMPTS[:2], config, sample_seeds(0, 0, 2))
    assert (found.best[0] - plain.images[0]).abs().max() <= 1 / 255 + 1e-6
    assert found.undefined.tolist() == [2 * TURNS + 1, 0]
    assert found.scores[0].isnan().all()


def nothing(batch, value):
    return torch.full(batch.edits.shape[:2], value)


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (partial(nothing, value=torch.nan), ValueError, "reward nothing: NaN for all 8 candidates of all 2 images"),
        (lambda b: torch.zeros(3, 1), ValueError, r"reward .*<lambda>: expected \[n, k\] = \[8, 1\].*got \[3, 1\]"),
        (lambda b: torch.zeros(9, 1), ValueError, r"each candidate, got \[9, 1\]"),
        (lambda b: redness(b)[:, 0], ValueError, r"got \[8\]"),
        (lambda b: [["good"]] * 8, TypeError, "reward .*: expected numbers"),
        (5, TypeError, "reward: expected a function of RewardBatch, got int"),
    ],
)
def test_bad_rewards(editor, images, reward, error, message):
    with pytest.raises(error, match=message):
        search(editor, images[:2], reward=reward)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width: expected >= 1, got 0"),
        ({"branching": 0}, "branching: expected >= 1, got 0"),
        ({"lookahead": -1}, "lookahead: expected >= 0, got -1"),
        ({"num_steps": 0}, "num_steps: expected >= 1, got 0"),
        ({"micro_batch": 0}, "micro_batch: expected >= 1, got 0"),
        ({"branch_at": (4,)}, r"branch_at: expected among \[0, 1, 2, 3\].*got \[4\]"),
        ({"branch_at": (1,), "variant": "ode"}, r"branch_at: expected among \[0\].*4 ode steps"),
        ({"branch_at": ()}, "branch_at: expected at least one noise number.*2·2 candidates would all be the same"),
        ({"seeds": torch.zeros(2)}, r"seeds: expected int64 \[4\]"),
        ({"eta": -1.0}, "eta"),
        ({"window": (3, 9)}, "window: expected"),
        ({"prompts": [["a"]]}, "instructions: expected 4 lists"),
        ({"prompts": [["a"], ["a", "b"], ["a"], ["a"]]}, "instructions: expected 4 lists of equally many"),
    ],
)
def test_bad_arguments(editor, images, change, message):
    with pytest.raises(ValueError, match=message):
        search(editor, images, **change)


@pytest.mark.parametrize("bad", [torch.rand(3, 32, 32), torch.rand(2, 1, 32, 32), [torch.rand(3, 32, 32)]])
def test_bad_images(editor, bad):
    with pytest.raises(ValueError, match=r"images: expected one tensor \[B, 3, H, W\]"):
        search(editor, bad, PROMPTS[:1])
    with pytest.raises(ValueError, match="height, width: expected positive multiples of 16"):
        search(editor, torch.rand(1, 3, 60, 64), PROMPTS[:1])
