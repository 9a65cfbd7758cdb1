"""What every judge takes and gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Judge", "JudgeScores", "Rows", "check_rows"]

FIELDS = ("score", "variance", "entropy", "median", "mass")


class JudgeScores(NamedTuple):
    """Scores of B rows of K edits, each field [B, K] fp32 on the images' device, and NaN where a score is invalid."""

    score: Tensor
    """Expected value of the score; of written answers, the mean of those that could be read."""
    variance: Tensor
    """Of the score's distribution; of written answers, among them."""
    entropy: Tensor
    """Of the same, in nats."""
    median: Tensor
    """The smallest value that at least half of the distribution does not exceed."""
    mass: Tensor
    """Probability of the score tokens within the whole vocabulary, NaN for normalize="set", which does not look at it;
    of written answers, the part that could be read. Low where the judge would rather say something else."""
    failures: dict[str, int]
    """How often, by reason: "image" (scores lost to pixels that are not finite), "mass" (scores below min_mass),
    "model" (scores that came out as NaN), "parse" (written answers that could not be read; a row's scores are lost if
    none could)."""
    answers: list[list[str]] | None = None
    """[b] the answers written about row b, where there are any."""


class Judge(Protocol):
    """Scores edits."""

    def score(
        self,
        references: Tensor | Sequence[Tensor],
        edits: Tensor | Sequence[Tensor],
        instructions: Sequence[Sequence[str]],
        *,
        owner: Sequence[int] | None = None,
    ) -> JudgeScores:
        """Scores of B rows of K edits in a row, each an answer to its instruction.

        Rows of the same reference and the same instructions are a group, whose common work is done once. References
        that are the same pixel by pixel are recognised.

        Args:
            references: [R, 3, H, W], or R tensors [3, H, W]; edits: [B, K, 3, H, W], or B tensors [K, 3, H, W]: float
                in [0, 1] or uint8, on the judge's device. Sizes may differ from row to row in sequences. edits[b][k]
                is what edits[b][k − 1], or the reference, became in turn k.
            instructions: B lists of K texts.
            owner: [B] index of row b's reference (default: R == B, in order).

        Raises:
            TypeError, ValueError: images, instructions and owners that do not fit together.
        """
        ...


@dataclass(frozen=True)
class Rows:
    """Checked arguments of `Judge.score`."""

    references: list[Tensor]  # R, of [3, H, W]
    edits: list[Tensor]  # B, of [K, 3, H, W]
    instructions: list[tuple[str, ...]]
    owner: list[int]
    turns: int
    valid: list[bool]
    """[B], whether all of a row's pixels are finite."""
    device: torch.device

    @property
    def usable(self) -> list[int]:
        return [row for row, valid in enumerate(self.valid) if valid]


