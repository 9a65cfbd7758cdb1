"""What is in the machine code of a compiled kernel: its instructions, what most programs run of them, and its loops."""

import re
from dataclasses import dataclass
from typing import Any

from mtedit_fast.kernels.ahead_of_time import cuobjdump

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?([A-Z][A-Z0-9_]*)([^;]*);")
SPECIAL = {"MUFU", "F2F", "F2I", "I2F"}
"""Functions and conversions that a multiprocessor does 16 of per clock, not 64 or 128."""


@dataclass(frozen=True)
class Instruction:
    """predicated: whether some threads skip it. rest: modifiers and operands."""

    address: int
    predicated: bool
    name: str
    rest: str

    @property
    def jumps_back_to(self) -> int | None:
        """The address of a loop's first instruction, where this is its last."""
        found = re.search(r"0x([0-9a-f]+)", self.rest) if self.name == "BRA" else None
        return int(found[1], 16) if found and int(found[1], 16) < self.address else None


@dataclass(frozen=True)
class MachineCode:
    """A kernel as it runs. stack: bytes of registers spilled. shared: bytes of shared memory."""

    instructions: list[Instruction]
    registers: int
    stack: int
    shared: int

    @classmethod
    def of(cls, compiled: Any) -> "MachineCode":
        text, usage = (cuobjdump(compiled, option) for option in ("-sass", "-res-usage"))
        found = [Instruction(int(at, 16), bool(guard), name, rest) for at, guard, name, rest in LINE.findall(text)]
        registers, stack = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
        return cls(found, registers, stack, compiled.metadata.shared)

    def once(self) -> list[Instruction]:
        """What a program runs that is not the last of its row to arrive: up to the exit after the first atomic. Loops
        and what branches go around are in it once."""
        atomics = [i for i, each in enumerate(self.instructions) if each.name.startswith("ATOM")]
        start = atomics[0] if atomics else 0
        for i, each in enumerate(self.instructions[start:], start):
            if each.name == "EXIT" and (atomics or not each.predicated):
                return self.instructions[: i + 1]
        raise RuntimeError("expected an EXIT in the machine code")

    def loop(self) -> list[Instruction]:
        """The longest innermost loop. What jumps back from beyond the last EXIT is a branch out of line."""
        ends = [each.address for each in self.instructions if each.name == "EXIT"]
        jumps = [(each.jumps_back_to, each.address) for each in self.instructions if each.jumps_back_to is not None]
        ranges = [(first, last) for first, last in jumps if not any(first <= end <= last for end in ends)]
        inner = [(a, b) for a, b in ranges if not any(a <= c and d < b for c, d in ranges)]
        if not inner:
            raise RuntimeError("expected a loop in the machine code")
        first, last = max(inner, key=lambda pair: pair[1] - pair[0])
        return [each for each in self.instructions if first <= each.address <= last]
