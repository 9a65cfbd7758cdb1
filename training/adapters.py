"""θ, the old policy and the reference of one transformer: LoRA adapters on one set of base weights.

θ is peft's adapter "default", the old policy its adapter "old", the reference no adapter at all. Which rows of a batch
see which is a plan that every LoRA layer reads, see `planned_lora`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from mtedit_fast.editors.reference_cache import Weights
from mtedit_fast.training.planned_lora import Plan, PlannedLinear

POLICY, OLD = "default", "old"

# DiffusionNFT (arXiv 2509.16117) types 0 to 2, and CRD: the decay of the old policy at iteration n.
OLD_DECAY: dict[str, Callable[[int], float]] = {
    "on_policy": lambda n: 0.0,
    "ramp": lambda n: min(0.001 * n, 0.5),
    "delayed": lambda n: 0.0 if n < 75 else min(0.0075 * (n - 75), 0.999),
    "crd": lambda n: min(0.25 + 0.005 * n, 0.999),
}


class Adapters:
    """θ, the old policy and the reference (no adapter) of one transformer: one set of base weights.

    Build it before `fully_shard` and before compiling. Adapter weights are fp32 (fp64 on an fp64 base). A context
    must cover the whole forward, and a backward that recomputes (activation checkpointing) must run under the plan
    of its forward: for θ, outside every context.

    Args:
        model: a diffusers transformer without adapters; used in place.
        rank, alpha: of every LoRA layer; its product is scaled by alpha/rank.
        target_modules: names or one regular expression, as in `peft.LoraConfig`; linear layers whose first dimension is
            the batch.
        seed: of the initial values; the global random state is left as it was.
        old: add the old policy, a copy of θ that is never trainable. Without it the old policy is the base.

    Raises:
        ValueError: the model has adapters already, or no module matches `target_modules` (peft's own error).
        TypeError: `target_modules` names something other than linear layers.
    """

    def __init__(
        self, model: Any, *, rank: int, alpha: float, target_modules: str | list[str], seed: int, old: bool = False
    ):
        if getattr(model, "peft_config", None):
            raise ValueError(
                f"model: expected a transformer without adapters, got {sorted(model.peft_config)}; fuse and unload "
                "them first (pipe.fuse_lora, pipe.unload_lora_weights)"
            )
        self.model = model
        self.rank = rank
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            for name in (POLICY, OLD) if old else (POLICY,):
                config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=target_modules)
                config._register_custom_module({nn.Linear: PlannedLinear})
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters are the point
                    model.add_adapter(config, name)
        model.set_adapter(POLICY)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        self._plan = Plan()
        model.register_forward_pre_hook(self._count_copies, with_kwargs=True)
        for name, layer in layers.items():
            if not isinstance(layer, PlannedLinear):
                raise TypeError(
                    f"target_modules: expected linear layers, got {name}, {type(layer.get_base_layer()).__name__}; "
                    "leave it out"
                )
            layer.plan = self._plan
        self._layers = list(layers.values())
        self.names = [f"{name}.lora_{factor}.weight" for name in layers for factor in "AB"]
        for name in model.peft_config:
            for parameter in self._weights(name):  # a bf16 adapter would lose small updates
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        self.has_old = old
        if old:
            _copy(self._weights(OLD), self.parameters)
        self.old_is_current = old
        """True only if the old policy is known to equal θ exactly, so that its forward need not be run."""
        self._versions = {POLICY: 0, OLD: 1}  # equal numbers are equal values; while old is current, θ's holds for it
        self._last_version = 1
        self._marks = {name: self._mark(name) for name in model.peft_config}
        model.weight_plan = self
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        """A moving average of θ, tensors as in `parameters`."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """θ's, layer by layer, A [rank, in] then B [out, rank]; sharded ones (DTensors) after `fully_shard`."""
        return self._weights(POLICY)

    def _weights(self, adapter: str) -> list[nn.Parameter]:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward may have left whole copies in place of the shards
        return [factor[adapter].weight for layer in self._layers for factor in (layer.lora_A, layer.lora_B)]

    # ---- which rows see which adapter

    @contextmanager
    def _planned(
        self, adapters: tuple[str, ...], share: tuple[int, int] | None = None, rows: int = 0
    ) -> Iterator[None]:
        plan = self._plan
        before = plan.adapters, plan.share, plan.rows
        plan.adapters, plan.share, plan.rows = adapters, share, rows
        try:
            yield
        finally:
            plan.adapters, plan.share, plan.rows = before

    def _count_copies(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the transformer's forward, and outside its compiled blocks."""
        if not self._plan.rows:
            return
        batch = (args[0] if args else kwargs["hidden_states"]).shape[0]
        self._plan.copies = batch // self._plan.rows
        if batch == 0 or batch % self._plan.rows:
            raise ValueError(
                f"rows: expected a batch of {self._plan.rows} rows, or whole copies of it (guidance), got {batch}; "
                "old + reference is the size of the forward's batch"
            )

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Every row without adapter: the frozen model."""
        with self._planned(()):
            yield

    @contextmanager
    def old(self) -> Iterator[None]:
        """Every row with the old policy."""
        with self._planned(self._old_names):
            yield

    @contextmanager
    def rows(self, old: int, reference: int) -> Iterator[None]:
        """Batches of old + reference rows, without gradient: the first `old` see the old policy, the rest no adapter.

        Base weights are read once for both. A forward may stack whole copies of its batch, as batched guidance does.
        Compiled code has one graph per share old/(old + reference), whatever the counts.

        Raises:
            ValueError: a count is negative, both are 0, or (in the forward) the batch has another size.
        """
        if old < 0 or reference < 0 or old + reference == 0:
            raise ValueError(
                f"old, reference: expected counts ≥ 0 of which one is > 0, got {old}, {reference}; skip the forward "
                "where there are no rows"
            )
        if old and reference:
            divisor = math.gcd(old, reference)
            planned = self._planned(self._old_names, (old // divisor, (old + reference) // divisor), old + reference)
        else:
            planned = self._planned(self._old_names if old else ())
        with torch.no_grad(), planned:
            yield

    @property
    def _old_names(self) -> tuple[str, ...]:
        return (OLD,) if self.has_old else ()

    # ---- `WeightPlan`, for what is derived from the weights and outlives a forward

    def weights_of(self, rows: int) -> list[Weights]:
        """The weights that each of `rows` rows of a batch would see now.

        A change of θ or the old policy that went by every method here is noticed, unless it was through `.data`.

        Raises:
            ValueError: `rows()` is for batches of another size.
        """
        for name, mark in self._marks.items():
            if self._mark(name) != mark:
                self._changed(name)
        plan, layer = self._plan, self._layers[0]
        names = tuple(layer.active_adapters) if plan.adapters is None else plan.adapters
        if layer.disable_adapters:
            names = ()
        adapted, base = self._seen(names), self._seen(())
        if plan.share is None:
            return [adapted] * rows
        parts, of = plan.share
        if rows == 0 or rows % plan.rows:
            raise ValueError(f"rows: expected a batch of {plan.rows} rows, or whole copies of it, got {rows}")
        first = plan.rows // of * parts
        return ([adapted] * first + [base] * (plan.rows - first)) * (rows // plan.rows)

    def seeing(self, weights: Weights) -> AbstractContextManager[None]:
        """Every row with `weights`; for θ's, gradients go to θ."""
        return self._planned(weights.adapters)

    def versions(self) -> set[Hashable]:
        """Of the base, θ and the old policy."""
        return {self._seen(names).version for names in ((), (POLICY,), self._old_names)}

    def _seen(self, adapters: tuple[str, ...]) -> Weights:
        numbers = [self._versions[POLICY if name == OLD and self.old_is_current else name] for name in adapters]
        return Weights(tuple(numbers), POLICY in adapters, adapters)

    def _changed(self, adapter: str) -> None:
        """θ or the old policy has new values, and the two are no longer known to be equal."""
        if self.old_is_current:
            self._versions[OLD], self.old_is_current = self._versions[POLICY], False
        self._last_version += 1
        self._versions[adapter] = self._last_version
        self._marks[adapter] = self._mark(adapter)

    def _mark(self, adapter: str) -> int:
        """Grows with every change in place."""
        return sum(factor[adapter].weight._version for layer in self._layers for factor in (layer.lora_A, layer.lora_B))

    # ---- the old policy and the average follow θ

    def update_old(self, decay: float) -> None:
        """old ← decay·old + (1 − decay)·θ; with decay 0 an exact copy.

        Raises:
            ValueError: there is no old adapter, or decay is outside [0, 1].
        """
        self._require_old("update_old")
        _follow(self._weights(OLD), self.parameters, decay)
        if not self.old_is_current:
            self._changed(OLD)
        self.old_is_current |= decay == 0
        self._marks[OLD] = self._mark(OLD)

    def stepped(self) -> None:
        """The optimizer changed θ."""
        self._changed(POLICY)

    def update_average(self, decay: float) -> None:
        """averages ← decay·averages + (1 − decay)·θ.

        Raises:
            ValueError: decay is outside [0, 1].
        """
        _follow(self._placed_averages(), self.parameters, decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The average in place of θ, to evaluate or export it; θ comes back bit for bit."""
        current = [parameter.detach().clone() for parameter in self.parameters]
        was_current, version = self.old_is_current, self._versions[POLICY]
        _copy(self.parameters, self._placed_averages())
        self._changed(POLICY)
        try:
            yield
        finally:
            _copy(self.parameters, current)
            self.old_is_current, self._versions[POLICY] = was_current, version
            self._marks[POLICY] = self._mark(POLICY)

    def _placed_averages(self) -> list[Tensor]:
        """The averages where and as θ is, which may have been moved or sharded since."""
        self.averages = [_like(*pair) for pair in zip(self.averages, self.parameters, strict=True)]
        return self.averages

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """{"average": ..., "old": ..., "old_is_current": bool}, the first two by peft's names; θ is the model's own.

        The tensors are θ-like: shards (DTensors) after `fully_shard`, ready for `torch.distributed.checkpoint`.
        """
        state: dict[str, Any] = {"average": dict(zip(self.names, self._placed_averages(), strict=True))}
        if self.has_old:
            state["old"] = dict(zip(self.names, (p.detach() for p in self._weights(OLD)), strict=True))
            state["old_is_current"] = self.old_is_current
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Whole tensors or DTensors of a layout like θ's; whole ones, the same on every rank, are sharded as θ is.

        Raises:
            ValueError: the old adapter is missing on either side, or adapters differ in layers, rank or shape.
        """
        if "old" in state:
            self._require_old("state")
            self.load(OLD, state["old"])
        elif self.has_old:
            raise ValueError(
                f"state: expected the old adapter, got {sorted(state)}; it was saved without one: build Adapters "
                "with old=False, or start the old policy from θ with update_old(0)"
            )
        self._check("average", state["average"])
        _copy(self._placed_averages(), [state["average"][name] for name in self.names])
        self.old_is_current = state.get("old_is_current", False)

    def load(self, adapter: str, tensors: dict[str, Tensor]) -> None:
        """Values of "default" (θ) or "old", by peft's names, as `load_state_dict` takes them.

        Raises:
            ValueError: adapters differ in layers, rank or shape.
        """
        self._check(adapter, tensors)
        _copy(self._weights(adapter), [tensors[name] for name in self.names])
        self._changed(adapter)

    def _check(self, adapter: str, tensors: dict[str, Tensor]) -> None:
        if tensors.keys() != set(self.names):
            other = sorted(tensors.keys() ^ set(self.names))
            raise ValueError(
                f"{adapter}: expected the {len(self.names)} tensors of this model's LoRA layers, got {len(tensors)}; "
                f"{len(other)} differ, the first is {other[0]}; use the target_modules it was saved with"
            )
        for name, parameter in zip(self.names, self.parameters, strict=True):
            value = tensors[name]
            if value.shape == parameter.shape:
                continue
            rank = value.shape[0 if ".lora_A." in name else -1]
            if rank != self.rank:
                raise ValueError(
                    f"{adapter}: adapters of different rank: expected {self.rank}, got {rank} ({name}); build "
                    f"Adapters with rank={rank}, or take a checkpoint of rank {self.rank}"
                )
            raise ValueError(
                f"{adapter}: expected {name} of shape {list(parameter.shape)}, got {list(value.shape)}; it belongs to "
                "another model"
            )

    def _require_old(self, argument: str) -> None:
        if not self.has_old:
            raise ValueError(f"{argument}: expected an old adapter, got none; build Adapters with old=True")


def _local(tensors: list[Any]) -> list[Tensor]:
    """Storage on this rank: fused operations do not take DTensors."""
    return [(tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach() for tensor in tensors]


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, where `parameter` is and cut as it is; no communication."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _copy(targets: list[Any], values: list[Any]) -> None:
    values = [_like(value, target) for value, target in zip(values, targets, strict=True)]
    torch._foreach_copy_(_local(targets), _local(values))


def _follow(targets: list[Any], values: list[Any], decay: float) -> None:
    """targets ← decay·targets + (1 − decay)·values, fused."""
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: expected a number in [0, 1], got {decay}; it is the share of the former value kept")
    if decay == 0:
        _copy(targets, values)  # exact whatever the former value, even infinite
    else:
        torch._foreach_lerp_(_local(targets), _local(values), 1 - decay)
