"""FLUX.2-Klein behind the Editor interface."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor, nn

from mtedit_fast.editors.base import Condition, TextConditioning
from mtedit_fast.editors.pipeline_editor import NEGATIVE, PipelineEditor

TEXT_LAYERS = (9, 18, 27)
"""Layers of Qwen3, counted from 1, whose outputs are the text's features."""


class KleinEditor(PipelineEditor):
    """Adapter for `Flux2KleinPipeline` (4B, 9B and their bases): the same numbers as the stock pipeline.

    Images are taken at the size they have; the pipeline brings those above 1024² pixels to that area first. Of the text
    encoder only the layers up to the last one used run, without its head. Distilled checkpoints need no guidance and,
    as in the pipeline, ignore its scale; the bases take a `negative_prompt`, the pipeline's being "".
    """

    pipelines = (Flux2KleinPipeline,)
    example = "black-forest-labs/FLUX.2-klein-4B"
    max_references = 4  # Black Forest Labs' editing guide
    # Every linear layer of a block; modulations, shared by all blocks, and embedders stay as they are.
    lora_targets = (
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.linear_(in|out))"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    )

    def __init__(self, pipeline: Any, *, max_sequence_length: int = 512, negative_prompt: str | None = None):
        super().__init__(pipeline, max_sequence_length=max_sequence_length, negative_prompt=negative_prompt)
        self._distilled = pipeline.config.get("is_distilled", True)  # Klein-KV always is, and does not record it
        if self._distilled:
            self.negative_prompt = None
        self._negative: Tensor | None = None
        self._ids: dict[tuple[Any, ...], Tensor] = {}

    @torch.no_grad()
    def encode_text(self, prompts: list[str], images: Tensor | None = None) -> TextConditioning:
        """`embeds` [P, S, D] of Qwen3's layers 9, 18 and 27, padded to S tokens that all count, as in the pipeline.

        Equal prompts go through the encoder once.
        """
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        rows = torch.tensor([distinct[prompt] for prompt in prompts], device=self.device)
        text = {"embeds": self._encode(list(distinct)).index_select(0, rows)}
        if self.negative_prompt is not None:
            if self._negative is None:
                self._negative = self._encode([self.negative_prompt])
            self._negative = self._negative.to(self.device)
            text[NEGATIVE + "embeds"] = self._negative.expand(len(prompts), -1, -1)
        return text

    def _encode(self, prompts: list[str]) -> Tensor:
        embeds = self.pipeline._get_qwen3_prompt_embeds(
            text_encoder=_FirstLayers(self.pipeline.text_encoder),
            tokenizer=self.pipeline.tokenizer,
            prompt=prompts,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
            hidden_states_layers=TEXT_LAYERS,
        )
        return embeds.to(self.dtype)

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """[B, 3, h, w] or [B, R, 3, h, w] in [0, 1] to packed latents [B, R·M, C] by the VAE's mode, normalised.

        Raises:
            ValueError: more references than `max_references`, or sides that the VAE and the packing do not divide.
        """
        images, count = self._references(images)
        pixels = (2 * images - 1).to(device=self.vae.device, dtype=self.vae.dtype)
        latents = self.pipeline._pack_latents(self.pipeline._encode_vae_image(pixels, generator=None))
        return latents.reshape(-1, count * latents.shape[1], latents.shape[2])

    @torch.no_grad()
    def decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Packed latents [B, N, C] to images [B, 3, H, W] fp32 in [0, 1]."""
        grid = latents.to(self.vae.dtype).transpose(1, 2).unflatten(2, self._sides((height, width)))
        norm = self.vae.bn
        std = (norm.running_var + self.vae.config.batch_norm_eps).sqrt().to(grid.dtype)
        grid = grid * std.view(1, -1, 1, 1) + norm.running_mean.to(grid.dtype).view(1, -1, 1, 1)
        image = self.vae.decode(self.pipeline._unpatchify_latents(grid), return_dict=False)[0]
        return (image.float() / 2 + 0.5).clamp(0, 1)

    def _shift(self, tokens: int, num_steps: int) -> float:
        return compute_empirical_mu(tokens, num_steps)

    def condition(
        self,
        references: Tensor,
        text: TextConditioning,
        *,
        height: int,
        width: int,
        guidance_scale: float = 1.0,
        reference_size: tuple[int, int] | None = None,
    ) -> Condition:
        """Both branches in one forward where guidance_scale > 1 and the checkpoint is not distilled.

        Raises:
            ValueError: latents that are not those of whole references of `reference_size`, more of them than
                `max_references`, or guidance asked of a base checkpoint whose text has no negative branch.
        """
        size = reference_size or (height, width)
        count = self._reference_count(references, *size)
        text, branches = self._branches(text, 1.0 if self._distilled else guidance_scale)
        inputs = self._inputs(text["embeds"], self._image_ids((0, (height, width)), *reference_times(count, size)))
        return Condition(references.to(self.dtype).repeat(branches, 1, 1), inputs, guidance_scale, branches)

    def velocity(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        batch, tokens, _ = latents.shape
        prediction = self.transformer(
            hidden_states=self._sequence(latents, condition),
            timestep=self._timestep(timestep, batch, condition.branches),
            return_dict=False,
            **condition.inputs,
        )[0][:, :tokens]
        if condition.branches == 1:
            return prediction
        conditional, negative = prediction.chunk(2)
        return negative + condition.guidance_scale * (conditional - negative)

    def _inputs(self, embeds: Tensor, image_ids: Tensor) -> dict[str, Any]:
        """The transformer's keyword arguments that the steps of a turn share."""
        return {
            "guidance": None,
            "encoder_hidden_states": embeds,
            "txt_ids": self._text_ids(embeds.shape[1]),
            "img_ids": image_ids,
        }

    def _sides(self, size: tuple[int, int]) -> tuple[int, int]:
        """Tokens along the height and the width of an image."""
        return size[0] // self._multiple, size[1] // self._multiple

    def _text_ids(self, length: int) -> Tensor:
        """Positions (T, H, W, L) of the text, [S, 4]: its place in L."""
        return self._positions((0, 1, 1, length))

    def _image_ids(self, *images: tuple[int, tuple[int, int]]) -> Tensor:
        """Positions (T, H, W, L) of the tokens of images, each given by its T and its size in pixels, [ΣHW, 4]."""
        return self._positions(*((time, *self._sides(size), 1) for time, size in images))

    def _positions(self, *grids: tuple[int, int, int, int]) -> Tensor:
        """Made once for each combination of (T, height, width, length)."""
        key = (self.device, *grids)
        if key not in self._ids:
            self._ids[key] = torch.cat(
                [
                    torch.cartesian_prod(torch.tensor([time]), *(torch.arange(side) for side in sides))
                    for time, *sides in grids
                ]
            ).to(self.device)
        return self._ids[key]


def reference_times(count: int, size: tuple[int, int]) -> list[tuple[int, tuple[int, int]]]:
    """T and size of every reference; the state's T is 0."""
    return [(10 * (number + 1), size) for number in range(count)]


class _LastLayerDone(Exception):
    """There is nothing left to compute."""


class _FirstLayers(nn.Module):
    """Qwen3 up to the last of TEXT_LAYERS, in the place of the whole model in the pipeline's `encode_prompt`."""

    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder = encoder

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.dtype

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        """`hidden_states` {layer: [P, S, d]}."""
        states: dict[int, Tensor] = {}

        def record(number: int, output: Tensor) -> None:
            states[number] = output
            if number == TEXT_LAYERS[-1]:
                raise _LastLayerDone

        layers = self.encoder.model.layers
        handles = [
            layers[number - 1].register_forward_hook(lambda _, inputs, output, number=number: record(number, output))
            for number in TEXT_LAYERS
        ]
        try:
            with suppress(_LastLayerDone):
                self.encoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return SimpleNamespace(hidden_states=states)
