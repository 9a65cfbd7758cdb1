"""Rewards of the playground's editor; they see images and instruction texts, nothing else."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mtedit_fast.edival.consistency import ContentConsistency
from mtedit_fast.judge import HuggingFaceJudge
from mtedit_fast.training.rewards import RewardBatch

from . import oracle
from .instructions import parse
from .judge_data import cell_status, grade
from .judge_model import load_judge
from .models import load_dino
from .world import CELLS, GRID


def exact_success(batch: RewardBatch) -> Tensor:
    """Whether each turn did what it was asked and touched nothing else, [B, K] bool: the held-out measure."""
    return oracle.evaluate(batch.references, batch.edits, batch.instructions).marginal.to(batch.edits.device)


def oracle_score(batch: RewardBatch, noise: float = 0.0, seed: int = 0) -> Tensor:
    """Graded success of every turn, [B, K] fp32 in [1, 5]: 1 + 4·(0.7·success + 0.3·cell accuracy).

    noise: standard deviation of a normal error added before clamping, drawn from `seed`, to imitate a judge.
    """
    if noise < 0:
        raise ValueError(f"noise must be >= 0, got {noise}")
    result = oracle.evaluate(batch.references, batch.edits, batch.instructions)
    score = 1 + 4 * (0.7 * result.marginal + 0.3 * result.cell_accuracy)
    if noise:
        score = score + noise * torch.randn(score.shape, generator=torch.Generator().manual_seed(seed))
    return score.clamp(1, 5).to(batch.edits.device)


def oracle_grade(batch: RewardBatch) -> Tensor:
    """The grade of every turn by the rubric the judge was taught, [B, K] fp32 in {1, …, 5}."""
    b, k = oracle.check_batch(batch.references, batch.edits, batch.instructions)
    images = torch.cat([batch.references[:, None], batch.edits], 1)
    states = oracle.read_states(images.flatten(0, 1))
    chains = [states[i * (k + 1) : (i + 1) * (k + 1)] for i in range(b)]
    grades = [
        [grade(cell_status(chain[j], text, chain[j + 1])) for j, text in enumerate(texts)]
        for chain, texts in zip(chains, batch.instructions, strict=True)
    ]
    return torch.tensor(grades, dtype=torch.float32).to(batch.edits.device)


@lru_cache(maxsize=2)
def _judge(device: torch.device) -> HuggingFaceJudge:
    return load_judge(device=device)


def judge_score(batch: RewardBatch) -> Tensor:
    """The playground's judge: expected score of every turn from one query per trajectory, [B, K] fp32 in [1, 5]."""
    return _judge(batch.edits.device).score(batch.references, batch.edits, batch.instructions).score


@lru_cache(maxsize=2)
def _consistency(device: torch.device) -> ContentConsistency:
    return ContentConsistency(load_dino().to(device))


def _boxes(state: list[int], classes: set[int] | None = None) -> list[tuple[float, float, float, float]]:
    """Normalised (cx, cy, w, h) of the cells that show an object (of `classes`)."""
    cells = [i for i in range(CELLS) if state[i] > 0 and (classes is None or state[i] in classes)]
    return [((i % GRID + 0.5) / GRID, (i // GRID + 0.5) / GRID, 1 / GRID, 1 / GRID) for i in cells]


def content_consistency(batch: RewardBatch) -> Tensor:
    """EdiVal's content consistency against the reference with the playground's DINO, [B, K] fp32 in [0, 1].

    NaN from the first background change on, and where no unedited object or no background is left.
    """
    b, k = oracle.check_batch(batch.references, batch.edits, batch.instructions)
    references, owner = batch.references.unique(dim=0, return_inverse=True)
    before = oracle.read_states(references)
    after = oracle.read_states(batch.edits.flatten(0, 1))
    unchanged: list[list[list[tuple[float, float, float, float]]]] = []
    background_changed = torch.zeros(b, k, dtype=torch.bool)
    for i, texts in enumerate(batch.instructions):
        state = before[int(owner[i])]
        kept = set(state[:CELLS]) - {0, -1}
        boxes = []
        for j, text in enumerate(texts):
            edit = parse(text)
            kept -= {edit.target, edit.reference if edit.type == "position_change" else 0}
            boxes.append(_boxes(state, kept))
            background_changed[i, j:] |= edit.type == "background_change"
        unchanged.append(boxes)
    result = _consistency(batch.edits.device)(
        references,
        batch.edits,
        unchanged,
        [_boxes(s) for s in before],
        [[_boxes(after[i * k + j]) for j in range(k)] for i in range(b)],
        background_changed=background_changed,
        owner=owner.tolist(),
    )
    return result.score.clamp(0, 1)
