"""csrc's CUDA kernels in place of the C++ ones, launched by their own host code: ops that would run these on the CPU
run those on the machine."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_size_t, c_uint, c_void_p
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pybind11

from mtedit_fast.ops import _cpp
from ptx_machine.launch import run
from ptx_machine.program import Program, parse

SOURCES = Path(__file__).parents[2] / "csrc"
MULTIPROCESSORS = 1  # so that loops over what a grid leaves go round
IMAGE = 48  # bytes of an image's description, which begins with its address
FAILED = 719  # cudaErrorLaunchFailure
LAUNCH = CFUNCTYPE(c_int, c_char_p, POINTER(c_uint), POINTER(c_uint), c_size_t, POINTER(c_void_p))
Buffers = list[tuple[int, int]]


class Extension:
    """csrc as setup.py builds it, but for CUDA's runtime: that is runtime.cpp, which launches on the machine."""

    def __init__(self, arch: int):
        """Compiles some seconds. FileNotFoundError without nvcc."""
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            raise FileNotFoundError("nvcc: expected on PATH, to compile CUDA kernels; install the CUDA toolkit")
        with tempfile.TemporaryDirectory() as folder:
            self.module, library = _host_code(nvcc, arch, Path(folder))
            code = [_ptx(nvcc, arch, source, Path(folder)) for source in sorted(SOURCES.glob("*.cu"))]
        self.programs = {name: parse(text, name) for text in code for name in _kernels(text)}
        self.buffers: Buffers = []
        self.error: BaseException | None = None
        self.callback = LAUNCH(self._launch)  # which has to outlive the library's use of it
        library.ptx_machine_connect(self.callback, MULTIPROCESSORS)

    def call(self, function: str, buffers: Buffers, *arguments: Any) -> None:
        """One of the module's; `buffers`: what its kernels may touch, address and bytes."""
        self.buffers, self.error = buffers, None
        try:
            getattr(self.module, function)(*arguments)
        except RuntimeError:
            if self.error is not None:
                raise self.error from None
            raise

    def _launch(self, name: bytes, grid: Any, block: Any, shared: int, given: Any) -> int:
        try:
            program = self.programs[name.decode()]
            threads = math.prod(block[:3])
            if threads > program.threads:
                raise RuntimeError(f"{program.name} takes at most {program.threads} threads a block, got {threads}")
            arguments = b""
            for i, (offset, size) in enumerate(_places(program)):
                arguments = arguments.ljust(offset, b"\0") + ctypes.string_at(given[i], size)
            run(program, tuple(grid[:3]), arguments, self.buffers, threads=threads, shared=shared)
        except BaseException as error:  # which would not get through the host code
            self.error = error
            return FAILED
        return 0


def _host_code(nvcc: str, arch: int, folder: Path) -> tuple[ModuleType, ctypes.CDLL]:
    path = folder / "_C.so"
    includes = [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]
    options = ["-O1", "-std=c++17", "-shared", "-cudart=none", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    options += [f"-gencode=arch=compute_{arch},code=compute_{arch}", f'-DMTEDIT_CUDA_ARCHS="sm_{arch}"']
    sources = [*SOURCES.glob("*.cpp"), *SOURCES.glob("*.cu"), Path(__file__).with_name("runtime.cpp")]
    _run([nvcc, *options, *includes, *sources, "-o", path])
    spec = importlib.util.spec_from_file_location(f"ptx_machine_{arch}._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, ctypes.CDLL(str(path))


def _ptx(nvcc: str, arch: int, source: Path, folder: Path) -> str:
    path = folder / "kernels.ptx"
    _run([nvcc, "-O3", "-std=c++17", f"-arch=compute_{arch}", "-ptx", source, "-o", path])
    return path.read_text()


def _run(command: list[str | Path]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stderr}")


def _kernels(code: str) -> list[str]:
    return [line.split()[-1].rstrip("(") for line in code.splitlines() if ".entry" in line]


def _places(program: Program) -> list[tuple[int, int]]:
    """Offset and bytes of each parameter."""
    return [
        (offset, int(type_.split()[1]) if type_.startswith("bytes") else int(type_[1:]) // 8)
        for offset, type_ in program.parameters.values()
    ]


extension = cache(Extension)
"""For 80 or 90."""


def device_copy(arch: int, out: np.ndarray, source: np.ndarray) -> None:
    buffers = [(array.ctypes.data, array.nbytes) for array in (out, source)]
    extension(arch).call("device_copy", buffers, buffers[0][0], *buffers[1], 0, 0)


def crop_resize(arch: int) -> Callable[..., None]:
    """In place of the extension's, whose arguments it takes; nvcc is called when it is."""

    def run_on_machine(
        images: Sequence[int], pixel: int, boxes: int, index: int, shape: Sequence[int], *others: Any
    ) -> None:
        *options, out, _ = others  # the last: threads of the CPU
        data, *sizes, stride, count, table = images
        buffers = [(boxes, shape[0] * 32), (index, shape[0] * 8), (out[0], math.prod(shape) * _itemsize(out[1]))]
        if table:
            buffers.append((table, count * IMAGE))
            described = np.frombuffer(ctypes.string_at(table, count * IMAGE), np.int64).reshape(count, -1).tolist()
        else:
            described = [[data, *sizes]]
        for address, height, width, row, column, channel in described:
            last = (height - 1) * row + (width - 1) * column + (shape[1] - 1) * channel
            last += 0 if table else (count - 1) * stride
            buffers.append((address, (last + 1) * _itemsize(pixel)))
        extension(arch).call("crop_resize_cuda", buffers, images, pixel, boxes, index, shape, *options, out, 0, 0)

    return run_on_machine


def install(arch: int) -> None:
    """For the rest of this process."""
    if _cpp._C is not None:
        _cpp._C.crop_resize = crop_resize(arch)


def _itemsize(code: int) -> int:
    return {code: dtype.itemsize for dtype, code in _cpp._PIXEL_CODES.items()}[code]
