"""The playground's judge: its grades, its data, its training and its committed weights."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from judge_truth import spread
from safetensors.torch import load_file
from scipy import stats
from torch.nn.functional import cross_entropy

from mtedit_fast.judge import ImageSpec, JudgePrompt, prepare_images
from mtedit_fast.judge.prompts import write_answer
from mtedit_fast.training.judge.data import JudgeData
from mtedit_fast.training.playground import models, rewards
from mtedit_fast.training.playground.build import Recipe, build
from mtedit_fast.training.playground.fit import generator_for
from mtedit_fast.training.playground.instructions import sample_chains
from mtedit_fast.training.playground.judge import JudgeLoss
from mtedit_fast.training.playground.judge_data import (
    CHANGE_RIGHT,
    CHANGE_WRONG,
    STAY_RIGHT,
    STAY_WRONG,
    Graded,
    cell_status,
    edited_by,
    grade,
    grade_chains,
    misdone_chains,
    rating,
    thought,
    write_rated,
)
from mtedit_fast.training.playground.judge_model import (
    IMAGES,
    PLAYGROUND_PROMPT,
    load_judge,
    load_judge_parts,
    new_judge_model,
    new_judge_tokenizer,
)
from mtedit_fast.training.playground.world import CELLS, CLASS_OF
from mtedit_fast.training.rewards import RewardBatch


@pytest.fixture(scope="module")
def pipeline():
    return models.load_pipeline()


@pytest.fixture(scope="module")
def graded(pipeline) -> Graded:
    chains = sample_chains(Random("judge tests"), 24)
    return grade_chains(misdone_chains(pipeline, chains, 5), chains.instructions)


def status_of(done: int, missing: int, wrong: int) -> list[int]:
    stay = CELLS + 1 - done - missing - wrong
    return [CHANGE_RIGHT] * done + [CHANGE_WRONG] * missing + [STAY_WRONG] * wrong + [STAY_RIGHT] * stay


# --- grades


@pytest.mark.parametrize(
    ("done", "missing", "wrong", "expected"),
    [
        (1, 0, 0, 5),
        (1, 0, 1, 4),
        (2, 0, 2, 3),
        (2, 0, 3, 3),
        (1, 0, 4, 2),
        (1, 0, 8, 2),
        (1, 0, 9, 1),
        (1, 1, 0, 3),
        (1, 1, 1, 3),
        (1, 1, 2, 2),
        (0, 1, 0, 1),
        (0, 0, 0, 5),  # was so already
        (0, 0, 1, 4),
    ],
)
def test_grades_follow_the_rubric(done, missing, wrong, expected):
    assert grade(status_of(done, missing, wrong)) == expected


def test_status_of_every_cell_by_hand():
    red, blue, green = (CLASS_OF[f"rubber {color} circle"] for color in ("red", "blue", "green"))
    before = [red, blue, *[0] * 14, 2]
    text = "Change the color of rubber red circle to green"
    assert cell_status(before, text, [green, blue, *[0] * 14, 2]) == [CHANGE_RIGHT, *[STAY_RIGHT] * 16]
    after = [blue, 0, -1, *[0] * 13, 3]
    wrong = [CHANGE_WRONG, STAY_WRONG, STAY_WRONG, *[STAY_RIGHT] * 13, STAY_WRONG]
    assert cell_status(before, text, after) == wrong
    impossible = "Remove wood red circle"  # nothing of it there: everything was to stay
    assert cell_status(before, impossible, before) == [*[STAY_RIGHT] * 16, CHANGE_WRONG]
    assert grade(cell_status(before, impossible, before)) == 1


def test_thoughts_are_words_of_the_tokenizer():
    tokenizer = new_judge_tokenizer()
    texts = {thought(status_of(d, m, w)) for d, m in ((1, 0), (1, 1), (0, 2)) for w in (0, 1, 12)}
    assert "wanted done, rest kept" in texts
    assert "wanted partly done, rest changed 1" in texts
    assert "wanted missing, rest changed 9" in texts
    assert all(tokenizer.unk_token_id not in tokenizer(text)["input_ids"] for text in texts)


def test_ratings_scatter_around_their_formula():
    status = status_of(1, 1, 2)
    mean = 1 + 4 * 0.5 * np.exp(-2 / 3)
    rng = Random(0)
    values = [rating(status, rng) for _ in range(4000)]
    assert set(values) <= {1, 2, 3, 4, 5}
    assert np.mean(values) == pytest.approx(mean, abs=0.05)
    assert {rating(status_of(1, 0, 0), rng, noise=0.0) for _ in range(9)} == {5}


# --- data


def test_drawn_mistakes_give_every_grade_and_start_from_clean_originals(graded):
    assert graded.images.dtype == torch.uint8
    assert graded.images.shape == (24, 4, 3, 64, 64)
    assert set(graded.grades.flatten().tolist()) >= {1, 3, 4, 5}
    assert (graded.scenes[:, 0] >= 0).all()
    batch = RewardBatch(graded.images[:, 0] / 255, graded.images[:, 1:] / 255, graded.instructions)
    assert torch.equal(rewards.oracle_grade(batch), graded.grades.float())
    # a turn that succeeds by the held-out measure is one that deserves a 5, and no other is
    assert torch.equal(rewards.exact_success(batch), graded.grades == 5)


def test_rated_edits_are_judge_training_data(tmp_path, pipeline):
    path = write_rated(tmp_path, 6, seed=3, split="heldout", pipeline=pipeline)
    data = JudgeData(path, PLAYGROUND_PROMPT.answers, complete=True, thoughts=True)
    assert len(data) == 6
    assert len({example.id for example in data}) == 6
    again = write_rated(tmp_path / "again", 6, seed=3, split="heldout", pipeline=pipeline)
    assert path.read_text() == again.read_text()
    images = torch.stack([data.image(data[0].image), data.image(data[0].edits[0])])
    judged = grade_chains(images[None], [list(data[0].instructions)])
    assert thought(judged.status[0, 0].tolist()) == data[0].thoughts[0]


def test_the_editors_own_edits_are_among_them(pipeline):
    chains = sample_chains(Random("judge tests, edited"), 3, turns=2)
    images = edited_by(pipeline, chains, seed=1)
    assert images.shape == (3, 3, 3, 64, 64)
    assert not torch.equal(images[:, 0], images[:, 1])


# --- model and training


def test_tokenizer_keeps_scores_and_tags_single():
    tokenizer = new_judge_tokenizer()
    for text in ("<Turn2Score>4", "<Score>4", "red 4"):
        assert len(tokenizer(text)["input_ids"]) == 2
    assert tokenizer.unk_token_id not in tokenizer("Change the count of wood red circle to 3")["input_ids"]


def plain_cross_entropy(model, graded, row, turns, opening, learned, thinking):
    """Of each token of `learned`, by a plain forward of the question about some turns, then `opening`, then these."""
    tokenizer = new_judge_tokenizer()
    messages = replace(PLAYGROUND_PROMPT, thinking=thinking).messages([graded.instructions[row][k] for k in turns])
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + opening
    before, ids = (tokenizer.encode(t) for t in (text.replace("<|image_pad|>", "<|image_pad|>" * CELLS), learned))
    whole = torch.tensor([before + ids])
    pixels, grid = prepare_images(graded.images[row, [turns[0], *(k + 1 for k in turns)]], IMAGES)
    types = (whole == model.config.image_token_id).int()
    out = model(input_ids=whole, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=types)
    return cross_entropy(out.logits[0, len(before) - 1 : -1], torch.tensor(ids), reduction="none").tolist()


@pytest.mark.parametrize("thinking", [False, True])
def test_answers_are_learned_as_in_sequences_of_their_own(graded, thinking):
    """The scores of all turns in one row, or one turn's whole answer."""
    model = spread(new_judge_model(3))
    rows, first = [4, 7, 4], [2, 0, 1] if thinking else [0, 0, 0]
    loss, expected = JudgeLoss(model, new_judge_tokenizer(), graded), []
    with torch.no_grad():
        _, metrics = loss.losses(torch.tensor(rows), torch.tensor(first), 1 if thinking else 3, thinking)
        for row, start in zip(rows, first, strict=True):
            grades = [str(grade) for grade in graded.grades[row].tolist()]
            if thinking:
                answer = write_answer([grades[start]], thought(graded.status[row, start].tolist())) + "<|im_end|>"
                expected += plain_cross_entropy(model, graded, row, [start], "", answer, True)
            else:
                for turn, grade in enumerate(grades, 1):
                    opening = f"<Turn{turn}Score>"
                    expected += plain_cross_entropy(model, graded, row, [0, 1, 2], opening, grade, False)
    assert metrics["answer"] == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_every_kind_of_step_has_a_finite_loss_and_gradients_everywhere(graded, seed):
    tokenizer = new_judge_tokenizer()
    loss = JudgeLoss(new_judge_model(0, tokenizer), tokenizer, graded)
    value, metrics = loss(2, generator_for(1, seed))
    value.backward()
    assert np.isfinite(value.item())
    assert set(metrics) == {"answer", "cells", "status"}
    missing = [name for name, p in loss.named_parameters() if p.grad is None]
    assert missing == []


