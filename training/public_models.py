"""Sizes of public editors: the fields of their published config.json, so that memory is known before a download.

Transformers and VAEs are fields that differ from the defaults of diffusers' classes, text encoders their number of
parameters. Sources: transformer/config.json, vae/config.json and text_encoder*/ of each repository on the hub.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from safetensors import safe_open

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Family:
    """The classes of a model family, and the tensors of its text per prompt by name: (S, transformer's config)."""

    transformer: Any
    vae: Any
    pipeline: Any
    text: Callable[[int, Any], Shapes]


FAMILIES = {
    "kontext": Family(
        FluxTransformer2DModel,
        AutoencoderKL,
        FluxKontextPipeline,
        lambda length, config: {
            "prompt_embeds": (length, config.joint_attention_dim),
            "pooled": (config.pooled_projection_dim,),
        },
    ),
    "qwen_image_edit": Family(
        QwenImageTransformer2DModel,
        AutoencoderKLQwenImage,
        QwenImageEditPipeline,
        lambda length, config: {"embeds": (length, config.joint_attention_dim), "mask": (length,)},
    ),
    "flux2_klein": Family(
        Flux2Transformer2DModel,
        AutoencoderKLFlux2,
        Flux2KleinPipeline,
        lambda length, config: {"embeds": (length, config.joint_attention_dim)},
    ),
}


FAMILIES["flux2_klein_kv"] = replace(FAMILIES["flux2_klein"], pipeline=Flux2KleinKVPipeline)


@dataclass(frozen=True)
class PublicModel:
    """Fields of the transformer's and the VAE's configuration, parameters of the text encoders, the pipeline's class if
    it is not the family's first."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    text_parameters: int
    is_distilled: bool = False  # needs no second branch for guidance
    pipeline: Any = None


_FLUX_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_KLEIN_4B: dict[str, Any] = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
_KLEIN_9B: dict[str, Any] = {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
    "guidance_embeds": False,
}
# The encoder of T5-XXL and CLIP-L; Qwen2.5-VL-7B; Qwen3-4B (tied) and Qwen3-8B.
_T5_CLIP, _QWEN_VL = 4_762_310_656 + 123_060_480, 8_292_166_656
_QWEN3_4B, _QWEN3_8B = 4_022_468_096, 8_190_735_360

PUBLIC: dict[str, PublicModel] = {
    "black-forest-labs/FLUX.1-Kontext-dev": PublicModel({"guidance_embeds": True}, _FLUX_VAE, _T5_CLIP),
    "Qwen/Qwen-Image-Edit": PublicModel({}, {}, _QWEN_VL),
    "Qwen/Qwen-Image-Edit-2509": PublicModel({}, {}, _QWEN_VL, pipeline=QwenImageEditPlusPipeline),
    "Qwen/Qwen-Image-Edit-2511": PublicModel({"zero_cond_t": True}, {}, _QWEN_VL, pipeline=QwenImageEditPlusPipeline),
    "black-forest-labs/FLUX.2-klein-4B": PublicModel(_KLEIN_4B, {}, _QWEN3_4B, is_distilled=True),
    "black-forest-labs/FLUX.2-klein-9B": PublicModel(_KLEIN_9B, {}, _QWEN3_8B, is_distilled=True),
    "black-forest-labs/FLUX.2-klein-9b-kv": PublicModel(_KLEIN_9B, {}, _QWEN3_8B, is_distilled=True),
    "black-forest-labs/FLUX.2-klein-base-4B": PublicModel(_KLEIN_4B, {}, _QWEN3_4B),
    "black-forest-labs/FLUX.2-klein-base-9B": PublicModel(_KLEIN_9B, {}, _QWEN3_8B),
}


def describe(path: str | Path) -> PublicModel:
    """The model of a hub name above, or of a local folder in the public layout.

    Raises:
        ValueError: neither.
    """
    folder = Path(path).expanduser()
    if not (folder / "transformer" / "config.json").is_file():
        if str(path) in PUBLIC:
            return PUBLIC[str(path)]
        raise ValueError(
            f"model.path: expected a folder with transformer/config.json, or one of {', '.join(PUBLIC)}; got {path}"
        )
    transformer, vae, index = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("transformer/config.json", "vae/config.json", "model_index.json")
    )
    return PublicModel(
        transformer,
        vae,
        _parameters(folder.glob("text_encoder*/*.safetensors")),
        bool(index.get("is_distilled")),
        getattr(diffusers, index["_class_name"], None),
    )


def _parameters(files: Any) -> int:
    """Elements in safetensors files, from their headers."""
    count = 0
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return count
