"""A judge's question as token ids: the part a group shares, the part of the edits, a short branch for every score."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from .prompts import JudgePrompt, Scale


class Question(NamedTuple):
    """Token ids of one question; image placeholders are already repeated, one for every token of their image.

    A turn's score is predicted after prefix + tail + its branch, which holds no other turn's score.
    """

    prefix: list[int]
    """Everything before the first edited image: the same for all edits of an image by the same instructions."""
    tail: list[int]
    """The edited images and the beginning of the answer, as far as it is the same for all turns."""
    branches: list[list[int]]
    """[K], the rest up to a turn's score; may be empty."""


@lru_cache(maxsize=4096)
def _render(tokenizer: Any, prompt: JudgePrompt, instructions: tuple[str, ...]) -> str:
    return tokenizer.apply_chat_template(prompt.messages(instructions), tokenize=False, add_generation_prompt=True)


def encode(
    tokenizer: Any,
    prompt: JudgePrompt,
    instructions: Sequence[str],
    image_tokens: Sequence[int],
    *,
    image_token: str,
    answers: Sequence[str] | None = None,
) -> tuple[list[int], list[list[int]]]:
    """(ids of the question, ids of each of `answers` after it).

    image_tokens: how many tokens each of the K + 1 images takes. answers: texts an answer begins with; default: the
    openings of the K scores. Raises ValueError where images and instructions do not fit, or where the chat template
    leaves images out.
    """
    text = _render(tokenizer, prompt, tuple(instructions))
    expected = len(instructions) + 1
    if len(image_tokens) != expected:
        raise ValueError(
            f"image_tokens: expected {expected}, the original and one per instruction, got {len(image_tokens)}"
        )
    if text.count(image_token) != expected:
        raise ValueError(
            f"chat template: expected {expected} times {image_token!r} in the question, got {text.count(image_token)}; "
            "the tokenizer's template must take images"
        )
    pieces = text.split(image_token)
    text = pieces[0] + "".join(image_token * n + piece for n, piece in zip(image_tokens, pieces[1:], strict=True))
    question = tokenizer.encode(text, add_special_tokens=False)
    if answers is None:
        answers = prompt.openings(len(instructions))
    encoded = []
    for answer in answers:
        ids = tokenizer.encode(text + answer, add_special_tokens=False)
        if ids[: len(question)] != question:
            raise ValueError(f"tokenizer: the answer {answer!r} changes the tokens of the question before it")
        encoded.append(ids[len(question) :])
    return question, encoded


def split_question(
    tokenizer: Any,
    prompt: JudgePrompt,
    instructions: Sequence[str],
    image_tokens: Sequence[int],
    *,
    image_token: str,
) -> Question:
    """The question of one group of edits, cut where its members begin to differ and where its turns do.

    image_tokens: how many tokens each of the K + 1 images takes. Errors as of `encode`.
    """
    ids, openings = encode(tokenizer, prompt, instructions, image_tokens, image_token=image_token)
    image_id = tokenizer.convert_tokens_to_ids(image_token)
    slots = [i for i, token in enumerate(ids) if token == image_id]
    first_edit = slots[image_tokens[0]]
    shared = 0
    while len(openings) > 1 and all(len(o) > shared and o[shared] == openings[0][shared] for o in openings):
        shared += 1
    if len(openings) == 1:
        shared = len(openings[0])
    return Question(ids[:first_edit], ids[first_edit:] + openings[0][:shared], [o[shared:] for o in openings])


@lru_cache(maxsize=64)
def score_token_ids(tokenizer: Any, scale: Scale, opening: str) -> tuple[int, ...]:
    """The ids of a scale's answers as they follow `opening`.

    Raises ValueError for an answer that is more than one token, such as "10" where digits are split: its first token
    would be scored in its place.
    """
    before = tokenizer.encode(opening, add_special_tokens=False)
    ids = []
    for text in scale.texts:
        after = tokenizer.encode(opening + text, add_special_tokens=False)
        if after[: len(before)] != before or len(after) != len(before) + 1:
            raise ValueError(
                f"scale: {text!r} after {opening!r} is {len(after) - len(before)} tokens to this tokenizer "
                f"({tokenizer.convert_ids_to_tokens(after[len(before) :])}), expected one; "
                "choose a scale of single tokens"
            )
        ids.append(after[-1])
    if len(set(ids)) != len(ids):
        raise ValueError(f"scale: the answers {scale.texts} share tokens ({ids}) in this tokenizer, expected one each")
    return tuple(ids)
