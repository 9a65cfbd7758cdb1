"""A grid of blocks that run a program's instructions one after the other, all threads of all blocks at once.

Threads that have branched apart go on at the least address first, so that they meet again. A block's last thread to
reach a barrier lets the others go on.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx_machine.memory import Array, GlobalMemory, Lanes, Releases, SharedMemory
from ptx_machine.program import Instruction, Program

WIDTHS = {"pred": bool, "8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}


def storage(type_: str) -> type:
    """Of a register: the unsigned integer that is as wide."""
    return WIDTHS[type_.lstrip("bsuf")]


@dataclass
class Pending:
    """What is delivered when its threads wait for it, and not before."""

    lanes: Lanes
    group: Array  # how many groups each lane had committed
    deliver: Callable[[Lanes], None]  # takes positions in lanes


class Queue:
    """Asynchronous copies, or products: committed in groups, by lane."""

    def __init__(self, lanes: int):
        self.committed = np.zeros(lanes, np.int64)
        self.pending: list[Pending] = []

    def add(self, lanes: Lanes, deliver: Callable[[Lanes], None]) -> None:
        self.pending.append(Pending(lanes, self.committed[lanes], deliver))

    def commit(self, lanes: Lanes) -> None:
        self.committed[lanes] += 1

    def wait(self, lanes: Lanes, but: int) -> None:
        """For all groups but the last ones of `lanes`."""
        here = np.zeros(len(self.committed), bool)
        here[lanes] = True
        kept = []
        for one in self.pending:
            due = here[one.lanes] & (one.group < self.committed[one.lanes] - but)
            if due.any():
                one.deliver(np.flatnonzero(due))
            if not due.all():
                kept.append(Pending(one.lanes[~due], one.group[~due], _rest(one.deliver, np.flatnonzero(~due))))
        self.pending = kept


def _rest(deliver: Callable[[Lanes], None], positions: Lanes) -> Callable[[Lanes], None]:
    return lambda chosen: deliver(positions[chosen])


def whole(lanes: Lanes, one: Instruction, size: int = 32) -> None:
    """Warps, or groups of four: an error where a part of one would carry out what all of it has to."""
    if len(lanes) % size or (lanes[::size] % size).any() or (np.diff(lanes.reshape(-1, size)) != 1).any():
        raise RuntimeError(f"{one.text}: not by all of the threads that it takes")


class Machine:
    """`blocks` blocks of a grid, from block `first` on."""

    def __init__(
        self,
        program: Program,
        arguments: bytes,
        memory: GlobalMemory,
        *,
        threads: int,
        grid: tuple[int, int, int],
        first: int,
        blocks: int,
        shared: int,
    ):
        self.program, self.memory = program, memory
        self.arguments = np.frombuffer(arguments, np.uint8)
        self.threads, self.grid = threads, grid
        self.count = blocks * threads
        self.shared = SharedMemory(blocks, program.static_shared + shared, threads)
        self.releases = Releases(self.shared)
        self.registers: dict[str, Array] = {}
        self.every = np.arange(self.count)
        self.at = np.zeros(self.count, np.int32)
        self.done = np.zeros(self.count, bool)
        self.waiting = np.zeros(self.count, bool)
        self.copies, self.products = Queue(self.count), Queue(self.count)
        block = first + self.every // threads
        self.special = {
            "%tid.x": self.every % threads,
            "%laneid": self.every % 32,
            "%warpid": self.every % threads // 32,
            "%ctaid.x": block % grid[0],
            "%ctaid.y": block // grid[0] % grid[1],
            "%ctaid.z": block // (grid[0] * grid[1]),
        } | {f"%n{name}": np.full(self.count, value) for name, value in self._sizes().items()}

    def _sizes(self) -> dict[str, int]:
        x, y, z = self.grid
        return {"tid.x": self.threads, "tid.y": 1, "tid.z": 1, "ctaid.x": x, "ctaid.y": y, "ctaid.z": z}

    # Operands -------------------------------------------------------------------------------------------------------

    def register(self, name: str) -> Array:
        if name not in self.registers:
            self.registers[name] = np.zeros(self.count, storage(self.program.type_of(name)))
        return self.registers[name]

    def get(self, operand: str, type_: type, lanes: Lanes) -> Array:
        """[lanes] of a numpy type."""
        if operand[0] == "%":
            if operand in self.special:
                return self.special[operand][lanes].astype(type_)
            bits = self.register(operand)[lanes]
            if bits.dtype == bool:
                return bits
            if bits.itemsize != np.dtype(type_).itemsize:
                bits = bits.astype(f"u{np.dtype(type_).itemsize}")
            return bits.view(type_)
        return np.full(len(lanes), self.constant(operand, type_))

    def constant(self, text: str, type_: type) -> Any:
        if text in self.program.shared:
            return type_(self.program.shared[text])
        if text in self.program.parameters:
            return type_(self.program.parameters[text][0])
        if text.startswith(("0f", "0F")):
            return np.array(int(text[2:], 16), np.uint32).view(np.float32)[()]
        if text.startswith(("0d", "0D")):
            return np.array(int(text[2:], 16), np.uint64).view(np.float64)[()]
        number = int(text.rstrip("U"), 0)
        if type_ is bool:
            return number != 0
        bits = number & ((1 << 8 * np.dtype(type_).itemsize) - 1)
        return np.array(bits, f"u{np.dtype(type_).itemsize}").view(type_)[()]

    def set(self, name: str, value: Array, lanes: Lanes) -> None:
        """A register that is wider than the value gets its sign, too."""
        if name == "_":
            return
        register = self.register(name)
        if register.dtype == bool:
            register[lanes] = value
        elif register.itemsize == value.itemsize:
            register[lanes] = value.view(register.dtype)
        else:
            register[lanes] = value.astype(register.dtype)

    def address(self, operand: str, type_: type, lanes: Lanes) -> Array:
        """Of `[%rd1 + 16]`."""
        base, offset = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+)\s*)?\]", operand).groups()  # type: ignore[union-attr]
        address = self.get(base, type_, lanes)
        return address + self.constant(offset, type_) if offset else address

    # Running --------------------------------------------------------------------------------------------------------

    def run(self, execute: dict[str, Callable[[Machine, Instruction, Lanes], None]]) -> None:
        instructions = self.program.instructions
        handlers = [execute[one.op[0]] for one in instructions]
        joins = set(self.program.labels.values())
        with np.errstate(all="ignore"):
            while not self.done.all():
                ready = ~(self.done | self.waiting)
                if not ready.any():
                    raise RuntimeError("a barrier that some of a block's threads never reach")
                at = int(self.at[ready].min())
                lanes = np.flatnonzero(ready & (self.at == at))
                while True:
                    one = instructions[at]
                    active = lanes
                    if one.guard:
                        active = lanes[self.register(one.guard)[lanes] != one.negated]
                    at += 1
                    if one.op[0] in CONTROL:
                        self.at[lanes] = at
                        self._control(one, active)
                        break
                    if len(active):
                        try:
                            handlers[at - 1](self, one, active)
                        except Exception as error:
                            error.add_note(f"at `{one.text}`")
                            raise
                    if at in joins and len(lanes) < self.count:
                        self.at[lanes] = at
                        break

    def _control(self, one: Instruction, lanes: Lanes) -> None:
        name = one.op[0]
        if name == "bra":
            self.at[lanes] = self.program.labels[one.operands[0]]
        elif name in ("ret", "exit"):
            self.done[lanes] = True
        elif len(one.operands) > 1:
            raise NotImplementedError(f"a barrier of some of the threads: {one.text}")
        else:
            self.waiting[lanes] = True
            waiting = self.waiting.reshape(-1, self.threads)
            arrived = waiting.all(axis=1)
            self.shared.era[arrived] += 1
            waiting[arrived] = False


CONTROL = ("bra", "ret", "exit", "bar", "barrier")
