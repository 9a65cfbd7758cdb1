"""What editors around a diffusers pipeline have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from mtedit_fast.editors.base import Condition, Schedule, TextConditioning

NEGATIVE = "negative_"


class PipelineEditor:
    """A pipeline whose transformer, VAE and text encoder are frozen; LoRA adapters added to the transformer train.

    With a `negative_prompt` the conditioning has a second branch, its tensors named `negative_…`, and `velocity` runs
    both branches in one forward when guidance_scale > 1.

    Args:
        pipeline: loaded; its transformer is used in place.
        max_sequence_length: text tokens per prompt, to which every prompt is padded.
        negative_prompt: of classifier-free guidance; None: guidance_scale must be 1.
    """

    pipelines: ClassVar[tuple[type[DiffusionPipeline], ...]]
    example: ClassVar[str]
    """A checkpoint on the hub."""
    text_sees_image: bool = False
    max_references: int = 1

    def __init__(self, pipeline: Any, *, max_sequence_length: int = 512, negative_prompt: str | None = None):
        if not isinstance(pipeline, self.pipelines):
            raise TypeError(
                f"pipeline: expected {' or '.join(kind.__name__ for kind in self.pipelines)}, got "
                f"{type(pipeline).__name__}; choose the editor family that the checkpoint is of"
            )
        self.pipeline = pipeline
        self.transformer: nn.Module = pipeline.transformer  # may be replaced by a wrapped (compiled) module: same call
        self.config = pipeline.transformer.config
        self.vae = pipeline.vae
        if all(parameter.ndim < 5 for parameter in self.vae.parameters()):  # not Qwen's, which is for video
            self.vae.to(memory_format=torch.channels_last)  # convolutions are faster so, on CPU and GPU
        self.max_sequence_length, self.negative_prompt = max_sequence_length, negative_prompt
        for module in pipeline.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> Self:
        """Load a checkpoint in the public layout, by hub name or local folder; options as the constructor's.

        Raises:
            FileNotFoundError: `path` looks like a local folder and is not there.
            TypeError: the checkpoint is of another family.
        """
        local = Path(path).expanduser()
        if str(path).startswith((".", "/", "~")) and not local.is_dir():
            raise FileNotFoundError(
                f"model path: expected a pipeline folder with model_index.json, found nothing at {path}; "
                f"pass a local folder or a hub name such as {cls.example}"
            )
        pipeline: Any = DiffusionPipeline.from_pretrained(local if local.exists() else path, dtype=dtype)
        return cls(pipeline.to(device), **options)

    def to(self, device: torch.device | str) -> Self:
        """Every model of it, in place."""
        self.pipeline.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.pipeline.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pipeline.transformer.dtype

    @property
    def _multiple(self) -> int:
        return self.pipeline.vae_scale_factor * 2

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        multiple = self._multiple
        if height <= 0 or width <= 0 or height % multiple or width % multiple:
            raise ValueError(
                f"height, width: expected positive multiples of {multiple} (VAE factor × 2×2 packing), "
                f"got {height}×{width}; resize the images first"
            )
        return (height // multiple) * (width // multiple), self.config.in_channels

    def _references(self, images: Tensor) -> tuple[Tensor, int]:
        """[B, 3, h, w] or [B, R, 3, h, w] as [B·R, 3, h, w], and R."""
        count = images.shape[1] if images.ndim == 5 else 1
        if images.ndim not in (4, 5) or images.shape[-3] != 3:
            raise ValueError(
                f"images: expected [B, 3, H, W], or [B, R, 3, H, W] for R references, got {list(images.shape)}"
            )
        if not 1 <= count <= self.max_references:
            raise ValueError(
                f"images: {type(self).__name__} takes 1 to {self.max_references} references per edit, got {count}"
            )
        self.latent_shape(*images.shape[-2:])
        return images.reshape(-1, *images.shape[-3:]), count

    def _reference_count(self, references: Tensor, height: int, width: int) -> int:
        """How many references of height × width pixels the latents [n, R·M, C] are."""
        tokens, channels = self.latent_shape(height, width)
        count, rest = divmod(references.shape[1], tokens)
        if rest or references.shape[2] != channels:
            raise ValueError(
                f"references: expected latents [n, R·{tokens}, {channels}] of images of {height}×{width} pixels, got "
                f"{list(references.shape)}; say reference_size where it is not the edit's, and bring all references of "
                "a batch to one size"
            )
        if not 1 <= count <= self.max_references:
            raise ValueError(
                f"references: {type(self).__name__} takes 1 to {self.max_references} per edit, got {count}"
            )
        return count

    def schedule(self, num_steps: int, height: int, width: int) -> Schedule:
        """σ from linspace(1, 1/T, T) with the family's own shift of it, exactly the pipeline's."""
        scheduler = self.pipeline.scheduler.__class__.from_config(self.pipeline.scheduler.config)
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
        scheduler.set_timesteps(sigmas=sigmas, mu=self._shift(self.latent_shape(height, width)[0], num_steps))
        return Schedule(scheduler.sigmas.float().to(self.device), scheduler.timesteps.float().to(self.device))

    def _shift(self, tokens: int, num_steps: int) -> float:
        """μ of the dynamic shift for N latent tokens."""
        raise NotImplementedError

    def invalidate(self) -> None:
        """Nothing here outlives a change of the weights."""

    def backward_references(self) -> None:
        """Nothing: gradients reach the weights through each condition itself."""

    def save_lora(self, directory: str | Path) -> None:
        """Write `pytorch_lora_weights.safetensors`, rank and alpha in its metadata, for `pipe.load_lora_weights`."""
        transformer = self.pipeline.transformer
        type(self.pipeline).save_lora_weights(
            directory,
            transformer_lora_layers=get_peft_model_state_dict(transformer),
            **_collate_lora_metadata({"transformer": transformer}),
        )

    def _branches(self, text: TextConditioning, guidance_scale: float) -> tuple[TextConditioning, int]:
        """The text of a forward and the number of its branches: [conditional, negative] rows with guidance."""
        positive = {name: value for name, value in text.items() if not name.startswith(NEGATIVE)}
        if guidance_scale <= 1:
            return positive, 1
        if len(text) == len(positive):
            raise ValueError(
                f"guidance_scale: expected 1 without a negative prompt, got {guidance_scale}; build the editor with "
                'negative_prompt=" " and encode the text with it'
            )
        return {name: torch.cat([value, text[NEGATIVE + name]]) for name, value in positive.items()}, 2

    def _sequence(self, latents: Tensor, condition: Condition) -> Tensor:
        """[n · branches, N + M, C] in the transformer's dtype: the state of every branch, then its references."""
        states = latents.to(self.dtype)
        if condition.branches > 1:
            states = states.repeat(condition.branches, 1, 1)
        return states if condition.references is None else torch.cat([states, condition.references], dim=1)

    def _timestep(self, timestep: Tensor, batch: int, branches: int) -> Tensor:
        """[batch · branches] in the transformer's dtype, over 1000, as the pipelines hand it over."""
        return timestep.expand(batch).to(self.dtype).repeat(branches) / 1000
