"""Triton's launches, with CPU tensors, of what it compiles for a GPU."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver

from mtedit_fast import kernels
from mtedit_fast.kernels import seeded_noise
from ptx_machine.launch import launch
from ptx_machine.program import parse


class Driver:
    """What Triton asks a device's driver."""

    def __init__(self, arch: int):
        self.arch = arch
        self.launcher_cls = None
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": (163 if self.arch == 80 else 227) << 10}

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def unload_module(self, module: object) -> None:
        pass


def install(arch: int) -> None:
    """For the rest of this process."""
    driver.set_active(Driver(arch))
    CompiledKernel._init_handles = _init_handles
    for kernel in pkgutil.iter_modules(kernels.__path__):  # as they are for a GPU
        importlib.import_module(f"{kernels.__name__}.{kernel.name}")
    seeded_noise.INTERPRETED = True  # which is why ops let them have tensors of the CPU


def _init_handles(self: Any) -> None:
    if self._run is not None:
        return
    limit = driver.active.get_device_properties(0)["max_shared_mem"]
    if self.metadata.shared > limit:
        raise triton.runtime.errors.OutOfResources(self.metadata.shared, limit, "shared memory")
    program = parse(self.asm["ptx"])
    kinds = list(self.src.signature.values())

    def run(
        x: int, y: int, z: int, stream: Any, function: Any, packed: Any, extra: Any, enter: Any, leave: Any, *args: Any
    ) -> None:
        given = [arg for arg, kind in zip(args, kinds, strict=True) if kind != "constexpr"]
        launch(program, (x, y, z), given, threads=32 * self.metadata.num_warps, shared=self.metadata.shared)

    self._run = run
