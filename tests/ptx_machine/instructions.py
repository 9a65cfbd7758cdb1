"""What instructions that move numbers do, and which function carries out which."""

from __future__ import annotations

import numpy as np

from ptx_machine import matrix
from ptx_machine.arithmetic import (
    TYPES,
    Handler,
    compare,
    convert,
    divide,
    elementwise,
    field,
    fused,
    multiply,
    select,
    shift,
)
from ptx_machine.machine import Machine, whole
from ptx_machine.memory import Lanes
from ptx_machine.program import Instruction, names


def move(machine: Machine, one: Instruction, lanes: Lanes) -> None:
    type_ = TYPES[one.op[-1]]
    target, source = one.operands
    if target[0] == "{":
        parts = names(target)
        bits = 8 * np.dtype(type_).itemsize // len(parts)
        value = machine.get(source, type_, lanes)
        for i, part in enumerate(parts):
            machine.set(part, (value >> type_(i * bits)).astype(f"u{bits // 8}"), lanes)
    elif source[0] == "{":
        parts = names(source)
        narrow = np.dtype(f"u{np.dtype(type_).itemsize // len(parts)}").type
        values = np.stack([machine.get(part, narrow, lanes) for part in parts], axis=1)
        machine.set(target, values.view(type_)[:, 0], lanes)
    else:
        machine.set(target, machine.get(source, type_, lanes), lanes)


