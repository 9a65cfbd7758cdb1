"""The served judge against servers on this machine: right, wrong, slow, busy, gone."""

import random
import time
import warnings
import zlib
from email.utils import formatdate

import pytest
import torch
from chat_server_fixture import DROPPED, JudgeServer, Reply, chat, images_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mtedit_fast import chat_server
from mtedit_fast.chat_server import ChatServer, ChatServerError
from mtedit_fast.judge.huggingface import HuggingFaceJudge
from mtedit_fast.judge.prompts import JudgePrompt, write_answer
from mtedit_fast.judge.sequence import encode, score_token_ids
from mtedit_fast.judge.served import ServedJudge, ServedJudgeError
from mtedit_fast.ops import digit_score
from mtedit_fast.qwen_vl import prepare_images
from mtedit_fast.training.playground.judge_model import IMAGES, new_judge_model, new_judge_tokenizer

TOKENIZER = new_judge_tokenizer()
THINKING = JudgePrompt("1-5", thinking=True)
TEXTS = ("Remove the red circle", "Add a blue square", "Make it dusk")
FIELDS = ("score", "variance", "entropy", "median", "mass")


def formula(text, images):
    """Log-probs that depend on every letter and pixel."""
    seed = zlib.crc32(text.encode() + b"".join(image.contiguous().numpy().tobytes() for image in images))
    return (3 * torch.randn(len(TOKENIZER), generator=torch.Generator().manual_seed(seed)).double()).log_softmax(0)


@pytest.fixture
def serve():
    servers = []

    def start(*args, **options):
        servers.append(JudgeServer(TOKENIZER, *args, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def judge(server, prompt=JudgePrompt(), **options):
    return ServedJudge(server.url, "judge", prompt, **{"backoff": 0.001, "timeout": 5.0, **options})


def batch(rows=4, turns=3, originals=2, size=(8, 12)):
    """(references, edits, instructions, owner) with neighbours in different groups."""
    generator = torch.Generator().manual_seed(0)
    references = torch.randint(256, (originals, 3, *size), generator=generator, dtype=torch.uint8)
    edits = torch.randint(256, (rows, turns, 3, *size), generator=generator, dtype=torch.uint8)
    owner = [row % originals for row in range(rows)]
    return references, edits, [list(TEXTS[:turns]) for _ in owner], owner


def ask(asked, data):
    references, edits, instructions, owner = data
    return asked.score(references, edits, instructions, owner=owner)


def truth(log_probs, prompt, data, **options):
    """{field: [B, K] fp64} of log_probs(text, images), by the fused head's own reference over the whole vocabulary."""
    references, edits, instructions, owner = data
    rows = []
    for images, first, texts in zip(edits, owner, instructions, strict=True):
        text = TOKENIZER.apply_chat_template(prompt.messages(texts), tokenize=False, add_generation_prompt=True)
        rows += [log_probs(text + opening, [references[first], *images]) for opening in prompt.openings(len(texts))]
    logits = torch.stack(rows)
    ids = score_token_ids(TOKENIZER, prompt.answers, "<Score>")
    found = digit_score(logits, torch.eye(logits.shape[1]).double(), ids, prompt.answers.values, **options)._asdict()
    found["mass"] = logits[:, ids].exp().sum(1)
    return {name: found[name].view(edits.shape[:2]) for name in FIELDS}


def assert_equal(scores, expected, where=...):
    for name in FIELDS:
        torch.testing.assert_close(getattr(scores, name)[where], expected[name].float()[where], rtol=1e-6, atol=1e-6)


def slot_of(body):
    """(row, turn) of a request, by its images among those of `batch()`; None for the health check's."""
    images = images_of(body)
    if not images:
        return None
    edits = batch()[1]
    (row,) = [row for row in range(len(edits)) if torch.equal(edits[row, 0], images[1])]
    return row, int(body["messages"][-1]["content"].removeprefix("<Turn")[0]) - 1


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


# --- what goes wrong ---

BROKEN_LOG_PROBS = chat("3")
BROKEN_LOG_PROBS["choices"][0]["logprobs"] = None


def listing(*entries):
    reply = chat("3")
    first = {"token": entries[0][0], "logprob": entries[0][1]}
    others = [{"token": token, "logprob": value} for token, value in entries]
    reply["choices"][0]["logprobs"] = {"content": [{**first, "top_logprobs": others}]}
    return Reply(body=reply)


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (DROPPED, "connection lost"),
        (Reply(200, b'{"choices": [', missing=100), "connection lost"),
        (Reply(500, b"down"), "status 500"),
        (Reply(503, b"loading"), "status 503"),
        (Reply(429, b"slow down", headers=(("Retry-After", "0"),)), "status 429"),
        (Reply(200, b"<html>"), "malformed reply"),
        (Reply(200, b""), "malformed reply"),
        (Reply(200, b"\xff\xfe{"), "malformed reply"),
        (Reply(200, b"[" * 100_000), "malformed reply"),
        (Reply(200, {"choices": []}), "malformed reply"),
        (Reply(200, [1]), "malformed reply"),
        (Reply(200, BROKEN_LOG_PROBS), "malformed reply"),
        (listing(("token_id:5", float("nan"))), "malformed reply"),
        (listing(("token_id:5", 12.5)), "malformed reply"),  # a logit
        (listing(("token_id:5", None)), "malformed reply"),
        (listing((["3"], -1.0)), "malformed reply"),
        (Reply(200, b"late", seconds=0.8), "timeout"),
        (Reply(400, b"too long"), "status 400"),
        (Reply(413, b"too large"), "status 413"),
        (listing(("the", -0.1)), "mass"),
    ],
)
def test_a_failure_costs_one_score(serve, failure, reason):
    server = serve(formula, trouble=lambda body, attempt: failure if slot_of(body) == (2, 1) else None)
    asked = judge(server, retries=2, timeout=0.4 if reason == "timeout" else 30.0)
    scores = ask(asked, batch())
    assert scores.failures == {reason: 1}
    lost = torch.zeros(4, 3, dtype=torch.bool)
    lost[2, 1] = True
    for name in FIELDS:
        assert torch.equal(getattr(scores, name).isnan(), lost)
    assert_equal(scores, truth(formula, JudgePrompt(), batch()), ~lost)
    attempts = sum(slot_of(body) == (2, 1) for body in server.asked)
    assert attempts == (1 if reason in ("status 400", "status 413", "mass") else 3)
    if reason != "mass":
        assert f"failed in {attempts} attempts" in asked.last_error


