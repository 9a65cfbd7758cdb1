"""`torch.cuda` of a machine with one GPU, as far as tests and benchmarks ask."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils._device
import triton.runtime.interpreter as interpreter
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mtedit_fast.ops import _backend, _operator
from pretend_gpu import tensors
from pretend_gpu.tensors import OnGPU, Pretend, bare, state

MEMORY = 140 << 30


class Event:
    def __init__(self, *_: Any, **__: Any):
        self.time = time.perf_counter()

    def record(self, *_: Any) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return (other.time - self.time) * 1000

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        if state.capture is not None:
            raise RuntimeError("operation not permitted when stream is capturing: Event.synchronize")

    def wait(self, *_: Any) -> None:
        pass


class Stream:
    cuda_stream = 0
    device = torch.device("cuda", 0)

    def __init__(self, *_: Any, **__: Any):
        pass

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event)

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None:
        Event.synchronize(Event())

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class Device:
    def __init__(self, device: Any):
        assert device in (None, 0) or torch.device(device) in (torch.device("cuda"), torch.device("cuda", 0)), device

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass


def synchronize(*_: Any) -> None:
    if tensors.captures:
        raise RuntimeError("operation not permitted when stream is capturing: synchronize")


def sync_debug_mode(mode: Any) -> None:
    state.on_wait = {0: "default", 1: "warn", 2: "error"}.get(mode, mode)


PROPERTIES = SimpleNamespace(
    name="a pretended GPU",
    total_memory=MEMORY,
    multi_processor_count=132,
    major=9,
    minor=0,
    L2_cache_size=50 << 20,
    warp_size=32,
    shared_memory_per_block_optin=232448,
    gcnArchName="",
)
CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "init": lambda: None,
    "_lazy_init": lambda: None,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "get_device_name": lambda device=None: PROPERTIES.name,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda device=None: PROPERTIES,
    "get_arch_list": lambda: ["sm_90"],
    "is_bf16_supported": lambda *_, **__: True,
    "synchronize": synchronize,
    "Event": Event,
    "Stream": Stream,
    "stream": lambda stream: nullcontext() if stream is None else stream,
    "StreamContext": lambda stream: nullcontext(),
    "current_stream": lambda device=None: Stream(),
    "default_stream": lambda device=None: Stream(),
    "set_stream": lambda stream: None,
    "device": Device,
    "CUDAGraph": tensors.Graph,
    "graph": tensors.graph,
    "is_current_stream_capturing": lambda: state.capture is not None,
    "set_sync_debug_mode": sync_debug_mode,
    "get_sync_debug_mode": lambda: ("default", "warn", "error").index(state.on_wait),
    "empty_cache": lambda: None,
    "ipc_collect": lambda: None,
    "memory_allocated": lambda device=None: 1 << 20,
    "max_memory_allocated": lambda device=None: 1 << 20,
    "memory_reserved": lambda device=None: 1 << 20,
    "max_memory_reserved": lambda device=None: 1 << 20,
    "reset_peak_memory_stats": lambda device=None: None,
    "memory_stats": lambda device=None: {},
    "mem_get_info": lambda device=None: (MEMORY, MEMORY),
    "get_rng_state": lambda device="cuda": torch.get_rng_state(),
    "set_rng_state": lambda new, device="cuda": torch.set_rng_state(new),
    "get_rng_state_all": lambda: [torch.get_rng_state()],
    "set_rng_state_all": lambda new: torch.set_rng_state(new[0]),
    "manual_seed": torch.default_generator.manual_seed,
    "manual_seed_all": lambda seed: None,
    "seed_all": lambda: None,
}


def pretend(kernels: bool) -> None:
    """For the rest of this process there is a GPU; with kernels=False one that ours do not run on."""
    for name, value in CUDA.items():
        setattr(torch.cuda, name, value)
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a CPU tensor cannot turn into another class
    torch.compile = lambda model=None, **_: model if model is not None else (lambda function: function)  # type: ignore[assignment]
    torch.utils._device._device_constructors()  # keeps a list of them, in which the real one belongs
    tensor = torch.tensor  # reads what it is given without asking
    torch.tensor = lambda data, *args, **kwargs: tensor(tree_map_only(OnGPU, OnGPU.tolist, data), *args, **kwargs)  # type: ignore[assignment]
    _operator.is_in_torch_dispatch_mode = lambda: False  # a GPU that does not pretend needs no mode
    _interpret()
    _without(("cuda",) if kernels else ("cuda", "triton"))
    _enter()
    start = threading.Thread.run

    def run(thread: threading.Thread) -> None:
        _enter()
        start(thread)

    threading.Thread.run = run  # type: ignore[method-assign]


def _enter() -> None:
    """In this thread, for good."""
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") is then a copy that is seen
    Pretend().__enter__()


def _without(backends: tuple[str, ...]) -> None:
    available = _backend.unavailable_reason

    def unavailable_reason(backend: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
        return "it needs a real GPU" if backend in backends else available(backend, device, dtypes)

    _backend.unavailable_reason = unavailable_reason


def _interpret() -> None:
    """Triton's interpreter takes CPU tensors; a GPU would take none of those."""
    launch = interpreter.GridExecutor.__call__

    def checked(executor: Any, *args: Any, **kwargs: Any) -> Any:
        strays = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor) and not isinstance(arg, OnGPU)]
        if strays:
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        args, kwargs = bare((args, kwargs))

        def run(*args: Any, **kwargs: Any) -> None:
            with torch.utils._python_dispatch._disable_current_modes():
                launch(executor, *args, **kwargs)

        if state.capture is not None:
            state.capture.append((run, args, kwargs, None))
        else:
            run(*args, **kwargs)

    interpreter.GridExecutor.__call__ = checked
