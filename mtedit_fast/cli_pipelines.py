"""What the commands load editors from: a training configuration, a pipeline, the playground, a DINO."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mtedit_fast.editors import EDITORS, Editor
from mtedit_fast.export.editors import editor_modules, family_of
from mtedit_fast.export.lora import lora_inputs, merge_lora, read_lora
from mtedit_fast.export.modules import Exportable, dino
from mtedit_fast.training.config_file import load_config
from mtedit_fast.training.playground.models import GUIDANCE, load_pipeline
from mtedit_fast.training.playground.world import SIZE

PLAYGROUND = "playground"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NEGATIVE_PROMPTS = {"qwen_image_edit": " ", "flux2_klein": ""}
"""Of guidance above 1, as the families' pipelines have it; a distilled Klein has none and ignores it."""
EXPECTED = {
    "model": "a pipeline's folder, a hub name such as black-forest-labs/FLUX.1-Kontext-dev, or "
    f'"{PLAYGROUND}"; an adapter goes to --lora',
    "source": "a training configuration (.yaml), a pipeline's folder or hub name, or a folder with a DINO",
}
"""By the argument's name."""


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
        pipeline: Any = load_pipeline(dtype=DTYPES[name])
        defaults = {"num_steps": 6, "guidance_scale": GUIDANCE, "size": (SIZE, SIZE)}
    else:
        pipeline = _pipeline("model", model, DTYPES[name])
    family = next((name for name, kind in EDITORS.items() if isinstance(pipeline, kind.pipelines)), None)
    if family is None:
        raise ValueError(
            f"model: expected a pipeline of {', '.join(EDITORS)}, got {type(pipeline).__name__} at {model}"
        )
    if lora is not None:
        merge_lora(pipeline.transformer, *read_lora(Path(lora).expanduser()))
    tokenizer = getattr(pipeline, "tokenizer_2", None) or pipeline.tokenizer
    options: dict[str, Any] = {"max_sequence_length": min(512, tokenizer.model_max_length)}
    if family in NEGATIVE_PROMPTS:
        options["negative_prompt"] = NEGATIVE_PROMPTS[family]
    return EDITORS[family](pipeline.to(place), **options), defaults


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
        pipeline, trained = _pipeline("source", source, kind), None
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
    config = load_config(path, [])
    trained = Path(config.run.output_dir) / "lora"
    if config.model.path is None:
        pipeline: Any = load_pipeline(dtype=dtype)
    else:
        pipeline = _pipeline("source", str(config.model.path), dtype)
    return pipeline, trained if trained.is_dir() else None, config.rollout.max_sequence_length


def _pipeline(argument: str, source: str, dtype: torch.dtype) -> Any:
    """The pipeline in a folder or behind a hub name; errors name the argument."""
    from diffusers import DiffusionPipeline

    path = Path(source).expanduser()
    if not path.is_dir() and source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{argument}: nothing at {source}; expected {EXPECTED[argument]}")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ValueError(f"{argument}: no model_index.json in {source}; expected {EXPECTED[argument]}")
    return DiffusionPipeline.from_pretrained(path if path.is_dir() else source, dtype=dtype)


def _backbone(path: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModel

    kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind not in ("dinov2", "dinov2_with_registers", "dinov3_vit"):
        raise ValueError(f"source: expected a pipeline or a DINO (dinov2, dinov3_vit), got {kind!r} in {path}")
    return AutoModel.from_pretrained(path, dtype=dtype).eval()