@pytest.mark.parametrize(
    "failure",
    [
        DROPPED,
        Reply(500, b"down"),
        Reply(429, b"slow down"),
        Reply(200, b'{"choices": [', missing=9),
        Reply(200, b"<html>"),
        Reply(200, b"late", seconds=0.8),
    ],
)
def test_failures_that_pass(serve, failure):
    server = serve(formula, trouble=lambda body, attempt: failure if attempt == 1 and slot_of(body) else None)
    scores = ask(judge(server, timeout=0.4 if failure.seconds else 30.0, concurrency=12), batch())
    assert scores.failures == {}
    assert_equal(scores, truth(formula, JudgePrompt(), batch()))


def test_a_server_that_goes_and_comes_back(serve):
    first = serve(formula)
    asked = judge(first, retries=1)
    expected = ask(asked, batch())
    first.close()
    gone = ask(asked, batch())
    assert gone.failures == {"unreachable": 12}
    assert gone.score.isnan().all()
    serve(formula, port=first.server_port)
    assert_equal(ask(asked, batch()), expected._asdict())


def test_pixels_that_are_no_numbers_are_not_sent(serve):
    server = serve(formula)
    references, edits, instructions, owner = batch()
    floats = edits / 255
    floats[1, 2, 0, 3, 3] = torch.nan
    scores = ask(judge(server), (references, floats, instructions, owner))
    assert scores.failures == {"image": 3}
    assert scores.score.isnan().any(1).tolist() == [False, True, False, False]
    assert {slot_of(body)[0] for body in server.asked} == {0, 2, 3}


# --- health ---


def test_health_in_words(serve):
    server = serve(formula)
    assert judge(server).health() is None
    assert judge(server, THINKING).health() is None
    server = serve(formula, key="secret", models=("a", "b"))
    assert "refuses the api_key: status 401" in judge(server, api_key="wrong").health()
    assert f"{server.url} does not serve 'judge'; it serves 'a', 'b'" == judge(server, api_key="secret").health()
    assert "it serves nothing" in judge(serve(formula, models=())).health()
    wrong = ServedJudge(server.url.removesuffix("/v1"), "judge", api_key="secret", backoff=0.001)
    assert "base_url ends in the version" in wrong.health()
    gone = serve(formula)
    gone.close()
    problem = judge(gone, retries=0).health()
    assert f"no server answers at {gone.url}" in problem
    assert "vllm serve judge" in problem


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (Reply(400, b"what is continue_final_message?"), r"does not continue an answer of 'judge' .*continue_final_me"),
        (Reply(200, chat("3")), "does not continue an answer of 'judge' with log-probs"),
        (Reply(200, b"late", seconds=0.8), "no server answers"),
        (Reply(500, b"out of memory"), "out of memory; the server is busy or failing"),
        (Reply(403, b"not for you"), "refuses the api_key"),
    ],
)
def test_a_server_that_cannot_judge_is_refused_before_the_first_score(serve, failure, words):
    server = serve(formula, trouble=lambda body, attempt: failure)
    asked = judge(server, retries=0, timeout=0.4 if failure.seconds else 30.0)
    for _ in range(2):
        with pytest.raises(ServedJudgeError, match=words):
            ask(asked, batch())
    assert server.asked == []
    server.trouble = None
    assert ask(asked, batch()).failures == {}


