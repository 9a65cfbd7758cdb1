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
STACK = 0 if TRITON_VERSION >= (3, 9) else 72
"""Bytes of a thread's registers that may be spilled: ptxas of Triton 3.6 to 3.8 does so in a few of the kernels."""


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
