"""Held-out success of a playground editor: three-turn chains through the stock pipeline."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import FluxKontextPipeline
from torch import Tensor

from . import oracle
from .data import split_chains
from .models import GUIDANCE, MAX_TOKENS
from .world import CELLS, SIZE, render


class Success(NamedTuple):
    image: list[float]  # [K] share of chains right up to turn k
    marginal: list[float]  # [K] share of turns right
    cell_accuracy: list[float]  # [K]
    types: dict[str, float]  # marginal success of each instruction type over all turns
    chains: int


def edit(pipeline: FluxKontextPipeline, images: Tensor, prompts: list[str], *, steps: int = 6, seed: int = 0) -> Tensor:
    """One turn for N images [N, 3, 64, 64] in [0, 1]: Euler over linspace(1, 1/steps), rounded to 8 bit."""
    output: Any = pipeline(
        image=images,
        prompt=prompts,
        height=SIZE,
        width=SIZE,
        max_area=SIZE**2,
        _auto_resize=False,
        num_inference_steps=steps,
        sigmas=np.linspace(1, 1 / steps, steps).tolist(),
        guidance_scale=GUIDANCE,
        max_sequence_length=MAX_TOKENS,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    )
    return (output.images.float() * 255).round() / 255


def edit_chains(
    pipeline: FluxKontextPipeline,
    references: Tensor,
    instructions: list[list[str]],
    *,
    steps: int = 6,
    seed: int = 0,
    batch: int = 50,
) -> Tensor:
    """Every turn of every chain, [N, K, 3, 64, 64]; each turn edits the turn before it."""
    chunks = []
    for start in range(0, len(references), batch):
        images, texts = references[start : start + batch], instructions[start : start + batch]
        turns = []
        for k in range(len(texts[0])):
            images = edit(pipeline, images, [t[k] for t in texts], steps=steps, seed=seed * 1_000_003 + start * 31 + k)
            turns.append(images)
        chunks.append(torch.stack(turns, 1))
    return torch.cat(chunks)


def success(pipeline: FluxKontextPipeline, n: int = 400, *, steps: int = 6, seed: int = 0) -> Success:
    """Oracle success on n held-out chains of three turns."""
    chains = split_chains(n, seed, "heldout")
    start = chains.scenes[:, 0]
    references = (render(start[:, :CELLS], start[:, CELLS]) * 255).round() / 255
    result = oracle.evaluate(
        references, edit_chains(pipeline, references, chains.instructions, steps=steps, seed=seed), chains.instructions
    )
    by_type: dict[str, list[bool]] = {}
    for kinds, right in zip(result.types, result.marginal.tolist(), strict=True):
        for kind, value in zip(kinds, right, strict=True):
            by_type.setdefault(kind, []).append(value)
    return Success(
        result.image.float().mean(0).tolist(),
        result.marginal.float().mean(0).tolist(),
        result.cell_accuracy.mean(0).tolist(),
        {k: float(np.mean(v)) for k, v in sorted(by_type.items())},
        n,
    )
