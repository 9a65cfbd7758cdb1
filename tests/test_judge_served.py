"""What the served judge asks a server on this machine, and what it makes of the answers."""

import time
import warnings

import pytest
import torch
from chat_server_fixture import Reply, chat, images_of
from served_judge import (
    FIELDS,
    TEXTS,
    THINKING,
    TOKENIZER,
    ask,
    assert_equal,
    batch,
    formula,
    judge,
    serving,
    slot_of,
    truth,
)

from mtedit_fast import chat_server
from mtedit_fast.judge.huggingface import HuggingFaceJudge
from mtedit_fast.judge.prompts import JudgePrompt, write_answer
from mtedit_fast.judge.sequence import encode, score_token_ids
from mtedit_fast.ops import digit_score
from mtedit_fast.qwen_vl import prepare_images
from mtedit_fast.training.playground.judge_model import IMAGES, new_judge_model


@pytest.fixture
def serve():
    yield from serving()


# --- what it says ---


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("normalize", ["set", "vocab"])
def test_scores_are_those_of_the_model(serve, turns, normalize):
    model = new_judge_model(seed=1, tokenizer=TOKENIZER)

    @torch.no_grad()
    def hidden(ids, images):
        ids = torch.tensor([ids])
        seen = {}
        if images:  # the health check has none
            seen["pixel_values"], seen["image_grid_thw"] = prepare_images(list(images), IMAGES)
            seen["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        return model.model(input_ids=ids, **seen).last_hidden_state[0, -1:]

    @torch.no_grad()
    def log_probs(text, images):
        tokens = [IMAGES.tokens(*image.shape[1:]) for image in images]
        pieces = text.split("<|image_pad|>")
        text = pieces[0] + "".join("<|image_pad|>" * n + p for n, p in zip(tokens, pieces[1:], strict=True))
        states = hidden(TOKENIZER.encode(text, add_special_tokens=False), images)
        return model.lm_head(states)[0].double().log_softmax(0)

    prompt = JudgePrompt("1-5", rubric="Score each edit.")
    data = references, edits, instructions, owner = batch(rows=3, turns=turns, size=(64, 64))
    server = serve(log_probs)
    scores = ask(judge(server, prompt, normalize=normalize), data)
    assert scores.failures == {}
    assert scores.answers is None
    ids = score_token_ids(TOKENIZER, prompt.answers, "<Score>")
    for row in range(3):
        images = [references[owner[row]], *edits[row]]
        tokens = [IMAGES.tokens(64, 64)] * (turns + 1)
        question, openings = encode(TOKENIZER, prompt, instructions[row], tokens, image_token="<|image_pad|>")
        for turn, opening in enumerate(openings):
            states = hidden(question + opening, images)
            whole = digit_score(states, model.lm_head.weight, ids, prompt.answers.values, normalize="vocab")
            expected = digit_score(states, model.lm_head.weight, ids, prompt.answers.values, normalize=normalize)
            expected = {**expected._asdict(), "mass": whole.mass}
            for name in FIELDS:
                torch.testing.assert_close(getattr(scores, name)[row, turn], expected[name][0], rtol=1e-5, atol=1e-5)
    local = ask(HuggingFaceJudge(model, TOKENIZER, IMAGES, prompt, normalize=normalize), data)
    for name in FIELDS[: 5 if normalize == "vocab" else 4]:
        torch.testing.assert_close(getattr(scores, name), getattr(local, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", ["1-5", "0-5", "binary", "yes_no"])
@pytest.mark.parametrize(
    "options", [{}, {"normalize": "vocab"}, {"temperature": 0.5}, {"temperature": 2.0, "tokenizer": TOKENIZER}]
)
def test_every_scale(serve, scale, options):
    data, prompt = batch(), JudgePrompt(scale)
    scores = ask(judge(serve(formula), prompt, **options), data)
    options = {name: value for name, value in options.items() if name != "tokenizer"}
    assert_equal(scores, truth(formula, prompt, data, **options))
    assert all(getattr(scores, name).dtype == torch.float32 for name in FIELDS)


def test_floats_are_rounded_to_levels_and_sequences_may_differ_in_size(serve):
    references, edits, instructions, owner = batch()
    server = serve(formula)
    expected = ask(judge(server), (references, edits, instructions, owner))
    floats = ask(judge(server), (references / 255, (edits / 255).double() + 1e-4, instructions, owner))
    assert_equal(floats, expected._asdict())
    lists = ask(judge(server), (list(references), [*edits[:3], edits[3, :, :, :5, :7]], instructions, owner))
    assert_equal(lists, expected._asdict(), slice(3))
    assert images_of(server.asked[-1])[1].shape in ((3, 8, 12), (3, 5, 7))
    assert (lists.score[3] != expected.score[3]).all()


def test_the_request(serve):
    server = serve(formula, key="secret")
    references, edits, instructions, _ = batch(rows=1, originals=1)
    asked = judge(server, api_key="secret", concurrency=1)
    asked.score(references, edits, instructions)
    assert [path for path, *_ in server.requests[:2]] == ["/v1/models", "/tokenize"]
    ids = list(score_token_ids(TOKENIZER, JudgePrompt().answers, "<Score>"))
    for turn, body in enumerate(server.asked):
        settings = {name: value for name, value in body.items() if name != "messages"}
        assert settings == {
            "model": "judge",
            "add_generation_prompt": False,
            "continue_final_message": True,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 20,
            "logprob_token_ids": ids,
            "return_tokens_as_token_ids": True,
        }
        assert body["messages"][-1] == {"role": "assistant", "content": f"<Turn{turn + 1}Score>"}
        sent = images_of(body)
        assert all(map(torch.equal, sent, [references[0], *edits[0]]))
        assert len(sent) == 4
    assert len(server.asked) == 3


def test_a_tokenizer_of_ones_own_spares_the_server(serve):
    server = serve(formula, tokenize=False)
    asked = judge(server, tokenizer=TOKENIZER)
    assert_equal(ask(asked, batch()), truth(formula, JudgePrompt(), batch()))
    assert "/tokenize" not in [path for path, *_ in server.requests]
    assert asked.incomplete == 0


@pytest.mark.parametrize("options", [{"tokenize": False}, {"named": False}])
def test_tokens_told_by_their_text(serve, options):
    def peaked(text, images):  # all digits among the likeliest
        log_probs = formula(text, images).clone()
        log_probs[[*score_token_ids(TOKENIZER, JudgePrompt().answers, "<Score>")]] += 30
        return log_probs.log_softmax(0)

    asked = judge(serve(peaked, **options))
    assert_equal(ask(asked, batch()), truth(peaked, JudgePrompt(), batch()))
    assert asked.incomplete == 0


def test_what_a_server_of_the_likeliest_tokens_loses_is_counted(serve):
    data = batch(rows=8)
    ids = torch.tensor(score_token_ids(TOKENIZER, JudgePrompt().answers, "<Score>"))
    listed = []

    def cut(text, images):
        log_probs = formula(text, images)
        best = log_probs.topk(20).indices
        listed.append(torch.isin(ids, best).sum())
        return torch.full_like(log_probs, -1e4).index_copy(0, best, log_probs[best])

    expected = truth(cut, JudgePrompt(), data)
    nothing = torch.stack(listed).view(8, 3) == 0
    partly = (torch.stack(listed).view(8, 3) < 5) & ~nothing
    assert nothing.any()
    assert partly.any()
    asked = judge(serve(formula, exact=False))
    with pytest.warns(UserWarning, match="gives only its 20 likeliest tokens"):
        scores = ask(asked, data)
    assert scores.failures == {"mass": int(nothing.sum())}
    assert torch.equal(scores.score.isnan(), nothing)
    assert_equal(scores, expected, ~nothing)
    assert asked.incomplete == partly.sum()
    with warnings.catch_warnings(action="error"):
        ask(asked, data)  # warns once
    assert asked.incomplete == 2 * partly.sum()


@pytest.mark.parametrize("normalize", ["set", "vocab"])
def test_scores_with_little_mass_are_invalid(serve, normalize):
    data = batch()
    expected = truth(formula, JudgePrompt(), data, normalize=normalize)
    least = float(expected["mass"].median())
    scores = ask(judge(serve(formula), normalize=normalize, min_mass=least + 1e-9), data)
    low = expected["mass"] <= least
    assert scores.failures == {"mass": int(low.sum())}
    for name in FIELDS:
        assert torch.equal(getattr(scores, name).isnan(), low)
    assert_equal(scores, expected, ~low)


# --- how it asks ---


def test_groups_and_rows_go_out_together_and_images_are_encoded_once(serve, monkeypatch):
    encoded = []
    plain = chat_server.png_url
    monkeypatch.setattr(chat_server, "png_url", lambda levels: encoded.append(levels) or plain(levels))
    server = serve(formula)
    references, edits, instructions, _ = batch(rows=5)
    references = torch.stack([*references, references[0]])  # the third is the first again
    instructions[4] = [*TEXTS[:2], "Make it dawn"]
    ask(judge(server, concurrency=1), (references, edits, instructions, [0, 1, 2, 1, 0]))
    rows = [next(r for r in range(5) if torch.equal(images_of(body)[1], edits[r, 0])) for body in server.asked]
    assert rows == [0, 0, 0, 2, 2, 2, 1, 1, 1, 3, 3, 3, 4, 4, 4]
    assert len(encoded) == 2 + 15
    encoded.clear()
    ask(judge(server, concurrency=8), (references, edits, instructions, [0, 1, 2, 1, 0]))
    assert len(encoded) == 2 + 15


def test_answers_out_of_order_meet_their_questions(serve):
    finished = []

    def late(body, attempt):
        if (slot := slot_of(body)) is not None:
            time.sleep(0.06 - 0.005 * (slot[0] * 3 + slot[1]))
            finished.append(slot)

    server = serve(formula, trouble=late)
    scores = ask(judge(server, concurrency=6), batch())
    assert finished != sorted(finished)
    assert_equal(scores, truth(formula, JudgePrompt(), batch()))
    assert 2 <= server.most <= 6


def test_nothing_to_score(serve):
    server = serve(formula)
    scores = judge(server).score(torch.zeros(0, 3, 8, 8), torch.zeros(0, 2, 3, 8, 8), [])
    assert scores.score.shape == (0, 2)
    assert scores.failures == {}
    assert server.requests == []


# --- thinking ---


def test_thinking_takes_the_mean_of_what_can_be_read(serve):
    data = batch(turns=2)
    written = [
        [write_answer("24", "a thought"), "<Turn1Score>4</Turn1Score>", write_answer("45"), write_answer(["4", "3.5"])],
        ["", "cut off in <Thought>the midd", "<Turn1Score>9</Turn1Score><Turn2Score>3</Turn2Score>", "no"],
        [write_answer("33")] * 4,
        [write_answer("15"), write_answer("25"), "<Turn1Score>1</Turn1Score>" + write_answer("35"), write_answer("45")],
    ]

    def write(text, images, i):
        assert text.endswith("<|im_start|>assistant\n")
        return written[next(r for r in range(4) if torch.equal(data[1][r, 0], images[1]))][i]

    server = serve(formula, write)
    asked = judge(server, THINKING, samples=4, temperature=0.9, max_new_tokens=77)
    scores = ask(asked, data)
    assert {(body["n"], body["temperature"], body["max_tokens"]) for body in server.asked} == {(4, 0.9, 77)}
    assert len(server.asked) == 4
    assert scores.answers == written
    assert scores.failures == {"parse": 5}
    nan = torch.nan
    torch.testing.assert_close(
        scores.score, torch.tensor([[10 / 3, 12.5 / 3], [nan, nan], [3, 3], [2.5, 5]]), equal_nan=True
    )
    torch.testing.assert_close(
        scores.variance, torch.tensor([[8 / 9, 7 / 18], [nan, nan], [0, 0], [1.25, 0]]), equal_nan=True
    )
    torch.testing.assert_close(scores.median, torch.tensor([[4.0, 4], [nan, nan], [3, 3], [2, 5]]), equal_nan=True)
    thirds = torch.tensor([2 / 3, 1 / 3])
    entropy = [float(-(thirds * thirds.log()).sum()), torch.tensor(3.0).log().item()]
    torch.testing.assert_close(
        scores.entropy, torch.tensor([entropy, [nan, nan], [0, 0], [torch.tensor(4.0).log().item(), 0]]), equal_nan=True
    )
    torch.testing.assert_close(scores.mass, torch.tensor([[0.75, 0.75], [nan, nan], [1, 1], [1, 1]]), equal_nan=True)
    strict = ask(judge(server, THINKING, samples=4, min_mass=0.8), data)
    assert strict.failures == {"parse": 5, "mass": 2}
    assert strict.score.isnan().any(1).tolist() == [True, True, False, False]


def test_thinking_answers_that_fail(serve):
    data = batch(rows=3, turns=1, originals=3)
    references = data[0]

    def trouble(body, attempt):
        first = images_of(body)[0]
        if torch.equal(first, references[0]):  # not in order, and one of them is nothing but hidden reasoning
            reply = chat("<Score>1</Score>", None)
            reply["choices"].reverse()
            return Reply(body=reply)
        return Reply(body=chat("<Score>2</Score>")) if torch.equal(first, references[1]) else None

    server = serve(formula, lambda text, images, i: f"<Score>{i + 3}</Score>", trouble=trouble)
    scores = ask(judge(server, THINKING, samples=2, retries=1), data)
    assert scores.answers == [["<Score>1</Score>", ""], [], ["<Score>3</Score>", "<Score>4</Score>"]]
    torch.testing.assert_close(scores.score[:, 0], torch.tensor([1.0, torch.nan, 3.5]), equal_nan=True)
    assert scores.failures == {"parse": 1, "malformed reply": 1}


def test_one_thinking_answer_without_chance(serve):
    server = serve(formula, lambda text, images, i: "<Score>yes</Score>")
    scores = ask(judge(server, JudgePrompt("yes_no", thinking=True), temperature=0), batch(turns=1))
    assert (scores.score == 1).all()
    assert server.asked[0]["temperature"] == 0
