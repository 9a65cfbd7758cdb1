"""A kernel as its compiler leaves it, for an architecture that need not be here.

Compiling takes no GPU, but a process without the interpreter: the ptx_NAME.py that call this are run as such.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from mtedit_fast.kernels.ahead_of_time import compile_for, cuobjdump

EVERY = (80, 90, 100)
MOVES = re.compile(
    r"\b(?:ld|st)\.global(?:\.\w+)*?(?:\.v([24]))?\.b(8|16|32|64)\b|\bcp\.async\.\S+ [^;]*?, 0x([0-9a-f]+)[,;]"
)


def wide_share(code: str) -> float:
    """Of the bytes that a thread's loads, stores and asynchronous copies of memory move in the code, those by 16."""
    sizes = [
        int(copied, 16) if copied else int(vector or 1) * int(bits) // 8 for vector, bits, copied in MOVES.findall(code)
    ]
    return round(sum(size for size in sizes if size == 16) / max(sum(sizes), 1), 3)


def report(
    kernel: Any,
    signature: dict[str, Any],
    arch: int,
    *,
    num_warps: int,
    num_stages: int = 3,
    divisible: Sequence[str] = ("numel",),
) -> dict[str, Any]:
    """Registers, bytes of stack and local and shared memory, and counts of what is in the code; see `compile_for`."""
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages, "divisible": divisible}
    compiled = compile_for(arch, kernel, signature, **options)
    usage = cuobjdump(compiled, "-res-usage")
    found: dict[str, Any] = {
        key.lower(): int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")
    }
    code = compiled.asm["ptx"]
    found |= {"shared": compiled.metadata.shared, "fp64": code.count(".f64"), "wide": wide_share(code)}
    found["fused"] = sum(2 if packed else 1 for packed in re.findall(r"\bfma\.[a-z.]*f32(x2)?", code))
    found["mma"] = [word for word in ("mma.sync", "wgmma", "tcgen05.mma") if word in code]
    return found


def show(name: str, arch: int, row: dict[str, Any]) -> None:
    print(json.dumps({"kernel": name, "arch": arch} | row), flush=True)
