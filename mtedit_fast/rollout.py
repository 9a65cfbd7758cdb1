"""Group rollouts over K turns, and the replay of their steps.

Turn k edits the decoded image of turn k−1 from fresh noise. Text, reference latents and the schedule are computed
once per group, what the steps of a turn share once per turn. Only the SDE steps carry a log-probability and are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from mtedit_fast.editors.base import Condition, Editor, TextConditioning
from mtedit_fast.ops import SDEStepOutput, sde_coefficients, sde_step, seeded_noise
from mtedit_fast.sampling.multistep import dpm2m_coefficients, dpm2m_step
from mtedit_fast.trajectories import RolloutConfig, Rows, Trajectories, slices

__all__ = ["RolloutConfig", "Trajectories", "replay", "rollout", "sample_seeds", "turn_seeds"]

_GOLDEN = 0x9E3779B97F4A7C15  # 2⁶⁴/φ: successive turns get well-spread Philox keys


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


def turn_seeds(seeds: Tensor, turn: int) -> Tensor:
    """The Philox keys of one turn, [B] int64, from those of the trajectories."""
    return seeds + _int64(turn * _GOLDEN)


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
    on_finished: Callable[[slice, Tensor], None] | None = None,
) -> Trajectories:
    """Sample G trajectories of K turns for each of P prompts, without a host sync in the step loop of a turn.

    Args:
        editor: the model; its current weights are the old policy.
        references: [P, 3, H, W] images in [0, 1].
        instructions: P lists of K instructions.
        config: see `RolloutConfig`.
        seeds: int64 [P·G], one per trajectory; noise depends on it alone, not on the batch split.
        timer: phase context manager such as `PhaseTimer`; phases "encode", "denoise", "decode".
        progress: called with the number of samples finished after every turn of a micro-batch.
        on_finished: called with the rows of whole groups and their images [b, K, 3, H, W], as soon as all their turns
            are there, so that rewards can be computed while sampling goes on.

    Returns:
        Trajectories. Check `raise_if_not_finite()` after the loop: a NaN is flagged, never a sync.

    Raises:
        ValueError: shapes that do not agree, or unequal numbers of turns.
    """
    timer = timer or (lambda phase: nullcontext())
    turns, seeds = _check_inputs(references, instructions, config, seeds), seeds.to(editor.device)
    with timer("encode"):  # once per group
        trajectories = _allocate(editor, references, instructions, config, seeds, turns)
    handed_over = 0
    for rows in trajectories.micro_batches():
        for turn in range(turns):
            with timer("denoise"):
                condition = trajectories.condition(editor, rows, turn)
                latents = _denoise(editor, trajectories, rows, turn, condition, turn_seeds(seeds[rows], turn))
            with timer("decode"):
                image = (editor.decode(latents, trajectories.height, trajectories.width) * 255).round() / 255
                trajectories.images[rows, turn] = image
            if turn + 1 < turns:
                with timer("encode"):
                    following = latents if config.latent_chain else encode_reference(editor, image, config)
                    trajectories.references[rows, turn + 1] = following.to(trajectories.references.dtype)
                    if editor.text_sees_image:
                        prompts = [instructions[row // config.group_size][turn + 1] for row in _range(rows)]
                        for name, value in editor.encode_text(prompts, image).items():
                            trajectories.text[turn + 1][name][rows] = value
            if progress:
                progress(len(latents))
        complete = rows.stop // config.group_size * config.group_size
        if on_finished and complete > handed_over:
            finished = slice(handed_over, complete)
            on_finished(finished, trajectories.images[finished])
            handed_over = complete
    return trajectories


def replay(
    editor: Editor,
    trajectories: Trajectories,
    rows: Rows,
    turn: int,
    positions: int | Tensor,
    *,
    return_mean: bool = True,
) -> SDEStepOutput:
    """Log-probs of stored steps under the editor's current weights, with gradient.

    All rows of one of the rollout's own micro-batches at one stored step repeat the rollout's arithmetic bit for bit:
    with unchanged weights the log-prob equals the stored one exactly. Any other selection runs in another shape, and
    its log-probs agree up to the model's batch noise.

    Args:
        rows: n trajectories; a slice from `micro_batches()` for exactness.
        turn: 0 … K−1.
        positions: 0 … S−1 within the stored window, one for all rows or int64 [n].
        return_mean: False leaves `mean` empty, for objectives that need only the log-prob.

    Returns:
        SDEStepOutput with `log_prob` [n] and `mean` [n, N, C].
    """
    before = trajectories.latents[rows, turn, positions]  # [n, N, C]
    after = trajectories.latents[rows, turn, positions + 1]
    step = positions + trajectories.steps.start
    velocity = trajectories.velocity(editor, before, trajectories.timesteps[step], rows, turn)
    return sde_step(before, velocity, trajectories.coefficients, step, prev_sample=after, return_mean=return_mean)


def _allocate(
    editor: Editor,
    references: Tensor,
    instructions: list[list[str]],
    config: RolloutConfig,
    seeds: Tensor,
    turns: int,
) -> Trajectories:
    """Everything the groups share, computed, and room for the rest."""
    prompts, _, height, width = references.shape
    batch, stored, device = prompts * config.group_size, len(config.sde_steps()), editor.device
    tokens, channels = editor.latent_shape(height, width)
    schedule = editor.schedule(config.num_steps, height, width)
    states = stored + 1 if stored else 0
    first = torch.cat(
        [encode_reference(editor, references[rows], config) for rows in slices(prompts, config.micro_batch)]
    )
    group = torch.arange(batch, device=device) // config.group_size
    text = _shared_text(editor, references, instructions)
    if editor.text_sees_image:  # from the second turn on everyone's is another
        text[0] = {name: value[group] for name, value in text[0].items()}
        text += [{name: torch.empty_like(value) for name, value in text[0].items()} for _ in range(1, turns)]

    def state(*shape: int) -> Tensor:
        return torch.empty(batch, turns, *shape, tokens, channels, device=device, dtype=config.state_dtype)

    trajectories = Trajectories(
        config=config,
        height=height,
        width=width,
        coefficients=sde_coefficients(
            schedule.sigmas.cpu(),
            variant=config.variant if stored else "ode",
            eta=config.eta,
            sde_steps=config.sde_steps() or None,
            device=device,
        ),
        schedule=schedule.sigmas.tolist(),
        sigmas=schedule.sigmas,
        timesteps=schedule.timesteps,
        steps=config.sde_steps(),
        text=text,
        prompt=torch.arange(batch, device=device) if editor.text_sees_image else group,
        group=group,
        seeds=seeds,
        references=first.new_empty(batch, turns, *first.shape[1:]),
        latents=state(states),
        clean=state(),
        log_probs=torch.empty(batch, turns, stored, device=device),
        means=torch.empty(batch, turns, stored, tokens, channels, device=device) if config.keep_means else None,
        estimates=state(states) if config.keep_estimates else None,
        images=torch.empty(batch, turns, 3, height, width, device=device),
        finite=torch.empty(batch, turns, config.num_steps, device=device, dtype=torch.bool),
    )
    trajectories.references[:, 0] = first[group]
    return trajectories


def encode_reference(editor: Editor, images: Tensor, config: RolloutConfig) -> Tensor:
    """[B, M, C] of images [B, 3, H, W], brought to `reference_size`."""
    size = config.reference_size
    if size is not None and size != tuple(images.shape[-2:]):
        images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
    return editor.encode_image(images)


def _shared_text(editor: Editor, references: Tensor, instructions: list[list[str]]) -> list[TextConditioning]:
    """The text of the turns whose prompts all members of a group share: all, or the first if text sees the images."""
    if editor.text_sees_image:
        return [editor.encode_text([prompt[0] for prompt in instructions], references.to(editor.device))]
    return [editor.encode_text(list(prompts)) for prompts in zip(*instructions, strict=True)]


def _range(rows: slice) -> range:
    return range(rows.start, rows.stop)


def _denoise(
    editor: Editor, trajectories: Trajectories, rows: slice, turn: int, condition: Condition, keys: Tensor
) -> Tensor:
    """One turn of one micro-batch from fresh noise, recording what the objective needs; returns the final state."""
    config, steps, means = trajectories.config, trajectories.steps, trajectories.means
    latents = seeded_noise(keys, trajectories.clean.shape[2:], 0).to(config.state_dtype)
    solver = dpm2m_coefficients(trajectories.schedule) if config.variant == "dpm2m" else None
    previous: Tensor | None = None  # the last clean estimate, which the multistep solver extrapolates from
    for step in range(config.num_steps):
        position, stored = step - steps.start, step in steps
        if stored and position == 0:
            trajectories.latents[rows, turn, 0] = latents
        velocity = editor.velocity(latents, trajectories.timesteps[step], condition)
        trajectories.finite[rows, turn, step] = velocity.flatten(1).sum(1, dtype=torch.float32).isfinite()
        if trajectories.estimates is not None and 0 <= position < trajectories.estimates.shape[2]:
            trajectories.estimates[rows, turn, position] = _clean_estimate(trajectories, latents, velocity, step)
        if solver is not None:
            estimate = _clean_estimate(trajectories, latents, velocity, step)
            latents = dpm2m_step(latents, velocity, previous, solver[step]).to(config.state_dtype)
            previous = estimate
            continue
        out = sde_step(latents, velocity, trajectories.coefficients, step, seed=keys, return_mean=config.keep_means)
        latents = out.prev_sample
        if stored:
            trajectories.latents[rows, turn, position + 1] = latents
            assert out.log_prob is not None  # the stored steps are the stochastic ones
            trajectories.log_probs[rows, turn, position] = out.log_prob
            if means is not None:
                means[rows, turn, position] = out.mean
    if trajectories.estimates is not None and steps.stop == config.num_steps:
        trajectories.estimates[rows, turn, -1] = latents
    trajectories.clean[rows, turn] = latents
    return latents


def _clean_estimate(trajectories: Trajectories, latents: Tensor, velocity: Tensor, step: int) -> Tensor:
    return latents.float() - trajectories.schedule[step] * velocity.float()


def _check_inputs(references: Tensor, instructions: list[list[str]], config: RolloutConfig, seeds: Tensor) -> int:
    if not isinstance(references, Tensor):
        sizes = sorted({f"{image.shape[-2]}×{image.shape[-1]}" for image in references})
        raise TypeError(
            f"references: expected one tensor [P, 3, H, W], got a {type(references).__name__} of sizes "
            f"{', '.join(sizes)}; resize them to one size and stack them, or roll each size out on its own"
        )
    if references.ndim != 4 or references.shape[1] != 3:
        raise ValueError(f"references: expected [P, 3, H, W], got {list(references.shape)}")
    if len(instructions) != len(references):
        raise ValueError(f"instructions: expected one list per reference ({len(references)}), got {len(instructions)}")
    turns = {len(prompt) for prompt in instructions}
    if len(turns) != 1 or turns == {0}:
        raise ValueError(f"instructions: expected equally many turns (at least 1) in every list, got {sorted(turns)}")
    if config.latent_chain and config.reference_size not in (None, tuple(references.shape[-2:])):
        raise ValueError(
            f"reference_size: expected None or the edit's {tuple(references.shape[-2:])} with latent_chain, which does "
            f"not come back to pixels, got {config.reference_size}"
        )
    if config.group_size < 1 or config.micro_batch < 1:
        raise ValueError(f"group_size, micro_batch: expected >= 1, got {config.group_size}, {config.micro_batch}")
    expected = len(references) * config.group_size
    if seeds.dtype != torch.int64 or seeds.shape != (expected,):
        raise ValueError(
            f"seeds: expected int64 [{expected}] (prompts × group_size), got {seeds.dtype} {list(seeds.shape)}; "
            "see sample_seeds"
        )
    return turns.pop()