@pytest.mark.parametrize("prompt", [JudgePrompt(), THINKING])
def test_what_no_other_request_would_mend_raises(serve, prompt):
    server = serve(formula, write=lambda text, images, i: "<Score>3</Score>")
    asked = judge(server, prompt, concurrency=1)
    ask(asked, batch())
    server.models = ("another",)
    before = len(server.asked)
    with pytest.raises(ServedJudgeError, match="`judge` does not exist"):
        ask(asked, batch())
    assert len(server.asked) <= before + 2  # the others stay unsent
    server.models, server.key = ("judge",), "new"
    with pytest.raises(ServedJudgeError, match="refuses the api_key"):
        ask(asked, batch())


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


# --- what callers get wrong ---


def test_a_score_of_several_tokens(serve):
    letters = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({c: i for i, c in enumerate("<>Score noyes")}, unk_token="<")),
        chat_template=TOKENIZER.chat_template,
    )
    letters.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    server = serve(formula)
    server.tokenizer = letters
    for options in ({"tokenizer": letters}, {}):
        with pytest.raises(ValueError, match="'no' after '<Score>' is 2 tokens"):
            ask(judge(server, JudgePrompt("yes_no"), **options), batch())
    assert server.asked == []


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"instructions": [["a", "b", " "]] * 4}, ValueError, r"instructions\[0\]\[2\]"),
        ({"instructions": [["a", "b"]] * 4}, ValueError, r"instructions\[0\] must be 3 texts"),
        ({"instructions": [["a", "b", "c"]] * 3}, ValueError, "instructions must be 4 lists"),
        ({"owner": [0, 1, 2, 0]}, ValueError, "owner must be 4 indices of 2 references"),
        ({"owner": None}, ValueError, "references must be as many"),
        ({"references": torch.zeros(2, 4, 8, 8)}, ValueError, r"references\[0\] must be \[3, H, W\]"),
        ({"edits": torch.zeros(4, 3, 3, 8, 8, dtype=torch.int64)}, TypeError, r"edits\[0\] must be a uint8"),
    ],
)
def test_arguments_that_do_not_fit(serve, change, error, words):
    server = serve(formula)
    data = dict(zip(("references", "edits", "instructions", "owner"), batch(), strict=True)) | change
    with pytest.raises(error, match=words):
        judge(server).score(**data)
    assert server.requests == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"normalize": "all"}, "normalize must be 'set' or 'vocab', got 'all'"),
        ({"samples": 0}, "samples and max_new_tokens must be positive, got 0 and 512"),
        ({"max_new_tokens": 0}, "must be positive, got 1 and 0"),
        ({"min_mass": 1.5}, r"min_mass must lie in \[0, 1\], got 1.5"),
        ({"temperature": 0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"temperature": 0, "samples": 2, "prompt": THINKING}, "samples must be 1 at temperature 0"),
        ({"temperature": 0.5, "normalize": "vocab"}, "temperature must be 1 with normalize='vocab', got 0.5"),
        ({"base_url": "localhost:8000"}, "base_url must begin with http"),
        ({"timeout": 0}, "timeout must be positive"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        ServedJudge(**{"base_url": "http://localhost:8000/v1", "model": "judge", **options})


# --- waiting ---


@pytest.mark.parametrize("asked", ["0", lambda: formatdate(usegmt=True)])
def test_a_server_says_how_long_to_wait(serve, asked):
    after = asked if isinstance(asked, str) else asked()
    busy = Reply(429, b"", headers=(("Retry-After", after),))
    server = serve(formula, trouble=lambda body, attempt: busy if attempt == 1 and slot_of(body) else None)
    start = time.perf_counter()
    assert ask(judge(server, backoff=1e3, timeout=60.0), batch()).failures == {}  # its own wait would be minutes
    assert time.perf_counter() - start < 30


def test_a_wait_is_no_longer_than_the_timeout_and_nonsense_is_ignored(serve):
    for after in ("9999", "soon", "-1", "Fri, 99 Foo 2099"):
        busy = Reply(503, b"", headers=(("Retry-After", after),))
        server = serve(formula, trouble=lambda body, attempt, busy=busy: busy if attempt == 1 else None)
        assert judge(server, timeout=0.2).health() is None


def test_waiting_leaves_seeded_generators_alone(serve):
    server = serve(formula, trouble=lambda body, attempt: DROPPED if attempt == 1 else None)
    random.seed(0)
    expected = random.getstate()
    assert judge(server).health() is None
    assert random.getstate() == expected


def test_an_error_says_what_kind_it_is():
    server = ChatServer("http://127.0.0.1:9/v1", retries=0)
    with pytest.raises(ChatServerError) as caught:
        server.call(server.url, lambda reply: reply, {})
    assert (caught.value.reason, caught.value.status) == ("unreachable", None)
    assert not caught.value.refused
    assert not caught.value.misconfigured
