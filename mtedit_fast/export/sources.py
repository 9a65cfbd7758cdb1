"""What there is to export behind a path: a training configuration, a pipeline, a DINO."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mtedit_fast.editors import EDITORS

from .editors import editor_modules, family_of
from .lora import lora_inputs, merge_lora, read_lora
from .modules import Exportable, dino

NEGATIVE_PROMPTS = {"qwen_image_edit": " ", "flux2_klein": ""}
"""Of guidance, as the families' pipelines have it; a distilled Klein has none and ignores it."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Source:
    """Modules to export, and the pipeline they are of, if any.

    merged: the adapter that is in the weights now, or None. options: of the editor.
    """

    modules: dict[str, Exportable]
    pipeline: Any = None
    merged: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)


def load_source(
    source: str,
    *,
    dtype: str,
    lora: str = "auto",
    lora_rank: int | None = None,
    max_sequence_length: int | None = None,
) -> Source:
    """Load what is to be exported.

    Args:
        source: a training configuration (.yaml), a pipeline's folder or hub name, or a folder with a DINO.
        dtype: fp32, bf16 or fp16.
        lora: "auto" merges the adapter that a configuration's run has left in OUTPUT_DIR/lora, "none" nothing, a path
            that adapter.
        lora_rank: make adapters inputs instead; nothing is merged.
        max_sequence_length: text tokens per prompt; default: the configuration's, else 512.

    Raises:
        ValueError: an unknown dtype, both lora and lora_rank, or a folder of something else.
        FileNotFoundError: there is nothing at `source`, or no adapter at `lora`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if lora_rank is not None and lora not in ("auto", "none"):
        raise ValueError("lora, lora_rank: expected one of them; an adapter is merged, or an input given at run time")
    kind, path = DTYPES[dtype], Path(source).expanduser()
    if path.suffix in (".yaml", ".yml"):
        pipeline, trained, length = _configured(path, kind)
        options: dict[str, Any] = {"max_sequence_length": max_sequence_length or length}
    elif (path / "config.json").is_file():
        return Source({"dino": dino(_backbone(path, kind))})
    else:
        pipeline, trained = _pipeline(source, path, kind), None
        options = {"max_sequence_length": max_sequence_length or 512}
    merged = None
    if lora_rank is None and lora != "none":
        merged = trained if lora == "auto" else Path(lora).expanduser()
    if merged is not None:
        merge_lora(pipeline.transformer, *read_lora(merged))
    family, modules = family_of(pipeline), editor_modules(pipeline, **options)
    if family in NEGATIVE_PROMPTS:
        options["negative_prompt"] = NEGATIVE_PROMPTS[family]
    if lora_rank is not None:
        targets = EDITORS[family].lora_targets
        modules["transformer"] = lora_inputs(modules["transformer"], rank=lora_rank, targets=targets)
    return Source(modules, pipeline, merged, options)


def _configured(path: Path, dtype: torch.dtype) -> tuple[Any, Path | None, int]:
    """Pipeline, trained adapter and text length of a training configuration."""
    from mtedit_fast.training.config_file import load_config
    from mtedit_fast.training.playground.models import load_pipeline

    config = load_config(path, [])
    trained = Path(config.run.output_dir) / "lora"
    if config.model.path is None:
        pipeline: Any = load_pipeline(dtype=dtype)
    else:
        pipeline = _pipeline(str(config.model.path), Path(config.model.path).expanduser(), dtype)
    return pipeline, trained if trained.is_dir() else None, config.rollout.max_sequence_length


def _pipeline(source: str, path: Path, dtype: torch.dtype) -> Any:
    from diffusers import DiffusionPipeline

    if not path.is_dir() and source.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"source: nothing at {source}; pass a training configuration (.yaml), a pipeline's folder or hub name, or "
            "a DINO's folder"
        )
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ValueError(
            f"source: expected model_index.json (a pipeline) or config.json (a DINO) in {source}, found neither"
        )
    return DiffusionPipeline.from_pretrained(path if path.is_dir() else source, dtype=dtype)


def _backbone(path: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModel

    kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind not in ("dinov2", "dinov2_with_registers", "dinov3_vit"):
        raise ValueError(f"source: expected a pipeline or a DINO (dinov2, dinov3_vit), got {kind!r} in {path}")
    return AutoModel.from_pretrained(path, dtype=dtype).eval()
