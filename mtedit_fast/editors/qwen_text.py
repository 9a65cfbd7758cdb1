"""Instructions as Qwen-Image-Edit's text encoder reads them, with the images they are about, batched on the device."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtedit_fast.editors.content import content_keys
from mtedit_fast.qwen_vl import ImageSpec, encode_images, hidden_states, prepare_images

__all__ = ["TextRows", "condition_size", "encode_prompts", "resize_lanczos"]

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
MULTIPLE = 32  # to which the pipelines round an image's sides
MAX_TOKENS = 65536  # of one forward of the language model, and of the vision tower after merging


class TextRows(NamedTuple):
    """What the text encoder makes of n (prompt, images)."""

    embeds: Tensor  # [n, L, D], zero beyond a row's own length
    lengths: list[int]
    image_tokens: int  # how many of them stand for images, the same in every row


def condition_size(height: int, width: int, area: int) -> tuple[int, int]:
    """(height, width) of about `area` pixels at this aspect ratio, multiples of 32 as the pipelines choose them."""
    wide = math.sqrt(area * (width / height))
    return max(round(wide * height / width / MULTIPLE), 1) * MULTIPLE, max(round(wide / MULTIPLE), 1) * MULTIPLE


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: list[tuple[str, int | None]], images: Tensor | None, area: int) -> TextRows:
    """The pipeline's own prompt embeddings, batched: one forward of each tower up to `MAX_TOKENS`.

    The positions of image tokens are three-dimensional, as the checkpoints were trained: with transformers 5 the stock
    pipelines of diffusers 0.42 do not pass `mm_token_type_ids` on, and number image tokens like words instead. No
    logits are computed, and as padding is on the right no mask is needed under causal attention.

    Args:
        prompts: (instruction, row of `images` it is about or None).
        images: [I, R, 3, H, W] in [0, 1], the R references of every row, or None where no prompt has any. Rounded to 8
            bits and brought to `area` pixels by PIL's Lanczos filter, as the pipelines do.

    Raises:
        ValueError: a prompt holds an image token of its own.
    """
    model, tokenizer = pipeline.text_encoder, pipeline.processor.tokenizer
    device, pad = model.device, model.config.image_token_id
    features: list[list[Tensor]] = []
    tokens, count, grid = 0, 0, torch.empty(0, 3, dtype=torch.int64)
    if images is not None:
        count, (height, width) = images.shape[1], images.shape[-2:]
        spec, size = ImageSpec.from_processor(pipeline.processor), condition_size(height, width, area)
        tokens, grid = spec.tokens(*size), torch.tensor([spec.grid(*size)])
        for part in images.flatten(0, 1).split(max(MAX_TOKENS // tokens, 1)):
            pixels = resize_lanczos(part.to(device), size)
            features += encode_images(model, *prepare_images(pixels, spec, quantize=True))
    texts = [chat_template(pipeline, count if row is not None else 0).format(prompt) for prompt, row in prompts]
    ids = [_expand(own, pad, tokens) for own in tokenizer(texts)["input_ids"]]
    for (prompt, row), own in zip(prompts, ids, strict=True):
        if own.count(pad) != (tokens * count if row is not None else 0):
            raise ValueError(f"prompts: expected no image tokens within an instruction, got {prompt!r}; take them out")
    lengths = [len(own) for own in ids]
    longest, filler = max(lengths), tokenizer.pad_token_id or 0
    padded = torch.tensor([own + [filler] * (longest - len(own)) for own in ids])
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]

    def read(rows: slice) -> Tensor:
        seen = [row * count + place for _, row in prompts[rows] if row is not None for place in range(count)]
        positions, _ = model.model.get_rope_index(
            padded[rows],
            (padded[rows] == pad).int(),
            image_grid_thw=grid.expand(len(seen), -1) if seen else None,
            attention_mask=mask[rows],
        )
        return hidden_states(model, padded[rows].to(device), [features[i] for i in seen], positions.to(device))

    step = max(MAX_TOKENS // longest, 1)
    hidden = torch.cat([read(slice(first, first + step)) for first in range(0, len(prompts), step)])
    start = pipeline.prompt_template_encode_start_idx
    embeds = hidden.masked_fill(~mask.to(device)[..., None], 0)[:, start:]
    return TextRows(embeds, [length - start for length in lengths], tokens * count)


def chat_template(pipeline: Any, count: int) -> str:
    """The pipeline's template for `count` images: the first version's holds the place of one, Plus numbers them."""
    template: str = pipeline.prompt_template_encode
    if PICTURE in template:
        return template if count else template.replace(PICTURE, "")
    return template.replace("{}", "".join(f"Picture {i + 1}: {PICTURE}" for i in range(count)) + "{}")


def _expand(ids: list[int], pad: int, tokens: int) -> list[int]:
    return [own for one in ids for own in ([pad] * tokens if one == pad else [one])]


def resize_lanczos(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images [B, 3, h, w] in [0, 1] at `size` (height, width), fp32, in 256 levels before and after.

    PIL's Lanczos filter (three lobes, stretched where it shrinks, columns first), without PIL's rounding between
    columns and rows.
    """
    levels = (images.float() * 255).round()
    height, width = images.shape[-2:]
    if width != size[1]:
        levels = levels @ _lanczos(width, size[1], levels.device).T
    if height != size[0]:
        levels = _lanczos(height, size[0], levels.device) @ levels
    return levels.round().clamp(0, 255) / 255


@lru_cache(maxsize=16)
def _lanczos(before: int, after: int, device: torch.device) -> Tensor:
    """[after, before] fp32 weights of one side."""
    step = before / after
    centre = (torch.arange(after, dtype=torch.float64) + 0.5) * step
    x = (torch.arange(before, dtype=torch.float64) + 0.5 - centre[:, None]) / max(step, 1)
    weights = torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0)
    return (weights / weights.sum(1, keepdim=True)).float().to(device)


def distinct(images: Tensor) -> tuple[list[int], list[int]]:
    """(the first row of each distinct image, which of them each row is) of images [B, ...] in [0, 1], in 256 levels.

    By the content of every row: one read of the images, and one of B keys by the host.
    """
    keys = content_keys((images.float() * 255).round().to(torch.uint8))
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    rows = sorted(first.values())
    return rows, [rows.index(first[key]) for key in keys]
