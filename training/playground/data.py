"""Playground data in the format users bring: a JSONL of {id, image, instructions} beside PNG files."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from PIL import Image

from .instructions import Chains, sample_chains
from .world import CELLS, render

SPLITS = ("train", "heldout")


def split_chains(n: int, seed: int = 0, split: str = "train", turns: int = 3) -> Chains:
    """Chains of a split; splits, seeds and the chains the weights were built from have disjoint random streams."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return sample_chains(Random(f"{split}/{seed}"), n, turns)


def write_dataset(folder: str | Path, n_chains: int, seed: int = 0, split: str = "train", turns: int = 3) -> Path:
    """Writes `n_chains` start images and their instructions; returns the JSONL's path, `folder/{split}.jsonl`.

    A line: {"id": "train-0-000017", "image": "train/000017.png", "instructions": [K texts],
    "types": [K EdiVal types]}, the image path being relative to `folder`.
    split: "train" or "heldout"; other text raises ValueError.
    """
    folder = Path(folder)
    chains = split_chains(n_chains, seed, split, turns)
    (folder / split).mkdir(parents=True, exist_ok=True)
    start = chains.scenes[:, 0]
    pixels = (render(start[:, :CELLS], start[:, CELLS]) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    path = folder / f"{split}.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for i, texts in enumerate(chains.instructions):
            image = f"{split}/{i:06d}.png"
            Image.fromarray(pixels[i]).save(folder / image, compress_level=1)
            name = f"{split}-{seed}-{i:06d}"
            record = {"id": name, "image": image, "instructions": texts, "types": chains.types[i]}
            file.write(json.dumps(record) + "\n")
    return path
