"""The HTTP client against a local server that answers, fails, stalls and talks nonsense."""

import pytest
import torch
from chat_server_fixture import Server, decode

from mtedit_fast.edival.backends import Question
from mtedit_fast.edival.vlm import HTTPVLM, VLMError, data_url


@pytest.fixture
def serve():
    servers = []

    def start(script):
        servers.append(Server(script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def vlm(server, **options):
    return HTTPVLM(server.url, "tiny", **{"backoff": 0.001, "timeout": 5.0, **options})


def questions(*texts):
    return [Question([], text) for text in texts]


def test_the_request(serve):
    server = serve(lambda text, attempt: (200, "yes", 0))
    client = vlm(server, api_key="key", max_tokens=7, temperature=0.5)
    images = [torch.rand(3, 5, 7), torch.zeros(3, 2, 2)]
    assert client.ask([Question(images, "Are they alike?")]) == ["yes"]
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer key"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("tiny", 7, 0.5)
    content = body["messages"][0]["content"]
    assert [c["type"] for c in content] == ["image_url", "image_url", "text"]
    assert content[0]["image_url"]["url"] == data_url(images[0])


def test_an_image_survives_its_url():
    levels = torch.randint(0, 256, (3, 45, 61), dtype=torch.uint8)
    assert torch.equal(decode(data_url(levels.float() / 255)), levels)
    outside = torch.tensor([-1.0, 0.5, 2.0]).view(3, 1, 1).bfloat16()
    assert decode(data_url(outside)).flatten().tolist() == [0, 128, 255]


def test_answers_keep_their_order_and_few_are_under_way(serve):
    # the first questions are answered last
    server = serve(lambda text, attempt: (200, f"answer {text}", 0.08 - 0.01 * int(text)))
    texts = [str(i) for i in range(8)]
    assert vlm(server, concurrency=3).ask(questions(*texts)) == [f"answer {i}" for i in texts]
    assert 2 <= server.most <= 3
    assert vlm(server).ask([]) == []


@pytest.mark.parametrize(
    "failure",
    [
        (0, "", 0),
        (500, "down", 0),
        (503, "busy", 0),
        (429, "slow down", 0),
        (200, b"<html>", 0),
        (200, b"{}", 0),
        (200, b'{"choices": []}', 0),
        (200, b'{"choices": [{"message": {"content": null}}]}', 0),
        (200, b"[1]", 0),
        (200, b"", 0),
    ],
)
def test_failures_are_retried(serve, failure):
    server = serve(lambda text, attempt: failure if attempt <= 2 else (200, f"{text} at {attempt}", 0))
    assert vlm(server).ask(questions("a")) == ["a at 3"]


def test_a_slow_answer_is_asked_for_again(serve):
    server = serve(lambda text, attempt: (200, "late", 1.0) if attempt == 1 else (200, "in time", 0))
    assert vlm(server, timeout=0.5).ask(questions("a")) == ["in time"]


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ((500, b"down for good", 0), "status 500: down for good"),
        ((200, b"not json", 0), "the reply holds no answer: 'not json'"),
        ((200, "late", 0.6), "TimeoutError"),
    ],
)
def test_failures_that_last(serve, failure, reason):
    server = serve(lambda text, attempt: failure)
    with pytest.raises(
        VLMError, match=rf"question 0 to {server.url}/chat/completions failed in 3 attempts; .*{reason}"
    ):
        vlm(server, retries=2, timeout=0.2).ask(questions("a"))
    assert server.attempts == {"a": 3}


@pytest.mark.parametrize("status", [401, 404])
def test_what_no_retry_mends_fails_at_once(serve, status):
    server = serve(lambda text, attempt: (status, b"no such key or model", 0))
    with pytest.raises(VLMError, match=f"failed in 1 attempts; the last gave status {status}: no such key or model"):
        vlm(server, concurrency=1).ask(questions(*map(str, range(50))))
    assert len(server.requests) <= 3  # questions not yet sent stay unsent


@pytest.mark.parametrize("status", [400, 413, 422])
def test_refused_questions_are_counted(serve, status):
    server = serve(lambda text, attempt: (status, b"filtered", 0) if text == "b" else (200, text, 0))
    client = vlm(server)
    assert client.ask(questions("a", "b", "c")) == ["a", "", "c"]
    assert client.refused == 1
    assert server.attempts["b"] == 1
    assert client.ask(questions("b")) == [""]
    assert client.refused == 2


def test_no_server():
    with pytest.raises(VLMError, match=r"question 0 .* failed in 2 attempts; the last gave .*refused"):
        HTTPVLM("http://127.0.0.1:9/v1", "tiny", retries=1, backoff=0.001).ask(questions("a"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"base_url": "localhost:8000"}, "base_url must begin with http:// or https://, got 'localhost:8000'"),
        ({"timeout": 0}, "timeout must be positive, .* got 0, 4, 1.0 and 8"),
        ({"retries": -1}, "timeout must be positive, .* got 60.0, -1"),
        ({"backoff": -1.0}, "got 60.0, 4, -1.0"),
        ({"concurrency": 0}, "concurrency at least 1, got .* and 0"),
    ],
)
def test_bad_options(options, reason):
    with pytest.raises(ValueError, match=reason):
        HTTPVLM(**{"base_url": "http://localhost:8000/v1", "model": "tiny", **options})


@pytest.mark.parametrize("bad", [torch.zeros(8, 8), torch.zeros(4, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)])
def test_bad_images(bad):
    with pytest.raises(ValueError, match=r"image must be \[3, H, W\] float in \[0, 1\], got "):
        data_url(bad)
