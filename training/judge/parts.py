"""A judge as files: loaded for training or evaluation, written for `HuggingFaceJudge.from_pretrained` and servers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mtedit_fast.judge.prompts import JudgePrompt
from mtedit_fast.qwen_vl import ImageSpec
from mtedit_fast.training.dtypes import DTYPES
from mtedit_fast.training.judge.config import ModelConfig

PROMPT = "judge.json"
PROCESSOR = ("preprocessor_config.json", "video_preprocessor_config.json")


class Parts(NamedTuple):
    model: Any
    tokenizer: Any
    images: ImageSpec


def load_parts(config: ModelConfig, device: torch.device | str = "cpu") -> Parts:
    """What `JudgeTrainer` takes. Weights that will be trained whole are loaded in fp32; `path: null` is the
    playground's judge."""
    dtype = DTYPES[config.dtype] if config.lora is not None else torch.float32
    if config.path is None:
        from mtedit_fast.training.playground.judge_model import IMAGES, load_judge_parts

        model, tokenizer = load_judge_parts(dtype=dtype)
        return Parts(model.to(device), tokenizer, IMAGES)
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model = AutoModelForImageTextToText.from_pretrained(config.path, dtype=dtype, attn_implementation=config.attention)
    tokenizer = AutoTokenizer.from_pretrained(config.path)
    return Parts(model.to(device).eval(), tokenizer, ImageSpec.from_pretrained(config.path))


def save_judge(folder: Path, parts: Parts, prompt: JudgePrompt, source: str | None = None) -> Path:
    """Write weights, tokenizer, image processor and prompt.

    source: the folder or hub id the model came from, whose processor files are copied; None writes them anew.
    """
    parts.model.save_pretrained(str(folder))
    parts.tokenizer.save_pretrained(str(folder))
    for name in PROCESSOR:
        original = None if source is None else _file(source, name)
        if original is not None:
            shutil.copyfile(original, folder / name)
    if not (folder / PROCESSOR[0]).exists():
        (folder / PROCESSOR[0]).write_text(json.dumps(_processor(parts.images), indent=2) + "\n")
    fields = {"scale": prompt.scale, "thinking": prompt.thinking, "rubric": prompt.rubric}
    (folder / PROMPT).write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


def load_prompt(path: str) -> JudgePrompt | None:
    """The prompt that a judge in a folder was trained with, or None."""
    file = Path(path) / PROMPT
    if not file.is_file():
        return None
    try:
        return JudgePrompt(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: expected scale, thinking and rubric: {error}") from None


def _file(source: str, name: str) -> str | None:
    from transformers.utils import cached_file

    return cached_file(source, name, _raise_exceptions_for_missing_entries=False)


def _processor(images: ImageSpec) -> dict[str, Any]:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": images.patch_size,
        "temporal_patch_size": images.temporal_patch_size,
        "merge_size": images.merge_size,
        "size": {"shortest_edge": images.min_pixels, "longest_edge": images.max_pixels},
        "image_mean": list(images.mean),
        "image_std": list(images.std),
    }
