"""A call captured as a CUDA graph: one launch instead of some thousand, the same kernels."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

undisturbed = threading.RLock()
"""Held during a capture, and by threads for as long as what they do would break one: waiting for the whole device,
emptying its cache, drawing from its default generator."""
WARM_UP = 3
"""Calls on a side stream before a capture: libraries choose their kernels and allocate workspaces in them."""


@contextmanager
def capture(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """Record the calls of this thread alone."""
    with undisturbed, torch.cuda.graph(graph, capture_error_mode="thread_local"):
        yield


class StaticInputs:
    """Copies of a nest of tensors at addresses that stay, of one layout.

    Broadcast dimensions stay broadcast, and dense tensors keep their memory format.
    """

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
    return _stored(tensor).clone(memory_format=torch.preserve_format).expand(tensor.shape)


class CapturedCall:
    """`function(*trees)`, captured on copies of the tensors of `trees`; called, it returns memory that the next call
    writes over.

    Attributes:
        inputs: one per tree; load what has changed before a call.
    """

    def __init__(self, function: Callable[..., Tensor], *trees: Any):
        self.inputs = [StaticInputs(tree) for tree in trees]
        held = [each.tree for each in self.inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                function(*held)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with capture(self.graph):
            self.out = function(*held)

    def __call__(self) -> Tensor:
        self.graph.replay()
        return self.out
