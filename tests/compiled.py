"""Kernels as they are compiled for sm_80, sm_90 and sm_100, which takes no GPU, and what all of them are held to."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import triton

Row = dict[str, Any]
TRITON_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
STACK = {(3, 6): 16, (3, 8): 8}.get(TRITON_VERSION, 0)
"""Bytes of a thread's registers that may be spilled, as ptxas of Triton 3.6 and 3.8 does."""
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes of shared memory that a block may have, by architecture."""
LEAST_WIDE = 0.27
"""Share of 16-byte moves in the code of a kernel on aligned rows; on others, it has less."""


def compile_all(script: str) -> list[Row]:
    """What `script`, ptx_NAME.py, prints of each kernel, specialisation and architecture.

    In a process of its own: under the interpreter kernels are not compilable.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name(script))]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def assert_no_fp64_or_spills(rows: list[Row], kernels: set[str]) -> None:
    """Of `kernels`, by the first word of their names, all compiled for every architecture together."""
    assert {row["arch"] for row in rows} == {80, 90, 100}
    assert {row["kernel"].split()[0] for row in rows} == kernels
    for row in rows:
        assert row["fp64"] == 0, row
        assert row["local"] == 0, row
        assert row["stack"] <= STACK, row


def assert_wide(rows: list[Row], *but: str) -> None:
    """Rows of tensors move 16 bytes at a time, but in `rows` that have one of `but` in their names.

    What a program reads or writes once counts as much in the code; what is wide where every access to rows is narrow
    is aligned by itself.
    """
    checked = [row for row in rows if not any(word in row["kernel"] for word in but)]
    assert checked
    assert not [row for row in checked if row["wide"] < LEAST_WIDE]
    assert not [row for row in rows if "odd" in but and row["kernel"].endswith("odd") and row["wide"] >= LEAST_WIDE]


def assert_half_products_on_tensor_cores(rows: list[Row]) -> None:
    """By the instruction of their architecture, which for large tiles is not that of the one before."""
    assert rows
    for row in rows:
        assert {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}[row["arch"]] in row["mma"], row
