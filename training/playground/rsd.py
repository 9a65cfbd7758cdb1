"""The playground of one-step restoration: 32×32 pieces of the tiny world, and a phantom with a complex-valued image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtedit_fast.edival.consistency import IMAGENET_MEAN, IMAGENET_STD
from mtedit_fast.onestep import Features

from .fit import generator_for
from .models import load_dino
from .world import CELL, random_scenes, render

SIDE = 2 * CELL
SHARE = 0.6  # of cells that hold an object


def shapes(count: int, seed: int) -> Tensor:
    """Scenes of 2 × 2 cells from anywhere in the world, [count, 3, 32, 32] fp32 in [-1, 1]."""
    generator = generator_for(seed, 0)
    parts = []
    for size in (min(1024, count - start) for start in range(0, count, 1024)):
        images = render(*random_scenes(size, generator, SHARE))
        pieces = images.unfold(2, SIDE, CELL).unfold(3, SIDE, CELL).flatten(2, 3)  # [n, 3, 9, 32, 32]
        pick = torch.randint(pieces.shape[2], (size,), generator=generator)
        parts.append(pieces[torch.arange(size), :, pick] * 2 - 1)
    return torch.cat(parts)


def phantom(count: int, seed: int, side: int = 32) -> Tensor:
    """Heads of random ellipses with a smooth phase, complex images as [count, 2, side, side] fp32, magnitudes ≤ 1."""
    generator = generator_for(seed, 1)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    line = torch.linspace(-1, 1, side)
    y, x = line[None, None, :, None], line[None, None, None, :]
    inner = 6
    radius = torch.cat((uniform(0.7, 0.9, count, 1, 2), uniform(0.08, 0.35, count, inner, 2)), 1)
    centre = torch.cat((torch.zeros(count, 1, 2), uniform(-0.4, 0.4, count, inner, 2)), 1)
    angle, value = uniform(0, torch.pi, count, inner + 1), uniform(-0.35, 0.35, count, inner + 1)
    angle[:, 0], value[:, 0] = torch.pi / 2, 0.55
    dx, dy = x - centre[..., 0, None, None], y - centre[..., 1, None, None]
    cos, sin = angle.cos()[..., None, None], angle.sin()[..., None, None]
    along, across = (
        (cos * dx + sin * dy) / radius[..., 0, None, None],
        (cos * dy - sin * dx) / radius[..., 1, None, None],
    )
    soft = torch.sigmoid((1 - along.square() - across.square()) * side / 3)  # edges of about a pixel
    magnitude = ((value[..., None, None] * soft).sum(1) * soft[:, 0]).clamp(0, 1)
    slope = uniform(-1, 1, count, 3)[..., None, None]
    phase = slope[:, 0] + slope[:, 1] * x[0] + slope[:, 2] * y[0]
    return torch.stack((magnitude * phase.cos(), magnitude * phase.sin()), 1)


def dino_features() -> Features:
    """CLS and mean patch features of the playground's DINO, [B, 128] fp32, of uint8 images [B, H, W, 3] of any size."""
    dino = load_dino()
    side = dino.config.image_size
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        x = images.cpu().permute(0, 3, 1, 2).float() / 255
        x = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
        hidden = dino(pixel_values=(x - mean) / std).last_hidden_state
        return torch.cat((hidden[:, 0], hidden[:, 1:].mean(1)), 1)

    return features
