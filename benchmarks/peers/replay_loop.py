"""Replay of sampled steps as public trainers do it: one step of one batch after the other, on the states it stored."""

import torch
from PIL import Image
from torch import Tensor

from peers.rollout_loop import RolloutLoop, Turn, sde_step_with_logprob


def replay_loop(loop: RolloutLoop, images: list[Image.Image], instruction: str, sampled: Turn) -> Tensor:
    """Log-probs [b, S] of the stochastic steps of a turn that edited `images`, under the editor's current weights.

    The states are those that were stored in the model's dtype, after the rollout had taken its log-probs.
    """
    editor, config = loop.editor, loop.config
    width, height = images[0].size
    velocity = loop.call(loop.prepared(images, instruction))
    schedule = editor.schedule(config.num_steps, height, width)
    log_probs = []
    for step in config.sde_steps():
        t, before, after = schedule.timesteps[step], sampled.latents[:, step], sampled.latents[:, step + 1]
        at = (schedule.sigmas, schedule.timesteps, velocity(before, t), t.expand(len(before)), before, config.eta)
        log_probs.append(sde_step_with_logprob(*at, prev_sample=after)[1])
    return torch.stack(log_probs, dim=1)