def test_judge_stage_resumes_bit_for_bit(tmp_path, monkeypatch):
    """Stopped after two of four steps, the build goes on to the weights of an uninterrupted one."""

    def run(folder, save_every):
        recipe = Recipe(judge_steps=4, judge_batch=2, judge_chains=(2, 2), save_every=save_every)
        out = tmp_path / folder / "weights"
        if not (out / "pipeline").exists():
            out.mkdir(parents=True)
            (out / "pipeline").symlink_to(models.WEIGHTS / "pipeline")
        build(out, stages=["judge"], work_dir=tmp_path / folder / "work", recipe=recipe)
        return load_file(out / "judge" / "model.safetensors"), out

    whole, out = run("whole", 4)
    with pytest.raises(KeyboardInterrupt):
        stop_after(2, monkeypatch, lambda: run("cut", 2))
    cut, _ = run("cut", 2)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert load_judge_parts(out / "judge")[1].chat_template == new_judge_tokenizer().chat_template
    assert ImageSpec.from_pretrained(str(out / "judge")) == IMAGES
    assert {value.dtype for value in whole.values()} == {torch.bfloat16}


def stop_after(steps, monkeypatch, run):
    """Runs until the step after `steps`, and stops there as a user would."""
    forward = JudgeLoss.forward
    calls = []

    def interrupted(self, *arguments):
        if len(calls) == steps:
            raise KeyboardInterrupt
        calls.append(1)
        return forward(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(JudgeLoss, "forward", interrupted)
        run()


# --- committed weights


def test_committed_judge_agrees_with_the_oracle_it_has_never_seen_these_edits_with(pipeline):
    chains = sample_chains(Random("judge tests, agreement"), 60)
    grades = grade_chains(edited_by(pipeline, chains, seed=9), chains.instructions)
    scores = load_judge().score(grades.images[:, 0], grades.images[:, 1:], grades.instructions)
    truth = grades.grades.float()
    assert scores.failures == {}
    assert stats.pearsonr(scores.score.flatten(), truth.flatten()).statistic > 0.8
    assert stats.spearmanr(scores.score.flatten(), truth.flatten()).statistic > 0.7


def test_judge_reward_is_the_committed_judge(pipeline):
    chains = sample_chains(Random("judge tests, reward"), 4)
    images = misdone_chains(pipeline, chains, 1) / 255
    batch = RewardBatch(images[:, 0], images[:, 1:], chains.instructions)
    expected = load_judge().score(batch.references, batch.edits, batch.instructions).score
    assert torch.equal(rewards.judge_score(batch), expected)
    assert ((expected >= 1) & (expected <= 5)).all()


def test_committed_judge_is_small_and_asked_as_documented():
    folder = models.WEIGHTS / "judge"
    assert sum(p.stat().st_size for p in folder.iterdir()) < 8 * 2**20
    assert load_judge().prompt == JudgePrompt("1-5", rubric="Score each edit.")
    with pytest.raises(FileNotFoundError, match="mtedit-fast playground build"):
        load_judge("nowhere")
