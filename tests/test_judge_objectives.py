"""Objectives of judge training: closed forms, and gradients against autograd through all logits."""

import math

import numpy as np
import pytest
import torch
from judge_training import new_parts, settings, write_examples

from mtedit_fast.qwen_vl import prepare_images
from mtedit_fast.training.judge.config import load_judge_config
from mtedit_fast.training.judge.data import JudgeData
from mtedit_fast.training.judge.methods import Totals, new_metrics, truth_of
from mtedit_fast.training.judge.objectives import (
    group_normalized,
    leave_one_out,
    leave_one_out_normalized,
    policy_loss,
    real_advantage,
    refinement_loss,
    score_weights,
)
from mtedit_fast.training.judge.parts import Parts
from mtedit_fast.training.judge.trainer import JudgeTrainer

VALUES = (1.0, 2.0, 3.0, 4.0, 5.0)


def test_scores_fall_on_the_values_around_them():
    expected = [[1, 0, 0, 0, 0], [0, 0, 0.5, 0.5, 0], [0, 0, 0, 0.75, 0.25], [0, 0, 0, 0, 1], [0, 1, 0, 0, 0]]
    got = score_weights(torch.tensor([1, 3.5, 4.25, 5, 2]), VALUES)
    assert torch.equal(got, torch.tensor(expected))
    y = 1 + 4 * torch.rand(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close((score_weights(y, VALUES).double() * torch.tensor(VALUES)).sum(-1), y, atol=1e-6, rtol=0)
    uneven = score_weights(torch.tensor([0.0, 2.5]), (0.0, 1.0, 4.0))
    assert torch.equal(uneven, torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5]]))
    assert score_weights(torch.zeros(0), VALUES).shape == (0, 5)
    # the cross-entropy to these weights is least where p = w, where the expected score is the true one
    w = score_weights(torch.tensor([3.25]), VALUES)[0].double()
    logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    for _ in range(4000):
        (grad,) = torch.autograd.grad(-(w * logits.log_softmax(0)).sum(), logits)
        logits.data -= 0.5 * grad
    assert abs((logits.softmax(0) * torch.tensor(VALUES)).sum().item() - 3.25) < 0.01


@pytest.mark.parametrize(
    ("targets", "values", "message"),
    [
        ([0.5], VALUES, r"targets: expected scores from 1 to 5, got \[0.5\]"),
        ([math.nan], VALUES, "targets"),
        ([1.0], (1.0, 1.0), "values: expected at least two, ascending"),
        ([1.0], (1.0,), "values: expected at least two"),
    ],
)
def test_score_weights_refuses(targets, values, message):
    with pytest.raises(ValueError, match=message):
        score_weights(torch.tensor(targets), values)


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(leave_one_out(rewards)[0], torch.tensor([1, -1 / 3, -1 / 3, -1 / 3]).double())
    mean, std = 0.25, 0.5  # of (1, 0, 0, 0), with n − 1
    torch.testing.assert_close(group_normalized(rewards, eps=0)[0], (rewards[0] - mean) / std)
    # leaving out the own reward only scales, which normalising takes back
    scaled = group_normalized(rewards, eps=0) * math.sqrt(4 / 3)
    torch.testing.assert_close(leave_one_out_normalized(rewards, eps=0), scaled)
    random = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for row, got in zip(random.tolist(), leave_one_out(random).tolist(), strict=True):
        for i, advantage in enumerate(got):
            assert advantage == pytest.approx(row[i] - np.mean(np.delete(row, i)))


@pytest.mark.parametrize("form", [leave_one_out, leave_one_out_normalized, group_normalized])
def test_equal_rewards_have_no_advantage_at_all(form):
    for n in range(1, 8):
        assert torch.equal(form(torch.full((2, n), -2.1234567)), torch.zeros(2, n))


