"""CUDA graphs of an editor's velocity: one launch per step instead of some thousand, the same kernels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from mtedit_fast.editors.base import Condition, Editor

WARM_UP = 3
"""Calls on a side stream before a capture: libraries choose their kernels and allocate workspaces in them."""


class StaticInputs:
    """Copies of a nest of tensors at addresses that stay, of one layout. Broadcast dimensions stay broadcast."""

    def __init__(self, tree: Any):
        leaves, self._spec = tree_flatten(tree)
        self._layout = layout(tree)
        self._leaves = [_twin(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.tree = tree_unflatten(self._leaves, self._spec)

    def load(self, tree: Any) -> None:
        """Copy the tensors of `tree`, which must have this one's layout."""
        if layout(tree) != self._layout:
            raise ValueError("tree: expected the layout these inputs were made for; make others for it")
        for mine, leaf in zip(self._leaves, tree_flatten(tree)[0], strict=True):
            if isinstance(mine, Tensor):
                _stored(mine).copy_(_stored(leaf))


def layout(tree: Any) -> Hashable:
    """What of a nest of tensors and plain values a captured graph depends on."""
    leaves, spec = tree_flatten(tree)
    return (
        spec,
        tuple(
            (leaf.shape, leaf.dtype, leaf.device, tuple(step == 0 for step in leaf.stride()))
            if isinstance(leaf, Tensor)
            else leaf
            for leaf in leaves
        ),
    )


def _stored(tensor: Tensor) -> Tensor:
    """Without the repetitions of broadcast dimensions."""
    for dim, (size, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if step == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _twin(tensor: Tensor) -> Tensor:
    return _stored(tensor).clone(memory_format=torch.contiguous_format).expand(tensor.shape)


class GraphedEditor:
    """An editor whose `velocity` is captured once per layout of its inputs and replayed from then on.

    Where there is nothing to capture (no GPU, or with gradient) it is the editor itself. The graph reads the weights
    where they are: changes in place count, weights that move get a graph of their own. Captured and eager calls run the
    same kernels, so a replay in eager mode still gives the rollout's log-probs bit for bit.

    Args:
        keep: graphs held at once; the least recently used goes. Each holds its inputs and its activations.
    """

    def __init__(self, editor: Editor, keep: int = 4):
        if keep < 1:
            raise ValueError(f"keep: expected at least 1 graph, got {keep}; use the editor itself for none")
        self.editor, self.keep = editor, keep
        self.captures = 0
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._current: tuple[Condition, _Graph] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.editor, name)

    def velocity(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """The editor's, in memory that the next call writes over."""
        if not latents.is_cuda or torch.is_grad_enabled():
            return self.editor.velocity(latents, timestep, condition)
        if self._current is None or self._current[0] is not condition:  # a new turn
            self._current = condition, self._graph(latents, timestep, condition)
        return self._current[1](latents, timestep)

    def _graph(self, latents: Tensor, timestep: Tensor, condition: Condition) -> _Graph:
        parts = vars(condition)
        key = (layout((latents, timestep, parts)), self._weights(len(latents) * condition.branches))
        if key in self._graphs:
            self._graphs.move_to_end(key)
            self._graphs[key].inputs.load(parts)
            return self._graphs[key]
        while len(self._graphs) >= self.keep:
            self._graphs.popitem(last=False)
        self._graphs[key] = _Graph(self.editor, latents, timestep, parts)
        self.captures += 1
        return self._graphs[key]

    def _weights(self, rows: int) -> Hashable:
        """Where the weights are, and which of them the rows see."""
        model: Any = self.editor.transformer
        plan = getattr(model, "weight_plan", None)
        seen = None if plan is None else tuple(weights.adapters for weights in plan.weights_of(rows))
        low = tuple(getattr(module, "switch", None) and module.switch.on for module in model.modules())
        return (seen, any(low), tuple(parameter.data_ptr() for parameter in model.parameters()))


class _Graph:
    """One captured velocity with its inputs and its output."""

    def __init__(self, editor: Editor, latents: Tensor, timestep: Tensor, parts: dict[str, Any]):
        self.inputs = StaticInputs(parts)
        self.latents, self.timestep = latents.clone(), timestep.clone()
        condition = Condition(**self.inputs.tree)

        def run() -> Tensor:
            return editor.velocity(self.latents, self.timestep, condition)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = run()

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        self.latents.copy_(latents)
        self.timestep.copy_(timestep)
        self.graph.replay()
        return self.out
