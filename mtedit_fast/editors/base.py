"""What a rollout needs from a model family, and nothing more."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

TextConditioning = dict[str, Tensor]  # model-specific tensors, one row per prompt


class Schedule(NamedTuple):
    """One denoising schedule, on the editor's device."""

    sigmas: Tensor  # [T+1] fp32, from 1 to 0
    timesteps: Tensor  # [T] fp32, what the transformer is conditioned on, 1000·σ


class Editor(Protocol):
    """Encode once, denoise, decode.

    Everything that does not depend on the noise is computed by the `encode_*` methods and `schedule`, so that a
    group of rollouts shares it. Images are [B, 3, H, W] in [0, 1]; latents are packed, [B, N, C].
    """

    transformer: nn.Module
    lora_targets: str
    """Regular expression of the modules that a LoRA adapts by default."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def encode_text(self, prompts: list[str]) -> TextConditioning:
        """Conditioning with one row per prompt."""

    def encode_image(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] to packed clean latents [B, N, C]."""

    def decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Packed latents [B, N, C] to images [B, 3, H, W], fp32, clamped to [0, 1]."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        """(N, C) of the packed latents of one H×W image; raises ValueError for a size the VAE cannot take."""

    def schedule(self, num_steps: int, height: int, width: int) -> Schedule:
        """The schedule the family's own pipeline uses for `num_steps` at this size."""

    def velocity(
        self,
        latents: Tensor,
        timestep: Tensor,
        references: Tensor,
        text: TextConditioning,
        *,
        height: int,
        width: int,
        guidance_scale: float,
    ) -> Tensor:
        """Model output ε − x₀ for `latents` [B, N, C] at `timestep` ([] or [B]), given reference latents [B, N, C]."""

    def save_lora(self, directory: str) -> None:
        """The adapter as safetensors that the stock pipeline's `load_lora_weights` takes."""
