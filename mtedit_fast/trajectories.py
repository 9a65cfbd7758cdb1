"""What a rollout is asked for and what it leaves behind: `RolloutConfig` and `Trajectories`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mtedit_fast.editors.base import Condition, Editor, TextConditioning
from mtedit_fast.ops import SDECoefficients

Rows = slice | Tensor  # trajectories: a slice, or int64 indices [n]


@dataclass(frozen=True)
class RolloutConfig:
    """How trajectories are sampled.

    Attributes:
        group_size: trajectories per (reference, instructions), G.
        num_steps: denoising steps per turn, T.
        variant: SDE variant of `ops.sde_coefficients`; deterministic: "ode" (Euler) or "dpm2m" (DPM-Solver++ 2M).
        eta: noise level η of the SDE steps.
        window: (start, stop) of the stochastic steps, 0 ≤ start < stop ≤ T; the others are ODE steps.
            None: all but the last step, whose Gaussian is too sharp to train on.
        micro_batch: samples per transformer forward; the shape in which the exact replay runs, too.
        guidance_scale: embedded guidance.
        reference_size: (height, width) in pixels that references are brought to; None: the edit's. A smaller one saves
            most of what a step costs where the model was trained on references larger than its images.
        latent_chain: feed a turn's latents to the next one without decode → 8 bit → encode (numerically different).
        keep_means: store the step means as well (GRPO-Guard needs them).
        keep_estimates: store the clean estimate x − σv at every stored state (step-wise rewards need them).
        state_dtype: storage dtype of the latents; log-probs are taken on the stored values.
    """

    group_size: int = 8
    num_steps: int = 6
    variant: str = "sde"
    eta: float = 0.7
    window: tuple[int, int] | None = None
    micro_batch: int = 32
    guidance_scale: float = 3.5
    reference_size: tuple[int, int] | None = None
    latent_chain: bool = False
    keep_means: bool = False
    keep_estimates: bool = False
    state_dtype: torch.dtype = torch.float32

    def sde_steps(self) -> range:
        """The stochastic steps; empty for a deterministic solver."""
        if self.variant in ("ode", "dpm2m") or self.eta == 0:
            return range(0)
        start, stop = self.window or (0, self.num_steps - 1)
        last = self.num_steps - (self.variant in ("cps", "ddim"))  # whose step to σ = 0 has no noise
        if not 0 <= start < stop <= last:
            raise ValueError(
                f"window: expected 0 <= start < stop <= {last} of {self.num_steps} {self.variant} steps, got "
                f"({start}, {stop}); num_steps must be at least 2 for window=None"
            )
        return range(start, stop)


@dataclass
class Trajectories:
    """B trajectories of K turns with S stored SDE steps; a fresh rollout's are group-major, B = P·G.

    Attributes:
        schedule: the T+1 sigmas as the host knows them; `sigmas` holds them on the device.
        text: K conditionings with one row per prompt; per trajectory where the text encoder sees the images.
        prompt: [B] int64, the row of `text` that each trajectory was edited by.
        group: [B] int64, trajectories with the same reference image and instructions share one.
        seeds: [B] int64, the noise's Philox keys.
        references: [B, K, M, C], the packed latents of the image each turn edits.
        latents: [B, K, S+1, N, C], the states before each stored step and after the last one; [B, K, 0, N, C] when
            nothing is stored.
        clean: [B, K, N, C], the final state of every turn.
        log_probs: [B, K, S] fp32, taken at rollout.
        means: [B, K, S, N, C] fp32 or None.
        estimates: [B, K, S+1, N, C], x − σv at the states of `latents`, or None.
        images: [B, K, 3, H, W] fp32 in [0, 1], rounded to 8 bit.
        finite: [B, K, T] bool, False where the transformer's output held a NaN or infinity.
    """

    config: RolloutConfig
    height: int
    width: int
    coefficients: SDECoefficients
    schedule: list[float]
    sigmas: Tensor
    timesteps: Tensor
    steps: range
    text: list[TextConditioning]
    prompt: Tensor
    group: Tensor
    seeds: Tensor
    references: Tensor
    latents: Tensor
    clean: Tensor
    log_probs: Tensor
    means: Tensor | None
    estimates: Tensor | None
    images: Tensor
    finite: Tensor

    def __len__(self) -> int:
        return self.clean.shape[0]

    @property
    def turns(self) -> int:
        return self.clean.shape[1]

    def to(self, device: torch.device | str) -> Trajectories:
        """The same on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Trajectories(**tree_map_only(Tensor, lambda tensor: tensor.to(device), values))

    def micro_batches(self) -> Iterator[slice]:
        """The row slices that went through the transformer together."""
        yield from slices(len(self), self.config.micro_batch)

    def text_rows(self, rows: Rows, turn: int) -> TextConditioning:
        """Conditioning of `turn` with one row per trajectory."""
        prompt = self.prompt[rows]
        return {name: tensor.index_select(0, prompt) for name, tensor in self.text[turn].items()}

    def condition(self, editor: Editor, rows: Rows, turn: int, copies: int = 1) -> Condition:
        """What the velocity of `rows`, stacked `copies` times along the batch, depends on besides state and time."""
        references, text = self.references[rows, turn], self.text_rows(rows, turn)
        if copies > 1:
            references = references.repeat(copies, 1, 1)
            text = {name: tensor.repeat(copies, *[1] * (tensor.ndim - 1)) for name, tensor in text.items()}
        return editor.condition(
            references,
            text,
            height=self.height,
            width=self.width,
            guidance_scale=self.config.guidance_scale,
            reference_size=self.config.reference_size,
        )

    def velocity(self, editor: Editor, latents: Tensor, timestep: Tensor, rows: Rows, turn: int) -> Tensor:
        """Model output for `latents` [n, N, C] at `timestep` ([] or [n]) under the conditioning of `rows` (n of them,
        or n a multiple of their number: then the rows repeat)."""
        count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        return editor.velocity(latents, timestep, self.condition(editor, rows, turn, len(latents) // max(count, 1)))

    def step_constants(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(σ' − σ, the scale c of the noise, flow_grpo's std_dev_t), [n] fp32 each, of the stored steps at `positions`
        [n]. std_dev_t is c for every variant but sde, where it is c/√(−dt)."""
        index = positions + self.steps.start
        _, _, scale, std = self.coefficients.table[index].unbind(1)
        return self.sigmas[index + 1] - self.sigmas[index], scale, std

    def learning_rows(self, rows: Tensor) -> dict[str, Tensor]:
        """What an update reads of the trajectories at int64 `rows` [n]: every field with a row each, but no images."""
        names = ("prompt", "group", "seeds", "references", "latents", "clean", "log_probs", "means")
        values = {name: getattr(self, name) for name in names}
        return {name: value[rows] for name, value in values.items() if value is not None}

    def with_rows(self, rows: dict[str, Tensor], text: list[TextConditioning]) -> Trajectories:
        """The same rollout with other trajectories: rows as `learning_rows` makes them, and their prompts' text."""
        own: dict[str, Any] = {name: value for name, value in rows.items() if hasattr(self, name)}
        return replace(self, text=text, estimates=None, images=self.images[:0], finite=self.finite[:0], **own)

    def raise_if_not_finite(self) -> None:
        """ValueError naming (sample, turn, step) of every non-finite velocity. Synchronises with the device once."""
        if bool(self.finite.all()):
            return
        bad = (~self.finite).nonzero().tolist()
        raise ValueError(
            f"velocity: expected finite model outputs, got NaN or infinity first at (sample, turn, step) {bad[:5]}"
            f"{' …' if len(bad) > 5 else ''}, {len(bad)} in all; lower the learning rate or go back to a checkpoint"
        )


def slices(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover `count`."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
