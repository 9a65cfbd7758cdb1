"""Edits that leave alone what the instruction does not target: it is restored from the reference through a keep-mask.

The inverse problem of `flow_priors` with A = the mask, on the packed latents of one turn, with the editor as flow and
along its own schedule, in the limit λ → ∞. The corrupted trajectory t y + (1 − t) A(start) is a straight line, from the
kept tokens' noise to the reference. So they are put on that line after every step, and the others are moved so that
the model, too, sends the kept ones along it: what λ ‖A(x + v dt) − y_t'‖² is then.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtedit_fast.editors.base import Condition, Editor
from mtedit_fast.inference_time.flow_priors import adam_step
from mtedit_fast.ops import sde_coefficients, sde_step, seeded_noise


@dataclass(frozen=True)
class KeepMaskSettings:
    """Settings of `keep_mask_edit`.

    inner_steps: Adam's, on the tokens that are not kept, before each step in the first `guided_share` of the schedule;
        each costs a forward and a backward. 0: no gradient is taken.
    step_size: Adam's, in the latents' units.
    paste: also put the reference's own pixels where the mask keeps them, which the VAE would give back only nearly.
    micro_batch: images per forward.
    """

    inner_steps: int = 1
    step_size: float = 0.15
    guided_share: float = 0.5
    paste: bool = True
    micro_batch: int = 32

    def __post_init__(self) -> None:
        if self.inner_steps < 0:
            raise ValueError(f"inner_steps: expected ≥ 0, got {self.inner_steps}")
        if not 0 < self.step_size < math.inf:
            raise ValueError(f"step_size: expected a finite number > 0, got {self.step_size}")
        if not 0 <= self.guided_share <= 1:
            raise ValueError(f"guided_share: expected 0 … 1, got {self.guided_share}")
        if self.micro_batch < 1:
            raise ValueError(f"micro_batch: expected ≥ 1, got {self.micro_batch}")


@torch.no_grad()
def keep_mask_edit(
    editor: Editor,
    images: Tensor,
    instructions: Sequence[str],
    keep: Tensor,
    *,
    num_steps: int,
    guidance_scale: float,
    seeds: Tensor,
    settings: KeepMaskSettings | None = None,
) -> Tensor:
    """One turn that edits each image by its instruction and restores it where `keep` says so.

    With nothing kept it is the plain edit, bit for bit.

    Args:
        images: [B, 3, H, W] in [0, 1].
        instructions: B texts.
        keep: [B or 1, 1, H, W], bool or 0 and 1; True where the reference must be restored. A latent token is kept
            where all of its pixels are.
        num_steps: of the editor's schedule.
        seeds: [B] int64; an image's noise is a function of its own, as in `rollout`.

    Returns:
        [B, 3, H, W] fp32 in [0, 1], multiples of 1/255 (but for what is pasted from images that are none), on the
        editor's device. An image with latents that are not finite is returned as it came, and named in a warning.

    Raises:
        ValueError: shapes that do not agree, a mask of other values, or an editor without gradient.
    """
    settings = settings or KeepMaskSettings()
    keep = _checked(images, instructions, keep, seeds).to(editor.device)
    parts = []
    for start in range(0, len(images), settings.micro_batch):
        rows = slice(start, start + settings.micro_batch)
        own = keep if len(keep) == 1 else keep[rows]
        parts.append(
            _edit(editor, images[rows], list(instructions[rows]), own, num_steps, guidance_scale, seeds[rows], settings)
        )
    edited = torch.cat(parts)
    originals = images.to(edited)
    sound = edited.flatten(1).isfinite().all(1)
    for image in (~sound).nonzero().flatten().tolist():
        warnings.warn(f"image {image}: its edit is not finite; returned as it came", stacklevel=2)
    edited = torch.where(sound[:, None, None, None], edited, originals)
    return torch.where(keep, originals, edited) if settings.paste else edited


def _checked(images: Tensor, instructions: Sequence[str], keep: Tensor, seeds: Tensor) -> Tensor:
    """The mask as bool."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected [B, 3, H, W] in [0, 1], got {list(images.shape)}")
    count, _, height, width = images.shape
    if isinstance(instructions, str) or len(instructions) != count:
        got = repr(instructions) if isinstance(instructions, str) else len(instructions)
        raise ValueError(f"instructions: expected one for each of {count} images, got {got}")
    if keep.ndim != 4 or keep.shape[0] not in (1, count) or keep.shape[1:] != (1, height, width):
        raise ValueError(
            f"keep: expected [{count} or 1, 1, {height}, {width}], as the images are, got {list(keep.shape)}; resize "
            "the mask to the images, without smoothing"
        )
    if keep.dtype != torch.bool and not bool(((keep == 0) | (keep == 1)).all()):
        raise ValueError("keep: expected True and False, or 0 (free) and 1 (kept), only")
    if seeds.dtype != torch.int64 or seeds.shape != (count,):
        raise ValueError(f"seeds: expected int64 [{count}], got {seeds.dtype} {list(seeds.shape)}")
    return keep.bool()


