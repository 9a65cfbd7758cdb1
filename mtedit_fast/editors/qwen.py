"""Qwen-Image-Edit (and 2509, 2511) behind the Editor interface."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_shift
from torch import Tensor

from mtedit_fast.editors.base import Condition, TextConditioning
from mtedit_fast.editors.pipeline_editor import NEGATIVE, PipelineEditor
from mtedit_fast.editors.qwen_text import condition_size, distinct, encode_prompts
from mtedit_fast.editors.qwen_transformer import Grids, SequenceTables, take_tensors
from mtedit_fast.qwen_vl import ImageSpec

_SPEC = ImageSpec(patch_size=14, min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
"""Of the public checkpoints, for a pipeline without its processor."""


class QwenEditor(PipelineEditor):
    """Adapter for `QwenImageEditPipeline` (one reference) and `QwenImageEditPlusPipeline` (2509 and 2511, up to three).

    The numbers of the stock pipeline at batch 1, with two differences. References are encoded at the size they have,
    where the pipelines bring them to 1024² pixels first. And the text encoder places image tokens in three dimensions
    whatever the version of transformers (see `qwen_text.encode_prompts`).

    Args:
        pipeline: loaded; its transformer is used in place and keeps serving the pipeline (see `take_tensors`).
        max_sequence_length: tokens of an instruction and its template, to which the images' tokens are added.
        negative_prompt: of classifier-free guidance, " " in the model cards; None: guidance_scale must be 1.
        condition_area: pixels to which the text encoder's images are brought; None: the pipeline's, 384² in Plus and
            1024² in the first version.
    """

    pipelines = (QwenImageEditPipeline, QwenImageEditPlusPipeline)
    example = "Qwen/Qwen-Image-Edit"
    text_sees_image = True
    # Every linear layer of a block but the modulations.
    lora_targets = (
        r"transformer_blocks\.\d+\."
        r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|(img|txt)_mlp\.net\.(0\.proj|2))"
    )

    def __init__(
        self,
        pipeline: Any,
        *,
        max_sequence_length: int = 512,
        negative_prompt: str | None = None,
        condition_area: int | None = None,
    ):
        super().__init__(pipeline, max_sequence_length=max_sequence_length, negative_prompt=negative_prompt)
        plus = isinstance(pipeline, QwenImageEditPlusPipeline)
        self.max_references = 3 if plus else 1  # what the checkpoints were trained for; the pipeline has no limit
        self.condition_area = condition_area or (384 * 384 if plus else 1024 * 1024)
        take_tensors(pipeline.transformer)
        self._tables = SequenceTables(pipeline.transformer)
        self._constants: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def encode_text(self, prompts: list[str], images: Tensor | None = None) -> TextConditioning:
        """`embeds` [P, S, D] and `mask` [P, S] bool, and the negative prompt's, read together.

        S is `max_sequence_length` and the images' tokens, so that rows of several calls with images of one size stack.
        An image goes through the vision tower once, and (prompt, images) through the language model once, however
        often they come; for that the host waits once for a checksum of the images.

        Args:
            images: [P, 3, H, W] or [P, R, 3, H, W] in [0, 1], which the text encoder reads along with the prompts.
                None: the instruction alone, for which the checkpoints were not trained.

        Raises:
            ValueError: a prompt is longer than `max_sequence_length`, or images are not one set per prompt, too many
                per prompt, or not images.
        """
        owners: list[int | None] = [None] * len(prompts)
        if images is not None:
            images = self._text_images(images, len(prompts))
            rows, shared = distinct(images)
            images, owners = images[rows], list(shared)
        asked = list(zip(prompts, owners, strict=True))
        negatives = [] if self.negative_prompt is None else [(self.negative_prompt, owner) for owner in owners]
        places = {row: place for place, row in enumerate(dict.fromkeys(asked + negatives))}
        out = encode_prompts(self.pipeline, list(places), images, self.condition_area)
        longest, room = max(out.lengths), self.max_sequence_length + out.image_tokens
        if longest > room:
            raise ValueError(
                f"prompts: expected at most {self.max_sequence_length} tokens with their template, got "
                f"{longest - out.image_tokens}; raise max_sequence_length (rollout.max_sequence_length)"
            )
        embeds = F.pad(out.embeds.to(self.device, self.dtype), (0, 0, 0, room - out.embeds.shape[1]))
        mask = (torch.arange(room) < torch.tensor(out.lengths)[:, None]).to(self.device)
        text: TextConditioning = {}
        for prefix, wanted in (("", asked), (NEGATIVE, negatives)):
            if wanted:
                index = torch.tensor([places[row] for row in wanted]).to(self.device)
                text |= {prefix + "embeds": embeds[index], prefix + "mask": mask[index]}
        return text

    def text_image_tokens(self, height: int, width: int) -> int:
        """Text tokens that stand for an image of this size."""
        processor = self.pipeline.processor
        spec = _SPEC if processor is None else ImageSpec.from_processor(processor)
        return spec.tokens(*condition_size(height, width, self.condition_area))

    def _text_images(self, images: Tensor, prompts: int) -> Tensor:
        """[P, R, 3, H, W]."""
        images = self._tensor(images)
        if images.ndim not in (4, 5) or images.shape[-3] != 3:
            raise ValueError(
                f"images: expected [P, 3, H, W], or [P, R, 3, H, W] for R references, got {list(images.shape)}"
            )
        if len(images) != prompts:
            raise ValueError(f"images: expected one per prompt ({prompts}), got {len(images)}")
        images = images if images.ndim == 5 else images[:, None]
        if not 1 <= images.shape[1] <= self.max_references:
            raise ValueError(
                f"images: expected 1 to {self.max_references} per prompt for {type(self.pipeline).__name__}, got "
                f"{images.shape[1]}; leave some out, or take a checkpoint of the Plus pipeline"
            )
        return images

    @staticmethod
    def _tensor(images: Any) -> Tensor:
        if isinstance(images, Tensor):
            return images
        sizes = sorted({f"{image.shape[-2]}×{image.shape[-1]}" for image in images})
        raise TypeError(
            f"images: expected one tensor, got a {type(images).__name__} of sizes {', '.join(sizes)}; bring all "
            "references of a batch to one size and stack them"
        )

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """[B, 3, h, w], or [B, R, 3, h, w] for ordered references, in [0, 1] to packed latents [B, R·M, C].

        By the VAE's mode, all images in one forward.
        """
        flat, count = self._references(self._tensor(images))
        pixels = (2 * flat - 1).to(device=self.vae.device, dtype=self.vae.dtype)
        latents = self.vae.encode(pixels[:, :, None]).latent_dist.mode()  # one frame
        mean, std = self._normalisation(latents)
        latents = (latents - mean) / std
        batch, channels, _, height, width = latents.shape
        packed = self.pipeline._pack_latents(latents, batch, channels, height, width)
        return packed.unflatten(0, (-1, count)).flatten(1, 2)

    @torch.no_grad()
    def decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Packed latents [B, N, C] to images [B, 3, H, W] fp32 in [0, 1]."""
        grid = self.pipeline._unpack_latents(latents, height, width, self.pipeline.vae_scale_factor).to(self.vae.dtype)
        mean, std = self._normalisation(grid)
        image = self.vae.decode(grid / (1 / std) + mean, return_dict=False)[0][:, :, 0]
        return (image.float() / 2 + 0.5).clamp(0, 1)

    def _normalisation(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents' channels, [1, C, 1, 1, 1] beside `latents`."""
        key = (latents.device, latents.dtype)
        if key not in self._constants:
            config = self.vae.config
            mean, std = (
                torch.tensor(v).to(*key).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std)
            )
            self._constants[key] = mean, std
        return self._constants[key]

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
        guidance_scale: float = 4.0,
        reference_size: tuple[int, int] | None = None,
    ) -> Condition:
        """Text cut to the longest row of a branch, and masked only where its rows differ in length.

        So a group that shares one prompt needs no mask, with guidance or without, and keeps flash attention. The host
        reads the lengths once. Raises ValueError where guidance_scale > 1 and the text has no negative branch, and
        where `references` are not 1 to `max_references` images of `reference_size`.
        """
        size = reference_size or (height, width)
        count = self._reference_count(references, *size)
        text, branches = self._branches(text, guidance_scale)
        embeds, mask = text["embeds"], text["mask"]
        lengths = [embeds.shape[1]] * len(mask) if mask.is_meta else mask.sum(1).tolist()
        sides = [(height, width), *[size] * count]
        grids: Grids = tuple((1, rows // self._multiple, columns // self._multiple) for rows, columns in sides)
        inputs = {"encoder_hidden_states": embeds[:, : max(lengths)]}
        if (index := self._tables.modulate_index(grids)) is not None:
            inputs["modulate_index"] = index
        rows = len(references)
        for prefix, own in (("", slice(rows)), (NEGATIVE, slice(rows, None)))[:branches]:
            longest = max(lengths[own])
            inputs[prefix + "rotary_cos"], inputs[prefix + "rotary_sin"] = self._tables.rotary(grids, longest)
            if min(lengths[own]) < longest:
                image = mask.new_ones(rows, self.latent_shape(height, width)[0] + references.shape[1])
                inputs[prefix + "attention_mask"] = torch.cat([mask[own, :longest], image], dim=1)[:, None, None]
        return Condition(references.to(self.dtype).repeat(branches, 1, 1), inputs, guidance_scale, branches)

    def velocity(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Both branches in one forward; the result has the conditional one's norm per token."""
        batch, tokens, _ = latents.shape
        prediction = self.transformer(
            hidden_states=self._sequence(latents, condition),
            timestep=self._timestep(timestep, batch, condition.branches),
            **condition.inputs,
        )[0][:, :tokens]
        return prediction if condition.branches == 1 else guided_velocity(prediction, condition.guidance_scale)


def guided_velocity(prediction: Tensor, scale: float) -> Tensor:
    """v = negative + scale·(conditional − negative), times ‖conditional‖/‖v‖ per token, in fp32.

    Args:
        prediction: [2n, N, C], conditional rows first.
    """
    conditional, negative = prediction.to(torch.promote_types(prediction.dtype, torch.float32)).chunk(2)
    guided = negative + scale * (conditional - negative)
    norm = guided.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(guided.dtype).tiny)
    return (guided * (conditional.norm(dim=-1, keepdim=True) / norm)).to(prediction.dtype)
