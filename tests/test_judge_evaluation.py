"""Evaluation of judges: agreement against scipy, predictions against plain forwards, reports."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from judge_training import RUBRIC, new_parts, write_examples
from judge_truth import spread
from scipy import stats

from mtedit_fast.judge import HuggingFaceJudge, JudgePrompt, prepare_images
from mtedit_fast.judge.prompts import SCALES
from mtedit_fast.training.judge.agreement import METRICS, agreement, weighted_agreement
from mtedit_fast.training.judge.batch import Packer
from mtedit_fast.training.judge.data import JudgeData
from mtedit_fast.training.judge.evaluation import predict, predict_with, summarize, write_predictions
from mtedit_fast.training.judge.report import write_report
from mtedit_fast.training.judge.sampling import sample


def scipy_agreement(x, y):
    return {
        "pearson": stats.pearsonr(x, y).statistic,
        "spearman": stats.spearmanr(x, y).statistic,
        "kendall": stats.kendalltau(x, y).statistic,
        "l1": np.abs(x - y).mean(),
        "rmse": math.sqrt(((x - y) ** 2).mean()),
    }


@pytest.mark.parametrize("n", [2, 3, 40, 1500])
@pytest.mark.parametrize("ties", [True, False])
def test_agreement_is_scipys(n, ties):
    random = np.random.default_rng(n)
    y = random.integers(1, 6, n).astype(float) if ties else random.normal(size=n)
    x = y + random.normal(size=n)
    x = np.round(x) if ties else x
    y[0], x[0] = 0.5, -3.0  # neither is constant
    got = agreement(x, y, range(n), resamples=3)
    for name, value in scipy_agreement(x, y).items():
        assert got[name]["mean"] == pytest.approx(value, rel=1e-12), name
        assert got[name]["n"] == n


def test_weights_are_repetitions():
    random = np.random.default_rng(0)
    y = random.integers(1, 6, 30).astype(float)
    x = np.round(y + random.normal(size=30), 1)
    weights = random.integers(0, 4, (5, 30)).astype(float)
    got = weighted_agreement(x, y, weights)
    for row, counts in enumerate(weights.astype(int)):
        for name, value in scipy_agreement(np.repeat(x, counts), np.repeat(y, counts)).items():
            assert got[name][row] == pytest.approx(value, rel=1e-11), name


def test_intervals_resample_groups():
    random = np.random.default_rng(0)
    y = random.integers(1, 6, 24).astype(float)
    x = y + random.normal(size=24)
    groups = [f"image {i % 6}" for i in range(24)]
    got = agreement(x, y, groups, resamples=200, confidence=0.9, seed=3)
    draws = np.random.default_rng(3).multinomial(6, np.full(6, 1 / 6), size=200)
    by_hand = {name: [] for name in METRICS}
    for draw in draws:
        rows = [i for group, count in enumerate(draw) for _ in range(count) for i in range(group, 24, 6)]
        for name, value in scipy_agreement(x[rows], y[rows]).items():
            by_hand[name].append(value)
    for name, values in by_hand.items():
        low, high = np.quantile(values, [0.05, 0.95])
        assert got[name]["low"] == pytest.approx(low, rel=1e-9)
        assert got[name]["high"] == pytest.approx(high, rel=1e-9)
    same = agreement(x, y, ["one"] * 24, resamples=20)
    assert same["rmse"]["low"] == same["rmse"]["high"] == pytest.approx(same["rmse"]["mean"])


def test_undefined_agreement():
    constant = agreement(np.full(5, 0.1), np.arange(5.0), range(5))
    assert [constant[name]["mean"] for name in ("pearson", "spearman", "kendall")] == [None] * 3
    assert constant["l1"]["mean"] == pytest.approx(np.abs(0.1 - np.arange(5)).mean())
    missing = agreement([1.0, math.nan, 3.0, 4.0], [1.0, 2.0, math.nan, 2.0], range(4))
    assert missing["rmse"]["n"] == 2
    assert agreement([math.nan], [1.0], ["a"])["l1"] == {"mean": None, "low": None, "high": None, "n": 0}
    with pytest.raises(ValueError, match="scores, truth, groups: expected the same"):
        agreement([1.0], [1.0, 2.0], [1])


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    parts = new_parts()
    path = write_examples(
        tmp_path_factory.mktemp("data"), [1, 2, 1, 3, 1], scores=[[1], [4, None], [2.5], [5, 1, 2], [3]]
    )
    return parts, JudgeData(path, SCALES["1-5"])


@pytest.mark.parametrize("batch", [2, 32])
def test_expected_scores_are_the_judges(judged, batch):
    parts, data = judged
    prompt = JudgePrompt(rubric=RUBRIC)
    packer = Packer(*parts, prompt, data.image)
    done = []
    scored = predict(packer, data.examples, samples=7, batch=batch, seed=1, progress=done.append)
    assert sum(done) == len(data)
    judge = HuggingFaceJudge(*parts, prompt, normalize="vocab")
    reference = predict_with(judge, data, data.examples, thinking=False, batch=batch)
    for own, other in zip(scored, reference, strict=True):
        turns = len(own.example.edits)
        assert own.example is other.example
        np.testing.assert_allclose(own.expected, other.expected, rtol=2e-5)
        np.testing.assert_allclose(own.mass, other.mass, rtol=2e-5)
        assert own.sampled.shape == (7, turns)
        assert set(own.sampled.ravel()) <= set(SCALES["1-5"].values)
        assert np.isnan(other.sampled).all()


def test_sampled_scores_follow_the_softmax_over_the_score_tokens(judged):
    parts, data = judged
    packer = Packer(*parts, JudgePrompt(rubric=RUBRIC), data.image)
    scored = predict(packer, data.examples[:1], samples=4000)
    judge = HuggingFaceJudge(*parts, packer.prompt, normalize="set")
    exact = predict_with(judge, data, data.examples[:1], thinking=False)[0].expected[0, 0]
    assert abs(scored[0].sampled.mean() - exact) < 5 * 1.5 / math.sqrt(4000)


def plain_inputs(packer, example, answer=()):
    """Of the model's own forward: one question, and the beginning of an answer."""
    ids = torch.tensor([[*packer.trunk(example).ids, *answer]])
    pixels, grid = prepare_images([packer.load(file) for file in example.files], packer.images)
    types = (ids == packer.image_id).int()
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": types}


