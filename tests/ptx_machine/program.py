"""PTX as text, taken apart: registers, parameters, instructions and where the labels are."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

COMMENT = re.compile(r"//[^\n]*")
DIRECTIVE = re.compile(r"\.(?:loc|file|section|pragma|branchtargets)\b[^\n;]*;?")
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%[\w$]+)")
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s[^,]*?([\w$]+)(?:\[(\d+)\])?\s*(?:,|$)")
SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$.]+)\[(\d*)\]")
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]]+(?:\s*\|\s*[^,\s]+)?")


@dataclass(frozen=True)
class Instruction:
    """`@!%p1 ld.global.v4.b32 {…}, [%rd1+16];`"""

    op: tuple[str, ...]  # ("ld", "global", "v4", "b32")
    operands: tuple[str, ...]
    guard: str = ""  # "%p1"
    negated: bool = False
    text: str = ""


@dataclass
class Program:
    name: str
    threads: int
    parameters: dict[str, tuple[int, str]] = field(default_factory=dict)  # name: offset and type, in order
    registers: dict[str, str] = field(default_factory=dict)  # prefix or name: type
    shared: dict[str, int] = field(default_factory=dict)  # name: offset; the launch's own is at the end
    static_shared: int = 0
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def type_of(self, register: str) -> str:
        return self.registers.get(register) or self.registers[register.rstrip("0123456789")]


def parse(code: str, entry: str = "") -> Program:
    """The kernel named `entry`, or the only one there is. ValueError where there is no such kernel."""
    code = COMMENT.sub("", code)
    kernels = list(re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", code, re.S))
    named = [kernel for kernel in kernels if entry in ("", kernel[1])]
    if len(named) != 1:
        raise ValueError(f"entry: expected one of {[kernel[1] for kernel in kernels]}, got {entry!r}")
    (kernel,) = named
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", kernel[3])
    program = Program(kernel[1], int(threads[1]) if threads else 0)
    offset = 0
    for align, type_, name, count in PARAMETER.findall(kernel[2]):
        size = int(count) if count else int(type_[1:]) // 8
        offset += -offset % int(align if count else size)
        program.parameters[name] = (offset, f"bytes {size}" if count else type_)
        offset += size
    body = _body(code[kernel.end() :])
    for align, name, size in SHARED.findall(code[: kernels[0].start()] + body):
        program.static_shared += -program.static_shared % int(align)
        program.shared[name] = program.static_shared
        program.static_shared += int(size or 0)
    program.registers = {name: type_ for type_, name in REGISTERS.findall(body)}
    body = re.sub(r"(?<!\w)\.(?:reg|shared|local)\b[^;]*;", "", DIRECTIVE.sub("", body))
    for statement in _statements(body):
        if statement.endswith(":"):
            program.labels[statement[:-1]] = len(program.instructions)
        else:
            program.instructions.append(_instruction(statement))
    return program


def _body(rest: str) -> str:
    depth = 1
    for at, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[:at]
    raise ValueError("a kernel without an end")


def _statements(body: str) -> list[str]:
    """Instructions without their semicolons, labels with their colons; braces around statements left out."""
    found = []
    for piece in body.split(";"):
        piece = " ".join(piece.split())
        while label := re.match(r"[{} ]*([\w$]+):(?!:)", piece):
            found.append(label[1] + ":")
            piece = piece[label.end() :]
        piece = piece.strip("{ ") if piece.endswith("{") else piece.lstrip("{} ")
        if piece:
            found.append(piece)
    return found


def _instruction(text: str) -> Instruction:
    guard = re.match(r"@(!?)(%?\w+)\s+", text)
    rest = text[guard.end() :] if guard else text
    op, _, operands = rest.partition(" ")
    return Instruction(
        tuple(op.split(".")),
        tuple(operand.strip() for operand in OPERAND.findall(operands)),
        guard[2] if guard else "",
        bool(guard and guard[1]),
        text,
    )


def names(operand: str) -> list[str]:
    """Of `{%r1, %r2}`, or of `%r1`."""
    return [name.strip() for name in operand.strip("{} ").split(",")]
