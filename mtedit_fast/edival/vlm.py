"""A vision-language model behind an OpenAI-compatible server."""

from __future__ import annotations

from typing import Any

from mtedit_fast.chat_server import ChatServer, ChatServerError, data_url

from .backends import Question


class VLMError(RuntimeError):
    """A server that could not be reached, or gave no answer after all retries."""


class HTTPVLM(ChatServer):
    """Asks a server's `/chat/completions`, several questions at a time.

    base_url, api_key, timeout, retries, backoff, concurrency: see `ChatServer`; a question is a request. max_tokens,
    temperature: of the answers. `refused` counts the questions the server turned down (400, 413 or 422); their answer
    is "".
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
        super().__init__(
            base_url, api_key=api_key, timeout=timeout, retries=retries, backoff=backoff, concurrency=concurrency
        )
        self.model = model
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.refused = 0

    def ask(self, questions: list[Question]) -> list[str]:
        """One answer per question, in order. Raises VLMError, with the question's number and the server's words, where
        retries do not help; no further question is sent then."""
        answers = self.map(self._ask, enumerate(questions))
        self.refused += sum(answer is None for answer in answers)
        return [answer or "" for answer in answers]

    def _ask(self, numbered: tuple[int, Question]) -> str | None:
        number, question = numbered
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(image)}} for image in question.images
        ]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question.text}]}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        try:
            return self.call(self.url, _content, body)
        except ChatServerError as error:
            if error.refused:
                return None
            raise VLMError(f"question {number} to {error}") from error


def _content(reply: Any) -> str:
    content = reply["choices"][0]["message"]["content"]
    if not isinstance(content, str):
        raise ValueError("no text")
    return content
