"""Group rollouts over K turns, and the exact replay of their steps.

For turn k of K: fresh noise, T denoising steps conditioned on the previous turn's image and instruction k, decode,
round to 8 bit, and the image becomes the next turn's reference. A group is G such trajectories of one
(reference image, instructions) pair. Only the steps of the SDE window carry a log-probability and are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtedit_fast.editors.base import Editor, TextConditioning, group_rows
from mtedit_fast.ops import SDECoefficients, SDEStepOutput, sde_coefficients, sde_step, seeded_noise

_GOLDEN = 0x9E3779B97F4A7C15  # 2⁶⁴/φ: successive turns get well-spread Philox keys


@dataclass(frozen=True)
class RolloutConfig:
    """How trajectories are sampled.

    Attributes:
        group_size: trajectories per (reference, instructions), G.
        num_steps: denoising steps per turn, T.
        variant: SDE variant of `ops.sde_coefficients`; "ode" for evaluation.
        eta: noise level η of the SDE steps.
        window: (start, stop) of the stochastic steps, 0 ≤ start < stop ≤ T; the others are ODE steps.
            None: all but the last step, whose Gaussian is too sharp to train on.
        micro_batch: samples per transformer forward; the shape in which the exact replay runs, too.
        guidance_scale: embedded guidance.
        latent_chain: feed a turn's latents to the next one without decode → 8 bit → encode (numerically different).
        keep_means: store the step means as well (GRPO-Guard needs them).
        state_dtype: storage dtype of the latents; log-probs are taken on the stored values.
    """

    group_size: int = 8
    num_steps: int = 6
    variant: str = "sde"
    eta: float = 0.7
    window: tuple[int, int] | None = None
    micro_batch: int = 32
    guidance_scale: float = 3.5
    latent_chain: bool = False
    keep_means: bool = False
    state_dtype: torch.dtype = torch.float32

    def sde_steps(self) -> range:
        """The stochastic steps; empty for the ODE."""
        if self.variant == "ode" or self.eta == 0:
            return range(0)
        start, stop = self.window or (0, self.num_steps - 1)
        if not 0 <= start < stop <= self.num_steps:
            raise ValueError(
                f"window: expected 0 <= start < stop <= num_steps ({self.num_steps}), got ({start}, {stop}); "
                "num_steps must be at least 2 for window=None"
            )
        return range(start, stop)


@dataclass
class Trajectories:
    """B = P·G trajectories (group-major) of K turns with S stored SDE steps.

    Attributes:
        latents: [B, K, S+1, N, C], the states before each stored step and after the last one.
        log_probs: [B, K, S] fp32, taken at rollout.
        means: [B, K, S, N, C] fp32 or None.
        reference_latents: [P, N, C] for turn 0 and [B, K-1, N, C] for the later turns.
        images: [B, K, 3, H, W] fp32 in [0, 1], rounded to 8 bit.
        finite: [B, K, T] bool, False where the transformer's output held a NaN or infinity.
    """

    config: RolloutConfig
    height: int
    width: int
    coefficients: SDECoefficients
    sigmas: Tensor
    timesteps: Tensor
    text: list[TextConditioning]
    first_references: Tensor
    later_references: Tensor
    latents: Tensor
    log_probs: Tensor
    means: Tensor | None
    images: Tensor
    finite: Tensor
    steps: range = field(default_factory=lambda: range(0))

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def turns(self) -> int:
        return self.images.shape[1]

    @property
    def groups(self) -> Tensor:
        """[B] int64, the group of each trajectory."""
        return torch.arange(len(self), device=self.images.device) // self.config.group_size

    def micro_batches(self) -> Iterator[slice]:
        """The row slices that went through the transformer together."""
        yield from _slices(len(self), self.config.micro_batch)

    def references(self, rows: slice, turn: int) -> Tensor:
        """Reference latents [b, N, C] of `rows` at `turn`."""
        if turn == 0:
            return group_rows(self.first_references, rows.start, rows.stop, self.config.group_size)
        return self.later_references[rows, turn - 1]

    def text_rows(self, rows: slice, turn: int) -> TextConditioning:
        return _text_rows(self.text[turn], rows, self.config.group_size)

    def step_constants(self, rows: slice, steps: range) -> tuple[Tensor, Tensor]:
        """(σ' − σ, std) of stored `steps` for `rows`, [s·b] each, step-major as `replay` returns them."""
        first, size = self.steps[steps.start], rows.stop - rows.start
        index = torch.arange(first, first + len(steps), device=self.sigmas.device).repeat_interleave(size)
        return self.sigmas[index + 1] - self.sigmas[index], self.coefficients.table[index, 3]

    def raise_if_not_finite(self) -> None:
        """ValueError naming (sample, turn, step) of every non-finite velocity. Synchronises with the device once."""
        if bool(self.finite.all()):
            return
        bad = (~self.finite).nonzero().tolist()
        raise ValueError(
            f"velocity: expected finite model outputs, got NaN or infinity first at (sample, turn, step) {bad[:5]}"
            f"{' …' if len(bad) > 5 else ''}, {len(bad)} in all; lower the learning rate or go back to a checkpoint"
        )


def sample_seeds(seed: int, iteration: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """[count] int64 Philox keys, a pure function of (seed, iteration, index): splitmix64 of the three.

    Needing no generator state, a resumed run draws what the uninterrupted one would have drawn.
    """
    mask = (1 << 64) - 1

    def mix(z: int) -> int:
        z = (z + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    base = mix(mix(seed) ^ iteration)
    return torch.tensor([_int64(mix(base ^ index)) for index in range(count)], device=device)


def _int64(value: int) -> int:
    """`value` modulo 2⁶⁴, as a signed integer."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


@torch.no_grad()
def rollout(
    editor: Editor,
    references: Tensor,
    instructions: list[list[str]],
    config: RolloutConfig,
    seeds: Tensor,
    *,
    timer: Callable[[str], AbstractContextManager[None]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Trajectories:
    """Sample G trajectories of K turns for each of P prompts, without a host sync in the step loop.

    Args:
        editor: the model; its current weights are the old policy.
        references: [P, 3, H, W] images in [0, 1].
        instructions: P lists of K instructions.
        config: see `RolloutConfig`.
        seeds: int64 [P·G], one per trajectory; noise depends on it alone, not on the batch split.
        timer: phase context manager such as `PhaseTimer`; phases "encode", "denoise", "decode".
        progress: called with the number of samples finished after every turn of a micro-batch.

    Returns:
        Trajectories. Check `raise_if_not_finite()` after the loop: a NaN is flagged, never a sync.

    Raises:
        ValueError: shapes that do not agree, or unequal numbers of turns.
    """
    timer = timer or (lambda phase: nullcontext())
    steps, turns = config.sde_steps(), _check_inputs(references, instructions, config, seeds)
    prompts, _, height, width = references.shape
    batch, device = prompts * config.group_size, editor.device
    tokens, channels = editor.latent_shape(height, width)
    schedule = editor.schedule(config.num_steps, height, width)
    stored = len(steps)

    with timer("encode"):  # once per group
        text = [editor.encode_text([prompt[turn] for prompt in instructions]) for turn in range(turns)]
        first = torch.cat([editor.encode_image(references[rows]) for rows in _slices(prompts, config.micro_batch)])
    trajectories = Trajectories(
        config=config,
        height=height,
        width=width,
        coefficients=sde_coefficients(
            schedule.sigmas.cpu(),
            variant=config.variant if stored else "ode",
            eta=config.eta,
            sde_steps=steps if stored else None,
            device=device,
        ),
        sigmas=schedule.sigmas,
        timesteps=schedule.timesteps,
        text=text,
        first_references=first,
        later_references=first.new_empty(batch, turns - 1, tokens, channels),
        latents=torch.empty(batch, turns, stored + 1, tokens, channels, device=device, dtype=config.state_dtype),
        log_probs=torch.empty(batch, turns, stored, device=device),
        means=torch.empty(batch, turns, stored, tokens, channels, device=device) if config.keep_means else None,
        images=torch.empty(batch, turns, 3, height, width, device=device),
        finite=torch.empty(batch, turns, config.num_steps, device=device, dtype=torch.bool),
        steps=steps,
    )
    for rows in trajectories.micro_batches():
        for turn in range(turns):
            with timer("denoise"):
                keys = seeds[rows].to(device) + _int64(turn * _GOLDEN)
                latents = _denoise(editor, trajectories, rows, turn, keys)
            with timer("decode"):
                image = (editor.decode(latents, height, width) * 255).round() / 255
                trajectories.images[rows, turn] = image
            if turn + 1 < turns:
                with timer("encode"):
                    trajectories.later_references[rows, turn] = (
                        latents.to(first.dtype) if config.latent_chain else editor.encode_image(image)
                    )
            if progress:
                progress(len(latents))
    return trajectories


def replay(
    editor: Editor,
    trajectories: Trajectories,
    rows: slice,
    turn: int,
    steps: range,
    *,
    return_mean: bool = True,
) -> SDEStepOutput:
    """Log-probs of stored steps under the editor's current weights, with gradient.

    One stored step in one of the rollout's own micro-batches repeats the rollout's arithmetic bit for bit: with
    unchanged weights the log-prob equals the stored one exactly. Several steps go through one forward together;
    the shape then differs, and the log-probs agree up to the model's batch noise.

    Args:
        rows: trajectories, a slice of the batch; from `micro_batches()` for exactness.
        turn: 0 … K−1.
        steps: positions 0 … S−1 within the stored window, contiguous.
        return_mean: False leaves `mean` empty, for objectives that need only the log-prob.

    Returns:
        SDEStepOutput with `log_prob` [b·s] and `mean` [b·s, N, C], step-major.
    """
    count, group_size = len(steps), trajectories.config.group_size
    before = trajectories.latents[rows, turn, steps.start : steps.stop]  # [b, s, N, C]
    after = trajectories.latents[rows, turn, steps.start + 1 : steps.stop + 1]
    references, text = trajectories.references(rows, turn), _text_rows(trajectories.text[turn], rows, group_size)
    first = trajectories.steps[steps.start]
    index: int | Tensor = first
    timestep = trajectories.timesteps[first]
    if count > 1:
        size = before.shape[0]
        index = torch.arange(first, first + count, device=before.device).repeat_interleave(size)
        timestep = trajectories.timesteps[index]
        references = references.repeat(count, 1, 1)
        text = {name: rows_.repeat(count, *[1] * (rows_.ndim - 1)) for name, rows_ in text.items()}
    before = before.transpose(0, 1).flatten(0, 1)  # step-major [s·b, N, C]
    after = after.transpose(0, 1).flatten(0, 1)
    velocity = _velocity(editor, trajectories, before, timestep, references, text)
    return sde_step(before, velocity, trajectories.coefficients, index, prev_sample=after, return_mean=return_mean)


def _denoise(editor: Editor, trajectories: Trajectories, rows: slice, turn: int, keys: Tensor) -> Tensor:
    config, steps = trajectories.config, trajectories.steps
    references, text = trajectories.references(rows, turn), trajectories.text_rows(rows, turn)
    latents = seeded_noise(keys, references.shape[1:], 0).to(config.state_dtype)
    for step in range(config.num_steps):
        position = step - steps.start
        stored = step in steps
        if stored and position == 0:
            trajectories.latents[rows, turn, 0] = latents
        velocity = _velocity(editor, trajectories, latents, trajectories.timesteps[step], references, text)
        trajectories.finite[rows, turn, step] = velocity.flatten(1).sum(1, dtype=torch.float32).isfinite()
        out = sde_step(latents, velocity, trajectories.coefficients, step, seed=keys, return_mean=config.keep_means)
        latents = out.prev_sample
        if stored:
            trajectories.latents[rows, turn, position + 1] = latents
            assert out.log_prob is not None  # the stored steps are the stochastic ones
            trajectories.log_probs[rows, turn, position] = out.log_prob
            if trajectories.means is not None:
                trajectories.means[rows, turn, position] = out.mean
    return latents


def _velocity(
    editor: Editor,
    trajectories: Trajectories,
    latents: Tensor,
    timestep: Tensor,
    references: Tensor,
    text: TextConditioning,
) -> Tensor:
    return editor.velocity(
        latents,
        timestep,
        references,
        text,
        height=trajectories.height,
        width=trajectories.width,
        guidance_scale=trajectories.config.guidance_scale,
    )


def _text_rows(text: TextConditioning, rows: slice, group_size: int) -> TextConditioning:
    return {name: group_rows(tensor, rows.start, rows.stop, group_size) for name, tensor in text.items()}


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _check_inputs(references: Tensor, instructions: list[list[str]], config: RolloutConfig, seeds: Tensor) -> int:
    if references.ndim != 4 or references.shape[1] != 3:
        raise ValueError(f"references: expected [P, 3, H, W], got {list(references.shape)}")
    if len(instructions) != len(references):
        raise ValueError(f"instructions: expected one list per reference ({len(references)}), got {len(instructions)}")
    turns = {len(prompt) for prompt in instructions}
    if len(turns) != 1 or turns == {0}:
        raise ValueError(f"instructions: expected equally many turns (at least 1) in every list, got {sorted(turns)}")
    if config.group_size < 1 or config.micro_batch < 1:
        raise ValueError(f"group_size, micro_batch: expected >= 1, got {config.group_size}, {config.micro_batch}")
    expected = len(references) * config.group_size
    if seeds.dtype != torch.int64 or seeds.shape != (expected,):
        raise ValueError(
            f"seeds: expected int64 [{expected}] (prompts × group_size), got {seeds.dtype} {list(seeds.shape)}; "
            "see sample_seeds"
        )
    return turns.pop()
