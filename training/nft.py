"""Likelihood-free objectives on the clean latents of a rollout: DiffusionNFT and Centered Reward Distillation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mtedit_fast.editors import Editor
from mtedit_fast.ops import CRDLoss, NFTLoss, advantage_to_reward, crd_loss, nft_loss, seeded_noise
from mtedit_fast.rollout import turn_seeds
from mtedit_fast.training.adapters import Adapters
from mtedit_fast.training.config import ObjectiveConfig
from mtedit_fast.training.update import Chunk, UpdateBatch, UpdateStats, chunked
from mtedit_fast.trajectories import Trajectories

# Philox steps that no rollout uses; its own begin at 0.
_TIMES, _NOISE = 1 << 20, (1 << 20) + 1
_SPREAD = -0x2E4BD5CD2D6E12FD  # odd: every draw of a trajectory has a key of its own


class NFT:
    """Noises every clean latent `draws` times and regresses the velocity towards, or away from, the old policy's.

    Only the policy's rows have a graph. The old policy's rows are left out while it equals the policy, the reference's
    where their weight is 0; what remains of both goes through the transformer in one forward without gradient.

    Args:
        forward_rows: (trajectory, draw) samples per forward with gradient.
    """

    def __init__(self, editor: Editor, adapters: Adapters, config: ObjectiveConfig, forward_rows: int):
        self.editor, self.adapters, self.config = editor, adapters, config
        self.forward_rows = forward_rows

    def attention(self) -> AbstractContextManager[None]:
        return nullcontext()

    def shares(self, batch: UpdateBatch, count: int) -> list[list[Chunk]]:
        trajectories, kept = batch.trajectories, batch.keep.nonzero().flatten()
        rows = [kept[trajectories.group[kept] % count == number] for number in range(count)]
        if self.config.name == "crd":
            return [self._whole_groups(trajectories, part) for part in rows]
        return [chunked(part, trajectories.turns, self.config.draws, self.forward_rows) for part in rows]

    def prepare(self, batch: UpdateBatch, shares: list[list[Chunk]]) -> None:
        """Nothing: the old policy is an adapter, not a record."""

    def loss(self, batch: UpdateBatch, chunk: Chunk, stats: UpdateStats) -> Tensor:
        config, trajectories = self.config, batch.trajectories
        clean = trajectories.clean[chunk.rows, chunk.turn].float()
        t = times(trajectories, chunk, config.draws, spread=config.times, shared=config.name == "crd")
        seeds = turn_seeds(trajectories.seeds[chunk.rows], chunk.turn) + chunk.index * _SPREAD
        noise = seeded_noise(seeds, clean.shape[1:], _NOISE)
        noisy = torch.lerp(clean, noise, t[:, None, None])
        velocity = trajectories.velocity(self.editor, noisy, 1000 * t, chunk.rows, chunk.turn)
        old, reference = self._others(trajectories, chunk, noisy, t)
        reward = advantage_to_reward(batch.advantage(chunk), mode=config.advantage_mode, clip=config.advantage_clip)
        # Weights of 1: the sum over the chunk, which the update divides by the samples of the whole optimizer step.
        options: dict[str, Any] = {
            "beta": config.beta,
            "scale": config.advantage_clip,
            "weight": torch.ones_like(t),
            "v_ref": reference,
            "kl_weight": config.kl_weight,
        }
        target = noise - clean
        result: NFTLoss | CRDLoss
        if config.name == "crd":
            result = crd_loss(velocity, old, target, reward, trajectories.group[chunk.rows], **options)
        else:
            result = nft_loss(velocity, old, target, t, reward, **options)
        if result.kl is not None:
            stats.record(kl=result.kl)
        stats.record(loss=result.policy, reward_in_loss=reward)
        return result.loss

    @torch.no_grad()
    def _others(
        self, trajectories: Trajectories, chunk: Chunk, noisy: Tensor, t: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The old policy's and the reference's velocities, None where they are not needed."""
        count = len(noisy)
        old = 0 if self.adapters.old_is_current else count
        reference = count if self.config.kl_weight else 0
        copies = (old + reference) // count
        if copies == 0:
            return None, None
        with self.adapters.rows(old=old, reference=reference):
            out = trajectories.velocity(
                self.editor, noisy.repeat(copies, 1, 1), 1000 * t.repeat(copies), chunk.rows, chunk.turn
            )
        return (out[:old] if old else None), (out[old:] if reference else None)

    def _whole_groups(self, trajectories: Trajectories, rows: Tensor) -> list[Chunk]:
        """Chunks that hold one draw of whole groups: the loss compares the members with each other."""
        _, sizes = trajectories.group[rows].unique_consecutive(return_counts=True)
        if len(sizes) and int(sizes.max()) > self.forward_rows:
            raise ValueError(
                f"optimizer.forward_rows: objective crd compares the members of a group in one forward, expected at "
                f"least the group's {int(sizes.max())} rows, got {self.forward_rows}"
            )
        packs: list[list[Tensor]] = []
        for part in rows.split(sizes.tolist()):
            if packs and sum(map(len, packs[-1])) + len(part) <= self.forward_rows:
                packs[-1].append(part)
            else:
                packs.append([part])
        return [
            Chunk(torch.cat(pack), turn, torch.full((sum(map(len, pack)),), draw, device=rows.device))
            for turn in range(trajectories.turns)
            for draw in range(self.config.draws)
            for pack in packs
        ]


def times(trajectories: Trajectories, chunk: Chunk, draws: int, *, spread: str, shared: bool) -> Tensor:
    """The noise level t in (0, 1] of every sample of a chunk, [n] fp32: a function of its seed, turn and draw.

    spread "schedule": `draws` different levels of the sampler's own schedule; "uniform": one from each of `draws`
    equal parts of [0, 1]. shared: all members of a group get the same ones.
    """
    seeds = trajectories.seeds[chunk.rows]
    if shared:  # the seed of each group's first member here
        _, member_of, sizes = trajectories.group[chunk.rows].unique_consecutive(return_inverse=True, return_counts=True)
        seeds = seeds[(sizes.cumsum(0) - sizes)[member_of]]
    seeds = turn_seeds(seeds, chunk.turn)
    levels = len(trajectories.sigmas) - 1
    normal = seeded_noise(seeds, (levels if spread == "schedule" else draws,), _TIMES)
    if spread == "schedule":
        order = normal.argsort(1)  # a random permutation of the levels
        return trajectories.sigmas[order.gather(1, (chunk.index % levels)[:, None])[:, 0]]
    uniform = torch.special.ndtr(normal).gather(1, chunk.index[:, None])[:, 0]
    return ((chunk.index + uniform) / draws).clamp(1e-3, 1 - 1e-3)
