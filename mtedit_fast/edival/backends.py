"""What EdiVal asks of the models it stands on: a detector, a vision-language model, a quality scorer."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Detection(NamedTuple):
    """What was found in one image, best score first."""

    boxes: Tensor
    """[n, 4] fp32 (cx, cy, w, h), each in [0, 1]."""
    scores: Tensor
    """[n] fp32 in [0, 1]."""
    phrases: list[str]
    """n, the words of the query each box stands for."""


class Detector(Protocol):
    """An open-vocabulary object detector."""

    def detect(
        self,
        images: Tensor,
        queries: list[str],
        *,
        box_threshold: float = 0.3,
        text_threshold: float | None = None,
    ) -> list[Detection]:
        """One Detection per image.

        images: [B, 3, H, W] fp32 in [0, 1]. queries: B, each an object's key, or several joined by ". ".
        box_threshold: lowest score of a box; text_threshold: lowest score of a word of its phrase (default: the same).
        """
        ...


class Question(NamedTuple):
    """A question about one or several images."""

    images: list[Tensor]
    """Each [3, H, W] in [0, 1], shown in order before the text."""
    text: str


class VLM(Protocol):
    """A vision-language model."""

    def ask(self, questions: list[Question]) -> list[str]:
        """One answer per question, in order."""
        ...


class Quality(Protocol):
    """A scorer of visual quality, such as HPSv3."""

    def score(self, images: Tensor, instructions: list[str]) -> Tensor:
        """[B] fp32, higher is better, of images [B, 3, H, W] fp32 in [0, 1] and the B instructions that made them."""
        ...
