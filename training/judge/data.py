"""Scored edits: JSONL lines `{id, image, edits, instructions, scores, thought?}` beside their images."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtedit_fast.edival.images import UnreadableImage, load_image
from mtedit_fast.judge.prompts import Scale

FORMAT = "{id, image, edits, instructions, scores}"
CACHE_BYTES = 2**30


@dataclass(frozen=True)
class JudgeExample:
    """An original image, its K edits in turn, what was asked for each, and how each was scored (None: unknown).

    thoughts: texts, any of which may precede the scores in an answer; often none or one.
    """

    id: str
    image: Path
    edits: tuple[Path, ...]
    instructions: tuple[str, ...]
    scores: tuple[float | None, ...]
    thoughts: tuple[str, ...] = ()
    where: str = ""
    line: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.image, *self.edits)


class JudgeData:
    """The examples of a JSONL file, all checked when it is opened, their images included.

    path: one object per line: `id` (unique text), `image` and `edits` (paths relative to the file, one edit per turn),
    `instructions` (a text per turn), `scores` (a number within the scale or null per turn; the key may be missing where
    `scored` is false), and optionally `thought` (a text) or `thoughts` (a list of alternatives). Other keys are kept in
    `JudgeExample.line`.
    scale: that scores must be on. scored: every example must have a score. complete: of every turn. thoughts: every
    example must have one. skip_unreadable: leave examples with missing or broken images out, counted in `skipped`.
    name: of the path, for errors.
    ValueError names file, line, key and what was expected.
    """

    def __init__(
        self,
        path: str | Path,
        scale: Scale,
        *,
        scored: bool = True,
        complete: bool = False,
        thoughts: bool = False,
        skip_unreadable: bool = False,
        seed: int = 0,
        name: str = "data.path",
    ) -> None:
        self.path, self.scale, self.seed = Path(path), scale, seed
        self._scored, self._complete, self._thoughts = scored or complete, complete, thoughts
        self._cache: dict[Path, Tensor] = {}
        self._room, self._lock = CACHE_BYTES, Lock()
        if not self.path.is_file():
            raise ValueError(f"{name}: no file {self.path}; expected JSONL of {FORMAT}")
        examples: list[JudgeExample] = []
        seen: dict[str, str] = {}
        for number, text in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
            if text.strip():
                example = self._read(f"{self.path}:{number}", text)
                if example.id in seen:
                    raise ValueError(
                        f"{example.where}: id: expected a unique text, {example.id!r} is already at {seen[example.id]}"
                    )
                seen[example.id] = example.where
                examples.append(example)
        broken = self._broken(examples)
        self.skipped: dict[str, str] = {}
        self.examples: list[JudgeExample] = []
        for example in examples:
            reason = next((broken[file] for file in example.files if file in broken), None)
            if reason is None:
                self.examples.append(example)
            elif skip_unreadable:
                self.skipped[example.id] = reason
            else:
                raise ValueError(
                    f"{example.where}: {self._key(example, broken)}: {reason}; skip_unreadable leaves it out"
                )
        if not self.examples:
            left = f", {len(self.skipped)} were skipped for their images" if self.skipped else ", the file is empty"
            raise ValueError(f"{self.path}: expected at least one example{left}")

    def _read(self, where: str, text: str) -> JudgeExample:
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(line, dict):
            raise ValueError(f"{where}: expected an object {FORMAT}, got {type(line).__name__}")
        for key in ("id", "image"):
            if not isinstance(line.get(key), str) or not line[key]:
                raise ValueError(f"{where}: {key}: expected a text, got {line.get(key)!r}")
        instructions = _texts(where, "instructions", line.get("instructions"))
        edits = _texts(where, "edits", line.get("edits"))
        if len(edits) != len(instructions):
            raise ValueError(
                f"{where}: edits: expected {len(instructions)} paths, one per instruction, got {len(edits)}"
            )
        thoughts = line.get("thoughts", [line["thought"]] if line.get("thought") is not None else [])
        thoughts = _texts(where, "thoughts" if "thoughts" in line else "thought", thoughts) if thoughts else []
        if self._thoughts and not thoughts:
            raise ValueError(f"{where}: thought: expected a text to imitate, got {line.get('thought')!r}")
        folder = self.path.parent
        return JudgeExample(
            id=line["id"],
            image=folder / line["image"],
            edits=tuple(folder / edit for edit in edits),
            instructions=tuple(instructions),
            scores=self._scores(where, line.get("scores"), len(instructions)),
            thoughts=tuple(thoughts),
            where=where,
            line=line,
        )

    def _scores(self, where: str, scores: Any, turns: int) -> tuple[float | None, ...]:
        if scores is None and not self._scored:
            return (None,) * turns
        if not isinstance(scores, list) or len(scores) != turns:
            raise ValueError(f"{where}: scores: expected {turns} numbers or nulls, one per instruction, got {scores!r}")
        low, high = min(self.scale.values), max(self.scale.values)
        for turn, score in enumerate(scores):
            number = isinstance(score, int | float) and not isinstance(score, bool)
            if not (score is None or number) or (number and not (math.isfinite(score) and low <= score <= high)):
                raise ValueError(
                    f"{where}: scores[{turn}]: expected a number from {low:g} to {high:g} or null, got {score!r}"
                )
            if score is None and self._complete:
                raise ValueError(
                    f"{where}: scores[{turn}]: expected a number, because whole answers are imitated, got null"
                )
        if self._scored and all(score is None for score in scores):
            raise ValueError(f"{where}: scores: expected at least one number, got {scores!r}")
        return tuple(None if score is None else float(score) for score in scores)

    def _broken(self, examples: list[JudgeExample]) -> dict[Path, str]:
        """{file: reason} of the images that cannot be read. Decoding them all takes a while once, and is the only way
        to know that no run will stop at a truncated file."""
        files = list(dict.fromkeys(file for example in examples for file in example.files))
        with ThreadPoolExecutor() as pool:
            reasons = zip(files, pool.map(self._try, files), strict=True)
            return {file: reason for file, reason in reasons if reason is not None}

    def _try(self, file: Path) -> str | None:
        try:
            self.image(file)
        except UnreadableImage as error:
            return str(error)
        return None

    @staticmethod
    def _key(example: JudgeExample, broken: dict[Path, str]) -> str:
        index = next(i for i, file in enumerate(example.files) if file in broken)
        return "image" if index == 0 else f"edits[{index - 1}]"

    def image(self, file: Path) -> Tensor:
        """An image file as uint8 [3, H, W]; small data sets stay in memory."""
        if file in self._cache:
            return self._cache[file]
        image = (load_image(file) * 255).round().byte()
        with self._lock:
            if image.nbytes <= self._room and file not in self._cache:
                self._room -= image.nbytes
                self._cache[file] = image
        return image

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> JudgeExample:
        return self.examples[index]

    def __iter__(self) -> Iterator[JudgeExample]:
        return iter(self.examples)

    def draw(self, step: int, n: int) -> list[JudgeExample]:
        """Examples n·step … n·(step + 1) − 1 of an endless order, every epoch a permutation that depends on (seed,
        epoch) alone: nothing to save for an exact resume."""
        positions = range(n * step, n * (step + 1))
        epochs = {position // len(self) for position in positions}
        orders = {epoch: np.random.default_rng([self.seed, epoch]).permutation(len(self)) for epoch in epochs}
        return [self.examples[orders[p // len(self)][p % len(self)]] for p in positions]

    def statistics(self) -> dict[str, int]:
        """Counts for the log: examples, turns, scored turns, images, skipped."""
        turns = Counter(len(example.edits) for example in self.examples)
        return {
            "examples": len(self),
            "turns": sum(k * n for k, n in turns.items()),
            "scored": sum(score is not None for example in self.examples for score in example.scores),
            "originals": len({example.image for example in self.examples}),
            "skipped": len(self.skipped),
        }


def _texts(where: str, key: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v.strip() for v in value):
        raise ValueError(f"{where}: {key}: expected a list of at least one text, none of them empty, got {value!r}")
    return value


def score_tensor(examples: list[JudgeExample]) -> Tensor:
    """[N, K] fp64 of examples with equally many turns, NaN where unknown."""
    rows = [[math.nan if score is None else score for score in example.scores] for example in examples]
    return torch.tensor(rows, dtype=torch.float64)
