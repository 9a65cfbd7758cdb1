"""FLUX.1-Kontext behind the Editor interface."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import FluxKontextPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift
from diffusers.training_utils import _collate_lora_metadata
from peft import get_peft_model_state_dict
from torch import Tensor

from mtedit_fast.editors.base import Schedule, TextConditioning


class KontextEditor:
    """Adapter for `FluxKontextPipeline`: the same numbers as the stock pipeline, each shared part computed once.

    Args:
        pipeline: a loaded `FluxKontextPipeline`; its transformer is used in place, so LoRA adapters added to it count.
        max_sequence_length: T5 tokens per prompt, as in the pipeline's call.
    """

    def __init__(self, pipeline: FluxKontextPipeline, *, max_sequence_length: int = 512):
        self.pipeline = pipeline
        self.transformer = pipeline.transformer  # may be replaced by a wrapped (DDP, compiled) module: same call
        self.config = pipeline.transformer.config
        self.vae = pipeline.vae
        self.max_sequence_length = max_sequence_length
        for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
            if module is not None:
                module.requires_grad_(False).eval()
        self.vae.to(memory_format=torch.channels_last)  # convolutions are faster so, on CPU and GPU
        self._guidance: dict[float, Tensor] = {}
        self._ids: dict[tuple[int, int], Tensor] = {}
        self._txt_ids: dict[int, Tensor] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        max_sequence_length: int = 512,
    ) -> KontextEditor:
        """Load a checkpoint in the public layout (`black-forest-labs/FLUX.1-Kontext-dev` or a local folder).

        Raises:
            FileNotFoundError: `path` looks like a local folder and is not there.
        """
        if str(path).startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
            raise FileNotFoundError(
                f"model path: expected a pipeline folder with model_index.json, found nothing at {path}; "
                "pass a local folder or a hub name such as black-forest-labs/FLUX.1-Kontext-dev"
            )
        local = Path(path).expanduser()
        pipeline = FluxKontextPipeline.from_pretrained(local if local.exists() else path, dtype=dtype)
        return cls(pipeline.to(device), max_sequence_length=max_sequence_length)

    @property
    def device(self) -> torch.device:
        return self.pipeline.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pipeline.transformer.dtype

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> TextConditioning:
        """`prompt_embeds` [P, S, D] and `pooled` [P, D'] by the pipeline's own tokenizers and encoders."""
        prompt_embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts, prompt_2=None, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": prompt_embeds.to(self.dtype), "pooled": pooled.to(self.dtype)}

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] to packed latents [B, N, C] by the VAE's mode, as the pipeline does."""
        pixels = (2 * images - 1).to(device=self.vae.device, dtype=self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.mode()
        latents = (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor
        batch, channels, height, width = latents.shape
        return self.pipeline._pack_latents(latents, batch, channels, height, width)

    @torch.no_grad()
    def decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Packed latents [B, N, C] to images [B, 3, H, W] fp32 in [0, 1]."""
        grid = self.pipeline._unpack_latents(latents.to(self.vae.dtype), height, width, self.pipeline.vae_scale_factor)
        grid = grid / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return (self.vae.decode(grid, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        multiple = self.pipeline.vae_scale_factor * 2
        if height <= 0 or width <= 0 or height % multiple or width % multiple:
            raise ValueError(
                f"height, width: expected positive multiples of {multiple} (VAE factor × 2×2 packing), "
                f"got {height}×{width}; resize the images first"
            )
        return (height // multiple) * (width // multiple), self.config.in_channels

    def schedule(self, num_steps: int, height: int, width: int) -> Schedule:
        """σ from linspace(1, 1/T, T) with the checkpoint's own (dynamic) shift, exactly the pipeline's."""
        scheduler = self.pipeline.scheduler.__class__.from_config(self.pipeline.scheduler.config)
        config = scheduler.config
        mu = calculate_shift(
            self.latent_shape(height, width)[0],
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
        return Schedule(scheduler.sigmas.float().to(self.device), scheduler.timesteps.float().to(self.device))

    def velocity(
        self,
        latents: Tensor,
        timestep: Tensor,
        references: Tensor,
        text: TextConditioning,
        *,
        height: int,
        width: int,
        guidance_scale: float = 3.5,
    ) -> Tensor:
        batch, tokens, _ = latents.shape
        guidance = None
        if self.config.guidance_embeds:
            guidance = self._guidance_scale(guidance_scale).expand(batch)
        prediction = self.transformer(
            hidden_states=torch.cat([latents.to(self.dtype), references.to(self.dtype)], dim=1),
            timestep=timestep.expand(batch).to(self.dtype) / 1000,
            guidance=guidance,
            pooled_projections=text["pooled"],
            encoder_hidden_states=text["prompt_embeds"],
            txt_ids=self._text_ids(text["prompt_embeds"].shape[1]),
            img_ids=self._image_ids(height, width),
            return_dict=False,
        )[0]
        return prediction[:, :tokens]

    def save_lora(self, directory: str | Path) -> None:
        """Write `pytorch_lora_weights.safetensors`, rank and alpha in its metadata, for `pipe.load_lora_weights`."""
        transformer = self.pipeline.transformer
        FluxKontextPipeline.save_lora_weights(
            directory,
            transformer_lora_layers=get_peft_model_state_dict(transformer),
            **_collate_lora_metadata({"transformer": transformer}),
        )

    def _guidance_scale(self, scale: float) -> Tensor:
        if scale not in self._guidance:
            self._guidance[scale] = torch.full((1,), scale, device=self.device, dtype=torch.float32)
        return self._guidance[scale]

    def _text_ids(self, length: int) -> Tensor:
        if length not in self._txt_ids:
            self._txt_ids[length] = torch.zeros(length, 3, device=self.device, dtype=self.dtype)
        return self._txt_ids[length]

    def _image_ids(self, height: int, width: int) -> Tensor:
        """Position ids of [noise, reference] tokens, [2N, 3]; the reference's first coordinate is 1."""
        if (height, width) not in self._ids:
            multiple = self.pipeline.vae_scale_factor * 2
            noise = self.pipeline._prepare_latent_image_ids(
                1, height // multiple, width // multiple, self.device, self.dtype
            )
            reference = noise.clone()
            reference[..., 0] = 1
            self._ids[height, width] = torch.cat([noise, reference])
        return self._ids[height, width]
