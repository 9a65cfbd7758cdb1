"""A vision-language model behind an OpenAI-compatible server."""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image
from torch import Tensor

from .backends import Question

# A server refuses these for what a question holds; asking again, or asking otherwise, would not help.
REFUSED = (400, 413, 422)
RETRIED = (408, 409, 425, 429)  # and every 5xx


class VLMError(RuntimeError):
    """A server that could not be reached, or gave no answer after all retries."""


class HTTPVLM:
    """Asks a server's `/chat/completions`, several questions at a time.

    base_url: up to the version, such as http://localhost:8000/v1. api_key: sent as a bearer token. timeout: seconds for
    each attempt. retries: further attempts after a lost connection, a timeout, a busy or failing server, or a reply
    that is not the protocol's JSON, with waits of backoff · 2ⁿ seconds (± half, or what the server asks for).
    concurrency: questions under way at once. max_tokens, temperature: of the answers. `refused` counts the questions
    the server turned down (400, 413 or 422); their answer is "".
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 1.0,
        concurrency: int = 8,
        max_tokens: int = 1024,
        temperature: float = 0.0,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must begin with http:// or https://, got {base_url!r}")
        if timeout <= 0 or retries < 0 or backoff < 0 or concurrency < 1:
            raise ValueError(
                "timeout must be positive, retries and backoff at least 0 and concurrency at least 1, "
                f"got {timeout}, {retries}, {backoff} and {concurrency}"
            )
        self.url = f"{base_url.rstrip('/')}/chat/completions"
        self.model = model
        self.api_key = api_key
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.concurrency = concurrency
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.refused = 0

    def ask(self, questions: list[Question]) -> list[str]:
        """One answer per question, in order. Raises VLMError, with the question's number and the server's words, where
        retries do not help; no further question is sent then."""
        with ThreadPoolExecutor(max_workers=self.concurrency) as pool:
            pending = [pool.submit(self._ask, i, question) for i, question in enumerate(questions)]
            try:
                answers = [future.result() for future in pending]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        self.refused += sum(answer is None for answer in answers)
        return [answer or "" for answer in answers]

    def _ask(self, number: int, question: Question) -> str | None:
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(image)}} for image in question.images
        ]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question.text}]}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        reason = ""
        for attempt in range(self.retries + 1):
            wait = self.backoff * 2**attempt * random.uniform(0.5, 1.5)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return _content(response.read())
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}: {error.read(300).decode(errors='replace')}"
                if error.code in REFUSED:
                    return None
                if error.code < 500 and error.code not in RETRIED:
                    break
                asked = error.headers.get("Retry-After", "")
                wait = min(float(asked), self.timeout) if asked.isdecimal() else wait
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
            if attempt < self.retries:
                time.sleep(wait)
        raise VLMError(f"question {number} to {self.url} failed in {attempt + 1} attempts; the last gave {reason}")


def data_url(image: Tensor) -> str:
    """A PNG data URL of an image [3, H, W] in [0, 1], rounded to 8 bits. Raises ValueError on another shape."""
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise ValueError(f"image must be [3, H, W] float in [0, 1], got {list(image.shape)} {image.dtype}")
    levels = image.detach().float().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _content(reply: bytes) -> str:
    """The answer in a reply; ValueError where it is not the protocol's."""
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        content = None
    if not isinstance(content, str):
        raise ValueError(f"the reply holds no answer: {reply[:200].decode(errors='replace')!r}")
    return content
