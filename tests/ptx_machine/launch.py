"""A launch: arguments as a GPU gets them, and the blocks of its grid, some at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ptx_machine.instructions import EXECUTE
from ptx_machine.machine import Machine, storage
from ptx_machine.memory import GlobalMemory
from ptx_machine.program import Program

LANES = 8192
"""Threads that run at once, about."""
ENDS: int | None = None
"""Only so many blocks run at each end of a grid: of what is too much to go through."""
Grid = tuple[int, int, int]
launches: dict[str, int] = {}
"""Of each kernel."""


def launch(program: Program, grid: Grid, given: list[Any], *, threads: int, shared: int) -> None:
    """given: tensors and numbers in the order of the program's parameters; those at its end may be left out."""
    padded = [*given, *[0] * (len(program.parameters) - len(given))]
    arguments, buffers = b"", []
    for (offset, type_), value in zip(program.parameters.values(), padded, strict=True):
        if isinstance(value, torch.Tensor):
            buffers.append((value.untyped_storage().data_ptr(), value.untyped_storage().nbytes()))
            value = value.data_ptr()
        number = f"<f{int(type_[1:]) // 8}" if type_[0] == "f" else np.dtype(storage(type_))
        if type_[0] != "f":
            value = int(value) % (1 << 8 * np.dtype(number).itemsize)
        arguments = arguments.ljust(offset, b"\0") + np.array(value, number).tobytes()
    run(program, grid, arguments, buffers, threads=threads, shared=shared)


def run(
    program: Program, grid: Grid, arguments: bytes, buffers: list[tuple[int, int]], *, threads: int, shared: int = 0
) -> None:
    """arguments: all of them, as they lie in memory; buffers: address and bytes of what they point to."""
    launches[program.name] = launches.get(program.name, 0) + 1
    memory = GlobalMemory(buffers)
    total, at_once = grid[0] * grid[1] * grid[2], max(LANES // threads, 1)
    starts = range(0, total, at_once)
    if ENDS is not None and total > 2 * ENDS:
        starts, at_once = (0, total - ENDS), ENDS  # type: ignore[assignment]
    for first in starts:
        blocks = min(at_once, total - first)
        sizes = {"threads": threads, "grid": grid, "first": first, "blocks": blocks, "shared": shared}
        Machine(program, arguments, memory, **sizes).run(EXECUTE)
