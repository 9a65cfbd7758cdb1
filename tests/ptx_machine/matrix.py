"""Tensor cores: fragments that a warp holds together, and products of them (PTX ISA, "matrix fragments")."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx_machine.floats import from_bfloat16, tf32
from ptx_machine.machine import Machine, whole
from ptx_machine.memory import Array, Lanes
from ptx_machine.program import Instruction, names

LANE = np.arange(32)
GROUP, THREAD = LANE // 4, LANE % 4


def _matrices(machine: Machine, one: Instruction, lanes: Lanes, operand: str, count: int) -> Array:
    """Addresses of rows, [warps, count, 8]."""
    whole(lanes, one)
    address = machine.address(operand, np.uint32, lanes)
    return address.reshape(-1, 4, 8)[:, :count]


def load_matrix(machine: Machine, one: Instruction, lanes: Lanes) -> None:
    """ldmatrix: 8x8 halves, of which lane 4i + j gets elements 2j and 2j + 1 of row i."""
    count = int(one.op[4][1:])
    rows = _matrices(machine, one, lanes, one.operands[1], count)
    readers = lanes.reshape(-1, 1, 4, 8)[:, :, :1, :].repeat(count, axis=2).ravel()
    data = machine.shared.read(readers, rows.ravel(), 16)
    halves = np.ascontiguousarray(data).view(np.uint16).reshape(-1, count, 8, 8)
    if "trans" in one.op:
        halves = halves.swapaxes(2, 3)
    words = np.ascontiguousarray(halves).view(np.uint32).reshape(-1, count, 32)
    for i, name in enumerate(names(one.operands[0])):
        machine.set(name, np.ascontiguousarray(words[:, i]).ravel(), lanes)


def store_matrix(machine: Machine, one: Instruction, lanes: Lanes) -> None:
    count = int(one.op[4][1:])
    rows = _matrices(machine, one, lanes, one.operands[0], count)
    words = np.stack([machine.get(name, np.uint32, lanes).reshape(-1, 32) for name in names(one.operands[1])], axis=1)
    halves = np.ascontiguousarray(words).view(np.uint16).reshape(-1, count, 8, 8)
    if "trans" in one.op:
        halves = halves.swapaxes(2, 3)
    data = np.ascontiguousarray(halves).view(np.uint8).reshape(-1, 16)
    writers = lanes.reshape(-1, 1, 4, 8)[:, :, :1, :].repeat(count, axis=2).ravel()
    machine.shared.write(writers, rows.ravel(), data)


def _numbers(words: Array, kind: str) -> Array:
    """[…, halves] of 32-bit words, fp64."""
    words = np.ascontiguousarray(words)
    if kind == "tf32":
        return tf32(words.view(np.float32)).astype(np.float64)
    halves = words.view(np.uint16)
    return (from_bfloat16(halves) if kind == "bf16" else halves.view(np.float16)).astype(np.float64)


def _fragment(machine: Machine, operand: str, lanes: Lanes, kind: str) -> Array:
    """[warps, 32, registers, numbers in one]"""
    words = [machine.get(name, np.uint32, lanes).reshape(-1, 32) for name in names(operand)]
    packed = np.ascontiguousarray(np.stack(words, axis=-1))
    return _numbers(packed, kind).reshape(*packed.shape, -1)


def _rows_a(fragment: Array) -> Array:
    """[warps, 16, k]: registers go down first."""
    wide = fragment.shape[-1]
    out = np.zeros((len(fragment), 16, 8 * wide))
    for register in range(4):
        for i in range(wide):
            column = THREAD * wide + i + 4 * wide * (register // 2)
            out[:, GROUP + 8 * (register % 2), column] = fragment[:, :, register, i]
    return out


def _columns_b(fragment: Array) -> Array:
    """[warps, k, 8]"""
    wide = fragment.shape[-1]
    out = np.zeros((len(fragment), 8 * wide, 8))
    for register in range(2):
        for i in range(wide):
            out[:, THREAD * wide + i + 4 * wide * register, GROUP] = fragment[:, :, register, i]
    return out


def _accumulate(machine: Machine, targets: list[str], before: list[str], product: Array, lanes: Lanes) -> None:
    """product [warps, 16, n] into fragments of 4 registers for every 8 columns."""
    for i, (target, source) in enumerate(zip(targets, before, strict=True)):
        part = product[:, GROUP + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * THREAD + i % 2]
        old = machine.get(source, np.float32, lanes) if source else np.zeros(len(lanes), np.float32)
        machine.set(target, (old.astype(np.float64) + part.ravel()).astype(np.float32), lanes)


def multiply(machine: Machine, one: Instruction, lanes: Lanes) -> None:
    """mma.sync of m16n8k16 halves or m16n8k8 tf32."""
    whole(lanes, one)
    shape, kind = one.op[3], one.op[7]
    if (shape, kind) not in (("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "tf32")):
        raise NotImplementedError(one.text)
    a, b = (_fragment(machine, operand, lanes, kind) for operand in one.operands[1:3])
    product = _rows_a(a) @ _columns_b(b)
    _accumulate(machine, names(one.operands[0]), names(one.operands[3]), product, lanes)


def warpgroup(machine: Machine, one: Instruction, lanes: Lanes) -> None:
    """wgmma: what it multiplies is read, and the sum written, when it is waited for."""
    if one.op[1] == "fence":
        return
    if one.op[1] == "commit_group":
        machine.products.commit(lanes)
    elif one.op[1] == "wait_group":
        machine.products.wait(lanes, int(one.operands[0]))
    else:
        whole(lanes, one, 128)
        machine.products.add(lanes, _product(machine, one, lanes))


def _product(machine: Machine, one: Instruction, lanes: Lanes) -> Callable[[Lanes], None]:
    shape, kind = one.op[4], one.op[6]
    _, n, k = (int(part) for part in shape.replace("n", " ").replace("k", " ").replace("m", "").split())
    targets, a, b, scale = one.operands[:4]
    signs = one.operands[4:6]
    transposed = [operand == "1" for operand in one.operands[6:]]
    if signs != ("1", "1"):
        raise NotImplementedError(one.text)
    keep = machine.get(scale, bool, lanes) if scale[0] == "%" else np.full(len(lanes), scale != "0")
    if keep.any() != keep.all():
        raise NotImplementedError(one.text)
    from_registers = a[0] == "{"
    trans_b = bool(transposed) and transposed[-1]
    trans_a = not from_registers and bool(transposed) and transposed[0]
    words = {operand: machine.get(operand, np.uint64, lanes) for operand in (a, b) if operand[0] == "%"}

    def deliver(at: Lanes) -> None:
        some = lanes[at]
        whole(some, one, 128)
        right = _described(machine, words[b][at], some, n, k, kind, trans_b).swapaxes(1, 2)  # [groups, k, n]
        if from_registers:
            left = _rows_a(_fragment(machine, a, some, kind)).reshape(-1, 64, k)
        else:
            left = _described(machine, words[a][at], some, 64, k, kind, trans_a)
        product = (left @ right).reshape(-1, 16, n)
        into = names(targets)
        _accumulate(machine, into, into if keep[0] else [""] * len(into), product, some)

    return deliver


def _described(machine: Machine, words: Array, lanes: Lanes, rows: int, k: int, kind: str, transposed: bool) -> Array:
    """[groups, rows, k] of shared memory that a matrix descriptor tells of."""
    words = words.reshape(-1, 128)
    if (words != words[:, :1]).any():
        raise RuntimeError("threads of a warpgroup disagree on a descriptor")
    word = words[:, 0].astype(np.int64)
    start, leading, stride = ((word >> by & 0x3FFF) * 16 for by in (0, 16, 32))
    width = {1: 128, 2: 64, 3: 32}.get(int(word[0] >> 62 & 3), 0)
    if not width or (word >> 49 & 7).any():
        raise NotImplementedError("a descriptor without a swizzle, or with an offset of its base")
    size = 4 if kind == "tf32" else 2
    row, column = np.meshgrid(np.arange(rows), np.arange(k), indexing="ij")
    if transposed:
        each = width // size
        offset = (
            (row // each)[None] * leading[:, None, None]
            + (column // 8)[None] * stride[:, None, None]
            + (column % 8 * width + row % each * size)[None]
        )
    else:
        offset = (row // 8)[None] * stride[:, None, None] + (row % 8 * width + column * size)[None]
    address = start[:, None, None] + offset
    address ^= (address >> 7 & (width // 16 - 1)) << 4
    groups = len(word)
    for warp in range(4):  # every one reads all of it
        readers = np.repeat(lanes.reshape(groups, 4, 32)[:, warp, 0], rows * k)
        data = machine.shared.read(readers, address.ravel().astype(np.uint32), size)
    numbers = np.ascontiguousarray(data)
    if kind == "tf32":
        return _numbers(numbers.view(np.uint32), kind).reshape(groups, rows, k)
    halves = numbers.view(np.uint16)
    values = from_bfloat16(halves) if kind == "bf16" else halves.view(np.float16)
    return values.astype(np.float64).reshape(groups, rows, k)
