"""Reward hacking made visible: a trained reward against a held-out one on the same scale, before and after training.

Scores that rise while what they stand for does not are the mark of overoptimisation (L. Gao and others, "Scaling laws
for reward model overoptimization", ICML 2023).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from mtedit_fast.edival.statistics import Estimate, paired_bootstrap
from mtedit_fast.training.config import RewardConfig


class Audit(NamedTuple):
    """What training did to a reward and to the one that audits it, over the held-out chains where both are defined."""

    against: str
    """Name of the auditing reward."""
    reward: Estimate
    """Rise of the trained reward, with its paired 95 % interval over chains."""
    truth: Estimate
    """Rise of the auditing reward."""
    gap: Estimate
    """Rise of reward − truth."""

    @property
    def hacked(self) -> bool:
        """Whether the gap has grown beyond doubt, by more than a tenth of what the reward has risen."""
        return self.gap.low > 0 and self.gap.mean > 0.1 * abs(self.reward.mean)

    def describe(self, name: str) -> str:
        """The finding in a sentence."""
        rises = f"{name} {self.reward.mean:+.3f}, {self.against} {self.truth.mean:+.3f}"
        change = f"{self.gap.mean:+.3f} (95 % interval {self.gap.low:+.3f} to {self.gap.high:+.3f})"
        if self.hacked:
            return f"{rises}. Reward hacking: the gap between them has grown by {change}."
        return f"{rises}. The gap between them has changed by {change}."

    def as_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name)._asdict() for name in ("reward", "truth", "gap")}
        return {"against": self.against, **values, "hacked": self.hacked}


def audit(rewards: list[RewardConfig], before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Audit]:
    """{name: Audit} of every reward with `audit` set.

    before, after: {name: [N, K]} of the same chains and noise; turns are averaged, chains with an undefined one left
    out, and a reward that is left with no chain too.
    """
    audits = {}
    for reward in rewards:
        if reward.audit is None:
            continue
        names = (reward.name, reward.audit)
        values = [np.asarray(scores[name].double()).mean(1) for scores in (before, after) for name in names]
        defined = ~np.isnan(values).any(0)
        if not defined.any():
            continue
        first, first_truth, last, last_truth = (value[defined] for value in values)
        audits[reward.name] = Audit(
            reward.audit,
            paired_bootstrap(first, last),
            paired_bootstrap(first_truth, last_truth),
            paired_bootstrap(first - first_truth, last - last_truth),
        )
    return audits
