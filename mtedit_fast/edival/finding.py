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


class ChainBoxes(NamedTuple):
    """Boxes (cx, cy, w, h) [n, 4] that content consistency is computed from, [b][k] each."""

    unchanged: list[list[Tensor | None]]
    """In the first image, of what nobody has edited up to turn k; None where there is nothing left of it."""
    covered: list[list[Tensor]]
    """Of all objects, in the first image and in that after turn k."""


def find_chains(
    finder: Finder,
    chains: Sequence[Sequence[int]],
    unchanged: Sequence[Sequence[Sequence[str]]],
    all_objects: Sequence[Sequence[Sequence[str]]],
    *,
    threshold: float,
) -> ChainBoxes:
    """The objects of chains of edits, all asked for at once.

    chains: [b] indices of K + 1 of the finder's images, the first and that after every turn. unchanged, all_objects:
    [b][k] names.
    """
    named = list(zip(chains, unchanged, all_objects, strict=True))

    def request(image: int, names: Sequence[str]) -> Find:
        return Find(image, ". ".join(map(query_for, names)), threshold)

    def boxes(image: int, names: Sequence[str]) -> Tensor:
        return finder.find([request(image, names)])[0].boxes if names else torch.zeros(0, 4)

    asked = [(first, names) for (first, *_), kept, everything in named for names in (*kept, *everything)]
    asked += [each for (_, *later), _, everything in named for each in zip(later, everything, strict=True)]
    finder.find([request(image, names) for image, names in asked if names])  # together; what follows looks them up
    return ChainBoxes(
        [[boxes(first, names) if names else None for names in kept] for (first, *_), kept, _ in named],
        [
            [
                torch.cat([boxes(first, names), boxes(image, names)])
                for image, names in zip(later, everything, strict=True)
            ]
            for (first, *later), _, everything in named
        ],
    )


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