def check_rows(
    references: Tensor | Sequence[Tensor],
    edits: Tensor | Sequence[Tensor],
    instructions: Sequence[Sequence[str]],
    owner: Sequence[int] | None,
) -> Rows:
    """The arguments as lists, identical references under one owner. Errors as of `Judge.score`; waits for the images'
    device once, and once more for every two references that seem identical."""
    originals, results = list(references), list(edits)
    for name, images, ndim, shape in (("references", originals, 3, "3, H, W"), ("edits", results, 4, "K, 3, H, W")):
        for i, image in enumerate(images):
            if not isinstance(image, Tensor) or not (image.dtype == torch.uint8 or image.dtype.is_floating_point):
                got = image.dtype if isinstance(image, Tensor) else type(image).__name__
                raise TypeError(f"{name}[{i}] must be a uint8 or floating-point tensor, got {got}")
            if image.ndim != ndim or image.shape[-3] != 3 or 0 in image.shape:
                raise ValueError(f"{name}[{i}] must be [{shape}] with pixels, got {list(image.shape)}")
    count = len(results)
    owners = list(range(count)) if owner is None else [int(i) for i in owner]
    if owner is None and len(originals) != count:
        raise ValueError(
            f"references must be as many as the {count} rows of edits without owner=, got {len(originals)}"
        )
    if len(owners) != count or not all(0 <= i < len(originals) for i in owners):
        raise ValueError(f"owner must be {count} indices of {len(originals)} references, got {owners}")
    if len(instructions) != count:
        raise ValueError(f"instructions must be {count} lists, one per row of edits, got {len(instructions)}")
    turns = results[0].shape[0] if results else edits.shape[1] if isinstance(edits, Tensor) else 0
    for row, (texts, images) in enumerate(zip(instructions, results, strict=True)):
        if isinstance(texts, str) or len(texts) != len(images):
            got = repr(texts) if isinstance(texts, str) else str(len(texts))
            raise ValueError(f"instructions[{row}] must be {len(images)} texts, one per edit of the row, got {got}")
        if len(images) != turns:
            raise ValueError(f"edits[{row}] must have {turns} turns as edits[0] has, got {len(images)}")
        for turn, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"instructions[{row}][{turn}] must be a text, got {text!r}")
    devices = {image.device for image in (*originals, *results)}
    if len(devices) > 1:
        raise ValueError(f"references and edits must be on one device, got {sorted(map(str, devices))}")
    device = devices.pop() if devices else torch.device("cpu")
    if not results:
        return Rows(originals, results, [], [], turns, [], device)
    finite = torch.stack([_finite(image) for image in (*originals, *results)])
    numbers = torch.cat([finite.long(), torch.stack([_fingerprint(image) for image in originals])]).tolist()
    whole, marks = numbers[: len(finite)], numbers[len(finite) :]
    same = _identical(originals, marks)
    return Rows(
        originals,
        results,
        [tuple(texts) for texts in instructions],
        [same[i] for i in owners],
        turns,
        [bool(whole[owners[row]] and whole[len(originals) + row]) for row in range(count)],
        device,
    )


def _finite(image: Tensor) -> Tensor:
    return image.isfinite().all() if image.dtype.is_floating_point else image.new_ones((), dtype=torch.bool)


def _fingerprint(image: Tensor) -> Tensor:
    """Sum of an image's bits as integers: exact, so the same for identical images."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return image.view(integers[image.element_size()]).sum(dtype=torch.int64)


def _identical(images: list[Tensor], marks: list[int]) -> list[int]:
    """[R] index of the first image that is the same pixel by pixel."""
    first: dict[tuple[object, ...], int] = {}
    same = []
    for i, (image, mark) in enumerate(zip(images, marks, strict=True)):
        j = first.setdefault((image.shape, image.dtype, mark), i)
        same.append(j if j == i or torch.equal(images[j], image) else i)
    return same


def invalid_scores(rows: Rows) -> tuple[dict[str, Tensor], Counter[str]]:
    """All fields NaN, and the failures that the images are."""
    shape = (len(rows.edits), rows.turns)
    fields = {name: torch.full(shape, torch.nan, device=rows.device) for name in FIELDS}
    lost = rows.turns * (len(rows.edits) - len(rows.usable))
    return fields, Counter({"image": lost} if lost else {})


def finished(fields: dict[str, Tensor], failures: Counter[str], answers: list[list[str]] | None = None) -> JudgeScores:
    score, variance, entropy, median, mass = (fields[name] for name in FIELDS)
    return JudgeScores(score, variance, entropy, median, mass, dict(+failures), answers)


def sample_statistics(scores: Tensor) -> dict[str, Tensor]:
    """score, variance, entropy and median, [K] each, of n >= 1 written scores [n, K]."""
    n = len(scores)
    parts = [column.unique(return_counts=True)[1] / n for column in scores.unbind(1)]
    return {
        "score": scores.mean(0),
        "variance": scores.var(0, correction=0),
        "entropy": torch.stack([-(part * part.log()).sum() for part in parts]),
        "median": scores.sort(0).values[(n - 1) // 2],
    }
