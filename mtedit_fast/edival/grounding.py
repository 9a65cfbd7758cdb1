"""Grounding DINO and MM-Grounding-DINO, through transformers, as a detector."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import Detection
from .consistency import IMAGENET_MEAN, IMAGENET_STD

MODEL_TYPES = ("grounding-dino", "mm-grounding-dino")


class GroundingDetector:
    """An open-vocabulary detector whose images stay tensors on the model's device.

    model: GroundingDinoForObjectDetection or MMGroundingDinoForObjectDetection. tokenizer: the checkpoint's.
    shortest_edge, longest_edge: side lengths in pixels that images are resized to, antialiased bilinear, keeping their
    aspect ratio. batch_size: images per forward. Raises ValueError on a model of another type.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        shortest_edge: int = 800,
        longest_edge: int = 1333,
        batch_size: int = 8,
    ) -> None:
        if model.config.model_type not in MODEL_TYPES:
            raise ValueError(f"model must be one of {', '.join(MODEL_TYPES)}, got {model.config.model_type}")
        if not 1 <= shortest_edge <= longest_edge or batch_size < 1:
            raise ValueError(
                "shortest_edge must be in 1..longest_edge and batch_size at least 1, "
                f"got {shortest_edge}, {longest_edge} and {batch_size}"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.shortest_edge = shortest_edge
        self.longest_edge = longest_edge
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(
        cls, path: str, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, **options: Any
    ) -> GroundingDetector:
        """Loads a checkpoint such as IDEA-Research/grounding-dino-base. options: of the constructor."""
        from transformers import AutoModelForZeroShotObjectDetection, AutoTokenizer

        model = AutoModelForZeroShotObjectDetection.from_pretrained(path, dtype=dtype).to(device)
        return cls(model, AutoTokenizer.from_pretrained(path), **options)

    @torch.no_grad()
    def detect(
        self,
        images: Tensor,
        queries: list[str],
        *,
        box_threshold: float = 0.3,
        text_threshold: float | None = None,
    ) -> list[Detection]:
        """One Detection per image, on the images' device, best score first.

        images: [B, 3, H, W] float in [0, 1]. queries: B, each an object's name or several joined by ". ". A box's
        score is the largest probability over the query's tokens and must exceed box_threshold; its phrase is made of
        the tokens above text_threshold (default: box_threshold). Raises ValueError on shapes that do not fit, on an
        empty query, and on one of more tokens than the model reads.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be [B, 3, H, W] float in [0, 1], got {list(images.shape)} {images.dtype}")
        if len(queries) != len(images):
            raise ValueError(f"queries must have one entry for each of {len(images)} images, got {len(queries)}")
        if not len(images):
            return []
        tokens = self._tokens(queries)
        threshold = box_threshold if text_threshold is None else text_threshold
        found: list[Detection] = []
        for start in range(0, len(queries), self.batch_size):
            part = slice(start, start + self.batch_size)
            batch = {name: value[part].to(self.model.device) for name, value in tokens.items()}
            pixels = self._pixels(images[part].to(self.model.device)).to(self.model.dtype)
            output = self.model(pixel_values=pixels, **batch)
            probabilities = output.logits.float().sigmoid()  # [b, Q, max_text_len], 0 beyond the query's tokens
            found += [
                self._read(p, boxes, ids, box_threshold, threshold, images.device)
                for p, boxes, ids in zip(probabilities, output.pred_boxes, batch["input_ids"], strict=True)
            ]
        return found

    def _tokens(self, queries: list[str]) -> dict[str, Tensor]:
        """Token ids, types and masks [B, L] of the queries as the model was trained on them: lower case, each phrase
        closed by a dot. The dot also makes a query's result independent of how far the batch pads it: attention
        inside a phrase is opened only by a closing mark that is not the last token."""
        if empty := [q for q in queries if not q.strip(" .")]:
            raise ValueError(f"queries must each name an object, got {empty[0]!r}")
        texts = [f"{query.strip(' .').lower()}." for query in queries]
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=True)
        limit = self.model.config.max_text_len
        lengths = tokens["attention_mask"].sum(1)
        if (longest := int(lengths.max())) > limit:
            query = queries[int(lengths.argmax())]
            raise ValueError(
                f"a query must have at most {limit} tokens, got {longest} in {query[:60]!r}...; ask for fewer objects"
            )
        return {name: tokens[name] for name in ("input_ids", "token_type_ids", "attention_mask")}

    def _pixels(self, images: Tensor) -> Tensor:
        """[B, 3, h, w], resized and normalised."""
        from transformers.image_transforms import get_size_with_aspect_ratio

        size = get_size_with_aspect_ratio(tuple(images.shape[-2:]), self.shortest_edge, self.longest_edge)
        pixels = images.float()
        if size != tuple(pixels.shape[-2:]):
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
        mean, std = (pixels.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        return (pixels - mean) / std

    def _read(
        self,
        probabilities: Tensor,  # [Q, max_text_len]
        boxes: Tensor,  # [Q, 4]
        input_ids: Tensor,  # [L]
        box_threshold: float,
        text_threshold: float,
        device: torch.device,
    ) -> Detection:
        scores, order = probabilities.max(-1).values.sort(descending=True, stable=True)
        order = order[scores > box_threshold]
        ids = input_ids.tolist()
        marks = {*self.tokenizer.all_special_ids, self.tokenizer.convert_tokens_to_ids(".")}
        phrases = []
        for above in (probabilities[order, : len(ids)] > text_threshold).tolist():
            words = [token for token, is_above in zip(ids, above, strict=True) if is_above and token not in marks]
            phrases.append(self.tokenizer.decode(words).strip())
        return Detection(boxes[order].float().to(device), scores[: len(order)].to(device), phrases)
