"""Tests of kernels as they are compiled for a GPU, without one: `python tests/ptx_machine 90 tests/test_sde_step.py`.

What follows the compute capability is pytest's.
"""

import os
import sys
from pathlib import Path

import pytest


def main(arch: int, arguments: list[str]) -> int:
    os.environ["TRITON_INTERPRET"] = "0"
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from ptx_machine import cuda, driver
    from ptx_machine.launch import launches

    driver.install(arch)
    cuda.install(arch)
    code = pytest.main(arguments)
    print(f"launches on sm_{arch}: {launches}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
