"""What `mtedit-fast edit` is made of: an editor from a path, an image that fits it, turns, and a strip of them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mtedit_fast.editors import EDITORS, Editor
from mtedit_fast.figures import INK, paste, wrap_text
from mtedit_fast.rollout import RolloutConfig, rollout, turn_seeds

PLAYGROUND = "playground"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NEGATIVE_PROMPTS = {"qwen_image_edit": " ", "flux2_klein": ""}
"""As the families' pipelines have it; read where guidance is above 1."""

Turn = Callable[[Tensor, str, int, Tensor], Tensor]
"""Of images [B, 3, H, W], an instruction, the turn 0 … K−1 and its noise keys [B] -> images [B, 3, H, W]."""


def load_editor(
    model: str, *, lora: str | Path | None = None, dtype: str = "auto", device: str = "auto"
) -> tuple[Editor, dict[str, Any]]:
    """An editor of any family, and the defaults of its edits: "num_steps", "guidance_scale", "size" (None: any).

    Args:
        model: a diffusers pipeline's folder or hub name, or "playground".
        lora: merged into the weights: the folder that `save_lora` wrote, or a safetensors file.
        dtype: fp32, bf16, fp16; auto is bf16 on a GPU, fp32 elsewhere.
        device: auto takes a GPU.

    Raises:
        FileNotFoundError: `model` looks like a local folder and is not there, or there is no adapter at `lora`.
        ValueError: a pipeline of no family, an unknown dtype, an adapter of another model.
    """
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    name = ("bf16" if place.startswith("cuda") else "fp32") if dtype == "auto" else dtype
    if name not in DTYPES:
        raise ValueError(f"dtype: expected auto, {', '.join(DTYPES)}, got {dtype!r}")
    defaults: dict[str, Any] = {"num_steps": 28, "guidance_scale": 3.5, "size": None}
    if model == PLAYGROUND:
        from mtedit_fast.training.playground.models import GUIDANCE, load_pipeline
        from mtedit_fast.training.playground.world import SIZE

        pipeline: Any = load_pipeline(dtype=DTYPES[name])
        defaults = {"num_steps": 6, "guidance_scale": GUIDANCE, "size": (SIZE, SIZE)}
    else:
        pipeline = _pipeline(model, DTYPES[name])
    family = next((name for name, kind in EDITORS.items() if isinstance(pipeline, kind.pipelines)), None)
    if family is None:
        raise ValueError(
            f"model: expected a pipeline of {', '.join(EDITORS)}, got {type(pipeline).__name__} at {model}"
        )
    if lora is not None:
        from mtedit_fast.export.lora import merge_lora, read_lora

        merge_lora(pipeline.transformer, *read_lora(Path(lora).expanduser()))
    tokenizer = getattr(pipeline, "tokenizer_2", None) or pipeline.tokenizer
    options: dict[str, Any] = {"max_sequence_length": min(512, tokenizer.model_max_length)}
    if family in NEGATIVE_PROMPTS:
        options["negative_prompt"] = NEGATIVE_PROMPTS[family]
    return EDITORS[family](pipeline.to(place), **options), defaults


def _pipeline(model: str, dtype: torch.dtype) -> Any:
    from diffusers import DiffusionPipeline

    path = Path(model).expanduser()
    if not path.is_dir() and model.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"model: nothing at {model}; pass a pipeline's folder, a hub name such as "
            f'black-forest-labs/FLUX.1-Kontext-dev, or "{PLAYGROUND}"'
        )
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ValueError(
            f"model: expected a pipeline's folder with model_index.json, found none in {model}; an adapter "
            "goes to --lora"
        )
    return DiffusionPipeline.from_pretrained(path if path.is_dir() else model, dtype=dtype)


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
        if not encoding.ids or spans:
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
