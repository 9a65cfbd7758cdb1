"""Multi-turn sampling as public trainers do it around stock diffusers pipelines, on an editor's own weights.

A pipeline call per `batch` repeats of a prompt and per turn: text and reference encoded anew, positions built anew, two
forwards for guidance with the text padded and masked, the state in the model's dtype, the stochastic step as a chain of
full-tensor operations that looks its sigmas up by comparing timesteps, all states kept, and the image carried to the
next turn through PIL and JPEG.

Klein-KV has two: `full_attention`, references in the sequence of every step, and its stock pipeline's call, which
extracts keys and values in the first step of every call, for every sample.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mtedit_fast.editors import KleinEditor, KontextEditor, QwenEditor, TextConditioning
from mtedit_fast.editors.klein_kv import KleinKVEditor
from mtedit_fast.editors.pipeline_editor import NEGATIVE
from mtedit_fast.rollout import RolloutConfig
from mtedit_fast.trajectories import slices

Velocity = Callable[[Tensor, Tensor], Tensor]
"""Of a state [b, N, C] at a timestep [], in the model's dtype."""
Noise = Callable[[slice, int, int, torch.Size], Tensor]
"""Of (rows, turn, draw, shape): draw 0 is the first state, draw i + 1 that of step i."""


@dataclass(frozen=True)
class Call:
    """What one pipeline call is about: b repeats of one edit."""

    editor: Any
    references: Tensor  # [b, M, C]
    text: TextConditioning
    size: tuple[int, int]
    reference_size: tuple[int, int]
    guidance_scale: float

    @property
    def transformer(self) -> Any:
        return self.editor.pipeline.transformer

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return size[0] // self.editor._multiple, size[1] // self.editor._multiple

    def timestep(self, t: Tensor) -> Tensor:
        return t.expand(len(self.references)).to(self.editor.dtype) / 1000


def kontext(call: Call) -> Velocity:
    pipeline, device, dtype = call.editor.pipeline, call.editor.device, call.editor.dtype
    own, reference = (
        pipeline._prepare_latent_image_ids(1, *call.grid(size), device, dtype)
        for size in (call.size, call.reference_size)
    )
    reference[..., 0] = 1
    ids = torch.cat([own, reference])
    text_ids = torch.zeros(call.text["prompt_embeds"].shape[1], 3, device=device, dtype=dtype)

    def velocity(latents: Tensor, t: Tensor) -> Tensor:
        guidance = torch.full([1], call.guidance_scale, device=device, dtype=torch.float32).expand(len(latents))
        out = call.transformer(
            hidden_states=torch.cat([latents, call.references], dim=1),
            timestep=call.timestep(t),
            guidance=guidance if call.transformer.config.guidance_embeds else None,
            pooled_projections=call.text["pooled"],
            encoder_hidden_states=call.text["prompt_embeds"],
            txt_ids=text_ids,
            img_ids=ids,
            return_dict=False,
        )[0]
        return out[:, : latents.shape[1]]

    return velocity


def qwen(call: Call) -> Velocity:
    """Guidance as two forwards, the result brought to the conditional one's norm."""
    shapes = [[(1, *call.grid(call.size)), (1, *call.grid(call.reference_size))]] * len(call.references)

    def forward(latents: Tensor, t: Tensor, prefix: str = "") -> Tensor:
        mask = call.text[prefix + "mask"]
        return call.transformer(
            hidden_states=torch.cat([latents, call.references], dim=1),
            timestep=call.timestep(t),
            guidance=None,
            encoder_hidden_states_mask=None if mask.all() else mask,
            encoder_hidden_states=call.text[prefix + "embeds"],
            img_shapes=shapes,
            return_dict=False,
        )[0][:, : latents.shape[1]]

    def velocity(latents: Tensor, t: Tensor) -> Tensor:
        conditional = forward(latents, t)
        if call.guidance_scale <= 1:
            return conditional
        negative = forward(latents, t, NEGATIVE)
        guided = negative + call.guidance_scale * (conditional - negative)
        norms = (torch.norm(v, dim=-1, keepdim=True) for v in (conditional, guided))
        return guided * (next(norms) / next(norms))

    return velocity


