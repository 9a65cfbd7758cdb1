"""What `mtedit-fast edit` is made of: an image that fits the editor, turns, and a strip of them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mtedit_fast.editors import Editor
from mtedit_fast.figures import INK, paste, wrap_text
from mtedit_fast.rollout import RolloutConfig, rollout, turn_seeds

Turn = Callable[[Tensor, str, int, Tensor], Tensor]
"""Of images [B, 3, H, W], an instruction, the turn 0 … K−1 and its noise keys [B] -> images [B, 3, H, W]."""


def check_words(editor: Any, instructions: Sequence[str]) -> None:
    """ValueError naming the words that an editor with a vocabulary of whole words has never seen; others take any."""
    tokenizer = editor.pipeline.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "WordLevel":
        return
    vocabulary = tokenizer.get_vocab()
    known = [word for word in sorted(vocabulary, key=vocabulary.get) if word not in tokenizer.all_special_tokens]
    for text in instructions:
        encoding = backend.encode(text, add_special_tokens=False)
        spans = [span for span, id in zip(encoding.offsets, encoding.ids, strict=True) if id == tokenizer.unk_token_id]
        if spans or not any(encoding.attention_mask):  # padding, where the tokenizer was saved with it, is no word
            unknown = [text[start:stop] for start, stop in spans]
            near = [word for wrong in unknown for word in difflib.get_close_matches(wrong, known, n=1)]
            hint = f"; did you mean {', '.join(near)}?" if near else ";"
            raise ValueError(
                f"instruction {text!r}: this editor knows no {' '.join(map(repr, unknown)) or 'empty one'}{hint} "
                f"all of its words: {' '.join(known)}"
            )


def fit(editor: Any, image: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """[3, H, W] at `size` (height, width), or at its own with sides rounded down to what the editor's latents allow."""
    multiple = 2 * editor.pipeline.vae_scale_factor
    height, width = size or (max(side // multiple, 1) * multiple for side in image.shape[1:])
    editor.latent_shape(height, width)
    if (height, width) == tuple(image.shape[1:]):
        return image
    resized = F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0].clamp(0, 1)
    return (resized * 255).round() / 255


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of "HEIGHTxWIDTH", or of one number for a square."""
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) not in (1, 2) or not all(side.strip().isdigit() for side in sides):
        raise ValueError(f"size: expected HEIGHTxWIDTH, such as 768x1024, or one number, got {text!r}")
    return int(sides[0]), int(sides[-1])


def plain_edits(editor: Editor, images: Tensor, instructions: list[list[str]], seeds: Tensor, **options: Any) -> Tensor:
    """[B, K, 3, H, W] of images [B, 3, H, W], B lists of K texts and seeds [B]: the ODE rollout; options as of
    `RolloutConfig`."""
    config = RolloutConfig(group_size=1, variant="ode", **options)
    return rollout(editor, images, instructions, config, seeds).images


def edit_turns(images: Tensor, instructions: Sequence[str], seeds: Tensor, turn: Turn) -> Tensor:
    """[B, K, 3, H, W]: each turn edits what the one before it made. images [B, 3, H, W], seeds int64 [B]."""
    edits: list[Tensor] = []
    for number, instruction in enumerate(instructions):
        images = turn(images, instruction, number, turn_seeds(seeds, number))
        edits.append(images)
    return torch.stack(edits, dim=1)


def strip(images: Sequence[Tensor], captions: Sequence[str], cell: int = 256) -> Image.Image:
    """Pictures [3, H, W] in [0, 1] side by side, each under its caption, fitted into squares of `cell` pixels."""
    if len(images) != len(captions):
        raise ValueError(f"captions: expected {len(images)}, one per image, got {len(captions)}")
    gap, lines, font = 12, 3, ImageFont.load_default(size=14)
    head = lines * 18 + gap
    canvas = Image.new("RGB", (gap + len(images) * (cell + gap), head + cell + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for column, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left = gap + column * (cell + gap)
        draw.multiline_text((left, gap // 2), wrap_text(caption, font, cell, lines), fill=INK, font=font)
        paste(canvas, image, (left, head), cell)
    return canvas
