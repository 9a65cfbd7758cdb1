"""What bench_rollout measures: an editor in some speed mode with something to edit, and how it is held to its peer."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import record
import torch
import torch.nn.functional as F
from peers.replay_loop import replay_loop
from peers.rollout_loop import RolloutLoop, to_pil
from random_editors import RECIPES, random_editor
from torch import Tensor

from mtedit_fast.ops import sde_step, seeded_noise
from mtedit_fast.rollout import RolloutConfig, Trajectories, replay, rollout, sample_seeds, turn_seeds
from mtedit_fast.timing import PhaseTimer
from mtedit_fast.training.memory import FusedAttention, peak_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One editor, and how it samples `group` trajectories of one prompt."""

    editor: str
    device: torch.device
    dtype: str
    tiny: bool
    size: int
    reference_size: int
    group: int
    turns: int
    steps: int
    micro_batch: int
    loop_batch: int
    compile: str = "none"
    cuda_graphs: bool = False
    attention: str | None = None

    @property
    def config(self) -> RolloutConfig:
        recipe = RECIPES[self.editor]
        return RolloutConfig(
            group_size=self.group,
            num_steps=self.steps,
            eta=recipe.eta,
            micro_batch=self.micro_batch,
            guidance_scale=recipe.guidance_scale,
            reference_size=None if self.reference_size == self.size else (self.reference_size,) * 2,
        )

    @property
    def columns(self) -> dict[str, Any]:
        modes = [f"compiled {self.compile}"] * (self.compile != "none") + ["graphs"] * self.cuda_graphs
        modes += [f"{self.attention} attention"] * (self.attention is not None)
        reference = "" if self.reference_size == self.size else f" from {self.reference_size}"
        return record.environment(self.device) | {
            "op": "rollout",
            "variant": f"tiny {self.editor}" if self.tiny else self.editor,
            "shape": f"{self.group}x{self.turns}x{self.size}{reference} in {self.steps}",
            "dtype": self.dtype,
            "backend": ", ".join(modes) or "eager",
            "timing": "call",
        }