def _klein_ids(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """(T, H, W, L) of text, state and reference."""

    def grid(time: int, height: int, width: int, length: int) -> Tensor:
        sides = (torch.tensor([time]), *(torch.arange(side) for side in (height, width, length)))
        return torch.cartesian_prod(*sides).to(call.editor.device)

    text = grid(0, 1, 1, call.text["embeds"].shape[1])
    return text, grid(0, *call.grid(call.size), 1), grid(10, *call.grid(call.reference_size), 1)


def full_attention(call: Call) -> Velocity:
    """Klein (distilled, so without guidance): everything sees everything."""
    text_ids, own, reference = _klein_ids(call)
    ids = torch.cat([own, reference])

    def velocity(latents: Tensor, t: Tensor) -> Tensor:
        return call.transformer(
            hidden_states=torch.cat([latents, call.references], dim=1),
            timestep=call.timestep(t),
            guidance=None,
            encoder_hidden_states=call.text["embeds"],
            txt_ids=text_ids,
            img_ids=ids,
            return_dict=False,
        )[0][:, : latents.shape[1]]

    return velocity


def extracting(call: Call) -> Velocity:
    """Klein-KV's pipeline: the first step runs the references of every sample along and keeps their keys and values."""
    text_ids, own, reference = _klein_ids(call)
    joint = torch.cat([reference, own])
    cache: Any = None

    def velocity(latents: Tensor, t: Tensor) -> Tensor:
        nonlocal cache
        inputs = {
            "timestep": call.timestep(t),
            "guidance": None,
            "encoder_hidden_states": call.text["embeds"],
            "txt_ids": text_ids,
            "return_dict": False,
        }
        if cache is None:
            prediction, cache = call.transformer(
                hidden_states=torch.cat([call.references, latents], dim=1),
                img_ids=joint,
                kv_cache_mode="extract",
                num_ref_tokens=call.references.shape[1],
                **inputs,
            )
            return prediction
        return call.transformer(hidden_states=latents, img_ids=own, kv_cache=cache, kv_cache_mode="cached", **inputs)[0]

    return velocity


def stock_call(editor: Any) -> Callable[[Call], Velocity]:
    """What the stock pipeline of the editor's family does."""
    calls = {KontextEditor: kontext, QwenEditor: qwen, KleinKVEditor: extracting, KleinEditor: full_attention}
    return next(call for kind, call in calls.items() if isinstance(editor, kind))


def sde_step_with_logprob(
    sigmas: Tensor,
    timesteps: Tensor,
    velocity: Tensor,
    t: Tensor,
    sample: Tensor,
    noise_level: float,
    noise: Tensor | None = None,
    prev_sample: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(next sample fp32, log-prob [b]) of Flow-GRPO's step (arXiv 2505.05470), one full-tensor operation at a time.

    Each row's step is looked up by comparing its timestep with all others, which waits for the device twice.

    Args:
        t: [b] of `timesteps`.
        noise_level: η; at 0 the log-prob is NaN.
    """
    velocity, sample = velocity.float(), sample.float()
    index = [(timesteps == own).nonzero()[0].item() for own in t]
    shape = (-1, *[1] * (sample.ndim - 1))
    sigma = sigmas[index].view(shape)
    after = sigmas[[i + 1 for i in index]].view(shape)
    second = sigmas[1].item()
    dt = after - sigma
    std = torch.sqrt(sigma / (1 - torch.where(sigma == 1, second, sigma))) * noise_level
    mean = sample * (1 + std**2 / (2 * sigma) * dt) + velocity * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    scale = std * torch.sqrt(-1 * dt)
    if prev_sample is None:
        prev_sample = mean + scale * (torch.randn_like(mean) if noise is None else noise)
    log_prob = (
        -((prev_sample.detach().float() - mean) ** 2) / (2 * scale**2)
        - torch.log(scale)
        - torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))
    )
    return prev_sample, log_prob.mean(dim=tuple(range(1, log_prob.ndim)))


@dataclass(frozen=True)
class Turn:
    """One call's outcome: b images as PIL, states [b, T+1, N, C] in the model's dtype, log-probs [b, T] fp32."""

    images: list[Image.Image]
    latents: Tensor
    log_probs: Tensor


class RolloutLoop:
    """Called, it samples `config.group_size` trajectories for every prompt: [B][K] `Turn`s by batches of repeats.

    Args:
        batch: repeats to a pipeline call.
        call: of the pipeline; default: the stock one.
        noise: instead of torch.randn.
        codec: how images travel between turns: "JPEG", or "PNG", which loses nothing.
    """

    def __init__(
        self,
        editor: Any,
        config: RolloutConfig,
        *,
        batch: int = 1,
        call: Callable[[Call], Velocity] | None = None,
        noise: Noise | None = None,
        codec: str = "JPEG",
    ):
        self.editor, self.config, self.batch, self.codec = editor, config, batch, codec
        self.call, self.noise = call or stock_call(editor), noise

    @torch.no_grad()
    def __call__(self, references: Tensor, instructions: list[list[str]]) -> list[list[Turn]]:
        group = self.config.group_size
        return [
            self.trajectories(references[prompt], texts, slice(prompt * group + rows.start, prompt * group + rows.stop))
            for prompt, texts in enumerate(instructions)
            for rows in slices(group, self.batch)
        ]

    def trajectories(self, reference: Tensor, instructions: list[str], rows: slice) -> list[Turn]:
        """All turns of one batch of repeats of one prompt."""
        images, turns = [to_pil(reference)] * (rows.stop - rows.start), []
        for turn, instruction in enumerate(instructions):
            turns.append(self.turn(images, instruction, rows, turn))
            images = [travelled(image, self.codec) for image in turns[-1].images]
        return turns

    def turn(self, images: list[Image.Image], instruction: str, rows: slice, turn: int) -> Turn:
        editor, config = self.editor, self.config
        width, height = images[0].size
        velocity = self.call(self.prepared(images, instruction))
        schedule = editor.schedule(config.num_steps, height, width)
        shape = torch.Size((len(images), *editor.latent_shape(height, width)))

        def draw(number: int) -> Tensor | None:
            return None if self.noise is None else self.noise(rows, turn, number, shape)

        first = draw(0)
        latents = (torch.randn(shape, device=editor.device) if first is None else first).to(editor.dtype)
        states, log_probs = [latents], []
        for step, t in enumerate(schedule.timesteps):
            prediction = velocity(latents, t)
            level = config.eta if step in config.sde_steps() else 0.0
            after, log_prob = sde_step_with_logprob(
                schedule.sigmas, schedule.timesteps, prediction, t.expand(len(latents)), latents, level, draw(step + 1)
            )
            latents = after.to(editor.dtype)  # after the log-prob was taken
            states.append(latents)
            log_probs.append(log_prob)
        decoded = editor.decode(latents, height, width)
        return Turn([to_pil(image) for image in decoded], torch.stack(states, dim=1), torch.stack(log_probs, dim=1))

    def prepared(self, images: list[Image.Image], instruction: str) -> Call:
        """Everything that a call encodes."""
        editor, (width, height) = self.editor, images[0].size
        size = self.config.reference_size or (height, width)
        pixels = torch.stack([to_tensor(image.resize(size[::-1], Image.Resampling.BICUBIC)) for image in images])
        prompts = [instruction] * len(images)
        text = editor.encode_text(prompts, pixels) if editor.text_sees_image else editor.encode_text(prompts)
        references = editor.encode_image(pixels.to(editor.device)).to(editor.dtype)
        return Call(editor, references, text, (height, width), size, self.config.guidance_scale)


def to_pil(image: Tensor) -> Image.Image:
    """Of [3, H, W] in [0, 1], rounded to 8 bits."""
    return Image.fromarray((image.permute(1, 2, 0).cpu().numpy() * 255).round().astype("uint8"))


def to_tensor(image: Image.Image) -> Tensor:
    """[3, H, W] fp32 in [0, 1]."""
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255).permute(2, 0, 1)


def travelled(image: Image.Image, codec: str) -> Image.Image:
    """Encoded, sent and decoded."""
    buffer = io.BytesIO()
    image.save(buffer, format=codec)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