def kept_tokens(keep: Tensor, tokens: int) -> Tensor:
    """[B, 1, H, W] bool in pixels to [B, N] of packed latents: whether all of a token's pixels are kept.

    Raises:
        ValueError: N tokens do not lie in squares over H × W pixels.
    """
    height, width = keep.shape[2:]
    side = math.isqrt(height * width // tokens)
    if side == 0 or height % side or width % side or (height // side) * (width // side) != tokens:
        raise ValueError(f"keep: expected sides of which {tokens} square tokens make a grid, got {height}×{width}")
    return ~F.max_pool2d((~keep).float(), side).flatten(1).bool()


def _edit(
    editor: Editor,
    images: Tensor,
    instructions: list[str],
    keep: Tensor,
    num_steps: int,
    guidance_scale: float,
    seeds: Tensor,
    settings: KeepMaskSettings,
) -> Tensor:
    height, width = images.shape[2:]
    seeds, images = seeds.to(editor.device), images.to(editor.device)
    references = editor.encode_image(images)
    text = editor.encode_text(instructions, images if editor.text_sees_image else None)
    condition = editor.condition(references, text, height=height, width=width, guidance_scale=guidance_scale)
    schedule = editor.schedule(num_steps, height, width)
    coefficients = sde_coefficients(schedule.sigmas.cpu(), variant="ode", device=editor.device)
    tokens, channels = editor.latent_shape(height, width)
    held = kept_tokens(keep, tokens)[..., None]  # [B or 1, N, 1]
    noise = latents = seeded_noise(seeds, (tokens, channels), 0)
    target = references.float()
    guided = round(settings.guided_share * num_steps) if bool(held.any()) and not bool(held.all()) else 0
    for step in range(num_steps):
        if step < guided:
            latents = _agree(editor, condition, latents, schedule.timesteps[step], noise - target, held, settings)
        velocity = editor.velocity(latents, schedule.timesteps[step], condition)
        latents = sde_step(latents, velocity, coefficients, step, return_mean=False).prev_sample
        latents = torch.where(held, torch.lerp(target, noise, schedule.sigmas[step + 1]), latents)
    return (editor.decode(latents, height, width) * 255).round() / 255


def _agree(
    editor: Editor,
    condition: Condition,
    latents: Tensor,
    timestep: Tensor,
    straight: Tensor,
    held: Tensor,
    settings: KeepMaskSettings,
) -> Tensor:
    """The state with its free tokens moved so that the model's velocity of the held ones comes nearer to `straight`."""
    first, second = torch.zeros_like(latents), torch.zeros_like(latents)
    for count in range(1, settings.inner_steps + 1):
        with torch.enable_grad():
            x = latents.detach().requires_grad_()
            velocity = editor.velocity(x, timestep, condition)
            if not velocity.requires_grad:
                raise ValueError(
                    "editor: its velocity has no gradient (a captured graph?); take the editor as it was loaded, or "
                    "KeepMaskSettings(inner_steps=0)"
                )
            (gradient,) = torch.autograd.grad(((velocity.float() - straight) * held).square().sum(), x)
        moved, first, second = adam_step(latents, gradient, first, second, count, settings.step_size)
        latents = torch.where(held, latents, moved)
    return latents