def permute(machine: Machine, one: Instruction, lanes: Lanes) -> None:
    a, b, selector = (machine.get(operand, np.uint32, lanes) for operand in one.operands[1:])
    source = np.stack([a, b], axis=1).view(np.uint8)
    chosen = (selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 0xF
    if (chosen > 7).any():
        raise NotImplementedError(one.text)
    out = np.take_along_axis(source, chosen.astype(np.intp), axis=1)
    machine.set(one.operands[0], np.ascontiguousarray(out).view(np.uint32)[:, 0], lanes)


def shuffle(machine: Machine, one: Instruction, lanes: Lanes) -> None:
    whole(lanes, one)
    target, _, predicate = one.operands[0].partition("|")
    value = machine.get(one.operands[1], np.uint32, lanes).reshape(-1, 32)
    by = machine.get(one.operands[2], np.uint32, lanes).astype(np.int64).reshape(-1, 32)
    clamp = machine.get(one.operands[3], np.uint32, lanes).astype(np.int64).reshape(-1, 32)
    own = np.arange(32)
    segment = (clamp >> 8) & 31
    last = (own & segment) | (clamp & 31 & ~segment)
    mode = one.op[2]
    source = {
        "bfly": own ^ by,
        "idx": (own & segment) | (by & ~segment & 31),
        "up": own - by,
        "down": own + by,
    }[mode]
    valid = source >= last if mode == "up" else source <= last
    source = np.where(valid, source, own)
    machine.set(target.strip(), np.take_along_axis(value, source, axis=1).ravel(), lanes)
    if predicate:
        machine.set(predicate.strip(), valid.ravel(), lanes)


def reduce_warp(machine: Machine, one: Instruction, lanes: Lanes) -> None:
    whole(lanes, one)
    value = machine.get(one.operands[1], TYPES[one.op[-1]], lanes).reshape(-1, 32)
    found = {
        "add": lambda v: v.sum(axis=1, dtype=v.dtype),
        "max": lambda v: v.max(axis=1),
        "min": lambda v: v.min(axis=1),
        "and": lambda v: np.bitwise_and.reduce(v, axis=1),
        "or": lambda v: np.bitwise_or.reduce(v, axis=1),
    }[one.op[2]](value)
    machine.set(one.operands[0], np.repeat(found, 32), lanes)


def atomic(machine: Machine, one: Instruction, lanes: Lanes) -> None:
    """One lane after the other, the last block first: no order may be relied on."""
    if one.op[1] != "global" or not {"acq_rel", "add"} <= set(one.op):
        raise NotImplementedError(one.text)
    machine.releases.atomic(lanes)
    type_ = TYPES[one.op[-1]]
    address = machine.address(one.operands[1], np.uint64, lanes)
    value = machine.get(one.operands[2], type_, lanes)
    old = np.empty(len(lanes), type_)
    for i in reversed(range(len(lanes))):
        old[i : i + 1] = machine.memory.read(address[i : i + 1], value.itemsize).view(type_)[:, 0]
        new = old[i : i + 1] + value[i : i + 1]
        machine.memory.write(address[i : i + 1], new.view(np.uint8).reshape(1, -1))
    machine.set(one.operands[0], old, lanes)


def _space(one: Instruction) -> str:
    """Addresses of no space are global: none is made of shared memory's."""
    return "global" if one.op[1] in (*TYPES, "v2", "v4") else one.op[1].split("::")[0]


def load(machine: Machine, one: Instruction, lanes: Lanes) -> None:
    type_ = TYPES[one.op[-1]]
    targets = names(one.operands[0])
    size = np.dtype(type_).itemsize
    space = _space(one)
    if space == "global":
        if "cg" in one.op:  # past the cache of a multiprocessor, as what other blocks have stored has to be
            machine.releases.load(lanes)
        data = machine.memory.read(machine.address(one.operands[1], np.uint64, lanes), size * len(targets))
    elif space == "shared":
        data = machine.shared.read(lanes, machine.address(one.operands[1], np.uint32, lanes), size * len(targets))
    elif space == "param":
        at = machine.address(one.operands[1], np.uint64, lanes).astype(np.intp)
        data = machine.arguments[at[:, None] + np.arange(size * len(targets))]
    else:
        raise NotImplementedError(one.text)
    for i, target in enumerate(targets):
        machine.set(target, np.ascontiguousarray(data[:, i * size : (i + 1) * size]).view(type_)[:, 0], lanes)


def store(machine: Machine, one: Instruction, lanes: Lanes) -> None:
    type_ = TYPES[one.op[-1]]
    space = _space(one)
    values = [machine.get(name, type_, lanes) for name in names(one.operands[1])]
    data = np.stack(values, axis=1).view(np.uint8)
    if space == "global":
        machine.releases.store(lanes)
        machine.memory.write(machine.address(one.operands[0], np.uint64, lanes), data)
    elif space == "shared":
        machine.shared.write(lanes, machine.address(one.operands[0], np.uint32, lanes), data)
    else:
        raise NotImplementedError(one.text)


def copy(machine: Machine, one: Instruction, lanes: Lanes) -> None:
    """cp.async; what it brings is there after the wait."""
    if one.op[2] == "commit_group":
        machine.copies.commit(lanes)
    elif one.op[2] in ("wait_group", "wait_all"):
        machine.copies.wait(lanes, int(one.operands[0]) if one.operands else 0)
    else:
        target = machine.address(one.operands[0], np.uint32, lanes)
        size = int(one.operands[2], 0)
        read = machine.get(one.operands[3], np.uint32, lanes) if len(one.operands) > 3 else np.full(len(lanes), size)
        if ((read != 0) & (read != size)).any():
            raise NotImplementedError(one.text)
        data = np.zeros((len(lanes), size), np.uint8)
        wanted = np.flatnonzero(read)
        data[wanted] = machine.memory.read(machine.address(one.operands[1], np.uint64, lanes)[wanted], size)
        machine.copies.add(lanes, lambda at: machine.shared.write(lanes[at], target[at], data[at]))


def nothing(machine: Machine, one: Instruction, lanes: Lanes) -> None:
    """Fences: here memory is in order."""


EXECUTE: dict[str, Handler] = {
    "abs": elementwise(np.abs),
    "add": elementwise(np.add),
    "and": elementwise(np.bitwise_and),
    "atom": atomic,
    "bfe": field,
    "cp": copy,
    "cvt": convert,
    "cvta": move,
    "div": elementwise(divide),
    "ex2": elementwise(np.exp2),
    "fence": nothing,
    "fma": fused,
    "ld": load,
    "ldmatrix": matrix.load_matrix,
    "lg2": elementwise(np.log2),
    "mad": multiply,
    "max": elementwise(np.fmax),
    "membar": nothing,
    "min": elementwise(np.fmin),
    "mma": matrix.multiply,
    "mov": move,
    "mul": multiply,
    "neg": elementwise(np.negative),
    "not": elementwise(np.invert),
    "or": elementwise(np.bitwise_or),
    "prmt": permute,
    "rcp": elementwise(lambda a: 1 / a),
    "redux": reduce_warp,
    "rem": elementwise(lambda a, b: a - b * divide(a, b)),
    "rsqrt": elementwise(lambda a: 1 / np.sqrt(a), 2.0**-22.9),
    "selp": select,
    "setp": compare,
    "shfl": shuffle,
    "shl": shift(True),
    "shr": shift(False),
    "sqrt": elementwise(np.sqrt),
    "st": store,
    "stmatrix": matrix.store_matrix,
    "sub": elementwise(np.subtract),
    "wgmma": matrix.warpgroup,
    "xor": elementwise(np.bitwise_xor),
    **dict.fromkeys(("bra", "ret", "exit", "bar", "barrier"), nothing),
}
