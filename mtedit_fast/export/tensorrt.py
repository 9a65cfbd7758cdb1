"""TensorRT plans in place of torch modules, on the caller's stream and at the tensors' addresses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtedit_fast.cuda_graphs import capture

from .backends import load_backend
from .manifest import verify_engine
from .ports import DTYPES
from .runtime import ExportedModule


class DeviceMemory:
    """Scratch memory of engines that run one after another on one stream: as large as the largest needs."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self.generation = 0
        """Grows when the memory moves: graphs captured before hold its former address."""

    def reserve(self, size: int, device: torch.device) -> Tensor:
        """At least `size` bytes, 256-byte aligned as torch's allocator gives them."""
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
            self.generation += 1
        return self._buffer


class _Captured(NamedTuple):
    graph: Any
    inputs: dict[str, Tensor]
    outputs: list[Tensor]
    generation: int


class TensorRTModule(ExportedModule):
    """An exported module through its TensorRT plan.

    Work goes to the caller's stream. The first call of a shape runs the engine as it is, the second captures a CUDA
    graph, and those after replay it on copies of the inputs. An adapter's tensors are read where they lie, so
    `set_lora` needs no new capture.

    Args:
        directory, name: of an export with an engine for this GPU. Manifest and hash are checked before the plan is
            opened.
        config: what `.config` shall be.
        device: a CUDA device.
        graphs: capture CUDA graphs.
        memory: shared with other modules that run on the same stream, never at the same time; default: its own.

    Raises:
        ValueError: no GPU, or an engine that is not for it, see `verify_engine`.
        ImportError: the engine's library is not installed.
    """

    def __init__(
        self,
        directory: str | Path,
        name: str,
        *,
        config: Any = None,
        device: torch.device | str = "cuda",
        graphs: bool = True,
        memory: DeviceMemory | None = None,
    ):
        if not torch.cuda.is_available():
            raise ValueError(
                f"device: expected a CUDA GPU to run {name} on, found none; run the ONNX files (--runtime onnx) instead"
            )
        super().__init__(directory, name, config=config, device=device)
        built = self.entry.engine
        library = load_backend(built.backend if built else "tensorrt")
        major, minor = torch.cuda.get_device_capability(self.device)
        path = verify_engine(
            directory,
            name,
            self.entry,
            backend=library.name,
            version=library.version,
            sm=10 * major + minor,
            device=torch.cuda.get_device_name(self.device) if library.name == "tensorrt" else "",
        )
        trt = library.trt
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise ValueError(
                f"{name}: {library.name} {library.version} refused {path.name}; export again on this machine"
            )
        self._strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._contexts: dict[tuple[int, ...], Any] = {}  # a captured graph needs its context's shapes to stay
        self._memory, self._graphs = memory or DeviceMemory(), graphs
        self._captured: dict[tuple[int, ...], _Captured] = {}

    def _run(self, values: dict[str, Tensor], sizes: dict[str, int], profile: int) -> list[Tensor]:
        with torch.cuda.device(self.device):
            key = (profile, *sizes.values())
            first = key not in self._contexts
            context = self._context(key)
            if first or not self._graphs or not self._capturable(context):
                return self._enqueue(context, values)
            captured = self._captured.get(key)
            if captured is None or captured.generation != self._memory.generation:
                captured = self._captured[key] = self._capture(context, values)
            for name, buffer in captured.inputs.items():
                if name not in self._lora:
                    buffer.copy_(values[name])
            captured.graph.replay()
            return [output.clone() for output in captured.outputs]

    def _context(self, key: tuple[int, ...]) -> Any:
        """The context of one shape, with the shared memory as it lies now."""
        profile = key[0]
        if key not in self._contexts:
            stream = torch.cuda.current_stream()
            context = self._engine.create_execution_context(self._strategy)
            if not context.set_optimization_profile_async(profile, stream.cuda_stream):
                raise RuntimeError(f"{self.name}: profile {self.entry.profiles[profile].name} cannot be selected")
            stream.synchronize()
            self._contexts[key] = context
        context = self._contexts[key]
        memory = self._memory.reserve(self._engine.get_device_memory_size_for_profile_v2(profile), self.device)
        context.set_device_memory(memory.data_ptr(), memory.numel())
        return context

    def _capturable(self, context: Any) -> bool:
        """tensorrt_rtx compiles kernels as it goes, and says when it is done."""
        asked = getattr(context, "is_stream_capturable", None)
        return asked is None or bool(asked(torch.cuda.current_stream().cuda_stream))

    def _enqueue(self, context: Any, values: dict[str, Tensor]) -> list[Tensor]:
        for name, value in values.items():
            context.set_input_shape(name, tuple(value.shape))
            context.set_tensor_address(name, value.data_ptr())
        outputs = []
        for port in self.entry.outputs:
            shape = tuple(context.get_tensor_shape(port.name))
            output = torch.empty(shape, dtype=DTYPES[port.dtype], device=self.device)
            context.set_tensor_address(port.name, output.data_ptr())
            outputs.append(output)
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError(f"{self.name}: the engine could not be run; the library's message is above")
        return outputs

    def _capture(self, context: Any, values: dict[str, Tensor]) -> _Captured:
        inputs = {name: value if name in self._lora else value.clone() for name, value in values.items()}
        graph = torch.cuda.CUDAGraph()
        with capture(graph):
            outputs = self._enqueue(context, inputs)
        return _Captured(graph, inputs, outputs, self._memory.generation)
