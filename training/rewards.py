"""Rewards: any function of a `RewardBatch` that returns [B, K], named by its import path."""

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtedit_fast.training.config import RewardConfig


@dataclass(frozen=True)
class RewardBatch:
    """What a reward sees of B trajectories of K turns.

    references fp32 [B, 3, H, W] and edits fp32 [B, K, 3, H, W], both in [0, 1]; instructions: B lists of K texts;
    records: B dicts with what else the data held (id, objects, extra keys).
    """

    references: Tensor
    edits: Tensor
    instructions: list[list[str]]
    records: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.edits.ndim != 5 or self.edits.shape[2] != 3:
            raise ValueError(f"edits: expected [B, K, 3, H, W], got {list(self.edits.shape)}")
        batch, turns = self.edits.shape[:2]
        if self.references.shape != (batch, *self.edits.shape[2:]):
            expected = [batch, *self.edits.shape[2:]]
            raise ValueError(f"references: expected {expected} like edits, got {list(self.references.shape)}")
        if len(self.instructions) != batch or any(len(chain) != turns for chain in self.instructions):
            lengths = sorted({len(chain) for chain in self.instructions})
            raise ValueError(
                f"instructions: expected {batch} lists of {turns}, got {len(self.instructions)} lists of {lengths}"
            )
        if len(self.records) not in (0, batch):
            raise ValueError(f"records: expected {batch} or none, got {len(self.records)}")


Reward = Callable[[RewardBatch], Any]


def load_reward(path: str) -> Reward:
    """Import `package.module:function`, also from the working directory. ValueError says what is wrong."""
    name, separator, attribute = path.partition(":")
    if not separator or not name or not attribute:
        raise ValueError(f"reward path {path!r}: expected package.module:function")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"reward path {path!r}: cannot import {name}: {error}") from error
    function = getattr(module, attribute, None)
    if function is None:
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"reward path {path!r}: {name} has no {attribute!r}{hint}")
    if not callable(function):
        raise ValueError(f"reward path {path!r}: expected a function, got {type(function).__name__}")
    return function


@torch.no_grad()
def score(rewards: Sequence[RewardConfig], batch: RewardBatch) -> dict[str, Tensor]:
    """Call every reward -> {name: fp32 [B, K] on the edits' device}.

    A reward returns a tensor, an array or nested lists of numbers, NaN (or None in a list) where it is undefined;
    ValueError or TypeError names one that returns something else.
    """
    shape = batch.edits.shape[:2]
    scores: dict[str, Tensor] = {}
    for reward in rewards:
        value = load_reward(reward.path)(batch)
        if not isinstance(value, Tensor):
            try:
                value = torch.from_numpy(np.array(value, dtype=np.float64))
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"reward {reward.name!r} ({reward.path}): expected numbers [B, K], got {error}"
                ) from error
        if value.is_complex():
            raise TypeError(f"reward {reward.name!r} ({reward.path}): expected real numbers, got {value.dtype}")
        if value.shape != shape:
            raise ValueError(
                f"reward {reward.name!r} ({reward.path}): expected [B, K] = {list(shape)}, got {list(value.shape)}"
            )
        scores[reward.name] = value.to(batch.edits.device, torch.float32)
    return scores
