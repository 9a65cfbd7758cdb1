"""Content consistency as EdiVal's loop takes it: PIL, two images to a forward, references embedded again every time."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import BitImageProcessorPil

from mtedit_fast.edival.consistency import IMAGENET_MEAN, IMAGENET_STD

Box = Sequence[int]
"""(left, top, right, bottom) in whole pixels."""


class ConsistencyLoop:
    """Of one edit and what it was made from. model: a ViT of transformers."""

    def __init__(self, model: Any):
        self.model, self.size = model, model.config.image_size
        self.registers = getattr(model.config, "num_register_tokens", 0)
        self.processor = BitImageProcessorPil(
            size={"height": self.size, "width": self.size},
            do_center_crop=False,
            resample=Image.Resampling.BICUBIC,
            image_mean=IMAGENET_MEAN,
            image_std=IMAGENET_STD,
        )

    @torch.no_grad()
    def __call__(
        self, before: Image.Image, after: Image.Image, unchanged: Sequence[Box], covered: Sequence[Box]
    ) -> float:
        """The mean of objects and background; NaN without an unchanged object, or where `covered` leaves nothing."""
        objects = []
        for left, top, right, bottom in unchanged:
            a, b = self.features(*(image.crop((left, top, right, bottom)) for image in (before, after)))
            objects.append(0.5 * cosine(a[0], b[0]) + 0.5 * cosine(a[1:].mean(0), b[1:].mean(0)))
        mask = Image.new("L", before.size, 255)
        for left, top, right, bottom in covered:
            ImageDraw.Draw(mask).rectangle((left, top, right - 1, bottom - 1), fill=0)
        keep = torch.from_numpy(np.asarray(mask) / np.float32(255))[None, None].to(self.model.device)
        weight = F.interpolate(keep, self.size // self.model.config.patch_size, mode="area").flatten()[:, None]
        weight = weight * (weight >= 0.5)
        a, b = (
            (F.normalize(tokens[1:], dim=-1) * weight).sum(0) / weight.sum() for tokens in self.features(before, after)
        )
        of_objects = sum(objects) / len(objects) if objects else float("nan")
        return 0.5 * of_objects + 0.5 * cosine(a, b)

    def features(self, *images: Image.Image) -> Tensor:
        """[n, 1 + patches, D] fp32."""
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        hidden = self.model(pixel_values=pixels.to(self.model.device, self.model.dtype)).last_hidden_state.float()
        return torch.cat([hidden[:, :1], hidden[:, 1 + self.registers :]], 1)


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a, b, dim=0).item()
