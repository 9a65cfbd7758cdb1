"""The rollout half of an iteration: trajectories of the sampling policy, and their rewards, on a GPU meanwhile."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtedit_fast.attention import without_cudnn_attention
from mtedit_fast.editors import Editor
from mtedit_fast.editors.fp8 import Float8Switch
from mtedit_fast.editors.graphs import GraphedEditor
from mtedit_fast.rollout import RolloutConfig, Trajectories, rollout, sample_seeds
from mtedit_fast.sampling import sde_window
from mtedit_fast.timing import PhaseTimer
from mtedit_fast.training.adapters import Adapters
from mtedit_fast.training.config import TrainConfig, size_of
from mtedit_fast.training.data import Record
from mtedit_fast.training.dtypes import DTYPES
from mtedit_fast.training.headroom import WITHOUT_GPU
from mtedit_fast.training.rewards import RewardBatch, RewardStream, step_rewards

if TYPE_CHECKING:
    from mtedit_fast.export.pipeline import EnginePipeline


class Sampler:
    """Rolls out with θ, or with the old policy where an objective samples from it, and scores what comes out.

    fp8: on while sampling. With `rollout.engine` the sampling policy's adapter is handed to an exported editor, which
    samples in the model's place.
    """

    def __init__(
        self,
        editor: Editor,
        adapters: Adapters,
        config: TrainConfig,
        timer: PhaseTimer,
        fp8: Float8Switch | None = None,
    ):
        self.adapters, self.config, self.timer, self.fp8 = adapters, config, timer, fp8
        self.editor: Editor = GraphedEditor(editor) if config.captures_steps(editor.text_sees_image) else editor
        self.engine: EnginePipeline | None = None
        if config.rollout.engine is not None:
            from mtedit_fast.export.pipeline import EnginePipeline

            self.engine = EnginePipeline(config.rollout.engine)
            self.editor = self.engine.editor

    def __call__(
        self, records: list[Record], *, iteration: int, first_group: int = 0
    ) -> tuple[Trajectories, dict[str, Tensor]]:
        """G trajectories per record with the sampling policy, and every reward of them, [B, K] or [B, K, S+1].

        Args:
            iteration: of the run; noise depends on it.
            first_group: number of the first record's group in the whole iteration, over all processes.
        """
        config, size = self.settings(iteration), self.config.rollout.group_size
        references = torch.stack([record.image for record in records]).to(self.editor.device)
        last = first_group + len(records)
        seeds = sample_seeds(self.config.run.seed, iteration, last * size)[first_group * size :]
        sampler = nullcontext() if self._samples_with_policy else self.adapters.old()
        if self.engine is not None:
            lora = self.config.model.lora
            self.engine.set_lora(self._sampling_adapter(), lora.alpha / lora.rank)
        with RewardStream(self.config.rewards) as stream:
            attention = without_cudnn_attention() if self.config.exact_replay else nullcontext()
            with self.timer("rollout"), sampler, torch.no_grad(), self.fp8 or nullcontext(), attention:
                trajectories = rollout(
                    self.editor,
                    references,
                    [record.instructions for record in records],
                    config,
                    seeds,
                    timer=self.timer,
                    on_finished=lambda rows, part: stream.submit(self._reward_batch(records, references, rows, part)),
                )
            trajectories.raise_if_not_finite()
            with self.timer("reward"):  # what is left of it
                rewards = stream.result()
                if self.config.advantage.credit == "dense_ode":
                    whole = self._reward_batch(records, references, slice(0, len(trajectories)), trajectories.images)
                    rewards = step_rewards(self.editor, trajectories, whole, self.config.rewards)
        if self.engine is not None:  # which may be of the CPU
            device = self.adapters.parameters[0].device
            trajectories, rewards = trajectories.to(device), {name: value.to(device) for name, value in rewards.items()}
        trajectories.group = trajectories.group + first_group
        return trajectories, rewards

    def forget_graphs(self) -> None:
        """Give the memory of captured graphs back."""
        if isinstance(self.editor, GraphedEditor):
            self.editor.forget()

    def _sampling_adapter(self) -> dict[str, Tensor]:
        """A and B by layer, of θ or the old policy."""
        if self._samples_with_policy:
            return dict(zip(self.adapters.names, self.adapters.parameters, strict=True))
        return self.adapters.state_dict()["old"]

    @property
    def _samples_with_policy(self) -> bool:
        return not self.config.objective.likelihood_free or self.adapters.old_is_current

    def _reward_batch(self, records: list[Record], references: Tensor, rows: slice, edits: Tensor) -> RewardBatch:
        """What rewards see of the trajectories at `rows`, whose images are `edits`."""
        size = self.config.rollout.group_size
        owners = [row // size for row in range(rows.start, rows.stop)]
        return RewardBatch(
            references=references[rows.start // size : rows.stop // size].repeat_interleave(size, 0),  # whole groups
            edits=edits,
            instructions=[records[owner].instructions for owner in owners],
            records=[records[owner].fields() for owner in owners],
        )

    def settings(self, iteration: int) -> RolloutConfig:
        """The sampler's settings, with this iteration's SDE window."""
        config = self.config.rollout
        window = None
        if config.window is not None:
            window = sde_window(
                config.num_steps,
                config.window.size,
                lo=config.window.lo,
                hi=config.window.hi,
                seed=self.config.run.seed * 1_000_003 + iteration,
            )
        return RolloutConfig(
            group_size=config.group_size,
            num_steps=config.num_steps,
            variant=config.variant,
            eta=config.eta,
            window=None if window is None else (window.start, window.stop),
            micro_batch=config.micro_batch or WITHOUT_GPU,
            guidance_scale=config.guidance_scale,
            reference_size=None if config.reference_resolution is None else size_of(config.reference_resolution),
            latent_chain=config.latent_chain,
            keep_means=self.config.objective.name == "grpo_guard" and self.config.exact_replay,
            keep_estimates=self.config.advantage.credit == "dense_ode",
            state_dtype=DTYPES[config.state_dtype],
        )
