"""A judge on another machine: the client of an OpenAI-compatible server such as vLLM's."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from mtedit_fast.chat_server import ChatServer, ChatServerError, Picture, ServerTokenizer, to_levels
from mtedit_fast.ops.digit_score import ENTROPY, MEDIAN, SCORE, VARIANCE, reference_statistics

from .prompts import JudgePrompt, parse_answer
from .scores import JudgeScores, check_rows, invalid_scores, sample_statistics
from .sequence import score_token_ids

TOP = 20  # the most log-probs a server gives unless it is told otherwise

T = TypeVar("T")


class ServedJudgeError(RuntimeError):
    """A judge that cannot be asked at all; the message says what is wrong with the server or its address."""


class ServedJudge:
    """Scores edits through a server's `/chat/completions`; a `Judge`.

    The expected digit takes a request of one token per edit, which continues an answer that ends right before the
    score, and the log-probs of the score tokens there. Servers that know `logprob_token_ids` (vLLM from 0.26) give
    them exactly. Others give their 20 likeliest tokens: a score token that is not among them counts as impossible,
    `incomplete` counts the scores this happened to, and the first of them warns. A thinking prompt takes a request of
    `samples` answers per row; scores are means over the answers that can be read.

    Requests about one reference and the same instructions go out next to each other, and those of a row too, so that
    they find one another's prefix in the server's cache. An image is encoded once per call, however often it is sent.

    Args:
        base_url, api_key, timeout, retries, backoff, concurrency: see `ChatServer`.
        model: its name at the server.
        tokenizer: the model's, to find the score tokens; by default the server is asked (vLLM's /tokenize), and where
            that is not answered, tokens are told by their text.
        normalize: "set" or "vocab", as of `ops.digit_score`.
        samples: answers per row of a thinking prompt.
        max_new_tokens: of a thinking answer.
        temperature: of the softmax over the score tokens (with "vocab" it must be 1, which is all a server tells), or
            of the sampling of thinking answers; the rest of sampling is up to the server.
        min_mass: scores with a mass, or a share of readable answers, below this are invalid. The mass is that at
            temperature 1, and known for "set" too.

    `score` raises ServedJudgeError for what no other request would mend: what `health` finds before the first score,
    and a key, model or path the server does not accept later. All else costs the scores it concerns: they are NaN and
    counted in `failures` as "unreachable", "timeout", "connection lost", "malformed reply" or "status 429" (or
    another), and `last_error` holds the server's words. "mass" also counts scores without any score token among the
    log-probs.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        prompt: JudgePrompt = JudgePrompt(),
        *,
        tokenizer: Any = None,
        normalize: Literal["set", "vocab"] = "set",
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 1.0,
        concurrency: int = 16,
        samples: int = 1,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        min_mass: float = 0.0,
    ) -> None:
        if normalize not in ("set", "vocab"):
            raise ValueError(f"normalize must be 'set' or 'vocab', got {normalize!r}")
        if samples < 1 or max_new_tokens < 1:
            raise ValueError(f"samples and max_new_tokens must be positive, got {samples} and {max_new_tokens}")
        if not 0 <= min_mass <= 1:
            raise ValueError(f"min_mass must lie in [0, 1], got {min_mass}")
        if not 0 <= temperature < math.inf or (temperature == 0 and not prompt.thinking):
            raise ValueError(f"temperature must be positive, or 0 for one thinking answer, got {temperature}")
        if prompt.thinking and samples > 1 and temperature == 0:
            raise ValueError(f"samples must be 1 at temperature 0, where all answers are the same, got {samples}")
        if not prompt.thinking and normalize == "vocab" and temperature != 1:
            raise ValueError(
                f"temperature must be 1 with normalize='vocab', got {temperature}: a server does not tell what other "
                "tokens would take at another; use normalize='set'"
            )
        self.server = ChatServer(
            base_url, api_key=api_key, timeout=timeout, retries=retries, backoff=backoff, concurrency=concurrency
        )
        self.model, self.prompt = model, prompt
        self.tokenizer = ServerTokenizer(self.server, model) if tokenizer is None else tokenizer
        self.normalize, self.temperature, self.min_mass = normalize, temperature, min_mass
        self.samples, self.max_new_tokens = samples, max_new_tokens
        self.incomplete = 0
        self.last_error = ""
        self._healthy = False
        self._token_ids: dict[str, tuple[int, ...] | None] = {}

    def health(self) -> str | None:
        """What is wrong with the server, in words; None if nothing is. It is asked which models it serves and, for the
        expected digit, for a score without images."""
        url = self.server.base_url
        try:
            served = self.server.call(f"{url}/models", lambda reply: [str(card["id"]) for card in reply["data"]])
        except ChatServerError as error:
            return self._in_words(error)
        if self.model not in served:
            return f"{url} does not serve {self.model!r}; it serves {', '.join(map(repr, served)) or 'nothing'}"
        if self.prompt.thinking:
            return None
        try:
            self._log_probs([{"role": "user", "content": self.prompt.answers.rubric}], self.prompt.openings(1)[0])
        except ChatServerError as error:
            if not error.refused and error.reason != "malformed reply":
                return self._in_words(error)
            return (
                f"{url} does not continue an answer of {self.model!r} with log-probs; a server like vLLM's is needed, "
                f"which takes continue_final_message, logprobs and top_logprobs = {TOP}: {error.words}"
            )
        return None

    def score(
        self,
        references: Tensor | Sequence[Tensor],
        edits: Tensor | Sequence[Tensor],
        instructions: Sequence[Sequence[str]],
        *,
        owner: Sequence[int] | None = None,
    ) -> JudgeScores:
        """See `Judge.score`. Images go out as PNGs, floats rounded to 8 bits.

        Raises:
            TypeError, ValueError: as of `Judge.score`; a scale with an answer of several tokens.
            ServedJudgeError: see the class.
        """
        rows = check_rows(references, edits, instructions, owner)
        questions = [self.prompt.messages(chain) for chain in rows.instructions]
        if rows.usable and not self._healthy:
            if problem := self.health():
                raise ServedJudgeError(problem)
            self._healthy = True
        groups: dict[Any, list[int]] = {}
        for row in rows.usable:
            groups.setdefault((rows.owner[row], rows.instructions[row]), []).append(row)
        order = [row for members in groups.values() for row in members]
        # copied here: on a GPU, only this thread's stream is known to be behind what made the images
        originals = {i: Picture(to_levels(rows.references[i])) for i, _ in groups}
        pictures = {row: [originals[rows.owner[row]], *map(Picture, to_levels(rows.edits[row]))] for row in order}

        def messages(row: int) -> list[dict[str, Any]]:
            images = iter(pictures[row])
            return [
                {**message, "content": [_part(part, images) for part in message["content"]]}
                for message in questions[row]
            ]

        fields, failures = invalid_scores(rows)
        fields = {name: field.cpu() for name, field in fields.items()}
        answers = None
        if self.prompt.thinking:
            answers = self._think(messages, order, fields, failures)
        else:
            self._expect(messages, order, fields, failures)
        fields = {name: field.to(rows.device) for name, field in fields.items()}
        return JudgeScores(**fields, failures=dict(+failures), answers=answers)

    def _expect(
        self, messages: Callable[[int], Any], order: list[int], fields: dict[str, Tensor], failures: Counter[str]
    ) -> None:
        """Fill the fields, [B, K] each, with what the log-probs of the score tokens say."""
        openings = self.prompt.openings(fields["score"].shape[1])
        slots = [(row, turn) for row in order for turn in range(len(openings))]
        for opening in openings if slots else ():
            self._find_tokens(opening)

        def ask(slot: tuple[int, int]) -> list[float] | str:
            return self._or_reason(lambda: self._log_probs(messages(slot[0]), openings[slot[1]]))

        values = torch.tensor(self.prompt.answers.values, dtype=torch.float64)
        log_probs = torch.full((*fields["score"].shape, len(values)), torch.nan, dtype=torch.float64)
        for slot, reply in zip(slots, self.server.map(ask, slots), strict=True):
            if isinstance(reply, str):
                failures[reply] += 1
            else:
                log_probs[slot] = torch.tensor(reply, dtype=torch.float64)
        missing = log_probs.isneginf()
        if incomplete := int((missing.any(-1) & ~missing.all(-1)).sum()):
            if not self.incomplete:
                warnings.warn(
                    f"{self.server.base_url} gives only its {TOP} likeliest tokens; score tokens that are not among "
                    "them count as impossible, in `incomplete` scores. vLLM from 0.26 gives them all.",
                    stacklevel=3,
                )
            self.incomplete += incomplete
        flat = log_probs.flatten(0, 1)  # [B·K, values]
        whole = flat.new_zeros(len(flat)) if self.normalize == "vocab" else None
        statistics = reference_statistics(flat / self.temperature, whole, values, None)
        found = {
            "score": statistics[SCORE],
            "variance": statistics[VARIANCE],
            "entropy": statistics[ENTROPY],
            "median": statistics[MEDIAN],
            "mass": flat.exp().sum(1),
        }
        low = (found["mass"] == 0) | (found["mass"] < self.min_mass)
        failures["mass"] += int(low.sum())
        for name, value in found.items():
            fields[name].copy_(value.masked_fill(low, torch.nan).view_as(fields[name]))

    def _log_probs(self, messages: list[dict[str, Any]], opening: str) -> list[float]:
        """Of the score tokens right after `opening`; -inf for those the server did not list."""
        ids = self._find_tokens(opening)
        body = {
            "model": self.model,
            "messages": [*messages, {"role": "assistant", "content": opening}],
            "add_generation_prompt": False,
            "continue_final_message": True,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": TOP,
        }
        texts = self.prompt.answers.texts
        names = {text: i for i, text in enumerate(texts)}
        if ids is not None:
            body |= {"logprob_token_ids": ids, "return_tokens_as_token_ids": True}
            names |= {f"token_id:{token}": i for i, token in enumerate(ids)}
        return self.server.call(self.server.url, partial(_read_log_probs, names=names, count=len(texts)), body)

    def _find_tokens(self, opening: str) -> tuple[int, ...] | None:
        """Ids of the scale's answers after `opening`; None where neither a tokenizer nor the server tells them."""
        if opening not in self._token_ids:
            try:
                self._token_ids[opening] = score_token_ids(self.tokenizer, self.prompt.answers, opening)
            except ChatServerError:
                self._token_ids[opening] = None
        return self._token_ids[opening]

    def _think(
        self, messages: Callable[[int], Any], order: list[int], fields: dict[str, Tensor], failures: Counter[str]
    ) -> list[list[str]]:
        """Fill the fields, [B, K] each, with what the written scores say, and return the answers of every row."""

        def ask(row: int) -> list[str] | str:
            body = {
                "model": self.model,
                "messages": messages(row),
                "n": self.samples,
                "max_tokens": self.max_new_tokens,
                "temperature": self.temperature,
            }
            reader = partial(_read_answers, count=self.samples)
            return self._or_reason(lambda: self.server.call(self.server.url, reader, body))

        batch, turns = fields["score"].shape
        answers: list[list[str]] = [[] for _ in range(batch)]
        for row, reply in zip(order, self.server.map(ask, order), strict=True):
            if isinstance(reply, str):
                failures[reply] += turns
                continue
            answers[row] = reply
            read = [scores for text in reply if (scores := parse_answer(text, turns, self.prompt.answers)) is not None]
            failures["parse"] += len(reply) - len(read)
            share = len(read) / self.samples
            if read and share < self.min_mass:
                failures["mass"] += turns
            elif read:
                statistics = sample_statistics(torch.tensor(read, dtype=torch.float64))
                for name, value in {**statistics, "mass": torch.tensor(share)}.items():
                    fields[name][row] = value
        return answers

    def _or_reason(self, call: Callable[[], T]) -> T | str:
        """What `call` returns, or why it failed; ServedJudgeError where every other would fail too."""
        try:
            return call()
        except ChatServerError as error:
            if error.misconfigured:
                raise ServedJudgeError(self._in_words(error)) from error
            self.last_error = str(error)
            return error.reason

    def _in_words(self, error: ChatServerError) -> str:
        url = self.server.base_url
        if error.status in (401, 403):
            return f"{url} refuses the api_key: {error.words}"
        if error.misconfigured or error.reason == "malformed reply":
            return f"{error}; base_url ends in the version, such as http://localhost:8000/v1, and model is served there"
        if error.status is None:
            return f"no server answers at {url}: {error.words}; start one, such as: vllm serve {self.model}"
        return f"{error}; the server is busy or failing"


def _part(part: dict[str, Any], images: Iterator[Picture]) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": next(images).url}} if part["type"] == "image" else part


def _read_log_probs(reply: Any, names: dict[str, int], count: int) -> list[float]:
    found = [-math.inf] * count
    likeliest = reply["choices"][0]["logprobs"]["content"][0]
    for entry in (likeliest, *likeliest["top_logprobs"]):
        value = float(entry["logprob"])
        if not value < 0.01:  # room for rounding, none for NaN or logits
            raise ValueError(f"expected log-probs, got {value}")
        if (index := names.get(entry["token"])) is not None:
            found[index] = max(found[index], value)
    return found


def _read_answers(reply: Any, count: int) -> list[str]:
    choices = sorted(reply["choices"], key=lambda choice: choice["index"])
    if len(choices) != count:
        raise ValueError(f"asked for {count} answers, got {len(choices)}")
    answers = [choice["message"]["content"] or "" for choice in choices]  # null: nothing but hidden reasoning
    if not all(isinstance(answer, str) for answer in answers):
        raise ValueError("no text")
    return answers