def plain_expectation(packer, example, ids, end):
    """Σ k p_k after the first `end` tokens of an answer, by one plain forward."""
    logits = packer.model(**plain_inputs(packer, example, ids[:end])).logits[0, -1].double()
    p = logits.softmax(0)[list(packer.score_ids)]
    return (p * torch.tensor(packer.scale.values).double()).sum().item()


@pytest.mark.parametrize("batch", [2, 32])
def test_thoughts_are_written_as_by_generate(judged, batch):
    """Questions of different lengths together, whose originals are shared."""
    parts, data = judged
    model = spread(new_parts().model)
    packer = Packer(model, *parts[1:], JudgePrompt(rubric=RUBRIC, thinking=True), data.image)
    options = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 6, "generator": torch.Generator()}
    for example, answers in zip(data, sample(packer, data.examples, n=2, batch=batch, **options), strict=True):
        whole = model.generate(**plain_inputs(packer, example), do_sample=False, max_new_tokens=6)[0]
        assert answers == [packer.cut(whole[len(packer.trunk(example).ids) :].tolist())] * 2


def test_thinking_scores_stand_where_the_answer_was_written(judged, monkeypatch):
    parts, data = judged
    packer = Packer(*parts, JudgePrompt(rubric=RUBRIC, thinking=True), data.image)
    encode = packer.tokenizer.encode
    texts = {
        1: ["<Thought>no</Thought><Score>4</Score>", "<Thought>yes , no</Thought><Score>2</Score>", "<Thought>no"],
        2: [
            "<Thought>no</Thought><Turn1Score>4</Turn1Score><Turn2Score>1</Turn2Score>",
            "<Thought>no</Thought><Turn1Score>4</Turn1Score>",
            "<Turn1Score>2</Turn1Score><Turn2Score>2</Turn2Score>",
        ],
        3: ["no", "no", "no"],
    }
    written = [[encode(text, add_special_tokens=False) for text in texts[len(e.edits)]] for e in data]
    monkeypatch.setattr("mtedit_fast.training.judge.evaluation.sample", lambda *a, **k: written)
    scored = predict(packer, data.examples, samples=3, batch=2)
    with torch.no_grad():
        for one in scored:
            turns = len(one.example.edits)
            for number, ids in enumerate(written[data.examples.index(one.example)]):
                slots = packer.slots(ids, turns)
                if slots is None:
                    assert np.isnan(one.expected[number]).all()
                    assert np.isnan(one.sampled[number]).all()
                    continue
                assert [packer.text(ids[offset]) for offset, _ in slots] == [f"{v:.0f}" for v in one.sampled[number]]
                for offset, turn in slots:
                    exact = plain_expectation(packer, one.example, ids, offset)
                    assert one.expected[number, turn] == pytest.approx(exact, rel=1e-4)
    summary = summarize(scored, resamples=20)
    # 3 answers about each of 3 + 2 + 3 scores; 3 single turns, 1 double turn and the triple one miss 1, 1, 3 answers
    assert summary["invalid"] == {"expected": {"count": 3 + 2 + 9, "of": 24}, "sampled": {"count": 14, "of": 24}}
    assert (summary["examples"], summary["scores"], summary["originals"]) == (5, 7, 2)
    assert summary["expected"]["l1"]["n"] == 4
    means = [np.nanmean(s.expected[:, 0]) for s in scored[:3]] + [np.nanmean(scored[4].expected[:, 0])]
    assert summary["expected"]["l1"]["mean"] == pytest.approx(np.abs(np.array(means) - [1, 4, 2.5, 3]).mean())
    ones = np.array([s.sampled[0, 0] for s in scored])[[0, 1, 2, 4]]
    assert summary["sampled_one"]["rmse"]["mean"] == pytest.approx(math.sqrt(((ones - [1, 4, 2.5, 3]) ** 2).mean()))


