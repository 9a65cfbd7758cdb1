"""FLUX.2-Klein behind the Editor interface."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from mtedit_fast.editors.base import TextConditioning
from mtedit_fast.editors.pipeline_editor import NEGATIVE, PipelineEditor


class KleinEditor(PipelineEditor):
    """Adapter for `Flux2KleinPipeline` (4B, 9B and their bases): the same numbers as the stock pipeline.

    Distilled checkpoints need no guidance and, as in the pipeline, ignore its scale; the bases take a
    `negative_prompt`, the pipeline's being "".
    """

    pipelines = (Flux2KleinPipeline,)
    example = "black-forest-labs/FLUX.2-klein-4B"
    # Every linear layer of a block; modulations, shared by all blocks, and embedders stay as they are.
    lora_targets = (
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.linear_(in|out))"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    )

    def __init__(self, pipeline: Any, *, max_sequence_length: int = 512, negative_prompt: str | None = None):
        super().__init__(pipeline, max_sequence_length=max_sequence_length, negative_prompt=negative_prompt)
        self._ids: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> TextConditioning:
        """`embeds` [P, S, D] of Qwen3's layers 9, 18 and 27, padded to S tokens that all count, as in the pipeline."""
        text = {"embeds": self._encode(prompts)}
        if self.negative_prompt is not None:
            negative = self._encode([self.negative_prompt])
            text[NEGATIVE + "embeds"] = negative.expand(len(prompts), -1, -1)
        return text

    def _encode(self, prompts: list[str]) -> Tensor:
        length = self.max_sequence_length
        embeds = self.pipeline.encode_prompt(prompts, device=self.device, max_sequence_length=length)[0]
        return embeds.to(self.dtype)

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] to packed latents [B, N, C] by the VAE's mode, normalised as in the pipeline."""
        pixels = (2 * images - 1).to(device=self.vae.device, dtype=self.vae.dtype)
        return self.pipeline._pack_latents(self.pipeline._encode_vae_image(pixels, generator=None))

    @torch.no_grad()
    def decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Packed latents [B, N, C] to images [B, 3, H, W] fp32 in [0, 1]."""
        sides = (height // self._multiple, width // self._multiple)
        grid = latents.to(self.vae.dtype).transpose(1, 2).unflatten(2, sides)
        norm = self.vae.bn
        std = (norm.running_var + self.vae.config.batch_norm_eps).sqrt().to(grid.dtype)
        grid = grid * std.view(1, -1, 1, 1) + norm.running_mean.to(grid.dtype).view(1, -1, 1, 1)
        image = self.vae.decode(self.pipeline._unpatchify_latents(grid), return_dict=False)[0]
        return (image.float() / 2 + 0.5).clamp(0, 1)

    def _shift(self, tokens: int, num_steps: int) -> float:
        return compute_empirical_mu(tokens, num_steps)

    def velocity(
        self,
        latents: Tensor,
        timestep: Tensor,
        references: Tensor,
        text: TextConditioning,
        *,
        height: int,
        width: int,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """Both branches in one forward where guidance_scale > 1 and the checkpoint is not distilled.

        Raises:
            ValueError: guidance is asked of a base checkpoint and the text has no negative branch.
        """
        batch, tokens, _ = latents.shape
        text, branches = self._branches(text, 1.0 if self.pipeline.config.is_distilled else guidance_scale)
        prediction = self.transformer(
            hidden_states=torch.cat([latents.to(self.dtype), references.to(self.dtype)], dim=1).repeat(branches, 1, 1),
            timestep=self._timestep(timestep, batch, branches),
            guidance=None,
            encoder_hidden_states=text["embeds"],
            txt_ids=self._text_ids(text["embeds"].shape[1]),
            img_ids=self._image_ids(height, width),
            return_dict=False,
        )[0][:, :tokens]
        if branches == 1:
            return prediction
        conditional, negative = prediction.chunk(2)
        return negative + guidance_scale * (conditional - negative)

    def _text_ids(self, length: int) -> Tensor:
        """Positions (T, H, W, L) of the text, [S, 4]: its place in L."""
        key = (length,)
        if key not in self._ids:
            self._ids[key] = _positions(0, 1, 1, length).to(self.device)
        return self._ids[key]

    def _image_ids(self, height: int, width: int) -> Tensor:
        """Positions (T, H, W, L) of [noise, reference] tokens, [2N, 4]; the reference's T is 10."""
        key = (height, width)
        if key not in self._ids:
            sides = (height // self._multiple, width // self._multiple)
            self._ids[key] = torch.cat([_positions(0, *sides, 1), _positions(10, *sides, 1)]).to(self.device)
        return self._ids[key]


def _positions(time: int, height: int, width: int, layers: int) -> Tensor:
    return torch.cartesian_prod(torch.tensor([time]), *(torch.arange(size) for size in (height, width, layers)))
