"""What a reward sees: of a rollout in training, and of the candidates of a search."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


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
