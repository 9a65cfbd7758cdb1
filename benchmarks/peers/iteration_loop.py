"""One iteration as public trainers run it: sample with the pipeline, then score, then update, nothing left out.

Sampling is `RolloutLoop`'s. When all of it is done the rewards are taken edit by edit. Every trajectory goes through
every forward of the update, filtered or not, and its loss is multiplied by zero where it was filtered. DiffusionNFT
(arXiv 2509.16117): old policy, policy and reference as three forwards one after the other, the adapter switched in
between, the loss in x̂₀ form. Flow-GRPO (arXiv 2505.05470): the stored steps replayed one by one.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Self

import torch
from bench_nft_loss import published_nft
from PIL import Image
from torch import Tensor

from mtedit_fast.editors import TextConditioning
from mtedit_fast.ops import advantage_to_reward
from mtedit_fast.rollout import Trajectories
from mtedit_fast.timing import PhaseTimer
from mtedit_fast.training.config import ObjectiveConfig
from peers.rollout_loop import Call, RolloutLoop, Velocity, sde_step_with_logprob, to_pil

Draws = Callable[[Tensor, int, Tensor, torch.Size], tuple[Tensor, Tensor]]
"""Of (rows [n], turn, number of the draw [n], shape [n, N, C]): noise levels [n] and noise."""
Scores = Callable[[Image.Image, list[Image.Image], list[str]], dict[str, list[float]]]
"""Of an original, its K edits and their instructions: K scores by each reward."""


@dataclass
class Samples:
    """What an update needs of B trajectories of K turns, as trainers collate it: a row of everything for each.

    text: K conditionings. latents [B, K, T+1, N, C], those of `Turn`; log_probs [B, K, S] of the stochastic steps.
    """

    group: Tensor
    images: list[list[Image.Image]]
    references: Tensor
    text: list[TextConditioning]
    latents: Tensor
    log_probs: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def turns(self) -> int:
        return self.latents.shape[1]

    @classmethod
    def of(cls, trajectories: Trajectories) -> Self:
        """Of a rollout of ours, so that both can learn from the same."""
        latents = torch.cat([trajectories.latents, trajectories.clean[:, :, None]], dim=2)
        every = slice(0, len(trajectories))
        text = [trajectories.text_rows(every, turn) for turn in range(trajectories.turns)]
        images = [[to_pil(image) for image in chain] for chain in trajectories.images]
        return cls(trajectories.group, images, trajectories.references, text, latents, trajectories.log_probs)


class Recorded(RolloutLoop):
    """Keeps what its pipeline calls encoded, in order."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.calls: list[Call] = []

    def prepared(self, images: list[Image.Image], instruction: str) -> Call:
        self.calls.append(super().prepared(images, instruction))
        return self.calls[-1]


