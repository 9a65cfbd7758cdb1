"""What a judge is asked, and how its written answers are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Scale(NamedTuple):
    """The answers a judge may give, each a single token, and what they are worth."""

    texts: tuple[str, ...]
    values: tuple[float, ...]
    rubric: str
    """What each answer stands for."""


_FIVE = """\
1: the instruction is ignored or reversed, or content that matters is destroyed.
2: only minor parts of the instruction are carried out, or much is changed that nobody asked for.
3: the main point is carried out, but incompletely or inaccurately, or with noticeable other changes.
4: largely as asked, with minor flaws; the rest of the image is well kept.
5: exactly and completely as asked; everything else is untouched."""

SCALES = {
    "1-5": Scale(tuple("12345"), (1.0, 2.0, 3.0, 4.0, 5.0), f"Score each edit from 1 to 5.\n{_FIVE}"),
    "0-5": Scale(
        tuple("012345"),
        (0.0, 1.0, 2.0, 3.0, 4.0, 5.0),
        f"Score each edit from 0 to 5.\n0: the result is not an edit of this image at all.\n{_FIVE}",
    ),
    "binary": Scale(
        ("0", "1"),
        (0.0, 1.0),
        "Score each edit 1 if the instruction is carried out completely and everything else is untouched, 0 otherwise.",
    ),
    "yes_no": Scale(
        ("no", "yes"),
        (0.0, 1.0),
        "Is the instruction carried out completely, with everything else untouched? Answer yes or no for each edit.",
    ),
}

THINKING = "Think first, briefly, between <Thought> and </Thought>: what changed, was it asked for, is the rest kept?"


@dataclass(frozen=True)
class JudgePrompt:
    """The question put to a judge about K edits in a row, each compared with the image before it.

    scale: one of `SCALES`. thinking: have it reason before it scores. rubric: what the system message says; the
    scale's own words by default.
    """

    scale: str = "1-5"
    thinking: bool = False
    rubric: str | None = None

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {self.scale!r}")

    @property
    def answers(self) -> Scale:
        return SCALES[self.scale]

    def messages(self, instructions: Sequence[str]) -> list[dict[str, Any]]:
        """Chat messages in the form chat templates take. Their {"type": "image"} parts stand for K + 1 images: the
        original, then the image after every turn. ValueError for no instruction, or an empty one.

        All text that does not depend on the edits comes before the first edited image, so that a group of edits of
        the same image by the same instructions shares everything up to there.
        """
        if isinstance(instructions, str) or not instructions:
            raise ValueError(f"instructions: expected a list of at least one text, got {instructions!r}")
        for turn, text in enumerate(instructions):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"instructions[{turn}]: expected a text, got {text!r}")
        rubric = self.answers.rubric if self.rubric is None else self.rubric
        system = f"{rubric}\n{THINKING}" if self.thinking else rubric
        image = {"type": "image"}
        if len(instructions) == 1:
            content = [
                _text("Original image: "),
                image,
                _text(f"\nInstruction: {instructions[0]}\nEdited image: "),
                image,
            ]
        else:
            listed = "".join(f"\n{turn}. {text}" for turn, text in enumerate(instructions, 1))
            content = [_text("Original image: "), image, _text(f"\nInstructions:{listed}")]
            for turn in range(1, len(instructions) + 1):
                content += [_text(f"\nAfter turn {turn}: "), image]
        return [
            {"role": "system", "content": [_text(system)]},
            {"role": "user", "content": content},
        ]

    def openings(self, turns: int) -> list[str]:
        """What stands right before the score of each turn in an answer: K texts. With `thinking`, a thought precedes
        the first of them, and earlier scores the later ones."""
        return [f"<{tag}>" for tag in _tags(turns)]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _tags(turns: int) -> list[str]:
    return ["Score"] if turns == 1 else [f"Turn{turn}Score" for turn in range(1, turns + 1)]


def write_answer(texts: Sequence[str], thought: str | None = None) -> str:
    """The full answer with the scores of all turns, after a thought where there is one: what training imitates."""
    scores = "".join(f"<{tag}>{text}</{tag}>" for tag, text in zip(_tags(len(texts)), texts, strict=True))
    return scores if thought is None else f"<Thought>{thought}</Thought>{scores}"


def parse_answer(answer: str, turns: int, scale: Scale) -> list[float] | None:
    """The K scores of a written answer, or None where not all of them are there and on the scale.

    Of several scores for a turn the last counts: a thought may mention the tag. Numbers may be written as decimals
    ("4.0", "3.5") within the scale's range.
    """
    words = dict(zip(scale.texts, scale.values, strict=True))
    scores = []
    for tag in _tags(turns):
        found = re.findall(rf"<{tag}>\s*([^<]*?)\s*</{tag}>", answer)
        if not found:
            return None
        word = found[-1]
        if word.lower() in words:
            scores.append(words[word.lower()])
        elif scale.texts[0].isdigit() and re.fullmatch(r"\d+(\.\d+)?", word):
            value = float(word)
            if not min(scale.values) <= value <= max(scale.values):
                return None
            scores.append(value)
        else:
            return None
    return scores
