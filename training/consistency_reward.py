"""Content consistency as a reward: what a turn was not asked to change should look as it did in the reference."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mtedit_fast.edival import ContentConsistency, Detector
from mtedit_fast.edival.finding import Finder, find_chains
from mtedit_fast.edival.grounding import GroundingDetector
from mtedit_fast.training.dtypes import DTYPES
from mtedit_fast.training.rewards import RewardBatch

KEYS = ("unchanged_objects", "all_objects", "bg_consistency")
"""Of a chain's line in the data, one entry per turn, as in EdiVal-Bench's CSV."""


@lru_cache(maxsize=2)
def load_detector(path: str, device: torch.device) -> Detector:
    """A detector, kept for the calls to come; fp32, since half precision would move its boxes by pixels."""
    return GroundingDetector.from_pretrained(path, device=device, dtype=torch.float32)


@lru_cache(maxsize=2)
def load_metric(path: str, dtype: str, device: torch.device) -> ContentConsistency:
    """A DINO with what compares its tokens, kept for the calls to come."""
    from transformers import AutoModel

    if dtype not in DTYPES:
        raise ValueError(f"options.dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    return ContentConsistency(AutoModel.from_pretrained(path, dtype=DTYPES[dtype]).eval().to(device))


def content_consistency(
    batch: RewardBatch,
    *,
    detector: str = "IDEA-Research/grounding-dino-base",
    dino: str = "facebook/dinov3-vitb16-pretrain-lvd1689m",
    dtype: str = "bf16",
    threshold: float = 0.35,
    detector_batch: int = 32,
) -> Tensor:
    """EdiVal's content consistency of every turn with the reference, [B, K] fp32 in [0, 1].

    NaN from the first change of the background on, and where no object that is to stay, or no background, is left. A
    reference's objects are found once for all its trajectories, and its crops go through the DINO once.

    Args:
        batch: whose records hold, per turn, `unchanged_objects` and `all_objects` (lists of names) and `bg_consistency`
            (false from the first change of the background on): the lines of `mtedit-fast edival instruct … .jsonl`.
        detector: folder or hub id of a (MM-)Grounding-DINO. dino: of a DINOv2 or DINOv3, computing in `dtype`, "bf16"
            or "fp32". Both run on the edits' device.
        threshold: lowest score of a box. detector_batch: images per call of the detector.

    Raises:
        ValueError: a record lacks one of these keys, or holds something else under it; an unknown dtype.
    """
    unchanged, all_objects, consistent = ([_of_turns(batch, i, key) for i in range(len(batch.edits))] for key in KEYS)
    references, owner = batch.references.unique_consecutive(dim=0, return_inverse=True)
    count, turns = len(references), batch.edits.shape[1]
    finder = Finder(
        load_detector(detector, batch.edits.device),
        [*references, *batch.edits.flatten(0, 1)],
        floor=threshold,
        batch_size=detector_batch,
    )
    chains = [(r, *range(count + i * turns, count + (i + 1) * turns)) for i, r in enumerate(owner.tolist())]
    boxes = find_chains(finder, chains, unchanged, all_objects, threshold=threshold)
    scores = load_metric(dino, dtype, batch.edits.device)(
        references,
        batch.edits,
        boxes.unchanged,
        [torch.zeros(0, 4)] * count,  # what is cut out of the reference's background differs from turn to turn
        boxes.covered,
        background_changed=~torch.tensor(consistent, dtype=torch.bool).view(-1, turns),
        owner=owner.tolist(),
    )
    return scores.score.clamp(0, 1)


def _of_turns(batch: RewardBatch, row: int, key: str) -> list[Any]:
    """What a record says of every turn."""
    record = batch.records[row] if batch.records else {}
    value, turns = record.get(key), batch.edits.shape[1]
    kind, what = (bool, "true or false") if key == KEYS[2] else (list, "a list of names")
    if not isinstance(value, list) or len(value) < turns or not all(isinstance(one, kind) for one in value):
        raise ValueError(
            f"record {record.get('id', row)!r}: {key}: expected {what} for each of {turns} turns, got {value!r}; "
            "mtedit-fast edival instruct writes such lines into a .jsonl"
        )
    return value[:turns]
