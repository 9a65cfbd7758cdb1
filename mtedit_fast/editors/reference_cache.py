"""What references contribute to a model whose references see only themselves: computed once for everyone who reads it.

Which rows of a batch see which weights is known to whoever put adapters on the transformer: `WeightPlan`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mtedit_fast.editors.content import content_keys


class Weights(NamedTuple):
    """The weights that a row of a batch sees.

    Attributes:
        version: equal versions are equal values.
        trainable: gradients with respect to them are wanted.
        adapters: names of what is added to the base.
    """

    version: Hashable
    trainable: bool = False
    adapters: tuple[str, ...] = ()


class WeightPlan(Protocol):
    """What a transformer may carry as `weight_plan`, when not all rows of its batches see the same weights."""

    def weights_of(self, rows: int) -> list[Weights]:
        """The weights that each of `rows` rows would see in a forward now."""

    def seeing(self, weights: Weights) -> AbstractContextManager[None]:
        """Every row of the forwards inside sees `weights`."""

    def versions(self) -> set[Hashable]:
        """Those that some row may yet see; nothing of another version is needed again."""


class OneWeights:
    """The plan of a transformer that carries none: all rows see the same weights.

    A new version begins when a parameter is changed in place or replaced, or peft's adapters are switched, scaled or
    merged. Not seen: what goes through `parameter.data`.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self._version = 0
        self._state: tuple[list[tuple[weakref.ref[Tensor], int]], Any] = ([], None)

    def weights_of(self, rows: int) -> list[Weights]:
        return [self._weights()] * rows

    def seeing(self, weights: Weights) -> AbstractContextManager[None]:
        return nullcontext()

    def versions(self) -> set[Hashable]:
        return {self._weights().version}

    def _weights(self) -> Weights:
        parameters = list(self.module.parameters())
        switches = [
            (tuple(layer.active_adapters), layer.disable_adapters, tuple(layer.merged_adapters), dict(layer.scaling))
            for layer in self.module.modules()
            if isinstance(layer, LoraLayer)
        ]
        known, before = self._state
        same = len(known) == len(parameters) and all(
            reference() is parameter and version == parameter._version
            for (reference, version), parameter in zip(known, parameters, strict=True)
        )
        if not same or switches != before:
            self._version += 1
            self._state = [(weakref.ref(parameter), parameter._version) for parameter in parameters], switches
        return Weights(self._version, any(parameter.requires_grad for parameter in parameters))


class Key(NamedTuple):
    """What an ordered set of references contributes depends on nothing else."""

    version: Hashable  # of the weights
    grid: Hashable
    content: tuple[int, int]


class _Gradient:
    """What arrived at one reference's tensors, in fp32 or better, until it is carried on to the weights."""

    def __init__(self, latents: Tensor, weights: Weights):
        self.latents, self.weights = latents, weights
        self.sums: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.sums.values())

    def take(self, index: int, leaf: Tensor) -> None:
        """Move a leaf's gradient here."""
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None  # called when it has just been accumulated
        if index in self.sums:
            self.sums[index] += gradient
        else:
            self.sums[index] = gradient.to(torch.promote_types(gradient.dtype, torch.float32))


class _Entry:
    """The tensors of one ordered set of references."""

    def __init__(self, latents: Tensor, tensors: list[Tensor]):
        self.latents, self.tensors = latents, tensors
        self.leaves: list[Tensor] | None = None
        self.nbytes = sum(tensor.nbytes for tensor in tensors)