class IterationLoop:
    """Called, it runs an iteration; `timer` then has the phases "rollout", "reward" and "update".

    Args:
        rollout: with an editor whose transformer is `policy`'s.
        policy: peft's model with the adapters "default" and, for nft, "old".
        sample_old: sample with the old policy.
        advantages: of samples, rewards {name: [B, K]} and records: [B, K] and which rows count [B].
        forward_rows: samples per forward with gradient.
        precision: the context that forwards run in.
        draws: instead of random levels of the sampler's schedule and torch.randn.
    """

    def __init__(
        self,
        rollout: Recorded,
        policy: Any,
        optimizer: torch.optim.Optimizer,
        scores: Scores,
        advantages: Callable[[Samples, dict[str, Tensor], list[Any]], tuple[Tensor, Tensor]],
        objective: ObjectiveConfig,
        *,
        forward_rows: int,
        max_grad_norm: float,
        timer: PhaseTimer,
        precision: Callable[[], AbstractContextManager[object]],
        sample_old: bool = False,
        draws: Draws | None = None,
    ):
        self.rollout, self.policy, self.optimizer, self.scores = rollout, policy, optimizer, scores
        self.advantages, self.objective, self.forward_rows = advantages, objective, forward_rows
        self.max_grad_norm, self.timer, self.precision = max_grad_norm, timer, precision
        self.sample_old, self.draws = sample_old, draws
        self.kept = 0

    def __call__(self, records: list[Any]) -> float:
        """The loss."""
        with self.timer("rollout"):
            samples = self.sampled(records)
        with self.timer("reward"):
            rewards = self.rewards(samples, records)
        advantages, keep = self.advantages(samples, rewards, records)
        self.kept = int(keep.sum())
        with self.timer("update"):
            return self.update(samples, advantages, keep)

    def sampled(self, records: list[Any]) -> Samples:
        references = torch.stack([record.image for record in records])
        self.rollout.calls.clear()
        if self.sample_old:
            self.policy.set_adapter("old")
        with self.precision():
            batches = self.rollout(references, [record.instructions for record in records])
        if self.sample_old:
            self.policy.set_adapter("default")
        turns, calls = len(batches[0]), iter(self.rollout.calls)
        of_batch = [[next(calls) for _ in batch] for batch in batches]  # in the order of sampling
        stored = self.rollout.config.sde_steps()
        device = self.rollout.editor.device
        return Samples(
            group=torch.arange(len(records), device=device).repeat_interleave(self.rollout.config.group_size),
            images=[list(chain) for batch in batches for chain in zip(*(turn.images for turn in batch), strict=True)],
            references=torch.cat([torch.stack([call.references for call in own], dim=1) for own in of_batch]),
            text=[
                {name: torch.cat([own[turn].text[name] for own in of_batch]) for name in of_batch[0][turn].text}
                for turn in range(turns)
            ],
            latents=torch.cat([torch.stack([turn.latents for turn in batch], dim=1) for batch in batches]),
            log_probs=torch.cat(
                [torch.stack([turn.log_probs[:, stored.start : stored.stop] for turn in batch], 1) for batch in batches]
            ),
        )

    def rewards(self, samples: Samples, records: list[Any]) -> dict[str, Tensor]:
        """{name: [B, K]}."""
        owners = [records[group] for group in samples.group.tolist()]
        found = [
            self.scores(to_pil(owner.image), images, owner.instructions)
            for owner, images in zip(owners, samples.images, strict=True)
        ]
        return {name: torch.tensor([each[name] for each in found], device=samples.group.device) for name in found[0]}

    def update(self, samples: Samples, advantages: Tensor, keep: Tensor) -> float:
        """One optimizer step on the mean loss of the kept rows; returns it."""
        nft = self.objective.name == "nft"
        losses = self.nft_losses(samples, advantages) if nft else self.grpo_losses(samples, advantages)
        count = int(keep.sum()) * samples.turns * (self.objective.draws if nft else samples.log_probs.shape[2])
        count, parts = max(count, 1), []
        for rows, loss in losses:
            mean = (loss * keep[rows]).sum() / count
            mean.backward()
            parts.append(mean.detach())
        parameters = self.optimizer.param_groups[0]["params"]
        torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if nft:
            self.follow()
        return torch.stack(parts).sum().item()

    def nft_losses(self, samples: Samples, advantages: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows, losses [n]) of every forward: each trajectory and turn noised `draws` times."""
        config, rows = self.objective, torch.arange(len(samples), device=samples.group.device)
        number = torch.arange(config.draws, device=rows.device).repeat(len(rows))
        draws = self.draws or self.random_draws(samples)
        for turn in range(samples.turns):
            for own, index in zip(
                rows.repeat_interleave(config.draws).split(self.forward_rows),
                number.split(self.forward_rows),
                strict=True,
            ):
                clean = samples.latents[own, turn, -1].float()
                t, noise = draws(own, turn, index, clean.shape)
                noisy = torch.lerp(clean, noise, t[:, None, None])
                forward = self.velocity(samples, own, turn)
                self.policy.set_adapter("old")
                with torch.no_grad():
                    old = forward(noisy, 1000 * t)
                self.policy.set_adapter("default")
                theta = forward(noisy, 1000 * t)
                with torch.no_grad():
                    with self.policy.disable_adapter():
                        reference = forward(noisy, 1000 * t)
                    self.policy.set_adapter("default")
                reward = advantage_to_reward(
                    advantages[own, turn], mode=config.advantage_mode, clip=config.advantage_clip
                )
                options = {"beta": config.beta, "kl_weight": config.kl_weight}
                yield own, published_nft(theta, old, reference, noisy, clean, t, reward, **options)

    def grpo_losses(self, samples: Samples, advantages: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows, losses [n]) of every step of every batch, max(−Aρ, −A·clip(ρ, 1 ± ε))."""
        config, clip = self.objective, self.objective.clip_range
        for own in torch.arange(len(samples), device=samples.group.device).split(self.forward_rows):
            for turn in range(samples.turns):
                for position in range(samples.log_probs.shape[2]):
                    log_prob = self.replayed(samples, own, turn, position)
                    ratio = torch.exp(log_prob - samples.log_probs[own, turn, position])
                    advantage = advantages[own, turn].clamp(-config.advantage_clip, config.advantage_clip)
                    yield own, torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))

    def replayed(self, samples: Samples, rows: Tensor, turn: int, position: int) -> Tensor:
        """Log-probs [n] of stored steps."""
        sampler, editor = self.rollout.config, self.rollout.editor
        schedule = editor.schedule(sampler.num_steps, *samples.images[0][0].size[::-1])
        t = schedule.timesteps[position]
        before, after = samples.latents[rows, turn, position], samples.latents[rows, turn, position + 1]
        velocity = self.velocity(samples, rows, turn)(before, t)
        at = (schedule.sigmas, schedule.timesteps, velocity, t.expand(len(rows)), before, sampler.eta)
        return sde_step_with_logprob(*at, prev_sample=after)[1]

    def velocity(self, samples: Samples, rows: Tensor, turn: int) -> Velocity:
        """The pipeline's model output under the conditioning that was stored."""
        config, (width, height) = self.rollout.config, samples.images[0][0].size
        text = {name: value[rows] for name, value in samples.text[turn].items()}
        sizes = (height, width), config.reference_size or (height, width)
        editor = self.rollout.editor
        model = self.rollout.call(Call(editor, samples.references[rows, turn], text, *sizes, config.guidance_scale))

        def velocity(latents: Tensor, t: Tensor) -> Tensor:
            with self.precision():
                return model(latents.to(editor.dtype), t).float()

        return velocity

    def random_draws(self, samples: Samples) -> Draws:
        """Different levels of the sampler's schedule for the draws of a trajectory and turn."""
        height, width = samples.images[0][0].size[::-1]
        sigmas = self.rollout.editor.schedule(self.rollout.config.num_steps, height, width).sigmas
        order = torch.rand(len(samples), samples.turns, len(sigmas) - 1, device=sigmas.device).argsort(-1)
        return lambda rows, turn, index, shape: (
            sigmas[order[rows, turn, index]],
            torch.randn(shape, device=sigmas.device),
        )

    @torch.no_grad()
    def follow(self, decay: float = 0.0) -> None:
        """old ← decay·old + (1 − decay)·θ."""
        found = dict(self.policy.named_parameters())
        for name, value in found.items():
            if ".default." in name:
                found[name.replace(".default.", ".old.")].lerp_(value, 1 - decay)