def test_slots_take_the_last_closed_score(judged):
    parts, data = judged
    packer = Packer(*parts, JudgePrompt(rubric=RUBRIC, thinking=True), data.image)

    def slots(text, turns=1):
        ids = packer.tokenizer.encode(text, add_special_tokens=False)
        found = packer.slots(ids, turns)
        return found and [(packer.text(ids[offset]), turn) for offset, turn in found]

    assert slots("<Thought><Score>1</Score></Thought><Score>4</Score>") == [("4", 0)]
    assert slots("<Score>4</Score><Score>") == [("4", 0)]
    assert slots("<Score>4") is None
    assert slots("</Score>") is None
    assert slots("<Score>9</Score>") is None
    assert slots("<Score>4 5</Score>") is None
    assert slots("<Score>no</Score>") is None
    assert slots("") is None
    two = "<Turn1Score>3</Turn1Score><Turn2Score>5</Turn2Score>"
    assert slots(two, 2) == [("3", 0), ("5", 1)]
    assert slots("<Turn2Score>5</Turn2Score><Turn1Score>3</Turn1Score>", 2) is None
    assert slots(two, 3) is None


def test_image_tokens_end_a_sampled_answer(judged):
    parts, data = judged
    packer = Packer(*parts, JudgePrompt(rubric=RUBRIC, thinking=True), data.image)
    image = packer.image_id
    assert packer.cut([1, 2, image, 3]) == [1, 2, image]
    assert packer.cut([1, 2]) == [1, 2]


def test_a_judge_that_thinks_is_read_by_its_answers(judged):
    parts, data = judged
    judge = HuggingFaceJudge(*parts, JudgePrompt(rubric=RUBRIC, thinking=True), samples=2, max_new_tokens=4)
    scored = predict_with(judge, data, data.examples, thinking=True)
    assert all(len(s.answers) == 2 and s.sampled.shape == (2, len(s.example.edits)) for s in scored)
    summary = summarize(scored, resamples=5)
    assert "expected" not in summary
    assert summary["mass"] is None


def test_report_and_predictions(judged, tmp_path):
    parts, data = judged
    packer = Packer(*parts, JudgePrompt(rubric=RUBRIC), data.image)
    scored = predict(packer, data.examples, samples=2)
    write_predictions(tmp_path / "predictions" / "tiny & co.jsonl", scored)
    line = json.loads((tmp_path / "predictions" / "tiny & co.jsonl").read_text().splitlines()[1])
    assert (line["id"], line["truth"]) == ("e1", [4.0, None])
    assert len(line["expected"]) == 2
    summary = {"models": {"tiny & co": summarize(scored, resamples=5)}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = write_report(tmp_path).read_text()
    assert "tiny &amp; co" in page
    assert page.count("<img") == 1
    with pytest.raises(ValueError, match=r"summary\.json: missing"):
        write_report(tmp_path / "nowhere")


def test_packing_does_not_change_scores(judged):
    """Eager and SDPA attention, one row at a time or all together."""
    parts, data = judged
    prompt = JudgePrompt(rubric=RUBRIC)
    together = predict(Packer(*parts, prompt, data.image), data.examples, batch=5)
    alone = predict(Packer(*parts, prompt, data.image), data.examples, batch=1)
    model = new_parts().model
    model.set_attn_implementation("eager")
    eager = predict(Packer(model, *parts[1:], prompt, data.image), data.examples, batch=5)
    for a, b, c in zip(together, alone, eager, strict=True):
        np.testing.assert_allclose(a.expected, b.expected, rtol=1e-5)
        np.testing.assert_allclose(a.expected, c.expected, rtol=1e-5)
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"model\.attention: .*expected sdpa or eager, got flash_attention_2"):
        Packer(model, *parts[1:], prompt, data.image)
    assert replace(prompt, thinking=True).thinking
