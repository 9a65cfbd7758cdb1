"""Tests of kernels as they are compiled for a GPU, without one: `python tests/ptx_machine 90 tests/test_sde_step.py`.

80 or 90 is the compute capability, what follows is pytest's. Triton launches, with CPU tensors, what it would launch on
a GPU, and `crop_resize`'s CUDA kernel, launched by its own host code, takes the place of the C++ one (tests named
"cpp"; it takes nvcc). A kernel's PTX runs instruction by instruction, products of tensor cores and asynchronous copies
included. Approximate instructions are off by as much as they may be; what arrives asynchronously does so as late as it
may; addresses outside of a tensor or not aligned, shared memory that warps share without a barrier, and shuffles of
parts of a warp are errors.

It shows what a compiled kernel computes, not how long it takes, nor what ptxas makes of it. Warps run in step: of races
in global memory only those show for which a barrier is missing beside an atomic. Tensor cores of sm_100 are missing.
"""

import os
import sys
from pathlib import Path

import pytest


def main(arch: int, arguments: list[str]) -> int:
    os.environ["TRITON_INTERPRET"] = "0"
    sys.path[0] = str(Path(__file__).parents[1])  # not this folder, whose names others have, too
    from ptx_machine import cuda, driver
    from ptx_machine.launch import launches

    driver.install(arch)
    cuda.install(arch)
    code = pytest.main(arguments)
    print(f"launches on sm_{arch}: {launches}")
    return int(code)


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("80", "90"):
        sys.exit(__doc__)
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
