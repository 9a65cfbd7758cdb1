"""A vision-language model in two calls, so that an image is encoded once however often it is read.

The forward of transformers' Qwen models takes encoded images from version 5.23 on; these calls also serve older ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["encode_images", "hidden_states"]


def encode_images(model: Any, pixels: Tensor, grid: Tensor) -> list[list[Tensor]]:
    """Of each image, [tokens, H] of what stands for it and of every deepstack layer.

    model: a Qwen2-VL, Qwen2.5-VL or Qwen3-VL for conditional generation. pixels, grid: from `prepare_images`.
    """
    out = model.model.get_image_features(pixels, grid, return_dict=True)
    lengths = [len(image) for image in out.pooler_output]
    deepstack = getattr(out, "deepstack_features", None) or []
    layers = [layer.split(lengths) if isinstance(layer, Tensor) else layer for layer in deepstack]  # before 5.23
    return [list(image) for image in zip(out.pooler_output, *layers, strict=True)]


def hidden_states(
    model: Any,
    ids: Tensor,
    features: Sequence[list[Tensor]],
    positions: Tensor,
    mask: Tensor | None = None,
    cache: Any = None,
) -> Tensor:
    """The language model's last hidden states [B, L, H], in the model's own way of placing images.

    Args:
        ids: [B, L] int64, with the model's image token wherever one of an image's tokens stands.
        features: of all images in ids, row by row, from `encode_images`.
        positions: [3, B, L] rotary positions. mask: as the attention implementation takes it, None for causal.
        cache: keys and values of what comes before, added to; None keeps none.
    """
    place = ids == model.config.image_token_id  # [B, L]
    embeds = model.get_input_embeddings()(ids)
    seen: dict[str, Any] = {}
    if features:
        images, *deepstack = (torch.cat(layer).to(embeds) for layer in zip(*features, strict=True))
        embeds = embeds.masked_scatter(place[..., None], images)
        if deepstack:
            seen = {"visual_pos_masks": place, "deepstack_visual_embeds": deepstack}
    return model.model.language_model(
        input_ids=None,
        inputs_embeds=embeds,
        position_ids=positions,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=cache is not None,
        **seen,
    ).last_hidden_state
