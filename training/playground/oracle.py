"""Exact success of multi-turn edits, decided from images and instruction texts alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .instructions import closest, is_satisfied, parse
from .world import read


class OracleResult(NamedTuple):
    marginal: Tensor  # [B, K] bool: turn k did what it was asked and touched nothing else
    image: Tensor  # [B, K] bool: all turns up to k did
    cell_accuracy: Tensor  # [B, K] fp32 in [0, 1]: half over what should change, half over what should stay
    types: list[list[str]]  # [B][K]


def read_states(images: Tensor) -> list[list[int]]:
    """Scenes of images [N, 3, 64, 64] as lists of 17 integers: 16 cell classes (-1: unreadable), background."""
    scenes = read(images)
    return torch.cat([scenes.cells, scenes.background[:, None]], 1).tolist()


def cell_accuracy(before: list[int], instruction: str, after: list[int]) -> float:
    """Share of right cells in [0, 1], the background counting as one more.

    Half the weight lies on what the edit should change, half on what should stay. Against an edit that cannot be
    carried out on `before`, only staying counts (at most 0.5).
    """
    wanted = closest(before, parse(instruction), after)
    target = before if wanted is None else wanted
    right = {True: [0, 0], False: [0, 0]}  # changed? -> right, all
    for b, t, a in zip(before, target, after, strict=True):
        right[b != t][0] += a == t and a >= 0
        right[b != t][1] += 1
    stay, change = (right[k][0] / right[k][1] if right[k][1] else None for k in (False, True))
    if wanted is None:
        return 0.5 * (stay or 0.0)
    parts = [p for p in (stay, change) if p is not None]
    return sum(parts) / len(parts)


def check_batch(references: Tensor, edits: Tensor, instructions: list[list[str]]) -> tuple[int, int]:
    """(B, K) of a batch of chains. Raises ValueError where images and instructions do not belong together."""
    if edits.ndim != 5 or references.shape != (edits.shape[0], *edits.shape[2:]):
        raise ValueError(
            "references and edits must be [B, 3, H, W] and [B, K, 3, H, W], "
            f"got {list(references.shape)} and {list(edits.shape)}"
        )
    b, k = edits.shape[:2]
    if [len(texts) for texts in instructions] != [k] * b:
        raise ValueError(
            f"instructions must hold {k} texts for each of {b} chains, got {[len(t) for t in instructions]}"
        )
    return b, k


def evaluate(references: Tensor, edits: Tensor, instructions: list[list[str]]) -> OracleResult:
    """Success of B chains of K edits.

    references: [B, 3, 64, 64], edits: [B, K, 3, 64, 64], both float in [0, 1], on any device; instructions: [B][K].
    Each turn is judged relative to the scene read from the image before it. Raises ValueError on shapes that do not
    fit together and on text outside the grammar.
    """
    b, k = check_batch(references, edits, instructions)
    images = torch.cat([references[:, None], edits], 1)
    states = read_states(images.flatten(0, 1))
    chains = [states[i * (k + 1) : (i + 1) * (k + 1)] for i in range(b)]
    marginal = torch.zeros(b, k, dtype=torch.bool)
    accuracy = torch.zeros(b, k)
    for i, (chain, texts) in enumerate(zip(chains, instructions, strict=True)):
        for j, text in enumerate(texts):
            marginal[i, j] = is_satisfied(chain[j], parse(text), chain[j + 1])
            accuracy[i, j] = cell_accuracy(chain[j], text, chain[j + 1])
    types = [[parse(text).type for text in texts] for texts in instructions]
    return OracleResult(marginal, marginal.cumprod(1).bool(), accuracy, types)
