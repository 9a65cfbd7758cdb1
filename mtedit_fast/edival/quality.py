"""Visual quality (VQ): HPSv3 behind the `Quality` protocol. It is reported beside O, and not a part of it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtedit_fast.edival.images import save_image


class HPSv3:
    """The preference model of Ma et al. (arXiv 2508.03789), through its own package `hpsv3` (7 B, on a GPU).

    Its reward is a Gaussian; the score is the mean.

    Args:
        device: "cuda", …
        batch_size: images per call.

    Raises:
        ImportError: the package is not installed.
    """

    def __init__(self, device: str = "cuda", *, batch_size: int = 8):
        try:
            from hpsv3 import HPSv3RewardInferencer
        except ImportError as error:
            raise ImportError("quality: HPSv3 needs its package: pip install hpsv3") from error
        self.inferencer: Any = HPSv3RewardInferencer(device=device)
        self.batch_size = batch_size

    def score(self, images: Tensor, instructions: list[str]) -> Tensor:
        """[B] fp32, higher is better, of images [B, 3, H, W] in [0, 1] and their instructions.

        Raises:
            ValueError: another number of instructions than images.
        """
        if len(instructions) != len(images):
            raise ValueError(f"instructions: expected one per image ({len(images)}), got {len(instructions)}")
        scores: list[float] = []
        with tempfile.TemporaryDirectory() as folder:  # the package reads files
            paths = [str(Path(folder) / f"{index}.png") for index in range(len(images))]
            for path, image in zip(paths, images, strict=True):
                save_image(image, path)
            for start in range(0, len(paths), self.batch_size):
                part = slice(start, start + self.batch_size)
                rewards = self.inferencer.reward(image_paths=paths[part], prompts=instructions[part])
                scores += [float(reward[0]) for reward in rewards]
        return torch.tensor(scores, dtype=torch.float32)


def hpsv3() -> HPSv3:
    """`mtedit-fast evaluate --quality mtedit_fast.edival.quality:hpsv3`."""
    return HPSv3()
