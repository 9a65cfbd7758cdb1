"""EdiVal's content consistency: how well an edited image keeps the objects and background nobody asked to change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mtedit_fast.ops import crop_resize, token_similarity

from .background import Boxes, background_weights, pixel_box, pixel_boxes, token_grid

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Boxes", "Consistency", "ContentConsistency", "pixel_box"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Consistency(NamedTuple):
    score: Tensor  # [B, K] fp32: mean of the two parts, NaN where either is undefined
    object: Tensor  # [B, K] fp32 in [-1, 1]
    background: Tensor  # [B, K] fp32 in [-1, 1]


class ContentConsistency:
    """Content consistency (EdiVal-Agent, arXiv 2509.13399) with a DINOv2 or DINOv3 backbone.

    Object part: mean over the unchanged objects of ½ cos(CLS) + ½ cos(mean patch token) of the same box, cut from both
    images. Background part: patch tokens, each of unit length, averaged with the part of its patch that no box covers
    as weight (0 below a half), and the cosine of the two averages. A reference's image and crops go through the model
    once for all its chains and turns, all images of a call in as few batches as `max_tokens` allows, and images of
    which no score is defined not at all.

    Args:
        model: a transformers ViT in eval mode whose `last_hidden_state` is [CLS, registers, patches], such as
            Dinov2Model or DINOv3ViTModel. It computes in its own dtype (bf16: `model.to(torch.bfloat16)`), the cosines
            in fp32.
        image_size, crop_size: side in pixels of whole images and of crops as the model sees them, multiples of the
            patch size (default: the config's image_size).
        mean, std: of the model's training images.
        filter: "bicubic" or "bilinear" (what DINOv3's own image processor does), antialiased.
        max_tokens: of one forward. Default: 65536, and on a CPU 8192, whose activations stay in its cache.
        registers: "drop", or "edival_compat" for the numbers of EdiVal's public code: it takes register tokens for
            patches, the first ones, and lays all of them out on the grid that fits their number, so that 224 pixels
            of DINOv3's patches of 16 become 10 × 20 cells instead of 14 × 14; and it scores 0 where no unchanged
            object was found. Boxes are rounded to pixels as here, not as there, in both.
        compile: run the model through `torch.compile`.
    """

    def __init__(
        self,
        model: Any,
        *,
        image_size: int | None = None,
        crop_size: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        filter: Literal["bicubic", "bilinear"] = "bicubic",
        max_tokens: int | None = None,
        registers: Literal["drop", "edival_compat"] = "drop",
        compile: bool = False,
    ) -> None:
        self.model = model
        self.patch = int(model.config.patch_size)
        self.image_size = image_size or int(model.config.image_size)
        self.crop_size = crop_size or int(model.config.image_size)
        for name, size in (("image_size", self.image_size), ("crop_size", self.crop_size)):
            if size % self.patch:
                raise ValueError(f"{name} must be a multiple of the model's patch size {self.patch}, got {size}")
        if registers not in ("drop", "edival_compat"):
            raise ValueError(f"registers must be 'drop' or 'edival_compat', got {registers!r}")
        if filter not in ("bicubic", "bilinear"):
            raise ValueError(f"filter must be 'bicubic' or 'bilinear', got {filter!r}")
        if max_tokens is None:
            max_tokens = 8192 if model.device.type == "cpu" else 65536
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, got {max_tokens}")
        self.num_registers = int(getattr(model.config, "num_register_tokens", 0) or 0)
        self.compat = registers == "edival_compat"
        self.first_patch = 1 if self.compat else 1 + self.num_registers
        self.mean, self.std, self.filter = tuple(mean), tuple(std), filter
        self.max_tokens = max_tokens
        self._vit = torch.compile(model) if compile else model

    @torch.no_grad()
    def __call__(
        self,
        references: Tensor,
        edits: Tensor,
        unchanged: Sequence[Sequence[Boxes | None]],
        found_references: Sequence[Boxes],
        found_edits: Sequence[Sequence[Boxes]],
        *,
        background_changed: Tensor | None = None,
        owner: Sequence[int] | None = None,
    ) -> Consistency:
        """Consistency of B chains of K edits with the images they started from.

        Boxes are normalised (cx, cy, w, h), rounded to whole pixels, clipped to the image and at least one pixel.

        Args:
            references: [R, 3, H, W] and edits: [B, K, 3, H, W], float in [0, 1] or uint8, on the model's device.
            unchanged: [b][k] boxes, found in the reference, of the objects not edited up to turn k. The object part is
                NaN for None, there are no such objects, and for an empty list, none was found (0 in "edival_compat").
            found_references, found_edits: [r] and [b][k] boxes of all objects found, cut out of the background; where
                nothing is left of it the background part is NaN.
            background_changed: [B, K] bool, everything is NaN there (default: nowhere).
            owner: [b] index of chain b's reference (default: R == B, in order).

        Raises:
            TypeError: images that are neither float nor uint8.
            ValueError: lengths, shapes or devices that do not fit together, or boxes that are not finite.
        """
        owner = list(range(len(edits))) if owner is None else list(owner)
        self._check(references, edits, unchanged, found_references, found_edits, background_changed, owner)
        b, k, _, height, width = edits.shape
        changed = [[False] * k] * b if background_changed is None else background_changed.tolist()
        turns = [(i, j) for i in range(b) for j in range(k) if not changed[i][j]]
        objects, backgrounds = torch.full((2, b * k), torch.nan, device=edits.device)
        if turns:
            index = [i * k + j for i, j in turns]
            sources = [owner[i] for i, _ in turns]
            given = [unchanged[i][j] for i, j in turns]
            kept = pixel_boxes(given, height, width, "unchanged")
            before = pixel_boxes(found_references, height, width, "found_references")
            after = pixel_boxes([found_edits[i][j] for i, j in turns], height, width, "found_edits")
            covered = [torch.cat([before[r], boxes]) for r, boxes in zip(sources, after, strict=True)]
            whole, crops = self._banks(references, edits.flatten(0, 1), index, sources, kept)
            objects[index] = self._object_part(*crops, given, kept)
            backgrounds[index] = self._background_part(*whole, covered, height, width)
        return Consistency(*(part.view(b, k) for part in (0.5 * (objects + backgrounds), objects, backgrounds)))

    def _banks(
        self, references: Tensor, edits: Tensor, index: list[int], sources: list[int], kept: list[Tensor]
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Tokens [n, T, D] and pairs of their rows, [turns, 2] of whole images and [boxes, 2] of crops.

        Turn t compares references[sources[t]] with edits[index[t]] [N, 3, H, W] and their crops of kept[t].
        """
        rows = {source: row for row, source in enumerate(dict.fromkeys(sources))}
        shared: dict[tuple[int, ...], int] = {}  # (reference, box) -> its crop, of all chains and turns
        boxes = [(source, *box) for source, own in zip(sources, kept, strict=True) for box in own.tolist()]
        cut_before = [shared.setdefault(box, len(shared)) for box in boxes]
        crop_pairs = [(row, len(shared) + i) for i, row in enumerate(cut_before)]
        image_pairs = [(rows[source], len(rows) + t) for t, source in enumerate(sources)]
        edited = [i for i, own in zip(index, kept, strict=True) for _ in range(len(own))]
        reference_boxes = torch.tensor(list(shared), dtype=torch.int64).view(-1, 5)
        frame = torch.tensor([[0, 0, *edits.shape[:1:-1]]])
        images = [
            self._pixels(references, list(rows), frame.expand(len(rows), 4), self.image_size),
            self._pixels(edits, index, frame.expand(len(index), 4), self.image_size),
        ]
        crops = [
            self._pixels(references, reference_boxes[:, 0].tolist(), reference_boxes[:, 1:], self.crop_size),
            self._pixels(edits, edited, torch.cat(kept), self.crop_size),
        ]
        if self.image_size == self.crop_size:
            whole, cut = self._tokens(images + crops).split([len(rows) + len(index), len(shared) + len(edited)])
        else:
            whole, cut = self._tokens(images), self._tokens(crops)
        pairs = (torch.tensor(p, dtype=torch.int64, device=edits.device).view(-1, 2) for p in (image_pairs, crop_pairs))
        return (whole, next(pairs)), (cut, next(pairs))

    def _pixels(self, images: Tensor, index: list[int], boxes: Tensor, size: int) -> Tensor:
        """Crops [n, 3, size, size] of images[index], resized and normalised, in the model's dtype."""
        return crop_resize(
            images,
            boxes,
            size,
            image_index=torch.tensor(index, dtype=torch.int64),
            filter=self.filter,
            mean=self.mean,
            std=self.std,
            dtype=self.model.dtype,
        )

    def _tokens(self, pixels: list[Tensor]) -> Tensor:
        """last_hidden_state [n, 1 + registers + patches, D], at most max_tokens in one forward."""
        images = torch.cat(pixels)
        count = 1 + self.num_registers + (images.shape[-1] // self.patch) ** 2
        if len(images) == 0:
            return images.new_empty(0, count, self.model.config.hidden_size)
        chunks = images.split(max(1, self.max_tokens // count))
        hidden = torch.cat([self._vit(pixel_values=chunk).last_hidden_state for chunk in chunks])
        if hidden.shape[1] != count:
            raise ValueError(
                f"model must return {count} tokens, CLS, {self.num_registers} registers and one per patch of "
                f"{self.patch} pixels, for images of {images.shape[-1]}; got {hidden.shape[1]}"
            )
        return hidden

    def _object_part(self, tokens: Tensor, pairs: Tensor, given: Sequence[Boxes | None], kept: list[Tensor]) -> Tensor:
        """[turns]: mean over a turn's boxes."""
        cls, patches = tokens[:, :1], tokens[:, self.first_patch :]
        similarity = 0.5 * (token_similarity(cls, cls, pairs) + token_similarity(patches, patches, pairs))
        counts = [len(boxes) for boxes in kept]
        sums = torch.nn.utils.rnn.pad_sequence(list(similarity.split(counts)), batch_first=True).sum(1)
        part = sums / torch.tensor(counts, device=sums.device)  # 0 / 0 = NaN
        if self.compat:
            part[[t for t, boxes in enumerate(given) if boxes is not None and len(boxes) == 0]] = 0.0
        return part

    def _background_part(self, tokens: Tensor, pairs: Tensor, covered: list[Tensor], height: int, width: int) -> Tensor:
        """[turns], with the boxes that each turn cuts out."""
        patches = tokens[:, self.first_patch :]
        side = self.image_size // self.patch
        grid = token_grid(patches.shape[1]) if self.compat else (side, side)
        weights = background_weights(covered, height, width, grid).to(tokens.device)
        return token_similarity(patches, patches, pairs, weights=weights, normalize=True)

    def _check(
        self,
        references: Tensor,
        edits: Tensor,
        unchanged: Sequence[Sequence[Boxes | None]],
        found_references: Sequence[Boxes],
        found_edits: Sequence[Sequence[Boxes]],
        background_changed: Tensor | None,
        owner: list[int],
    ) -> None:
        if edits.ndim != 5 or references.ndim != 4 or references.shape[1:] != edits.shape[2:] or edits.shape[2] != 3:
            raise ValueError(
                "references and edits must be [R, 3, H, W] and [B, K, 3, H, W], "
                f"got {list(references.shape)} and {list(edits.shape)}"
            )
        for name, images in (("references", references), ("edits", edits)):
            if not (images.dtype.is_floating_point or images.dtype == torch.uint8):
                raise TypeError(f"{name} must be float in [0, 1] or uint8, got {images.dtype}")
            if images.device != self.model.device:
                raise ValueError(f"{name} must be on the model's device {self.model.device}, got {images.device}")
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
