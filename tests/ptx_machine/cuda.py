"""The CUDA kernels, in place of the C++ ones: ops that would run these on the CPU run those on the machine."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from ctypes import c_bool, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

from mtedit_fast.ops import _cpp
from ptx_machine.launch import run
from ptx_machine.program import Program, parse

SOURCES = Path(__file__).parents[2] / "csrc"
THREADS, COLUMNS, ROWS, MAX_CHANNELS = 256, 64, 16, 4  # of crop_resize.cu
PIXELS = {0: ("f", 4), 1: ("13__nv_bfloat16", 2), 2: ("6__half", 2), 3: ("h", 1)}  # mangled, and bytes of one
OUTPUTS = {0: 4, 1: 2, 2: 2}


class Image(ctypes.Structure):
    _fields_ = [(name, c_int64) for name in ("data", "height", "width", "row_stride", "pixel_stride", "channel_stride")]


class Images(ctypes.Structure):
    _fields_ = [("first", Image), ("image_stride", c_int64), ("count", c_int64), ("table", c_void_p)]


class CropResize(ctypes.Structure):
    """csrc/crop_resize.h"""

    _fields_ = [
        ("images", Images),
        ("channels", c_int),
        ("pixel", c_int),
        ("boxes", c_void_p),
        ("index", c_void_p),
        ("crops", c_int64),
        ("height", c_int64),
        ("width", c_int64),
        ("cubic", c_bool),
        ("gain", c_float * MAX_CHANNELS),
        ("bias", c_float * MAX_CHANNELS),
        ("out", c_void_p),
        ("out_dtype", c_int32),
    ]


def compile_cuda(source: str, arch: int) -> str:
    """PTX of a file in csrc. FileNotFoundError without nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("nvcc: expected on PATH, to compile CUDA kernels; install the CUDA toolkit")
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernels.ptx"
        command = [nvcc, "-O3", "-std=c++17", f"-arch=compute_{arch}", "-ptx", SOURCES / source, "-o", ptx]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        return ptx.read_text()


def kernels_of(code: str) -> dict[str, Program]:
    return {
        name: parse(code, name)
        for name in (line.split()[-1].rstrip("(") for line in code.splitlines() if ".entry" in line)
    }


def install(arch: int) -> None:
    """For the rest of this process; nvcc is called when a kernel is."""
    programs: dict[str, Program] = {}

    def crop_resize(
        images: tuple[int, ...],
        pixel: int,
        boxes: int,
        index: int,
        shape: tuple[int, ...],
        cubic: bool,
        gain: list[float],
        bias: list[float],
        out: tuple[int, int],
        threads: int,
    ) -> None:
        if not programs:
            programs.update(kernels_of(compile_cuda("crop_resize.cu", arch)))
        mangled, size = PIXELS[pixel]
        (program,) = (program for name, program in programs.items() if f"crop_tileI{mangled}E" in name)
        crops, channels, height, width = shape
        *first, stride, count, table = images
        padded = [[*values, *[0.0] * (MAX_CHANNELS - channels)] for values in (gain, bias)]
        described = Images(Image(*first), stride, count, table)
        arrays = [(c_float * MAX_CHANNELS)(*values) for values in padded]
        sizes = (boxes, index, crops, height, width, cubic)
        argument = CropResize(described, channels, pixel, *sizes, *arrays, *out)
        each = (
            [Image.from_address(table + i * ctypes.sizeof(Image)) for i in range(count)] if table else [Image(*first)]
        )
        buffers = [(boxes, crops * 32), (index, crops * 8), (table, count * ctypes.sizeof(Image) if table else 0)]
        buffers.append((out[0], crops * channels * height * width * OUTPUTS[out[1]]))
        for image in each:
            reach = (image.height - 1) * image.row_stride + (image.width - 1) * image.pixel_stride
            reach += (channels - 1) * image.channel_stride + (0 if table else (count - 1) * stride)
            buffers.append((image.data, (reach + 1) * size))
        tiles = crops * -(-width // COLUMNS) * -(-height // ROWS)
        if tiles:
            run(program, (tiles, 1, 1), bytes(argument), buffers, threads=THREADS)

    if _cpp._C is not None:
        _cpp._C.crop_resize = crop_resize