@pytest.mark.parametrize("form", ["leave_one_out", "group"])
@pytest.mark.parametrize("reward", ["probability", "log_probability"])
def test_real_advantage_by_formula(form, reward):
    generator = torch.Generator().manual_seed(1)
    error = torch.rand(2, 4, generator=generator, dtype=torch.float64)
    log_prob = -3 * torch.rand(2, 4, generator=generator, dtype=torch.float64)
    error.requires_grad_()
    got = real_advantage(error, log_prob, likelihood_weight=0.7, form=form, reward=reward, clip=0.9)
    assert not got.requires_grad
    for row in range(2):
        parts = []
        for rewards in (-error.detach()[row].numpy(), log_prob[row].exp().numpy() if reward == "probability" else None):
            r = log_prob[row].numpy() if rewards is None else rewards
            if form == "group":
                parts.append((r - r.mean()) / (r.std(ddof=1) + 1e-6))
            else:
                loo = np.array([r[i] - np.delete(r, i).mean() for i in range(4)])
                parts.append(loo / (loo.std() + 1e-8))
        expected = np.clip(parts[0], -0.9, 0.9) + 0.7 * np.clip(parts[1], -0.9, 0.9)
        np.testing.assert_allclose(got[row].numpy(), expected, rtol=1e-9)
    alone = real_advantage(error, log_prob, likelihood_weight=0.0, form=form, reward=reward, clip=math.inf)
    assert alone.abs().max() > 0.9


def test_an_answer_without_score_is_the_least_likely_of_its_group():
    error = torch.tensor([[1.0, 2.0, 3.0, 16.0]])
    log_prob = torch.tensor([[-1.0, -2.0, -3.0, -torch.inf]])
    got = real_advantage(error, log_prob, likelihood_weight=1.0, reward="log_probability", clip=math.inf)
    same = real_advantage(error, log_prob.clamp(min=-3), likelihood_weight=1.0, reward="log_probability", clip=math.inf)
    assert torch.equal(got, same)
    assert got.isfinite().all()
    none = real_advantage(error, torch.full((1, 4), -torch.inf), likelihood_weight=1.0, reward="log_probability")
    assert torch.equal(none, real_advantage(error, log_prob, likelihood_weight=0.0))
    assert real_advantage(error, log_prob, likelihood_weight=1.0).isfinite().all()


def test_unknown_forms_are_named():
    with pytest.raises(ValueError, match="form: expected one of leave_one_out, group, got 'loo'"):
        real_advantage(torch.ones(1, 2), torch.ones(1, 2), likelihood_weight=1, form="loo")
    with pytest.raises(ValueError, match="reward: expected probability or log_probability, got 'p'"):
        real_advantage(torch.ones(1, 2), torch.ones(1, 2), likelihood_weight=1, reward="p")


def test_losses_by_hand():
    log_prob = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    loss = policy_loss(log_prob, torch.tensor([1.0, -0.5, 0.0]), 4)
    assert loss.item() == (1 - 1) / 4
    (grad,) = torch.autograd.grad(loss, log_prob)
    assert grad.tolist() == [-0.25, 0.125, 0]
    got = refinement_loss(torch.tensor([4.0]), torch.tensor([-2.0]), likelihood_weight=0.5)
    assert got.item() == 5
    assert refinement_loss(torch.tensor([4.0]), torch.tensor([-torch.inf]), likelihood_weight=0.0).item() == 4


def test_the_mean_minimises_squared_error_and_maximises_correlation():
    # REAL's lemma, on a finite population: 4 inputs, several true scores each
    random = np.random.default_rng(0)
    x = np.repeat(np.arange(4), 5)
    y = random.integers(1, 6, 20).astype(float)
    best = np.array([y[x == i].mean() for i in range(4)])
    error, correlation = ((best[x] - y) ** 2).mean(), np.corrcoef(best[x], y)[0, 1]
    for _ in range(500):
        other = best + random.normal(0, 1, 4)
        assert ((other[x] - y) ** 2).mean() > error
        assert np.corrcoef(other[x], y)[0, 1] <= correlation + 1e-12
    # and a policy gradient step at the mean stands still
    score = torch.tensor(best[x], requires_grad=True)
    (grad,) = torch.autograd.grad(
        refinement_loss((score - torch.tensor(y)).square(), torch.zeros(20), likelihood_weight=0.0).sum(), score
    )
    np.testing.assert_allclose([grad[x == i].sum() for i in range(4)], 0, atol=1e-12)


# ---- gradients through the model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_examples(tmp_path_factory.mktemp("data"), [1, 2, 1], scores=[[4], [2, None], [2.5]])


def full_log_probs(trainer, example, ids):
    """log p [L, V] of what follows every token of a plain sequence, by all its logits, and where `ids` start."""
    packer, model = trainer.packer, trainer.model
    question = list(packer.trunk(example).ids)
    row = torch.tensor([question + list(ids)])
    pixels, grid = prepare_images([trainer.data.image(f) for f in example.files], packer.images, dtype=torch.float64)
    types = (row == packer.image_id).int()
    out = model(input_ids=row, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=types)
    return out.logits[0].log_softmax(-1), len(question) - 1


