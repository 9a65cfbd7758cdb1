"""Many (image, query) pairs put to a detector together, each once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import Detection, Detector
from .geometry import usable


class Find(NamedTuple):
    image: int
    query: str  # an object's name, or several joined by ". "
    threshold: float


class Finder:
    """A detector asked for many (image, query) pairs at once, each once; thresholds are applied to what it found.

    images: list of [3, H, W] in [0, 1]. floor: lowest threshold that will be asked for. batch_size: images per call.
    """

    def __init__(self, detector: Detector, images: Sequence[Tensor], *, floor: float, batch_size: int = 32) -> None:
        self.detector, self.images = detector, images
        self.floor, self.batch_size = floor, batch_size
        self.found: dict[tuple[int, str], Detection] = {}

    def find(self, requests: Sequence[Find]) -> list[Detection]:
        """One Detection per request: usable boxes scoring above its threshold, best first."""
        keys = sorted({(f.image, f.query) for f in requests} - self.found.keys())
        sizes: dict[tuple[int, ...], list[tuple[int, str]]] = {}
        for key in keys:
            sizes.setdefault(tuple(self.images[key[0]].shape), []).append(key)
        for same in sizes.values():
            for start in range(0, len(same), self.batch_size):
                batch = same[start : start + self.batch_size]
                images = torch.stack([self.images[image] for image, _ in batch])
                queries = [query for _, query in batch]
                found = self.detector.detect(images, queries, box_threshold=self.floor)
                self.found.update(zip(batch, map(_clean, found), strict=True))
        return [_above(self.found[f.image, f.query], f.threshold) for f in requests]


def query_for(name: str) -> str:
    """What a detector is asked for: lower case, without the full stops that separate names."""
    return " ".join(name.replace(".", " ").lower().split())


def select(found: Detection, keep: Tensor) -> Detection:
    phrases = [found.phrases[i] for i in (keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep).tolist()]
    return Detection(found.boxes[keep], found.scores[keep], phrases)


def best(found: Detection) -> Detection:
    return Detection(found.boxes[:1], found.scores[:1], found.phrases[:1])


def smaller_than(found: Detection, side: float) -> Detection:
    return select(found, ~(found.boxes[:, 2:] > side).all(1))


def _clean(found: Detection) -> Detection:
    found = Detection(found.boxes.cpu(), found.scores.cpu(), found.phrases)
    ordered = select(found, found.scores.argsort(descending=True, stable=True))
    return select(ordered, usable(ordered.boxes))


def _above(found: Detection, threshold: float) -> Detection:
    return select(found, found.scores > threshold)
