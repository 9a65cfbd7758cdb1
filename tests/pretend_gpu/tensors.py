"""Tensors that say they are on cuda:0 and hold a CPU tensor; what a GPU would refuse, or wait for, is noticed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
GPU = torch.device("cuda", 0)
WAITS = {  # results whose size or value the host has to know
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.equal,
    aten.is_nonzero,
    aten.bincount,
}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
COPIES = {aten._to_copy, aten.copy_}
TAKES_SCALARS = INDEXED | {aten.fill_, aten.fill, aten.masked_fill_, aten.masked_fill}  # as pointwise operators do
MIXED = {  # a CPU has no products of one dtype into another
    aten.mm.dtype: lambda a, b, dtype: a.to(dtype) @ b.to(dtype),
    aten.bmm.dtype: lambda a, b, dtype: a.to(dtype) @ b.to(dtype),
    aten.addmm.dtype: lambda c, a, b, dtype: c.to(dtype) + a.to(dtype) @ b.to(dtype),
}


class State(threading.local):
    """Of a thread: what to do where it waits for the GPU, and the graph that it is capturing."""

    on_wait = "default"
    capture: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] | None = None


state = State()
captures: list[Graph] = []
"""Going on, in whatever thread: until they end nothing may wait for the whole device."""
pinned: dict[int, Any] = {}
"""Storages by address; held, so that no other memory gets theirs."""


class OnGPU(Tensor):
    """`inner` is the CPU tensor."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGPU:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=GPU,
        )

    def __init__(self, inner: Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> Any:
        wait("tolist")
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def record_stream(self, stream: Any) -> None:
        pass

    def pin_memory(self, *_: Any) -> Tensor:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            twin = OnGPU(self.inner.detach().clone(memory_format=torch.preserve_format))
            memo[id(self)] = twin.requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                memo[id(self)]._is_param = True
        return memo[id(self)]

    def __reduce_ex__(self, _: Any) -> Any:
        return rebuilt, (self.inner.detach(), self.requires_grad, getattr(self, "_is_param", False))

    def __repr__(self, **_: Any) -> str:
        return f"{self.inner!r} on cuda:0"


def rebuilt(inner: Tensor, requires_grad: bool, is_param: bool) -> Tensor:
    """Of a pickle."""
    tensor = OnGPU(inner).requires_grad_(requires_grad)
    if is_param:
        tensor._is_param = True
    return tensor


def bare(tree: Any) -> Any:
    """CPU tensors and devices in place of the GPU's."""
    return tree_map(_bare, tree)


def _bare(leaf: Any) -> Any:
    if isinstance(leaf, OnGPU):
        return leaf.inner
    return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == "cuda" else leaf


def wait(what: str) -> None:
    """The host waits for the GPU."""
    if state.capture is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
    if state.on_wait == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")


class Pretend(TorchDispatchMode):
    """Entered, `device="cuda"` makes tensors that pretend."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    device = kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    touches = any(isinstance(tensor, OnGPU) for tensor in tensors)
    if func is aten.is_pinned.default:
        return args[0].untyped_storage().data_ptr() in pinned
    if func is aten._pin_memory.default or kwargs.get("pin_memory"):
        out = args[0].clone() if func is aten._pin_memory.default else func(*args, **kwargs | {"pin_memory": False})
        pinned[out.untyped_storage().data_ptr()] = out.untyped_storage()
        return out
    if not touches and (device is None or torch.device(device).type != "cuda"):
        return func(*args, **kwargs)
    if func.namespace == "mtedit_fast":
        return _ours(func, args, kwargs)
    packet = func.overloadpacket
    if packet in COPIES:
        _check_copy(func, args, kwargs)
    elif touches:
        _check_devices(func, args, tensors)
    if packet in WAITS or (packet is aten.repeat_interleave and kwargs.get("output_size") is None):
        wait(str(func))
    raw_args, raw_kwargs = bare((args, kwargs))
    raw = MIXED.get(func, func)(*raw_args, **raw_kwargs)
    if state.capture is not None:
        state.capture.append((func, raw_args, raw_kwargs, raw))
    lands = (
        isinstance(args[0], OnGPU) if packet is aten.copy_ else device is None or torch.device(device).type == "cuda"
    )
    if not lands:
        return args[0] if packet is aten.copy_ else raw
    out = tree_map(lambda leaf: OnGPU(leaf) if type(leaf) is Tensor else leaf, raw)
    return return_and_correct_aliasing(func, args, kwargs, out)


def _ours(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator of ours is the function registered for GPUs, run on what pretends."""
    from torch._library.custom_ops import OPDEFS

    definition = OPDEFS[func.name()]
    with Pretend():
        return definition._backend_fns.get("cuda", definition._backend_fns.get(None))(*args, **kwargs)


def _check_copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    source = args[1] if func.overloadpacket is aten.copy_ else args[0]
    there = isinstance(source, OnGPU)
    if func.overloadpacket is aten.copy_:
        goes, free = isinstance(args[0], OnGPU), bool(args[2]) if len(args) > 2 else kwargs.get("non_blocking", False)
    else:
        device = kwargs.get("device")
        goes, free = (there if device is None else device.type == "cuda"), kwargs.get("non_blocking", False)
    if there == goes:
        return
    host = source if not there else args[0]
    is_pinned = type(host) is Tensor and host.untyped_storage().data_ptr() in pinned
    if not free:
        wait(f"{func} from {'GPU' if there else 'pageable memory'}")
    elif state.capture is not None and not is_pinned:
        raise RuntimeError("operation not permitted when stream is capturing: a copy of pageable memory")


def _check_devices(func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    if func.overloadpacket in INDEXED:
        for index in args[1]:
            if isinstance(index, Tensor):
                if index.dtype in (torch.bool, torch.uint8):
                    wait(f"{func} by a mask")
                elif not isinstance(index, OnGPU):
                    wait(f"{func} by indices on the CPU")
        tensors = [tensor for tensor in (args[0], *args[2:3]) if isinstance(tensor, Tensor)]
    strays = [tensor for tensor in tensors if not isinstance(tensor, OnGPU)]
    scalars = torch.Tag.pointwise in func.tags or func.overloadpacket in TAKES_SCALARS or "foreach" in func.name()
    if any(tensor.dim() or not scalars for tensor in strays):
        shapes = [list(tensor.shape) for tensor in strays]
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({func}, on the CPU: {shapes})"
        )


class Graph:
    """A captured graph: replayed, the recorded calls run again on the same memory."""

    def __init__(self, *_: Any, **__: Any):
        self.calls: list[Any] = []

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = MIXED.get(func, func)(*args, **kwargs)
            for old, new in _results(func, args, kwargs, out, again):
                old.copy_(new)

    def pool(self) -> tuple[int, int]:
        return (0, 0)

    def reset(self) -> None:
        self.calls = []


def _results(func: Any, args: Any, kwargs: Any, out: Any, again: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Memory that a call has written and that is its own, before and now."""
    schema = getattr(func, "_schema", None)
    if schema is None or schema.is_mutable or any(result.alias_info for result in schema.returns):
        return
    held = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
        if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in held:
            yield old, new


@contextmanager
def graph(captured: Graph, *_: Any, **__: Any) -> Iterator[None]:
    """`torch.cuda.graph`: nothing that is captured has run, so that what it would write is NaN until a replay."""
    state.capture = captured.calls
    captures.append(captured)
    try:
        yield
    finally:
        state.capture = None
        captures.remove(captured)
    for func, args, kwargs, out in captured.calls:
        for memory, _ in _results(func, args, kwargs, out, out):
            if memory.is_floating_point():
                memory.fill_(torch.nan)
