"""Updates as public trainers run them: every forward whether it is needed or not, losses masked instead of left out."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from bench_nft_loss import published_nft
from torch import Tensor

from mtedit_fast.ops import advantage_to_reward, seeded_noise
from mtedit_fast.rollout import turn_seeds
from mtedit_fast.training import nft
from mtedit_fast.training.nft import NFT
from mtedit_fast.training.update import Chunk, UpdateBatch, UpdateStats


class Serial(NFT):
    """The published loop (DiffusionNFT, arXiv 2509.16117): its `adapters` are peft's model, and nothing is skipped."""

    def loss(self, batch: UpdateBatch, chunk: Chunk, stats: UpdateStats) -> Tensor:
        trajectories, config = batch.trajectories, self.config
        peft: Any = self.adapters
        clean = trajectories.clean[chunk.rows, chunk.turn]
        t = nft.times(trajectories, chunk, config.draws, spread=config.times, shared=False)
        seeds = turn_seeds(trajectories.seeds[chunk.rows], chunk.turn) + chunk.index * nft._SPREAD
        noisy = torch.lerp(clean, seeded_noise(seeds, clean.shape[1:], nft._NOISE), t[:, None, None])
        forward = partial(trajectories.velocity, self.editor, noisy, 1000 * t, chunk.rows, chunk.turn)
        peft.set_adapter("old")
        with torch.no_grad():
            old = forward()
        peft.set_adapter("default")
        theta = forward()
        with torch.no_grad():
            with peft.disable_adapter():
                reference = forward()
            peft.set_adapter("default")
        r = advantage_to_reward(batch.advantage(chunk), mode=config.advantage_mode, clip=config.advantage_clip)
        options = {"beta": config.beta, "kl_weight": config.kl_weight}
        return published_nft(theta, old, reference, noisy, clean, t, r, **options).sum()


class Masked(NFT):
    """Filtered trajectories go through the transformer like the others; their losses are multiplied by zero."""

    def shares(self, batch: UpdateBatch, count: int) -> list[list[Chunk]]:
        filtered = replace(batch, keep=~batch.keep)
        pairs = zip(super().shares(batch, count), super().shares(filtered, count), strict=True)
        return [kept + rest for kept, rest in pairs]

    def loss(self, batch: UpdateBatch, chunk: Chunk, stats: UpdateStats) -> Tensor:
        return super().loss(batch, chunk, stats) * batch.keep[chunk.rows[0]]
