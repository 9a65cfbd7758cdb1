"""Real HTTP servers, on free ports, that speak the chat protocol: a scripted one, and one that does what vLLM does."""

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image


class Reply(NamedTuple):
    status: int = 200
    body: object = None  # bytes as they are, anything else as JSON
    seconds: float = 0.0  # to wait first
    headers: tuple[tuple[str, str], ...] = ()
    missing: int = 0  # bytes that were promised and do not come


DROPPED = Reply(status=0)  # the connection is closed without a word


class ChatHTTPServer(ThreadingHTTPServer):
    """Answers with `reply(path, headers, body)`; body is None for a GET. Keeps what it was asked for, in order, and
    the most requests that were under way at once."""

    daemon_threads = True
    request_queue_size = 128  # connections beyond the default of 5 would wait a second for TCP's next try

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.lock = threading.Lock()
        self.requests = []  # (path, headers, body)
        self.running = self.most = 0
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def close(self):
        self.shutdown()
        self.server_close()

    def reply(self, path, headers, body):
        raise NotImplementedError


class Handler(BaseHTTPRequestHandler):
    server: ChatHTTPServer

    def do_GET(self):
        self.answer(None)

    def do_POST(self):
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body):
        headers = dict(self.headers)
        with self.server.lock:
            self.server.requests.append((self.path, headers, body))
            self.server.running += 1
            self.server.most = max(self.server.most, self.server.running)
        reply = self.server.reply(self.path, headers, body)
        time.sleep(reply.seconds)
        with self.server.lock:
            self.server.running -= 1
        if reply.status == 0:
            return
        data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        try:
            self.send_response(reply.status)
            for header in (*reply.headers, ("Content-Length", str(len(data) + reply.missing))):
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass  # the client gave up

    def log_message(self, *args):
        pass


def chat(*texts):
    """A reply with these answers."""
    choices = [{"index": i, "message": {"role": "assistant", "content": text}} for i, text in enumerate(texts)]
    return {"object": "chat.completion", "choices": choices}


class Server(ChatHTTPServer):
    """Answers each question's n-th attempt with script(text, n): (status, body, seconds to wait)."""

    def __init__(self, script):
        self.script = script
        self.attempts = {}
        super().__init__()

    def reply(self, path, headers, body):
        text = body["messages"][0]["content"][-1]["text"]
        with self.lock:
            attempt = self.attempts[text] = self.attempts.get(text, 0) + 1
        status, content, seconds = self.script(text, attempt)
        headers = (("Retry-After", "0"),) if status == 429 else ()
        return Reply(status, content if isinstance(content, bytes) else chat(content), seconds, headers)


class JudgeServer(ChatHTTPServer):
    """vLLM's protocol around log_probs(text, images): those of all tokens after a rendered text with its images, uint8
    [3, H, W] each; a judge that thinks has write(text, images, i), its i-th answer.

    exact: knows logprob_token_ids. named: says tokens by id where asked. tokenize: has /tokenize. trouble(body, n) may
    return a Reply in place of the n-th attempt at the same question's.
    """

    def __init__(
        self, tokenizer, log_probs=None, write=None, *, trouble=None, exact=True, named=True, tokenize=True, key=None,
        models=("judge",), port=0,
    ):  # fmt: skip
        self.tokenizer, self.log_probs, self.write, self.trouble = tokenizer, log_probs, write, trouble
        self.exact, self.named, self.tokenize, self.key, self.models = exact, named, tokenize, key, models
        self.attempts = {}
        super().__init__(port)

    @property
    def asked(self):
        """Bodies of the requests for completions, without the one of the health check."""
        return [body for path, _, body in self.requests if path == "/v1/chat/completions" and images_of(body)]

    def reply(self, path, headers, body):
        if self.key and headers.get("Authorization") != f"Bearer {self.key}":
            return Reply(401, {"error": "Unauthorized"})
        if path == "/v1/models":
            return Reply(body={"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})
        if path == "/tokenize" and self.tokenize:
            ids = self.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
            return Reply(body={"count": len(ids), "max_model_len": 1024, "tokens": ids})
        if path != "/v1/chat/completions":
            return Reply(404, {"detail": "Not Found"})
        if body["model"] not in self.models:
            return Reply(404, error(f"The model `{body['model']}` does not exist."))
        with self.lock:
            question = json.dumps(body["messages"])
            attempt = self.attempts[question] = self.attempts.get(question, 0) + 1
        if self.trouble and (trouble := self.trouble(body, attempt)):
            return trouble
        return self.complete(body)

    def complete(self, body):
        going_on = body.get("continue_final_message", False)
        if going_on and body.get("add_generation_prompt", True):
            return Reply(400, error("Cannot set both `continue_final_message` and `add_generation_prompt` to True."))
        if (body.get("top_logprobs") or body.get("logprob_token_ids")) and not body.get("logprobs"):
            return Reply(400, error("`logprobs` must be set to true."))
        if body.get("top_logprobs", 0) > 20:
            return Reply(400, error("Requested sample logprobs, which is greater than max allowed: 20"))
        if body.get("n", 1) > 1 and body["temperature"] == 0:
            return Reply(400, error("n must be 1 when using greedy sampling."))
        messages = [
            {**message, "content": [{"type": "image"} if p["type"] == "image_url" else p for p in message["content"]]}
            if isinstance(message["content"], list)
            else message
            for message in body["messages"]
        ]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not going_on, continue_final_message=going_on
        )
        images = images_of(body)
        if not body.get("logprobs"):
            return Reply(body=chat(*(self.write(text, images, i) for i in range(body.get("n", 1)))))
        assert body["max_tokens"] == 1
        log_probs = self.log_probs(text, images)
        listed = log_probs.topk(min(body["top_logprobs"], len(log_probs))).indices.tolist()
        sampled = listed[0]
        if self.exact and (wanted := body.get("logprob_token_ids")):
            listed = list(dict.fromkeys([sampled, *wanted]))
        by_id = self.named and body.get("return_tokens_as_token_ids")
        entries = [
            {
                "token": f"token_id:{token}" if by_id else self.tokenizer.decode([token]),
                "logprob": max(float(log_probs[token]), -9999.0),
            }
            for token in listed
        ]
        reply = chat(self.tokenizer.decode([sampled]))
        reply["choices"][0]["logprobs"] = {"content": [{**entries[0], "top_logprobs": entries}]}
        return Reply(body=reply)


def error(words):
    return {"error": {"message": words, "type": "BadRequestError"}}


def images_of(body):
    """Images uint8 [3, H, W] of a request, in order."""
    parts = [
        part for message in body["messages"] if isinstance(message["content"], list) for part in message["content"]
    ]
    return [decode(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]


def decode(url):
    kind, data = url.split(",")
    assert kind == "data:image/png;base64"
    picture = np.array(Image.open(io.BytesIO(base64.b64decode(data))))
    return torch.from_numpy(picture).permute(2, 0, 1)