class ReferenceCache:
    """The tensors `extract` makes of references, kept by (weight version, grid, content of the latents).

    Without gradient, rows get the tensors themselves. With gradient and trainable weights they get leaves of the same
    storage; what arrives at those is summed over all backwards and waits for `backward`, which carries it on to the
    weights by one more extraction, with a graph. So `torch.autograd.grad` alone does not see what the weights do
    through the references: take `loss.backward()`, then `backward()`. References are extracted one at a time, so that
    their bits do not depend on what else is missing.

    Beyond `budget` the least recently used are dropped, those of the last call excepted: whoever asked for them holds
    them anyway. One that is larger than the whole budget is thus extracted again after another was used, no error. A
    dropped reference's gradient is carried on at once.

    Args:
        extract: (latents [1, L, C], grid) to tensors [1, ...], a function of the transformer's weights.
        plan: the current plan of weights.
        budget: bytes of tensors and waiting gradients.

    Attributes:
        extractions: without graph, one per reference and weight version while the budget lasts.
        hits: distinct references that a call found here.
        evictions: dropped for the budget, not for their version.
        backwards: extractions with graph.
    """

    def __init__(self, extract: Callable[[Tensor, Any], list[Tensor]], plan: Callable[[], WeightPlan], budget: int):
        if budget < 0:
            raise ValueError(f"budget: expected bytes ≥ 0, got {budget}")
        self.extract, self.plan, self.budget = extract, plan, budget
        self.extractions = self.hits = self.evictions = self.backwards = 0
        self._entries: dict[Key, _Entry] = {}  # least recently used first
        self._waiting: dict[Key, _Gradient] = {}

    @property
    def bytes(self) -> int:
        """Of tensors and waiting gradients."""
        held = sum(entry.nbytes for entry in self._entries.values())
        return held + sum(gradient.nbytes for gradient in self._waiting.values())

    def runs(self, latents: Tensor, grid: Hashable) -> list[tuple[list[Tensor], int]]:
        """The tensors [1, ...] of the rows of `latents` [n, L, C], with the number of neighbours that share them.

        Waits for the device once, to read the keys.

        Raises:
            RuntimeError: gradients still wait for weights that are no more.
        """
        plan = self.plan()
        weights = plan.weights_of(len(latents))
        self._forget(plan.versions() | {each.version for each in weights})
        keys = [Key(each.version, grid, content) for each, content in zip(weights, content_keys(latents), strict=True)]
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        for key in dict.fromkeys(keys):
            if key in self._entries:
                self._entries[key] = self._entries.pop(key)
                self.hits += 1
                continue
            own = latents[first[key] : first[key] + 1].clone()
            with torch.no_grad(), plan.seeing(weights[first[key]]):
                self._entries[key] = _Entry(own, self.extract(own, grid))
            self.extractions += 1
        self._trim(keep=first)
        neighbours = [list(group) for _, group in groupby(zip(keys, weights, strict=True))]
        return [(self._tensors(*group[0]), len(group)) for group in neighbours]

    def backward(self) -> None:
        """Carry all waiting gradients on to the weights.

        Raises:
            RuntimeError: the weights they are for have changed.
        """
        self._forget(self.plan().versions())
        for key in list(self._waiting):
            self._carry_on(key)

    def clear(self) -> None:
        """Forget everything, waiting gradients included."""
        self._entries.clear()
        self._waiting.clear()

    def _tensors(self, key: Key, weights: Weights) -> list[Tensor]:
        entry = self._entries[key]
        if not (weights.trainable and torch.is_grad_enabled()):
            return entry.tensors
        if entry.leaves is None:
            # The hooks hold the gradient but not the entry, so that a dropped entry's memory is free at once.
            gradient = _Gradient(entry.latents, weights)
            entry.leaves = [tensor.detach().requires_grad_() for tensor in entry.tensors]
            for index, leaf in enumerate(entry.leaves):
                leaf.register_post_accumulate_grad_hook(partial(self._arrived, key, gradient, index))
        return entry.leaves

    def _arrived(self, key: Key, gradient: _Gradient, index: int, leaf: Tensor) -> None:
        gradient.take(index, leaf)
        self._waiting[key] = gradient

    def _carry_on(self, key: Key) -> None:
        gradient = self._waiting.pop(key)
        sums, gradient.sums = gradient.sums, {}
        with torch.enable_grad(), self.plan().seeing(gradient.weights):
            tensors = self.extract(gradient.latents, key.grid)
            reached = [index for index in sums if tensors[index].requires_grad]  # not those before the first adapter
            if reached:  # here, as checkpointed blocks run again in it
                torch.autograd.backward(
                    [tensors[index] for index in reached], [sums[index].to(tensors[index].dtype) for index in reached]
                )
        self.backwards += 1

    def _forget(self, versions: set[Hashable]) -> None:
        """Drop what no row will see again."""
        stale = sum(key.version not in versions for key in self._waiting)
        if stale:
            raise RuntimeError(
                f"references: gradients of {stale} wait for weights that have changed since; call "
                "editor.backward_references() after the last backward and before the optimizer's step, or "
                "editor.invalidate() to give them up"
            )
        for key in [key for key in self._entries if key.version not in versions]:
            del self._entries[key]

    def _trim(self, keep: Collection[Key]) -> None:
        for key in [key for key in self._waiting if key not in self._entries]:  # came after the entry was dropped
            if self.bytes > self.budget:
                self._carry_on(key)
        for key in [key for key in self._entries if key not in keep]:
            if self.bytes <= self.budget:
                return
            del self._entries[key]
            self.evictions += 1
            if key in self._waiting:
                self._carry_on(key)