def trainer_for(path, tmp_path, **sections):
    config = load_judge_config(settings(path, tmp_path, **sections))
    data = JudgeData(path, config.prompt.prompt.answers)
    parts = new_parts()
    return JudgeTrainer(Parts(parts.model.double(), *parts[1:]), data, config)


def gradients(trainer, questions):
    """The step's loss and gradient."""
    totals = Totals(*map(sum, zip(*(q.totals() for q in questions), strict=True)))
    loss = trainer._accumulate(questions, totals, new_metrics())
    grads = {n: p.grad for n, p in zip(trainer.names, trainer.parameters, strict=True)}
    trainer.optimizer.zero_grad()
    return loss, grads


def compare(trainer, questions, naive):
    loss, grads = gradients(trainer, questions)
    naive.backward()
    assert loss.item() == pytest.approx(naive.item(), rel=1e-5)
    for name, parameter in zip(trainer.names, trainer.parameters, strict=True):
        expected = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        scale = max(expected.abs().max().item(), 1e-9)
        got = grads[name] if grads[name] is not None else torch.zeros_like(parameter)
        assert (got - expected).abs().max().item() < 1e-6 * scale + 1e-12, name
    assert any(p.grad is not None and p.grad.abs().max() > 1e-6 for p in trainer.parameters)


def likelihood(trainer, log_p, y):
    """log p(y) by linear shares, and the expected score, of log-probs [V]."""
    ids = torch.tensor(trainer.packer.score_ids)
    low = math.floor(y)
    known = log_p[ids[low - 1]] if low == y else (low + 1 - y) * log_p[ids[low - 1]] + (y - low) * log_p[ids[low]]
    return known, (log_p[ids].exp() * torch.tensor(VALUES, dtype=torch.float64)).sum()


def answers_for(trainer, example, written):
    """Token ids of answers written as (thought, scores) or as plain text, as if sampled."""
    from mtedit_fast.judge.prompts import write_answer

    texts = [w if isinstance(w, str) else write_answer([str(s) for s in w[1]], w[0]) for w in written]
    return [trainer.packer.tokenizer.encode(text, add_special_tokens=False) for text in texts]


WRITTEN = {
    1: [("changed wanted", [3]), ("missing", [1]), ("changed wanted", [2]), "<Thought> no </Thought>"],
    2: [("kept", [2, 4]), ("missing, kept", [1, 1]), ("kept", [2, 5]), ("no", [5, 5])],
}


