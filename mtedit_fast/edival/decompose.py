"""From images to their objects: a vision-language model lists them, a detector must find each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import VLM, Detection, Detector, Question
from .objects import SceneObject, parse_objects

THRESHOLD = 0.35
MAX_SIDE, MAX_AREA = 0.9, 0.4

PROMPT = """List the objects that can be seen clearly in this picture, each kind once, leaving out the background.
Answer with JSON only, in this form:
{"objects": [{"object": "chair", "color": "brown", "material": "wood", "text": null, "count": 2, "foreground": true}]}
object: a singular noun without attributes. color, material: one word each, null if unclear. text: the words written on
it, null if none. count: how many there are. foreground: false if it belongs to the scenery behind the others."""


class Decomposition(NamedTuple):
    scenes: list[dict[str, SceneObject]]
    """For each image its objects by key, with boxes and scores; count is the number of boxes found."""
    failures: list[tuple[int, str]]
    """(image, reason) of answers that could not be read; those scenes are empty."""
    dropped: list[dict[str, str]]
    """For each image the keys the model listed that are left out, with the reason."""


def decompose(
    images: Tensor | Sequence[Tensor],
    vlm: VLM,
    detector: Detector,
    *,
    threshold: float = THRESHOLD,
    batch_size: int = 32,
) -> Decomposition:
    """The objects of each image.

    An object stays if the detector finds it (box and text threshold alike) and none of its boxes has a side above 0.9
    together with an area above 0.4 of the image. images: [B, 3, H, W], or B of [3, H, W] of any sizes, float in
    [0, 1]. batch_size: detections asked for at a time. A model's answer that cannot be read is counted among the
    failures, not raised; raises ValueError where images have another shape.
    """
    for i, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise ValueError(f"images[{i}] must be [3, H, W] float in [0, 1], got {list(image.shape)} {image.dtype}")
    listed: list[dict[str, SceneObject]] = []
    failures: list[tuple[int, str]] = []
    for i, answer in enumerate(vlm.ask([Question([image], PROMPT) for image in images])):
        try:
            listed.append(parse_objects(answer))
        except ValueError as error:
            listed.append({})
            failures.append((i, str(error)))
    scenes: list[dict[str, SceneObject]] = [{} for _ in listed]
    dropped: list[dict[str, str]] = [{} for _ in listed]
    for (i, key), detection in _detect(images, listed, detector, threshold, batch_size).items():
        if reason := why_dropped(detection):
            dropped[i][key] = reason
            continue
        boxes = tuple((cx, cy, w, h) for cx, cy, w, h in detection.boxes.tolist())
        scores = tuple(detection.scores.tolist())
        scenes[i][key] = replace(listed[i][key], count=len(boxes), boxes=boxes, scores=scores)
    return Decomposition(scenes, failures, dropped)


def why_dropped(detection: Detection) -> str | None:
    """Why a detected object is left out: not found, or a box that covers much of the image; None if it stays."""
    if not len(detection.boxes):
        return "not found by the detector"
    for _, _, w, h in detection.boxes.tolist():
        if max(w, h) > MAX_SIDE and w * h > MAX_AREA:
            return f"a box of {w:.2f} × {h:.2f} covers too much of the image"
    return None


def _detect(
    images: Tensor | Sequence[Tensor],
    listed: list[dict[str, SceneObject]],
    detector: Detector,
    threshold: float,
    batch_size: int,
) -> dict[tuple[int, str], Detection]:
    """What the detector finds of each (image, key), in their order; images of one size share a batch."""
    found: dict[tuple[int, str], Detection | None] = {(i, k): None for i, keys in enumerate(listed) for k in keys}
    by_size: dict[torch.Size, list[tuple[int, str]]] = defaultdict(list)
    for i, key in found:
        by_size[images[i].shape].append((i, key))
    for pairs in by_size.values():
        for start in range(0, len(pairs), batch_size):
            part = pairs[start : start + batch_size]
            detections = detector.detect(
                torch.stack([images[i] for i, _ in part]),
                [key for _, key in part],
                box_threshold=threshold,
                text_threshold=threshold,
            )
            found.update(zip(part, detections, strict=True))
    return {pair: detection for pair, detection in found.items() if detection is not None}
