"""EdiVal's content consistency: how well an edited image keeps the objects and background nobody asked to change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Boxes = Sequence[Sequence[float]] | Tensor  # [n, 4] (cx, cy, w, h), each in [0, 1]


class Consistency(NamedTuple):
    score: Tensor  # [B, K] fp32: mean of the two parts, NaN where either is undefined
    object: Tensor  # [B, K] fp32 in [-1, 1]
    background: Tensor  # [B, K] fp32 in [-1, 1]


def pixel_box(box: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) in whole pixels of a normalised (cx, cy, w, h) box, clipped, at least one pixel."""
    cx, cy, w, h = (float(v) for v in box)
    left = min(max(round((cx - w / 2) * width), 0), width - 1)
    top = min(max(round((cy - h / 2) * height), 0), height - 1)
    right = min(max(round((cx + w / 2) * width), left + 1), width)
    bottom = min(max(round((cy + h / 2) * height), top + 1), height)
    return top, bottom, left, right


class ContentConsistency:
    """Content consistency with a DINOv2 or DINOv3 backbone.

    model: a transformers ViT whose `last_hidden_state` is [CLS, registers, patches], such as Dinov2Model; register
    tokens are dropped. image_size, crop_size: side in pixels of whole images and of crops as the model sees them,
    multiples of the patch size (default: the config's image_size). mean, std: of the model's training images.
    batch_size: images per forward.
    """

    def __init__(
        self,
        model: Any,
        *,
        image_size: int | None = None,
        crop_size: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        batch_size: int = 256,
    ) -> None:
        self.model = model
        self.patch = int(model.config.patch_size)
        self.image_size = image_size or int(model.config.image_size)
        self.crop_size = crop_size or int(model.config.image_size)
        for name, size in (("image_size", self.image_size), ("crop_size", self.crop_size)):
            if size % self.patch:
                raise ValueError(f"{name} must be a multiple of the model's patch size {self.patch}, got {size}")
        self.prefix = 1 + int(getattr(model.config, "num_register_tokens", 0) or 0)
        self.mean, self.std = tuple(mean), tuple(std)
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(
        self,
        references: Tensor,
        edits: Tensor,
        unchanged: Sequence[Sequence[Boxes]],
        found_references: Sequence[Boxes],
        found_edits: Sequence[Sequence[Boxes]],
        *,
        background_changed: Tensor | None = None,
        owner: Sequence[int] | None = None,
    ) -> Consistency:
        """Consistency of B chains of K edits with the images they started from.

        references: [R, 3, H, W], edits: [B, K, 3, H, W], float in [0, 1] on the model's device.
        unchanged[b][k]: boxes in the reference of the objects not edited up to turn k; empty: the object part is NaN.
        found_references[r], found_edits[b][k]: boxes of all objects found, cut out of the background; where nothing
        is left the background part is NaN. background_changed: [B, K] bool, NaN there (default: nowhere).
        owner[b]: index of chain b's reference (default: R == B, in order); members of a group share one, whose
        features are computed once. Raises ValueError where lengths or shapes do not fit together.
        """
        owner = list(range(len(edits))) if owner is None else list(owner)
        self._check(references, edits, unchanged, found_references, found_edits, background_changed, owner)
        objects = self._object_part(references, edits, unchanged, owner)
        backgrounds = self._background_part(references, edits, found_references, found_edits, owner)
        if background_changed is not None:
            undefined = background_changed.to(edits.device)
            objects = objects.masked_fill(undefined, torch.nan)
            backgrounds = backgrounds.masked_fill(undefined, torch.nan)
        return Consistency(0.5 * (objects + backgrounds), objects, backgrounds)

    def _features(self, images: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """CLS [N, D] and patch tokens [N, P, D], fp32, of images [N, 3, H, W] resized to `size`."""
        mean, std = (images.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        tokens = []
        for chunk in images.split(self.batch_size):
            pixels = (_resize(chunk, size) - mean) / std
            tokens.append(self.model(pixel_values=pixels.to(self.model.dtype)).last_hidden_state.float())
        hidden = torch.cat(tokens)
        return hidden[:, 0], hidden[:, self.prefix :]

    def _object_part(
        self, references: Tensor, edits: Tensor, unchanged: Sequence[Sequence[Boxes]], owner: list[int]
    ) -> Tensor:
        b, k, _, height, width = edits.shape
        crops: list[Tensor] = []
        source: dict[tuple[int, ...], int] = {}  # (reference, box) -> crop, shared by group members and turns
        pairs: list[tuple[int, int, int]] = []  # (edit b·K + k, crop of the reference, crop of the edit)
        for i in range(b):
            for j in range(k):
                for box in torch.as_tensor(unchanged[i][j]).view(-1, 4).tolist():
                    top, bottom, left, right = pixels = pixel_box(box, height, width)
                    key = (owner[i], *pixels)
                    if key not in source:
                        source[key] = len(crops)
                        crops.append(_resize(references[owner[i], None, :, top:bottom, left:right], self.crop_size))
                    pairs.append((i * k + j, source[key], len(crops)))
                    crops.append(_resize(edits[i, j, None, :, top:bottom, left:right], self.crop_size))
        if not pairs:
            return edits.new_full((b, k), torch.nan, dtype=torch.float32)
        cls, patches = self._features(torch.cat(crops), self.crop_size)
        index, before, after = torch.tensor(pairs, device=edits.device).T
        mean = patches.mean(1)
        similarity = 0.5 * F.cosine_similarity(cls[before], cls[after]) + 0.5 * F.cosine_similarity(
            mean[before], mean[after]
        )
        total = similarity.new_zeros(b * k).index_add(0, index, similarity)
        return (total / torch.bincount(index, minlength=b * k)).view(b, k)  # 0 / 0 = NaN: no unchanged object

    def _background_part(
        self,
        references: Tensor,
        edits: Tensor,
        found_references: Sequence[Boxes],
        found_edits: Sequence[Sequence[Boxes]],
        owner: list[int],
    ) -> Tensor:
        b, k, _, height, width = edits.shape
        keep = torch.ones(b, k, height, width)
        for i in range(b):
            for j in range(k):
                for boxes in (found_references[owner[i]], found_edits[i][j]):
                    for box in torch.as_tensor(boxes).view(-1, 4).tolist():
                        top, bottom, left, right = pixel_box(box, height, width)
                        keep[i, j, top:bottom, left:right] = 0
        grid = self.image_size // self.patch
        weight = F.adaptive_avg_pool2d(keep.to(edits.device), grid).flatten(2)  # [B, K, P]
        weight = weight * (weight >= 0.5)
        before = F.normalize(self._features(references, self.image_size)[1], dim=-1)[owner]  # [B, P, D]
        after = F.normalize(self._features(edits.flatten(0, 1), self.image_size)[1], dim=-1).view(b, k, grid**2, -1)
        # a common factor of the weights leaves the cosine as it is, so sums stand for weighted means
        score = F.cosine_similarity(
            torch.einsum("bkp,bpd->bkd", weight, before), torch.einsum("bkp,bkpd->bkd", weight, after), dim=-1
        )
        return score.masked_fill(weight.sum(-1) == 0, torch.nan)

    @staticmethod
    def _check(
        references: Tensor,
        edits: Tensor,
        unchanged: Sequence[Sequence[Boxes]],
        found_references: Sequence[Boxes],
        found_edits: Sequence[Sequence[Boxes]],
        background_changed: Tensor | None,
        owner: list[int],
    ) -> None:
        if edits.ndim != 5 or references.ndim != 4 or references.shape[1:] != edits.shape[2:]:
            raise ValueError(
                "references and edits must be [R, 3, H, W] and [B, K, 3, H, W], "
                f"got {list(references.shape)} and {list(edits.shape)}"
            )
        b, k = edits.shape[:2]
        if len(owner) != b or not all(0 <= r < len(references) for r in owner):
            raise ValueError(
                f"owner must give each of {b} chains one of {len(references)} references, got {owner}; "
                "leave it out only when there is one reference per chain"
            )
        for name, boxes in (("unchanged", unchanged), ("found_edits", found_edits)):
            if [len(turns) for turns in boxes] != [k] * b:
                raise ValueError(f"{name} must be [{b}][{k}] boxes, got lengths {[len(turns) for turns in boxes]}")
        if len(found_references) != len(references):
            raise ValueError(f"found_references must have {len(references)} entries, got {len(found_references)}")
        if background_changed is not None and background_changed.shape != (b, k):
            raise ValueError(f"background_changed must be [{b}, {k}], got {list(background_changed.shape)}")


def _resize(images: Tensor, size: int) -> Tensor:
    """Antialiased bicubic to size × size; images already of that size pass unchanged."""
    if images.shape[-2:] == (size, size):
        return images.float()
    return F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True, align_corners=False)
