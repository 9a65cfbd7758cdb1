"""Training of the playground's DINO: patches name their cell's content, CLS the bag of objects."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Model

from mtedit_fast.edival.consistency import IMAGENET_MEAN, IMAGENET_STD

from .fit import fit, generator_for, muon_and_adamw
from .world import BACKGROUNDS, CELL, CELLS, CLASSES, GRID, SIZE, random_scenes, render


def train_dino(
    model: Dinov2Model, *, steps: int, checkpoint: Path, seed: int, save_every: int = 50, resume: bool = True
) -> None:
    """Half of each batch are whole images, half single cells enlarged to the image's size, all slightly noisy."""
    module = nn.ModuleDict(
        {"model": model, "patch": nn.Linear(64, CLASSES), "bag": nn.Linear(64, CLASSES + len(BACKGROUNDS))}
    )
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = generator_for(seed, step)
        cells, background = random_scenes(64, generator)
        images = render(cells, background)
        pick = torch.randint(CELLS, (32,), generator=generator)
        crops = images[32:].unfold(2, CELL, CELL).unfold(3, CELL, CELL).flatten(2, 3)[torch.arange(32), :, pick]
        crops = F.interpolate(crops, size=(SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False)
        images = torch.cat([images[:32], crops])
        images = images + 0.05 * torch.rand(64, 1, 1, 1, generator=generator) * torch.randn(
            images.shape, generator=generator
        )
        shown = cells[torch.arange(32, 64), pick]
        per_patch = cells[:32].view(-1, GRID, 1, GRID, 1).expand(-1, -1, 2, -1, 2).reshape(32, -1)
        per_patch = torch.cat([per_patch, shown[:, None].expand(-1, per_patch.shape[1])])
        bag = torch.zeros(64, CLASSES + len(BACKGROUNDS))
        bag[:32].scatter_(1, cells[:32], 1.0)
        bag[32:].scatter_(1, shown[:, None], 1.0)
        bag[torch.arange(64), CLASSES + background] = 1.0
        bag[:, 0] = 0.0
        hidden = model(pixel_values=(images - mean) / std).last_hidden_state
        logits = module["patch"](hidden[:, 1:])
        patches = F.cross_entropy(logits.flatten(0, 1), per_patch.flatten())
        bags = F.binary_cross_entropy_with_logits(module["bag"](hidden[:, 0]), bag)
        right = (logits.argmax(-1) == per_patch).float().mean().item()
        return patches + 5 * bags, {"patches": right, "bag": bags.item()}

    hidden = [p for n, p in model.named_parameters() if "layer." in n and p.ndim == 2]
    chosen = {id(p) for p in hidden}
    rest = [p for p in module.parameters() if id(p) not in chosen]
    fit(
        "dino",
        module,
        muon_and_adamw(hidden, rest, 3e-3, 2e-3),
        loss,
        steps=steps,
        schedule=lambda step: min((step + 1) / 20, 1 - step / steps),
        checkpoint=checkpoint,
        save_every=save_every,
        resume=resume,
    )
