"""What a rollout needs from a model family, and nothing more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

TextConditioning = dict[str, Tensor]  # model-specific tensors, one row per prompt


class Schedule(NamedTuple):
    """One denoising schedule, on the editor's device."""

    sigmas: Tensor  # [T+1] fp32, from 1 to 0
    timesteps: Tensor  # [T] fp32, what the transformer is conditioned on, 1000·σ


@dataclass(frozen=True)
class Condition:
    """What the velocity of n samples depends on besides state and time: made once per turn, read at every step.

    Attributes:
        references: [n · branches, M, C] in the transformer's dtype, in one sequence with the state; None where they
            enter in another way.
        inputs: the transformer's other keyword arguments: text, positions, guidance.
        guidance_scale: of the combination of the branches.
        branches: 2 where [conditional, negative] rows go through the transformer together.
    """

    references: Tensor | None
    inputs: dict[str, Any]
    guidance_scale: float = 1.0
    branches: int = 1


class Editor(Protocol):
    """Encode once, condition once per turn, denoise, decode.

    What a group of rollouts shares is computed by the `encode_*` methods and `schedule`, what the steps of a turn share
    by `condition`, so that `velocity` holds the transformer and nothing else. Images are [B, 3, H, W] in [0, 1];
    latents are packed, [B, N, C].
    """

    transformer: nn.Module
    text_sees_image: bool
    """The text encoder reads the images to be edited, too: text is then encoded per image, not per instruction."""
    max_references: int
    """Images that one edit can be conditioned on."""
    lora_targets: str
    """Regular expression of the modules that a LoRA adapts by default."""

    @property
    def device(self) -> torch.device: ...

    def to(self, device: torch.device | str) -> Editor:
        """Itself, with every model on `device`."""

    @property
    def dtype(self) -> torch.dtype: ...

    def encode_text(self, prompts: list[str], images: Tensor | None = None) -> TextConditioning:
        """Conditioning with one row per prompt; images [P, 3, H, W] are for those whose text sees them."""

    def encode_image(self, images: Tensor) -> Tensor:
        """[B, 3, h, w] in [0, 1], or R ordered references [B, R, 3, h, w], to packed clean latents [B, R·M, C]."""

    def decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Packed latents [B, N, C] to images [B, 3, H, W], fp32, clamped to [0, 1]."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        """(N, C) of the packed latents of one H×W image; raises ValueError for a size the VAE cannot take."""

    def schedule(self, num_steps: int, height: int, width: int) -> Schedule:
        """The schedule the family's own pipeline uses for `num_steps` at this size."""

    def condition(
        self,
        references: Tensor,
        text: TextConditioning,
        *,
        height: int,
        width: int,
        guidance_scale: float,
        reference_size: tuple[int, int] | None = None,
    ) -> Condition:
        """What the steps of one turn of n samples share. May wait for the device, which `velocity` never does.

        Args:
            references: [n, R·M, C] latents of images of `reference_size` (None: that of the edit, height × width).
            text: n rows.
        """

    def velocity(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Model output ε − x₀ for `latents` [n, N, C] at `timestep`, [] or [n]."""

    def invalidate(self) -> None:
        """The transformer's weights have changed: what was derived from them must not be used again."""

    def backward_references(self) -> None:
        """Carry gradients that shared parts of several conditions have gathered on to the weights."""

    def save_lora(self, directory: str) -> None:
        """The adapter as safetensors that the stock pipeline's `load_lora_weights` takes."""
