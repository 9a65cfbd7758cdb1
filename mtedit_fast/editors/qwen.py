"""Qwen-Image-Edit (and 2509, 2511) behind the Editor interface."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_shift
from torch import Tensor

from mtedit_fast.editors.base import TextConditioning
from mtedit_fast.editors.pipeline_editor import NEGATIVE, PipelineEditor

_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"  # in the template of the first version


class QwenEditor(PipelineEditor):
    """Adapter for `QwenImageEditPipeline` and `QwenImageEditPlusPipeline`, one reference per image.

    The same numbers as the stock pipeline at batch 1, except that images are taken at the size they have: the
    reference is encoded at the size of the edit, where the pipelines bring it to 1024² pixels first. The text encoder
    sees the images only where `encode_text` is given them; `rollout` encodes a group's instructions once and without,
    so its text is that of the instruction alone.
    """

    pipelines = (QwenImageEditPipeline, QwenImageEditPlusPipeline)
    example = "Qwen/Qwen-Image-Edit"
    # Every linear layer of a block but the modulations.
    lora_targets = (
        r"transformer_blocks\.\d+\."
        r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|(img|txt)_mlp\.net\.(0\.proj|2))"
    )

    @torch.no_grad()
    def encode_text(self, prompts: list[str], images: Tensor | Sequence[Tensor] | None = None) -> TextConditioning:
        """`embeds` [P, S, D] and `mask` [P, S] bool, padded to `max_sequence_length`, and the negative prompt's.

        Args:
            images: P of [3, H, W] in [0, 1], which the text encoder sees along with the prompts, as in the pipeline;
                (H/28)·(W/28) tokens each. None: the instruction alone, which serves every image of a group.

        Raises:
            ValueError: a prompt with its image is longer than `max_sequence_length`, or their numbers differ.
        """
        if images is not None and len(images) != len(prompts):
            raise ValueError(f"images: expected one per prompt ({len(prompts)}), got {len(images)}")
        pictures = [None] * len(prompts) if images is None else [(255 * i).round().byte().cpu() for i in images]
        text = self._rows([self._encode(*row) for row in zip(prompts, pictures, strict=True)])
        if self.negative_prompt is None:
            return text
        seen = pictures if images is not None else [None]
        negative = self._rows([self._encode(self.negative_prompt, picture) for picture in seen])
        return text | {
            NEGATIVE + name: value.expand(len(prompts), *value.shape[1:]) for name, value in negative.items()
        }

    def _encode(self, prompt: str, picture: Tensor | None) -> Tensor:
        """[S, D] of one prompt; the pipelines would take several pictures as several of one prompt."""
        pipeline = self.pipeline
        if picture is not None:
            return pipeline._get_qwen_prompt_embeds([prompt], [picture], self.device)[0][0]
        template = pipeline.prompt_template_encode.replace(_PICTURE, "")
        inputs = pipeline.processor(text=[template.format(prompt)], return_tensors="pt").to(self.device)
        output = pipeline.text_encoder(inputs["input_ids"], inputs["attention_mask"], output_hidden_states=True)
        return output.hidden_states[-1][0, pipeline.prompt_template_encode_start_idx :]

    def _rows(self, embeds: list[Tensor]) -> TextConditioning:
        length = max(map(len, embeds), default=0)
        if length > self.max_sequence_length:
            raise ValueError(
                f"prompts: expected at most {self.max_sequence_length} tokens with their image, got {length}; raise "
                "max_sequence_length (rollout.max_sequence_length) or pass smaller images"
            )
        padded = embeds[0].new_zeros(len(embeds), self.max_sequence_length, embeds[0].shape[-1], dtype=self.dtype)
        mask = torch.zeros(padded.shape[:2], dtype=torch.bool, device=padded.device)
        for row, value in enumerate(embeds):
            padded[row, : len(value)] = value
            mask[row, : len(value)] = True
        return {"embeds": padded, "mask": mask}

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] to packed latents [B, N, C] by the VAE's mode, as the pipeline does."""
        pixels = (2 * images - 1).to(device=self.vae.device, dtype=self.vae.dtype)
        latents = self.pipeline._encode_vae_image(pixels[:, :, None], generator=None)  # one frame
        batch, channels, _, height, width = latents.shape
        return self.pipeline._pack_latents(latents, batch, channels, height, width)

    @torch.no_grad()
    def decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Packed latents [B, N, C] to images [B, 3, H, W] fp32 in [0, 1]."""
        grid = self.pipeline._unpack_latents(latents, height, width, self.pipeline.vae_scale_factor).to(self.vae.dtype)
        mean, std = (
            torch.tensor(self.vae.config[name], device=grid.device, dtype=grid.dtype).view(1, -1, 1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        image = self.vae.decode(grid / (1 / std) + mean, return_dict=False)[0][:, :, 0]
        return (image.float() / 2 + 0.5).clamp(0, 1)

    def _shift(self, tokens: int, num_steps: int) -> float:
        config = self.pipeline.scheduler.config
        return calculate_shift(
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )

    def velocity(
        self,
        latents: Tensor,
        timestep: Tensor,
        references: Tensor,
        text: TextConditioning,
        *,
        height: int,
        width: int,
        guidance_scale: float = 4.0,
    ) -> Tensor:
        """Both branches in one forward where guidance_scale > 1; the result has the conditional one's norm per token.

        Raises:
            ValueError: guidance_scale > 1 and the text has no negative branch.
        """
        batch, tokens, _ = latents.shape
        text, branches = self._branches(text, guidance_scale)
        side = (1, height // self._multiple, width // self._multiple)  # of the edit, and of the reference
        prediction = self.transformer(
            hidden_states=torch.cat([latents.to(self.dtype), references.to(self.dtype)], dim=1).repeat(branches, 1, 1),
            timestep=self._timestep(timestep, batch, branches),
            encoder_hidden_states=text["embeds"],
            encoder_hidden_states_mask=text["mask"],
            img_shapes=[[side, side]] * (batch * branches),
            return_dict=False,
        )[0][:, :tokens]
        if branches == 1:
            return prediction
        conditional, negative = prediction.chunk(2)
        guided = negative + guidance_scale * (conditional - negative)
        return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