class Setup:
    """The editor with its speed modes on, and what it edits."""

    def __init__(self, case: Case):
        self.case, self.config = case, case.config
        self.stock = random_editor(case.editor, case.device, DTYPES[case.dtype], tiny=case.tiny)
        self.editor, self.precision = self._fast()
        generator = torch.Generator().manual_seed(1)
        coarse = torch.rand(1, 3, 8, 8, generator=generator)  # smooth, so that JPEG has an image to encode
        references = F.interpolate(coarse, case.size, mode="bicubic").clamp(0, 1)
        self.references = ((255 * references).round() / 255).to(case.device)
        self.instructions = [[f"Edit number {turn + 1}" for turn in range(case.turns)]]
        self.seeds = sample_seeds(0, 0, case.group, case.device)

    def _fast(self) -> tuple[Any, Callable[[], AbstractContextManager[object]]]:
        """The editor in its modes, and the context in which it runs in its precision."""
        case, editor = self.case, self.stock
        precision: Callable[[], AbstractContextManager[object]] = nullcontext
        if case.attention is not None:
            from mtedit_fast.editors.speed import set_attention

            set_attention(editor, case.attention)
        if case.dtype == "fp8":  # before it is compiled
            from mtedit_fast.editors.fp8 import Float8Switch

            switch = Float8Switch(editor)
            precision = lambda: switch  # noqa: E731
        if case.compile != "none":
            from mtedit_fast.editors.speed import compile_transformer

            torch._dynamo.reset()
            mode: Any = case.compile
            compile_transformer(editor, mode, dynamic=False)  # a second batch size would get kernels of dynamic shapes
        if case.cuda_graphs:
            from mtedit_fast.editors.graphs import GraphedEditor

            return GraphedEditor(editor), precision
        return editor, precision

    @torch.no_grad()
    def rollout(self, timer: PhaseTimer | None = None) -> Trajectories:
        self.stock.invalidate()  # or Klein-KV would find the keys and values of the last rollout, whose work counts
        with self.precision():
            out = rollout(self.editor, self.references, self.instructions, self.config, self.seeds, timer=timer)
        out.raise_if_not_finite()  # waits for the device
        return out

    @torch.no_grad()
    def drift(self, trajectories: Trajectories) -> float:
        """Largest |Δ log-prob| of all stored steps, replayed in the shapes of the rollout."""
        largest = 0.0
        with self.precision():
            for rows in trajectories.micro_batches():
                for turn in range(trajectories.turns):
                    for position in range(len(trajectories.steps)):
                        out = replay(self.editor, trajectories, rows, turn, position, return_mean=False)
                        assert out.log_prob is not None
                        change = (out.log_prob - trajectories.log_probs[rows, turn, position]).abs().max().item()
                        largest = max(largest, math.inf if math.isnan(change) else change)
        return largest

    def loop(self, **options: Any) -> RolloutLoop:
        return RolloutLoop(self.stock, self.config, batch=self.case.loop_batch, **options)

    def run_loop(self, loop: RolloutLoop) -> object:
        with torch.compiler.set_stance("force_eager"):
            out = loop(self.references, self.instructions)
        if self.case.device.type == "cuda":
            torch.cuda.synchronize()
        return out

    @torch.no_grad()
    def compared(self, trajectories: Trajectories) -> tuple[float, float]:
        """(distance of the peer's states from ours, drift of the peer), of its first batch in the first turn with the
        noise of ours.

        The distance is relative to how far the velocities have moved the state.
        """
        rows = slice(0, min(self.case.loop_batch, self.case.group))
        keys = turn_seeds(self.seeds[rows], 0)
        loop = self.loop(noise=lambda rows, turn, draw, shape: seeded_noise(keys, tuple(shape[1:]), draw))
        images, instruction = [to_pil(self.references[0])] * (rows.stop - rows.start), self.instructions[0][0]
        with torch.compiler.set_stance("force_eager"):
            found = loop.turn(images, instruction, rows, 0)
            replayed = replay_loop(loop, images, instruction, found)
        drift = (replayed - found.log_probs[:, trajectories.steps.start : trajectories.steps.stop]).abs().max().item()
        ours = trajectories.clean[rows, 0].float()
        still = seeded_noise(keys, tuple(ours.shape[1:]), 0)
        for step in range(self.config.num_steps):
            nothing = torch.zeros_like(still)
            still = sde_step(still, nothing, trajectories.coefficients, step, seed=keys).prev_sample
        distance = ((found.latents[:, -1].float() - ours).norm() / (ours - still).norm()).item()
        return (math.inf if math.isnan(distance) else distance), drift


def predicted_bytes(setup: Setup, trajectories: Trajectories) -> int:
    """Weights, what the rollout stores, and the largest of encoding, one velocity and decoding, from shapes alone.

    Klein-KV: with a reference of its own for every sample, as from the second turn on.
    """
    case, config = setup.case, setup.config
    meta = random_editor(case.editor, torch.device("meta"), DTYPES[case.dtype], tiny=case.tiny)
    rows = min(case.micro_batch, case.group)
    sides, reference = (case.size,) * 2, (case.reference_size,) * 2
    latents = torch.empty(rows, *meta.latent_shape(*sides), device="meta")
    references = torch.empty(rows, *meta.latent_shape(*reference), device="meta", dtype=meta.dtype)
    text = meta.encode_text(["edit"] * rows)
    size = {"height": case.size, "width": case.size, "reference_size": reference}

    def velocity() -> None:
        condition = meta.condition(references, text, guidance_scale=config.guidance_scale, **size)
        meta.velocity(latents, latents[:, 0, 0], condition)

    with FusedAttention():
        phases = (
            velocity,
            lambda: meta.decode(latents, *sides),
            lambda: meta.encode_image(torch.empty(rows, 3, *reference, device="meta")),
        )
        work = max(peak_bytes(phase) for phase in phases)
    parts = (setup.stock.pipeline.transformer, setup.stock.vae)
    weights = (tensor for part in parts for tensor in (*part.parameters(), *part.buffers()))
    text_rows = (value for each in trajectories.text for value in each.values())
    stored = (value for value in vars(trajectories).values() if isinstance(value, Tensor))
    return work + sum(tensor.nbytes for tensor in (*weights, *text_rows, *stored))
