"""Kernels compiled for an architecture that need not be here; not in a process with Triton's interpreter."""

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compile_for(
    arch: int,
    kernel: Any,
    signature: dict[str, Any],
    *,
    num_warps: int,
    num_stages: int = 3,
    divisible: Sequence[str] = ("numel",),
) -> Any:
    """What Triton makes of a kernel of ours at a launch: `.asm["ptx"]`, `.asm["cubin"]`, `.metadata.shared` …

    Args:
        arch: 80 for compute capability 8.0.
        signature: more than the kernel's arguments: a type, or the value of a constant.
        divisible: integers that are multiples of 16, as Triton finds out at a launch; pointers are.
    """
    given = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(
        fn=kernel,
        signature={name: value if isinstance(value, str) else "constexpr" for name, value in given.items()},
        constexprs={name: value for name, value in given.items() if not isinstance(value, str)},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, (name, value) in enumerate(given.items())
            if isinstance(value, str) and (value.startswith("*") or name in divisible)
        },
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def cuobjdump(compiled: Any, option: str) -> str:
    """What the tool says of a compiled kernel: "-sass" its instructions, "-res-usage" registers, stack and memory."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, option, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
