"""FLUX.1-Kontext behind the Editor interface."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxKontextPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift
from torch import Tensor

from mtedit_fast.editors.base import Condition, TextConditioning
from mtedit_fast.editors.pipeline_editor import PipelineEditor


class KontextEditor(PipelineEditor):
    """Adapter for `FluxKontextPipeline`: the same numbers as the stock pipeline, each shared part computed once.

    Guidance is embedded (distilled), so there is no negative prompt.

    Args:
        pipeline: a loaded `FluxKontextPipeline`; its transformer is used in place, so LoRA adapters added to it count.
        max_sequence_length: T5 tokens per prompt, as in the pipeline's call.
    """

    pipelines = (FluxKontextPipeline,)
    example = "black-forest-labs/FLUX.1-Kontext-dev"
    # Every linear layer of a block; the embedders and the final projection stay as they are.
    lora_targets = (
        r"(transformer_blocks|single_transformer_blocks)\.\d+\."
        r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
    )

    def __init__(self, pipeline: Any, *, max_sequence_length: int = 512):
        super().__init__(pipeline, max_sequence_length=max_sequence_length)
        self._ids: dict[tuple[Any, ...], Tensor] = {}
        self._txt_ids: dict[tuple[Any, ...], Tensor] = {}

    @torch.no_grad()
    def encode_text(self, prompts: list[str], images: Tensor | None = None) -> TextConditioning:
        """`prompt_embeds` [P, S, D] and `pooled` [P, D'] by the pipeline's own tokenizers and encoders."""
        prompt_embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts, prompt_2=None, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": prompt_embeds.to(self.dtype), "pooled": pooled.to(self.dtype)}

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """[B, 3, h, w] in [0, 1] to packed latents [B, M, C] by the VAE's mode, as the pipeline does."""
        images, _ = self._references(images)
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

    def _shift(self, tokens: int, num_steps: int) -> float:
        config = self.pipeline.scheduler.config
        return calculate_shift(
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )

    def condition(
        self,
        references: Tensor,
        text: TextConditioning,
        *,
        height: int,
        width: int,
        guidance_scale: float = 3.5,
        reference_size: tuple[int, int] | None = None,
    ) -> Condition:
        """One reference per edit, at any resolution."""
        sizes = ((height, width), reference_size or (height, width))
        self._reference_count(references, *sizes[1])
        guidance = None
        if self.config.guidance_embeds:
            guidance = torch.full((len(references),), guidance_scale, device=self.device, dtype=torch.float32)
        inputs = {
            "guidance": guidance,
            "pooled_projections": text["pooled"],
            "encoder_hidden_states": text["prompt_embeds"],
            "txt_ids": self._text_ids(text["prompt_embeds"].shape[1]),
            "img_ids": self._image_ids(*sizes[0], *sizes[1]),
        }
        return Condition(references.to(self.dtype), inputs)

    def velocity(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        batch, tokens, _ = latents.shape
        prediction = self.transformer(
            hidden_states=self._sequence(latents, condition),
            timestep=self._timestep(timestep, batch, 1),
            return_dict=False,
            **condition.inputs,
        )[0]
        return prediction[:, :tokens]

    def _text_ids(self, length: int) -> Tensor:
        key = (self.device, length)
        if key not in self._txt_ids:
            self._txt_ids[key] = torch.zeros(length, 3, device=self.device, dtype=self.dtype)
        return self._txt_ids[key]

    def _image_ids(self, height: int, width: int, reference_height: int, reference_width: int) -> Tensor:
        """Position ids of [noise, reference] tokens, [N + M, 3]; the reference's first coordinate is 1."""
        sides = ((height, width), (reference_height, reference_width))
        key = (self.device, *sides)
        if key not in self._ids:
            noise, reference = (
                self.pipeline._prepare_latent_image_ids(
                    1, side[0] // self._multiple, side[1] // self._multiple, self.device, self.dtype
                )
                for side in sides
            )
            reference[..., 0] = 1
            self._ids[key] = torch.cat([noise, reference])
        return self._ids[key]
