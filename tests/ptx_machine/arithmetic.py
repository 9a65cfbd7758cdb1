"""What instructions that compute do, each thread for itself, as NVIDIA's PTX ISA describes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx_machine.floats import BFLOAT16, approximate, fma, fma_double, from_bfloat16, to_bfloat16
from ptx_machine.machine import Machine
from ptx_machine.memory import Array, Lanes
from ptx_machine.program import Instruction

Handler = Callable[[Machine, Instruction, Lanes], None]
TYPES: dict[str, Any] = {
    **{f"b{n}": np.dtype(f"u{n // 8}").type for n in (8, 16, 32, 64)},
    **{f"u{n}": np.dtype(f"u{n // 8}").type for n in (8, 16, 32, 64)},
    **{f"s{n}": np.dtype(f"i{n // 8}").type for n in (8, 16, 32, 64)},
    **{f"f{n}": np.dtype(f"f{n // 8}").type for n in (16, 32, 64)},
    "pred": bool,
}
APPROXIMATE = {"approx", "full"}
KNOWN = {"rn", "ftz", "lo", "wide", "hi", *APPROXIMATE}


def type_of(one: Instruction) -> Any:
    """The last one it names; of what is not known, nothing is made up."""
    unknown = set(one.op[1:-1]) - KNOWN
    if unknown:
        raise NotImplementedError(f"{one.text}: {', '.join(sorted(unknown))}")
    return TYPES[one.op[-1]]


def elementwise(function: Callable[..., Array], error: float = 2.0**-22) -> Handler:
    """`error`: of the approximate form, relative; two units in the last place at most."""

    def handler(machine: Machine, one: Instruction, lanes: Lanes) -> None:
        type_ = type_of(one)
        values = [machine.get(operand, type_, lanes) for operand in one.operands[1:]]
        if APPROXIMATE & set(one.op):
            exact = function(*(value.astype(np.float64) for value in values))
            out = approximate(exact, values[0], error)
        else:
            out = function(*values)
        if "ftz" in one.op and out.dtype == np.float32:
            out = np.where(np.abs(out) < np.float32(2.0**-126), np.copysign(np.float32(0), out), out)
        machine.set(one.operands[0], out, lanes)

    return handler


def divide(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    safe = np.where(b == 0, 1, b)
    quotient = a // safe
    quotient += ((a % safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)  # toward zero
    return np.where(b == 0, np.array(-1).astype(a.dtype), quotient)


def shift(left: bool) -> Handler:
    def handler(machine: Machine, one: Instruction, lanes: Lanes) -> None:
        type_ = type_of(one)
        bits = 8 * np.dtype(type_).itemsize
        value = machine.get(one.operands[1], type_, lanes)
        by = np.minimum(machine.get(one.operands[2], np.uint32, lanes), bits)
        within = np.minimum(by, bits - 1).astype(value.dtype)
        if left:
            out = np.where(by < bits, value << within, value.dtype.type(0))
        elif value.dtype.kind == "i":
            out = value >> within
        else:
            out = np.where(by < bits, value >> within, value.dtype.type(0))
        machine.set(one.operands[0], out, lanes)

    return handler


def multiply(machine: Machine, one: Instruction, lanes: Lanes) -> None:
    type_ = type_of(one)
    add = one.op[0] == "mad"
    a, b = (machine.get(operand, type_, lanes) for operand in one.operands[1:3])
    if "wide" in one.op:
        wide = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}").type
        out = a.astype(wide) * b.astype(wide)
    elif "hi" in one.op:
        if a.itemsize == 8:
            raise NotImplementedError(one.text)
        wide = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}").type
        out = ((a.astype(wide) * b.astype(wide)) >> wide(8 * a.itemsize)).astype(type_)
    else:
        out = a * b
    if add:
        out = out + machine.get(one.operands[3], out.dtype.type, lanes)
    machine.set(one.operands[0], out, lanes)


def fused(machine: Machine, one: Instruction, lanes: Lanes) -> None:
    type_ = type_of(one)
    values = (machine.get(operand, type_, lanes) for operand in one.operands[1:])
    machine.set(one.operands[0], {np.float32: fma, np.float64: fma_double}[type_](*values), lanes)


COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a != b) & ~_unordered(a, b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "equ": lambda a, b: (a == b) | _unordered(a, b),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~_unordered(a, b),
    "nan": lambda a, b: _unordered(a, b),
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _unordered(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(len(a), bool)


def compare(machine: Machine, one: Instruction, lanes: Lanes) -> None:
    type_ = TYPES[one.op[-1]]
    a, b = (machine.get(operand, type_, lanes) for operand in one.operands[1:3])
    out = COMPARE[one.op[1]](a, b)
    if len(one.operands) > 3:
        out = COMBINE[one.op[2]](out, machine.get(one.operands[3], bool, lanes))
    if "|" in one.operands[0]:
        raise NotImplementedError(one.text)
    machine.set(one.operands[0], out, lanes)


def select(machine: Machine, one: Instruction, lanes: Lanes) -> None:
    type_ = type_of(one)
    a, b = (machine.get(operand, type_, lanes) for operand in one.operands[1:3])
    machine.set(one.operands[0], np.where(machine.get(one.operands[3], bool, lanes), a, b), lanes)


def field(machine: Machine, one: Instruction, lanes: Lanes) -> None:
    """bfe: bits from a position on, with the sign of the last."""
    type_ = type_of(one)
    bits = 8 * np.dtype(type_).itemsize
    value = machine.get(one.operands[1], type_, lanes)
    start, length = (int(machine.constant(operand, np.uint32)) & 0xFF for operand in one.operands[2:])
    if not 0 < start + length <= bits or not length:
        raise NotImplementedError(one.text)
    out = (value << type_(bits - start - length)) >> type_(bits - length)
    machine.set(one.operands[0], out, lanes)


def convert(machine: Machine, one: Instruction, lanes: Lanes) -> None:
    target, source = one.op[-2:]
    if target in ("bf16x2", "f16x2"):
        high, low = (machine.get(operand, np.float32, lanes) for operand in one.operands[1:])
        narrow = to_bfloat16 if target == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
        machine.set(one.operands[0], np.stack([narrow(low), narrow(high)], axis=1).view(np.uint32)[:, 0], lanes)
        return
    unknown = set(one.op[1:-2]) - {"rn", "rzi", "rni", "rmi", "rpi", "ftz"}
    if unknown:
        raise NotImplementedError(one.text)
    value = machine.get(one.operands[1], BFLOAT16 if source == "bf16" else TYPES[source], lanes)
    if source == "bf16":
        value = from_bfloat16(value)
    if target == "bf16":
        machine.set(one.operands[0], to_bfloat16(value.astype(np.float32)), lanes)
        return
    kind = TYPES[target]
    if value.dtype.kind == "f" and np.dtype(kind).kind in "iu":
        rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
        (how,) = (rounding[word] for word in one.op if word in rounding)
        limits = np.iinfo(kind)
        exact = np.where(np.isnan(value), 0, how(value.astype(np.float64)))
        inside = np.clip(exact, float(limits.min), np.nextafter(float(limits.max) + 1, 0))
        value = np.where(exact > limits.max, limits.max, inside.astype(kind))
    machine.set(one.operands[0], value.astype(kind), lanes)