@pytest.mark.parametrize(
    ("reward", "form", "beta"),
    [
        ("probability", "leave_one_out", 0.3),
        ("log_probability", "group", 0.3),
    ],
)
def test_gradient_of_a_real_step(path, tmp_path, reward, form, beta):
    method = {"name": "real", "reward": reward, "advantage": form, "beta": beta, "likelihood_weight": 0.6}
    trainer = trainer_for(path, tmp_path, method=method)
    packer, questions, terms, refinements, tokens = trainer.packer, [], [], [], 0
    for example in trainer.data:
        turns = len(example.edits)
        answers = answers_for(trainer, example, WRITTEN[turns])
        questions.append(trainer.method.question(example, answers))
        errors, likelihoods, cots = [], [], []
        for ids in answers:
            text = [packer.text(t) for t in ids]
            slots = [i for i, t in enumerate(text) if i and text[i - 1].endswith("Score>") and "/" not in text[i - 1]]
            forced = list(ids)
            for slot, y in zip(slots, example.scores, strict=False):
                if y is not None:
                    forced[slot] = packer.score_ids[math.floor(y + 0.4999) - 1]  # the nearest, the lower on a tie
            end = slots[-1] if slots else len(forced)
            log_p, start = full_log_probs(trainer, example, forced[:end])
            cots.append([log_p[start + i, forced[i]] for i in range(end) if i not in slots])
            if not slots:
                far = [max((1 - y) ** 2, (5 - y) ** 2) for y in example.scores if y is not None]
                errors.append(torch.tensor(np.mean(far)))
                likelihoods.append(torch.tensor(-math.inf, dtype=torch.float64))
                continue
            pairs = [(s, y) for s, y in zip(slots, example.scores, strict=True) if y is not None]
            known = [likelihood(trainer, log_p[start + slot], y) for slot, y in pairs]
            squares = [(score - y) ** 2 for (_, score), (_, y) in zip(known, pairs, strict=True)]
            errors.append(torch.stack(squares).mean())
            likelihoods.append(torch.stack([value for value, _ in known]).mean())
            refinements += [square - 0.6 * value for square, (value, _) in zip(squares, known, strict=True)]
        advantage = real_advantage(
            torch.stack(errors), torch.stack(likelihoods), likelihood_weight=0.6, form=form, reward=reward
        )
        terms += [-a * value for a, values in zip(advantage, cots, strict=True) for value in values]
        tokens += sum(map(len, cots))
    assert len(questions[0].row.branches) == 3  # two of four answers differ in their sampled score alone
    compare(trainer, questions, torch.stack(terms).sum() / tokens + beta * torch.stack(refinements).mean())


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_gradient_of_0_1_accuracy(path, tmp_path, name):
    trainer = trainer_for(path, tmp_path, method={"name": name})
    questions, terms, tokens = [], [], 0
    hits = {0: [0, 0, 0, 0], 1: [1, 0, 1, 0], 2: [0, 0, 1, 0]}  # of 4; 2, unknown; 2.5, written as 2
    for number, example in enumerate(trainer.data):
        answers = answers_for(trainer, example, WRITTEN[len(example.edits)])
        questions.append(trainer.method.question(example, answers))
        r = np.array(hits[number], dtype=float)
        loo = np.array([r[i] - np.delete(r, i).mean() for i in range(4)])
        advantage = loo if name == "rloo" else (r - r.mean()) / (r.std(ddof=1) + 1e-6)
        for a, ids in zip(advantage, answers, strict=True):
            log_p, start = full_log_probs(trainer, example, ids)
            terms += [-a * log_p[start + i, token] for i, token in enumerate(ids)]
            tokens += len(ids)
    compare(trainer, questions, torch.stack(terms).sum() / tokens)


@pytest.mark.parametrize("name", ["sft", "tract", "regression"])
@pytest.mark.parametrize("thinking", [True, False])
def test_gradient_of_imitation(tmp_path, name, thinking):
    scores = [[4], [2, 5 if thinking else None], [2.5]]
    path = write_examples(tmp_path / "data", [1, 2, 1], scores=scores)
    prompt = {"thinking": thinking}
    trainer = trainer_for(path, tmp_path, method={"name": name, "squared_weight": 0.4}, prompt=prompt)
    questions = trainer.method.questions(trainer.data.examples, 0, new_metrics())
    entropy, squares = [], []
    for example in trainer.data:
        turns = len(example.edits)
        if thinking:
            texts = [str(math.floor(y + 0.4999)) for y in example.scores]
            (ids,) = answers_for(trainer, example, [(example.thoughts[0], texts)])
            ids.append(trainer.packer.tokenizer.eos_token_id)
            sequences = [(ids, dict(enumerate(example.scores)))]
        else:
            tags = ["<Score>"] if turns == 1 else ["<Turn1Score>", "<Turn2Score>"]
            sequences = [
                (answers_for(trainer, example, [tag])[0], {turn: example.scores[turn]}) for turn, tag in enumerate(tags)
            ]
        for ids, targets in sequences:
            log_p, start = full_log_probs(trainer, example, ids)
            pieces = [trainer.packer.text(t) for t in ids]
            slots = [i + 1 for i, t in enumerate(pieces) if t.endswith("Score>") and "/" not in t]
            for slot, y in zip(slots, targets.values(), strict=True):
                if y is not None:
                    value, score = likelihood(trainer, log_p[start + slot], y)
                    entropy.append(-value)
                    squares.append((score - y) ** 2)
            if thinking:
                entropy += [-log_p[start + i, t] for i, t in enumerate(ids) if i not in slots]
    weight = {"sft": 0.0, "tract": 0.4, "regression": 1.0}[name]
    naive = weight * torch.stack(squares).mean()
    compare(trainer, questions, naive if name == "regression" else naive + torch.stack(entropy).mean())


def test_truth_of_a_batch_follows_its_slots(path, tmp_path):
    trainer = trainer_for(path, tmp_path)
    example = trainer.data[1]
    question = trainer.method.question(example, answers_for(trainer, example, WRITTEN[2]))
    batch = trainer.packer.pack([question.row])
    assert len(question.row.branches) == 3
    truth = truth_of([question], batch)
    assert truth.nan_to_num(-1).tolist() == [2, -1] * 3
