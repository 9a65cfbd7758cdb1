"""A client of OpenAI-compatible servers: retries, timeouts, bounded concurrency, images as data URLs."""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from PIL import Image
from torch import Tensor, uint8

# A server refuses these for what a request holds; asking again, or asking otherwise, would not help.
REFUSED = (400, 413, 422)
RETRIED = (408, 409, 425, 429)  # and every 5xx

T = TypeVar("T")
R = TypeVar("R")

_jitter = random.Random()  # of its own: waiting must not move the seeded generator of whoever trains


class ChatServerError(RuntimeError):
    """A request that got no answer, after all its attempts.

    reason: the last failure in a few words that do not depend on the request, to count by: "unreachable", "timeout",
    "connection lost", "malformed reply", "status 500". words: the same with what the server said. status: of HTTP.
    """

    def __init__(self, message: str, reason: str, words: str, status: int | None) -> None:
        super().__init__(message)
        self.reason, self.words, self.status = reason, words, status

    @property
    def refused(self) -> bool:
        """The server turned down what this very request holds."""
        return self.status in REFUSED

    @property
    def misconfigured(self) -> bool:
        """Neither a retry nor another request would fare better: a wrong key, model or path."""
        return self.status is not None and self.status < 500 and self.status not in REFUSED + RETRIED


class ChatServer:
    """Sends requests to a server, several at a time.

    base_url: up to the version, such as http://localhost:8000/v1. api_key: sent as a bearer token. timeout: seconds for
    each attempt. retries: further attempts after a lost connection, a timeout, a busy or failing server, or a reply
    that is not the protocol's JSON, with waits of backoff · 2ⁿ seconds (± half, or what the server asks for).
    concurrency: requests under way at once.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 1.0,
        concurrency: int = 8,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must begin with http:// or https://, got {base_url!r}")
        if timeout <= 0 or retries < 0 or backoff < 0 or concurrency < 1:
            raise ValueError(
                "timeout must be positive, retries and backoff at least 0 and concurrency at least 1, "
                f"got {timeout}, {retries}, {backoff} and {concurrency}"
            )
        self.base_url = base_url.rstrip("/")
        self.url = f"{self.base_url}/chat/completions"
        self.api_key = api_key
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.concurrency = concurrency

    def call(self, url: str, read: Callable[[Any], T], body: dict[str, Any] | None = None) -> T:
        """What `read` makes of the JSON reply to a POST of `body`, or to a GET without one.

        A reply in which `read` does not find what it needs (KeyError, IndexError, TypeError, ValueError) counts as
        malformed. Raises ChatServerError, with the server's words, where retries do not help.
        """
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
        for attempt in range(self.retries + 1):
            wait = self.backoff * 2**attempt * _jitter.uniform(0.5, 1.5)
            status = None
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    reply = response.read()
                try:
                    return read(json.loads(reply))
                except (ValueError, LookupError, TypeError, RecursionError) as error:
                    shown = reply[:200].decode(errors="replace")
                    reason = "malformed reply"
                    words = f"the reply holds no answer: {shown!r} ({type(error).__name__}: {error})"
            except urllib.error.HTTPError as error:
                status = error.code
                reason = f"status {status}"
                words = f"{reason}: {_body(error)}"
                asked = _seconds(error.headers.get("Retry-After", ""))
                wait = wait if asked is None else min(asked, self.timeout)
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = _reason(error)
                words = f"{type(error).__name__}: {error}"
            if status is not None and status < 500 and status not in RETRIED:
                break
            if attempt < self.retries:
                time.sleep(wait)
        message = f"{url} failed in {attempt + 1} attempts; the last gave {words}"
        raise ChatServerError(message, reason, words, status)

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """[function(item)] in order, `concurrency` at a time, begun in order. After an exception no further one is
        begun."""
        with ThreadPoolExecutor(max_workers=self.concurrency) as pool:
            pending = [pool.submit(function, item) for item in items]
            try:
                return [future.result() for future in pending]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


class ServerTokenizer:
    """As much of a tokenizer as finding single tokens takes, at the server: vLLM's /tokenize, beside the version."""

    def __init__(self, server: ChatServer, model: str) -> None:
        self.server, self.model = server, model

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text. Raises ChatServerError."""
        body = {"model": self.model, "prompt": text, "add_special_tokens": add_special_tokens}
        url = f"{self.server.base_url.removesuffix('/v1')}/tokenize"
        return self.server.call(url, lambda reply: [int(token) for token in reply["tokens"]], body)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Names for messages; the server knows the real ones."""
        return [f"token {token}" for token in ids]


def _body(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(300).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


def _seconds(retry_after: str) -> float | None:
    """A Retry-After header, seconds or a date; None where it is neither."""
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        return max(parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return None


def _reason(error: Exception) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return "timeout"
    if isinstance(cause, ConnectionRefusedError) or not isinstance(cause, ConnectionError | http.client.HTTPException):
        return "unreachable"
    return "connection lost"


def to_levels(images: Tensor) -> Tensor:
    """Images of any shape, float in [0, 1] rounded to 8 bits or uint8 as they are, as uint8 on the CPU."""
    if images.dtype != uint8:
        images = images.detach().float().clamp(0, 1).mul(255).round().byte()
    return images.cpu()


def data_url(image: Tensor) -> str:
    """A PNG data URL of an image [3, H, W] in [0, 1], rounded to 8 bits. Raises ValueError on another shape."""
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise ValueError(f"image must be [3, H, W] float in [0, 1], got {list(image.shape)} {image.dtype}")
    return png_url(to_levels(image))


def png_url(levels: Tensor) -> str:
    """A PNG data URL of an image uint8 [3, H, W] on the CPU."""
    buffer = io.BytesIO()
    # the server is near: bytes cost less than the time to save them
    Image.fromarray(levels.permute(1, 2, 0).numpy()).save(buffer, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


class Picture:
    """An image uint8 [3, H, W] on the CPU, encoded once, when its URL is first wanted, by whichever thread wants it."""

    def __init__(self, levels: Tensor) -> None:
        self._levels = levels
        self._lock = threading.Lock()
        self._url = ""

    @property
    def url(self) -> str:
        with self._lock:
            self._url = self._url or png_url(self._levels)
        return self._url
