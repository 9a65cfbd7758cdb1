"""Edits and images whose objects get the attributes that the prompt gives them: EBAMA's guidance of the latents."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from mtedit_fast.editors.base import Condition, Editor
from mtedit_fast.editors.graphs import GraphedEditor
from mtedit_fast.editors.speed import StepCachedEditor
from mtedit_fast.inference_time.attention_maps import AttentionMaps
from mtedit_fast.inference_time.ebama import DISTANCES, Targets, ebama_loss, make_targets
from mtedit_fast.inference_time.phrases import (
    Phrase,
    PromptToken,
    editor_tokens,
    find_phrases,
    locate,
    prompt_tokens,
)
from mtedit_fast.ops import sde_coefficients, sde_step, seeded_noise

__all__ = ["align_edit", "align_generate", "phrase_targets"]

Phrases = Sequence[Sequence[Phrase]]


def align_edit(
    editor: Editor,
    images: Tensor,
    instructions: Sequence[str],
    phrases: Phrases | None = None,
    *,
    num_steps: int,
    guidance_scale: float,
    seeds: Tensor,
    scale: float = 20.0,
    aligned_share: float = 0.5,
    distance: str = "cosine",
    intensity: float = 0.5,
    layers: Collection[int] | None = None,
) -> Tensor:
    """One turn of edits, the objects named by `phrases` bound to their modifiers (EBAMA, arXiv 2404.07389).

    Before each of the first `aligned_share` of the steps, every image's latents take z ← z − scale·∇_z(L_s + ½L_t) on
    the maps of the conditional branch: a forward with gradient more, and its backward. Images do not depend on each
    other. The gradient of one that is not finite is left out, and that image goes on without guidance from there; a
    warning names it.

    Args:
        editor: of any family; a transformer with gradient checkpointing keeps memory at that of a training step.
        images: [B, 3, H, W] in [0, 1].
        instructions: B of them.
        phrases: what each instruction says about which object, at least one; None: by spaCy. Name objects that the
            edited image is to show, with the attributes they are to have: L_t makes every noun visible, also one that
            is to be removed.
        num_steps, guidance_scale: of the plain edit.
        seeds: int64 [B], as `rollout` takes them for the first turn (see `turn_seeds` for others).
        scale: of the step, ≥ 0; 20 in the paper, for Stable Diffusion. 0 is the plain edit, bit for bit.
        aligned_share: in [0, 1].
        distance, intensity: see `ebama_loss`.
        layers: see `AttentionMaps`.

    Returns:
        [B, 3, H, W] in 256 levels of [0, 1].

    Raises:
        TypeError: an editor of unknown family, or one wrapped for speed.
        ValueError: a negative scale, an instruction without nouns, a word that is not in it, or shapes that differ.
        ImportError: no phrases, and no spaCy.
    """
    guide = _Guide(scale, aligned_share, distance, intensity, layers)
    if isinstance(editor, GraphedEditor | StepCachedEditor):
        raise TypeError(
            f"editor: expected one that runs eagerly with gradient, got {type(editor).__name__}; pass its .editor"
        )
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected [B, 3, H, W], got {list(images.shape)}")
    batch, (height, width) = len(images), images.shape[-2:]
    _check_rows(batch, seeds, instructions=instructions, phrases=phrases)
    device, prompts = editor.device, list(instructions)
    images, seeds = images.to(device), seeds.to(device)
    tokens, channels = editor.latent_shape(height, width)
    schedule = editor.schedule(num_steps, height, width)
    coefficients = sde_coefficients(schedule.sigmas.cpu(), variant="ode", device=device)
    aligned = guide.steps(num_steps)
    if aligned:
        seen = images if editor.text_sees_image else None
        targets = phrase_targets(prompts, phrases, editor_tokens(editor, prompts, seen)).to(device)
    with torch.no_grad():
        text = editor.encode_text(prompts, images if editor.text_sees_image else None)
        references = editor.encode_image(images)

        def condition_at(guidance: float) -> Condition:
            return editor.condition(references, text, height=height, width=width, guidance_scale=guidance)

        condition = condition_at(guidance_scale)
        # Guidance that a model was distilled to take as an input stays in the one branch there is.
        conditional = condition if condition.branches == 1 or not aligned else condition_at(1.0)
        side = round((height * width / tokens) ** 0.5)
        latents = seeded_noise(seeds, (tokens, channels), 0)
        guided = torch.ones(batch, dtype=torch.bool, device=device)
        for step, timestep in enumerate(schedule.timesteps):
            if step < aligned:

                def forward(z: Tensor, timestep: Tensor = timestep) -> Tensor:
                    return editor.velocity(z, timestep, conditional)

                maps = AttentionMaps(
                    editor.transformer, targets.columns, (height // side, width // side), layers=guide.layers
                )
                latents = guide.update(latents, forward, maps, targets, guided)
            velocity = editor.velocity(latents, timestep, condition)
            latents = sde_step(latents, velocity, coefficients, step, seed=seeds, return_mean=False).prev_sample
        _warn(guided)
        return (editor.decode(latents, height, width) * 255).round() / 255


def align_generate(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    phrases: Phrases | None = None,
    *,
    seeds: Tensor,
    num_steps: int = 50,
    guidance_scale: float = 7.5,
    negative_prompt: str = "",
    size: tuple[int, int] | None = None,
    scale: float = 20.0,
    aligned_share: float = 0.5,
    distance: str = "cosine",
    intensity: float = 0.5,
    resolution: int = 16,
    layers: Collection[int] | None = None,
) -> Tensor:
    """Images of Stable Diffusion 1.x or 2.x with EBAMA's guidance, every member of the batch with its own.

    The settings of the paper by default. As in its code, the softmax of L_t is over all text tokens but the first and
    the last, padding included. The pipeline's safety checker does not run.

    Args:
        pipeline: a loaded `StableDiffusionPipeline`; a copy of its scheduler is used.
        prompts: B of them.
        phrases, scale, aligned_share, distance, intensity, layers: as in `align_edit`.
        seeds: int64 [B]; the first noise is `seeded_noise` of them, and schedulers that draw noise do so per image.
        size: (height, width) in pixels, multiples of 8; None: the model's.
        resolution: tokens along the shorter side of the maps that count; 16 of the 64 of a 512² image's latents.

    Returns:
        [B, 3, H, W] fp32 in [0, 1].

    Raises:
        TypeError: another pipeline.
        ValueError: as `align_edit`, or a resolution that no layer has.
        ImportError: no phrases, and no spaCy.
    """
    guide = _Guide(scale, aligned_share, distance, intensity, layers)
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise TypeError(f"pipeline: expected a StableDiffusionPipeline (1.x or 2.x), got {type(pipeline).__name__}")
    unet: Any = pipeline.unet
    factor, device, batch, prompts = pipeline.vae_scale_factor, unet.device, len(prompts), list(prompts)
    height, width = size or (unet.config.sample_size * factor,) * 2
    if min(height, width) <= 0 or height % 8 or width % 8:
        raise ValueError(f"size: expected positive multiples of 8, got {height}×{width}")
    _check_rows(batch, seeds, prompts=prompts, phrases=phrases)
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(num_steps, device=device)
    aligned = guide.steps(len(scheduler.timesteps))
    rows, columns = height // factor, width // factor
    if aligned:
        tokenizer = pipeline.tokenizer
        longest = tokenizer.model_max_length
        tokens = [prompt_tokens(tokenizer, prompt, max_length=longest) for prompt in prompts]
        targets = phrase_targets(prompts, phrases, tokens, competing=range(1, longest - 1)).to(device)
        side = min(rows, columns) / resolution
        grid = round(rows / side), round(columns / side)
    with torch.no_grad():
        guidance = guidance_scale > 1
        text, negative = pipeline.encode_prompt(prompts, device, 1, guidance, [negative_prompt] * batch)
        both = torch.cat([negative, text]) if guidance else text
        noise = seeded_noise(seeds.to(device), (unet.config.in_channels, rows, columns), 0)
        latents = (noise * scheduler.init_noise_sigma).to(unet.dtype)
        options: dict[str, Any] = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            options["generator"] = [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]
        guided = torch.ones(batch, dtype=torch.bool, device=device)
        for step, timestep in enumerate(scheduler.timesteps):

            def forward(z: Tensor, embeds: Tensor = text, timestep: Tensor = timestep) -> Tensor:
                scaled = scheduler.scale_model_input(z, timestep)
                return unet(scaled, timestep, encoder_hidden_states=embeds, return_dict=False)[0]

            if step < aligned:
                maps = AttentionMaps(unet, targets.columns, grid, layers=guide.layers)
                latents = guide.update(latents, forward, maps, targets, guided)
            noise = forward(torch.cat([latents, latents]) if guidance else latents, both)
            if guidance:
                unconditional, conditional = noise.chunk(2)
                noise = unconditional + guidance_scale * (conditional - unconditional)
            latents = scheduler.step(noise, timestep, latents, **options, return_dict=False)[0]
        _warn(guided)
        image = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
        return (image.float() / 2 + 0.5).clamp(0, 1)


def phrase_targets(
    prompts: Sequence[str],
    phrases: Phrases | None,
    tokens: Sequence[Sequence[PromptToken]],
    competing: Sequence[int] = (),
) -> Targets:
    """`make_targets` for the given phrases of every prompt, or for those that spaCy finds."""
    found = find_phrases(prompts) if phrases is None else phrases
    located = [locate(prompt, own) for prompt, own in zip(prompts, found, strict=True)]
    return make_targets(tokens, located, competing)


@dataclass
class _Guide:
    """What the update of latents depends on but for the model."""

    scale: float
    share: float
    distance: str
    intensity: float
    layers: Collection[int] | None

    def __post_init__(self) -> None:
        if not 0 <= self.scale < float("inf"):
            raise ValueError(f"scale: expected a step size >= 0, got {self.scale}; 0 is the plain edit")
        if not 0 <= self.share <= 1:
            raise ValueError(f"aligned_share: expected a share of the steps in [0, 1], got {self.share}")
        if not self.intensity >= 0:
            raise ValueError(f"intensity: expected a weight >= 0, got {self.intensity}; 0 leaves L_t out")
        if self.distance not in DISTANCES:
            raise ValueError(f"distance: expected one of {', '.join(DISTANCES)}, got {self.distance!r}")

    def steps(self, num_steps: int) -> int:
        """How many of the first steps are aligned."""
        return round(self.share * num_steps) if self.scale > 0 else 0

    def update(
        self,
        latents: Tensor,
        forward: Callable[[Tensor], Tensor],
        maps: AttentionMaps,
        targets: Targets,
        guided: Tensor,
    ) -> Tensor:
        """z − scale·∇_z of every image that is still `guided` [B], which loses those whose gradient is not finite."""
        with torch.enable_grad(), maps:
            z = latents.detach().requires_grad_()
            forward(z)
            loss = ebama_loss(maps.mean(), targets, distance=self.distance, intensity=self.intensity)
            (gradient,) = torch.autograd.grad(loss.sum(), z)
        guided &= gradient.flatten(1).isfinite().all(1)
        keep = guided.view(-1, *[1] * (latents.ndim - 1))
        return torch.where(keep, latents - self.scale * gradient, latents)


def _check_rows(batch: int, seeds: Tensor, **lists: Any) -> None:
    """Raises where a list has another length than the batch."""
    for name, value in lists.items():
        if value is not None and (isinstance(value, str) or len(value) != batch):
            got = repr(value) if isinstance(value, str) else len(value)
            raise ValueError(f"{name}: expected one per image ({batch}), got {got}")
    if seeds.dtype != torch.int64 or seeds.shape != (batch,):
        raise ValueError(f"seeds: expected int64 [{batch}], one per image, got {seeds.dtype} {list(seeds.shape)}")


def _warn(guided: Tensor) -> None:
    lost = (~guided).nonzero()[:, 0].tolist()
    if lost:
        names = ", ".join(map(str, lost))
        warnings.warn(f"align: gradient not finite, went on without guidance: image {names} of the batch", stacklevel=3)
