"""bench_iteration's rewards: the loop's, and those of full size as a trainer finds them by their path."""

from functools import lru_cache
from typing import Any

import bench_consistency
import bench_judge
import torch
from peers.consistency_loop import ConsistencyLoop
from peers.iteration_loop import Scores
from peers.judge_loop import JudgeLoop
from peers.rollout_loop import to_tensor
from PIL import Image
from torch import Tensor

from mtedit_fast.edival import ContentConsistency
from mtedit_fast.edival.background import pixel_boxes
from mtedit_fast.judge import HuggingFaceJudge
from mtedit_fast.training.playground import rewards as playground
from mtedit_fast.training.playground.instructions import parse
from mtedit_fast.training.playground.oracle import read_states
from mtedit_fast.training.playground.world import CELLS
from mtedit_fast.training.rewards import RewardBatch

Boxes = list[tuple[list[list[int]], list[list[int]]] | None]
"""[K] of (unchanged, all found) in whole pixels, None where the background was to change."""


def loop_scores(full: bool, device: torch.device) -> Scores:
    """The trainer's rewards by the loop's means, with the same models. full: those with random weights."""
    own: Any = random_judge(device) if full else playground._judge(device)
    judge = JudgeLoop(own.model, own.tokenizer, own.images, own.prompt)
    metric = ConsistencyLoop((random_metric(device) if full else playground._consistency(device)).model)
    boxes, low = (fixed_boxes, -1.0) if full else (found_boxes, 0.0)  # where the trainer's reward ends

    def scores(original: Image.Image, images: list[Image.Image], instructions: list[str]) -> dict[str, list[float]]:
        found = zip(images, boxes(original, images, instructions), strict=True)
        kept = [float("nan") if own is None else metric(original, image, *own) for image, own in found]
        return {"judge": judge([original, *images], instructions), "consistency": [clamp(x, low) for x in kept]}

    return scores


def clamp(value: float, low: float) -> float:
    """Within [low, 1]; NaN stays."""
    return value if value != value else min(max(value, low), 1.0)


def found_boxes(original: Image.Image, images: list[Image.Image], instructions: list[str]) -> Boxes:
    """As playground.rewards.content_consistency has them, but found image by image, in the original every time."""
    boxes: Boxes = []
    edits = [parse(text) for text in instructions]
    for turn, image in enumerate(images):
        before, after = (read_states(to_tensor(picture)[None])[0] for picture in (original, image))
        done = edits[: turn + 1]
        moved = {edit.reference for edit in done if edit.type == "position_change"}
        kept = set(before[:CELLS]) - {0, -1} - {edit.target for edit in done} - moved
        found = (playground._boxes(before, kept), [*playground._boxes(before), *playground._boxes(after)])
        pixels = [own.tolist() for own in pixel_boxes(found, image.height, image.width)]
        boxes.append(None if any(edit.type == "background_change" for edit in done) else (pixels[0], pixels[1]))
    return boxes


def fixed_boxes(original: Image.Image, images: list[Image.Image], instructions: list[str]) -> Boxes:
    """Of four objects that nobody edits: random editors draw none that could be found."""
    boxes = pixel_boxes([_objects()], original.height, original.width)[0].tolist()
    return [(boxes, boxes)] * len(images)


def _objects() -> list[list[float]]:
    return bench_consistency.Case(True, torch.device("cpu")).objects


@lru_cache(maxsize=1)
def random_judge(device: torch.device) -> HuggingFaceJudge:
    case = bench_judge.Case(True, device)
    return HuggingFaceJudge(*case.parts, case.spec, case.prompt)


@lru_cache(maxsize=1)
def random_metric(device: torch.device) -> ContentConsistency:
    return ContentConsistency(bench_consistency.Case(True, device).model)


def random_judge_score(batch: RewardBatch) -> Tensor:
    return random_judge(batch.edits.device).score(batch.references, batch.edits, batch.instructions).score


def random_consistency(batch: RewardBatch) -> Tensor:
    references, owner = without_repeats(batch.references)
    b, k = batch.edits.shape[:2]
    objects = _objects()
    metric = random_metric(batch.edits.device)
    found = [[objects] * k] * b
    return metric(references, batch.edits, found, [objects] * len(references), found, owner=owner).score


def without_repeats(images: Tensor) -> tuple[Tensor, list[int]]:
    """Those that differ from the one before, and which of them each is: what `unique` finds, without a sort."""
    new = (images[1:] != images[:-1]).flatten(1).any(1)
    owner = [0, *new.cumsum(0).tolist()]
    return images[[i for i in range(len(images)) if i == 0 or owner[i] > owner[i - 1]]], owner
