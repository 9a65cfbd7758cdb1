"""CUDA graphs of an editor's velocity: one launch per step instead of some thousand, the same kernels."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from mtedit_fast.cuda_graphs import CapturedCall, layout
from mtedit_fast.editors.base import Condition, Editor


class GraphedEditor:
    """An editor whose `velocity` is captured once per layout of its inputs and replayed from then on.

    Where there is nothing to capture (no GPU, or with gradient) it is the editor itself. The graph reads the weights
    where they are: changes in place count, weights that move get a graph of their own. Captured and eager
    calls launch the same kernels, so that a replay in eager mode should give the rollout's log-probs bit for bit: a
    test on a GPU holds them to it.

    Args:
        keep: graphs held at once; the least recently used goes. Each holds its inputs and its activations.
    """

    def __init__(self, editor: Editor, keep: int = 4):
        if keep < 1:
            raise ValueError(f"keep: expected at least 1 graph, got {keep}; use the editor itself for none")
        self.editor, self.keep = editor, keep
        self.captures = 0
        self._graphs: OrderedDict[Hashable, CapturedCall] = OrderedDict()
        # Weakly: the condition is a turn's, and what it holds should end with it.
        self._current: tuple[Callable[[], Condition | None], CapturedCall] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.editor, name)

    def velocity(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """The editor's, in memory that the next call writes over."""
        if not latents.is_cuda or torch.is_grad_enabled():
            return self.editor.velocity(latents, timestep, condition)
        if self._current is None or self._current[0]() is not condition:  # a new turn
            self._current = weakref.ref(condition), self._graph(latents, timestep, condition)
        call = self._current[1]
        call.inputs[0].load((latents, timestep))
        return call()

    def forget(self) -> None:
        """Give the graphs' memory back; the next calls capture again."""
        self._graphs.clear()
        self._current = None

    def _graph(self, latents: Tensor, timestep: Tensor, condition: Condition) -> CapturedCall:
        parts = vars(condition)
        key = (layout((latents, timestep, parts)), self._weights(len(latents) * condition.branches))
        if key in self._graphs:
            self._graphs.move_to_end(key)
            self._graphs[key].inputs[1].load(parts)
            return self._graphs[key]
        while len(self._graphs) >= self.keep:
            self._graphs.popitem(last=False)

        def run(state: tuple[Tensor, Tensor], parts: dict[str, Any]) -> Tensor:
            return self.editor.velocity(*state, Condition(**parts))

        self._graphs[key] = CapturedCall(run, (latents, timestep), parts)
        self.captures += 1
        return self._graphs[key]

    def _weights(self, rows: int) -> Hashable:
        """Where the weights are, and which of them the rows see."""
        model: Any = self.editor.transformer
        plan = getattr(model, "weight_plan", None)
        seen = None if plan is None else tuple(weights.adapters for weights in plan.weights_of(rows))
        low = tuple(getattr(module, "switch", None) and module.switch.on for module in model.modules())
        return (seen, any(low), tuple(parameter.data_ptr() for parameter in model.parameters()))
