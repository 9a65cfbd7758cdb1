"""A configuration's editor on the meta device: the shapes of a run, with nothing loaded and nothing allocated."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from mtedit_fast.editors import EDITORS
from mtedit_fast.editors.pipeline_editor import NEGATIVE
from mtedit_fast.training.adapters import Adapters
from mtedit_fast.training.config import TrainConfig, size_of
from mtedit_fast.training.dtypes import DTYPES, default_dtype
from mtedit_fast.training.public_models import FAMILIES, describe


def model_path(config: TrainConfig) -> str:
    """`model.path`, or the playground's pipeline."""
    if config.model.path is not None:
        return config.model.path
    from mtedit_fast.training.playground.models import WEIGHTS

    return str(WEIGHTS / "pipeline")


class MetaModel:
    """Transformer with LoRA and VAE of `config.model`, in the shapes of its data.

    Attributes:
        blocks: the transformer's.
        tokens, channels: of an image's latents; reference_tokens: of the reference's.

    Raises:
        ValueError: `model.path` is neither a folder nor a known hub name.
    """

    def __init__(self, config: TrainConfig) -> None:
        family, public = FAMILIES[config.model.family], describe(model_path(config))
        self.dtype = DTYPES[config.model.dtype]
        with torch.device("meta"), default_dtype(self.dtype):
            self.transformer = family.transformer.from_config(public.transformer)
            self.vae = family.vae.from_config(public.vae)
        pipeline = public.pipeline or family.pipeline
        arguments = dict.fromkeys(inspect.signature(pipeline).parameters)
        arguments |= {"transformer": self.transformer, "vae": self.vae, "scheduler": FlowMatchEulerDiscreteScheduler()}
        if "is_distilled" in arguments:
            arguments["is_distilled"] = public.is_distilled
        self.editor: Any = EDITORS[config.model.family](pipeline(**arguments))
        names = set(self.transformer._no_split_modules)
        self.blocks = [module for module in self.transformer.modules() if type(module).__name__ in names]
        lora = config.model.lora
        self.adapters = Adapters(
            self.transformer,
            rank=lora.rank,
            alpha=lora.alpha,
            target_modules=lora.target_modules or self.editor.lora_targets,
            seed=0,
        )
        if config.model.activation_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.size, self.guidance_scale = config.data.size, config.rollout.guidance_scale
        self.tokens, self.channels = self.editor.latent_shape(*self.size)
        resolution = config.rollout.reference_resolution
        self.reference_size = self.size if resolution is None else size_of(resolution)
        self.reference_tokens, _ = self.editor.latent_shape(*self.reference_size)
        self.text_tokens = config.rollout.max_sequence_length
        if self.editor.text_sees_image:
            self.text_tokens += self.editor.text_image_tokens(*self.size)
        self._text = family.text(self.text_tokens, self.transformer.config)
        if config.model.family != "kontext" and self.guidance_scale > 1 and not public.is_distilled:
            self._text |= {NEGATIVE + name: shape for name, shape in self._text.items()}

    def text(self, rows: int) -> dict[str, Tensor]:
        """Conditioning of `rows` prompts."""
        return {
            name: torch.empty(rows, *shape, device="meta", dtype=torch.bool if name.endswith("mask") else self.dtype)
            for name, shape in self._text.items()
        }

    def condition(self, rows: int) -> Any:
        height, width = self.size
        return self.editor.condition(
            torch.empty(rows, self.reference_tokens, self.channels, device="meta"),
            self.text(rows),
            height=height,
            width=width,
            guidance_scale=self.guidance_scale,
            reference_size=self.reference_size,
        )

    def velocity(self, rows: int, condition: Any = None) -> Tensor:
        """Of `rows` samples; condition: theirs, None for one made here."""
        latents = torch.empty(rows, self.tokens, self.channels, device="meta")
        return self.editor.velocity(latents, latents[:, 0, 0], condition or self.condition(rows))

    def encode(self, rows: int) -> Tensor:
        return self.editor.encode_image(torch.empty(rows, 3, *self.reference_size, device="meta"))

    def decode(self, rows: int) -> Tensor:
        return self.editor.decode(torch.empty(rows, self.tokens, self.channels, device="meta"), *self.size)
