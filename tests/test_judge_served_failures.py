"""The served judge against servers that are wrong, slow, busy or gone, and arguments that do not fit."""

import random
import time
from email.utils import formatdate

import pytest
import torch
from chat_server_fixture import DROPPED, Reply, chat
from served_judge import FIELDS, THINKING, TOKENIZER, ask, assert_equal, batch, formula, judge, serving, slot_of, truth
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mtedit_fast.chat_server import ChatServer, ChatServerError
from mtedit_fast.judge.prompts import JudgePrompt
from mtedit_fast.judge.served import ServedJudge, ServedJudgeError


@pytest.fixture
def serve():
    yield from serving()


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
