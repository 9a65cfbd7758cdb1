"""A LoRA layer of which each row of a batch sees the adapters that a plan names.

The plan is plain Python values that every layer of a model reads: no hooks, no walk over the model, and `torch.compile`
specialises on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor


@dataclass
class Plan:
    """What the LoRA layers of one model add to the base's output."""

    adapters: tuple[str, ...] | None = None  # None: the ones active in peft, θ
    # (2, 5): of five equal parts of the batch the first two see the adapters, the rest none; None: every row does.
    # A share, not a count, so that compiled code serves every batch size.
    share: tuple[int, int] | None = None
    rows: int = 0  # of the batch that the share is of, which a forward may stack `copies` times
    copies: int = 1


class PlannedLinear(PeftLinear):
    """peft's LoRA layer of a linear layer, by a plan: y = W x + b, then y[rows] += s·B A x[rows].

    Computed in the dtype of the base's output whatever the adapter's own, as under autocast, and added in place by one
    matrix product.
    """

    plan: Plan

    def forward(self, x: Tensor) -> Tensor:
        if self.disable_adapters or self.merged:  # through peft's own switches
            return super().forward(x)
        result = self.base_layer(x)
        plan = self.plan
        for name in self.active_adapters if plan.adapters is None else plan.adapters:
            if name not in self.lora_A:
                continue
            if plan.share is None:
                self._add(result, x, name)
                continue
            parts, of = plan.share
            if x.shape[0] % (of * plan.copies):
                raise ValueError(
                    f"target_modules: expected layers whose first dimension is the batch, got one with input "
                    f"{list(x.shape)}; leave it out to use rows()"
                )
            size = x.shape[0] // plan.copies
            for copy in range(plan.copies):
                part = slice(copy * size, copy * size + size // of * parts)
                self._add(result[part], x[part], name)
        return result

    def _add(self, result: Tensor, x: Tensor, name: str) -> None:
        """result [b, ..., out] += scaling·B A x [b, ..., in]."""
        dtype = result.dtype
        low = F.linear(x.to(dtype), self.lora_A[name].weight.to(dtype)).flatten(0, -2)
        up = self.lora_B[name].weight.to(dtype)
        result.view(-1, result.shape[-1]).addmm_(low, up.t(), alpha=self.scaling[name])
