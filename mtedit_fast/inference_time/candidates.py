"""Candidates of a search, and the rewards that choose among them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtedit_fast.rewards import RewardBatch

Reward = Callable[[Any], Any]
"""Of a `RewardBatch` of n candidates, k − 1 finished turns and the one judged -> [n, k], higher is better, NaN where
undefined."""


def score(reward: Reward, candidates: RewardBatch) -> Tensor:
    """[n, k] fp32 on the host.

    Raises:
        TypeError: no numbers. ValueError: another shape.
    """
    values = reward(candidates)
    if not isinstance(values, Tensor):
        try:
            values = torch.from_numpy(np.array(values, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise TypeError(f"reward {reward_name(reward)}: expected numbers [n, k], got {error}") from error
    expected = candidates.edits.shape[:2]
    if values.shape != expected:
        raise ValueError(
            f"reward {reward_name(reward)}: expected [n, k] = {list(expected)}, a number for each turn of each "
            f"candidate, got {list(values.shape)}"
        )
    return values.to("cpu", torch.float32)


def rank(scores: Tensor, reward: Reward) -> Tensor:
    """Candidates of B images [B, n], best first; of equals the earlier, NaN last.

    Raises:
        ValueError: all are NaN; it names the reward.
    """
    missing = scores.isnan()
    if missing.all():
        raise ValueError(
            f"reward {reward_name(reward)}: NaN for all {scores.numel()} candidates of all {len(scores)} images, so "
            "there is nothing to choose by; call it on a finished edit to see why"
        )
    return scores.masked_fill(missing, -torch.inf).argsort(dim=1, descending=True, stable=True)


def reward_name(reward: Any) -> str:
    """What errors call a function, a partial one or a callable object."""
    while isinstance(reward, partial):
        reward = reward.func
    return getattr(reward, "__qualname__", type(reward).__name__)
