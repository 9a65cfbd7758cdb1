"""EdiVal-Bench's CSV: one row per image and turn, each holding the chain up to that turn and the pools after it."""

from __future__ import annotations

import ast
import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from .instructions import Instruction, parse, render
from .pools import Pools

COLUMNS = (
    "image_index",
    "turns",
    "task_type",
    "instructions",
    "format_instructions",
    "bg_consistency",
    "unchanged_objects",
    "available_objects",
    "all_objects",
)


@dataclass(frozen=True)
class BenchmarkRow:
    """One image and its chain of K instructions."""

    image_index: str
    instructions: list[Instruction]
    """K; their text is the raw instruction."""
    raw_instructions: list[str]
    """K, as the editor is given them."""
    unchanged: list[list[str]]
    """After each turn, the original objects nobody has edited."""
    available: list[list[str]]
    all_objects: list[list[str]]
    background_consistent: list[bool]
    """After each turn, whether the background has not been changed so far."""

    @classmethod
    def of(cls, image_index: str, chain: Sequence[tuple[Instruction, Pools]]) -> BenchmarkRow:
        """The row of a chain from `generate`."""
        instructions, pools = [i for i, _ in chain], [p for _, p in chain]
        return cls(
            image_index,
            instructions,
            [i.text for i in instructions],
            [list(p.unchanged) for p in pools],
            [list(p.available) for p in pools],
            [list(p.all) for p in pools],
            [not p.has_background_change for p in pools],
        )


class RowError(NamedTuple):
    row_number: int
    """As a spreadsheet counts: the header is row 1."""
    reason: str


class _Turn(NamedTuple):
    image_index: str
    turn: int
    types: list[str]
    raw: list[str]
    formatted: list[str]
    background_consistent: bool
    unchanged: list[str]
    available: list[str]
    all_objects: list[str]


def read_benchmark(path: str | Path) -> tuple[list[BenchmarkRow], list[RowError]]:
    """The images of a benchmark file, in its order, and the rows that could not be read.

    An image's chain ends before its first turn without a readable row; an image whose first turn has none is left
    out. Raises ValueError where the file is no such benchmark: columns missing, or not UTF-8 text.
    """
    turns: dict[str, dict[int, tuple[int, _Turn]]] = {}
    errors: list[RowError] = []
    for number, row in _rows(Path(path)):
        try:
            if isinstance(row, str):
                raise ValueError(row)
            turn = _read(row)
            earlier = turns.setdefault(turn.image_index, {})
            if turn.turn in earlier:
                raise ValueError(
                    f"image {turn.image_index} has its turn {turn.turn} in row {earlier[turn.turn][0]} already"
                )
            earlier[turn.turn] = number, turn
        except ValueError as error:
            errors.append(RowError(number, str(error)))
    images = []
    for index, by_turn in turns.items():
        chain: list[_Turn] = []
        instructions: list[Instruction] = []
        for t in sorted(by_turn):
            number, turn = by_turn[t]
            try:
                instructions.append(_next_instruction(chain, turn))
                chain.append(turn)
            except ValueError as error:
                errors.append(RowError(number, str(error)))
        if chain:
            images.append(
                BenchmarkRow(
                    index,
                    instructions,
                    [t.raw[-1] for t in chain],
                    [t.unchanged for t in chain],
                    [t.available for t in chain],
                    [t.all_objects for t in chain],
                    [t.background_consistent for t in chain],
                )
            )
    return images, sorted(errors)


def write_benchmark(path: str | Path, rows: Iterable[BenchmarkRow]) -> None:
    """Writes images in the public format, one CSV row per turn. `read_benchmark` inverts it."""
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(COLUMNS)
        for row in rows:
            formatted = [render(i, brackets=True) for i in row.instructions]
            for k in range(1, len(row.instructions) + 1):
                out.writerow(
                    (
                        row.image_index,
                        k,
                        [i.type for i in row.instructions[:k]],
                        row.raw_instructions[:k],
                        formatted[:k],
                        row.background_consistent[k - 1],
                        row.unchanged[k - 1],
                        row.available[k - 1],
                        row.all_objects[k - 1],
                    )
                )


def write_chains(path: str | Path, rows: Iterable[BenchmarkRow], images: Mapping[str, Path]) -> None:
    """Writes images as `mtedit-fast train` reads them: a JSON line per chain, with what every turn is to keep.

    images: the file of each image_index, written relative to `path`.
    """
    with Path(path).open("w", encoding="utf-8") as file:
        for row in rows:
            line = {
                "id": row.image_index,
                "image": os.path.relpath(images[row.image_index], Path(path).parent),
                "instructions": row.raw_instructions,
                "types": [instruction.type for instruction in row.instructions],
                "unchanged_objects": row.unchanged,
                "all_objects": row.all_objects,
                "bg_consistency": row.background_consistent,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str] | str]]:
    """(row number, row by column), or the reason the row is not one."""
    # utf-8-sig: a byte order mark from a spreadsheet would become part of the first column's name
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, [])
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} must be a CSV file in UTF-8, got {error}") from None
        if missing := [c for c in COLUMNS if c not in header]:
            raise ValueError(
                f"{path} must have the columns {', '.join(COLUMNS)}, lacks {', '.join(missing)}; its first row is "
                f"{header[: len(COLUMNS)]}"
            )
        number = 1
        while True:
            number += 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} must be a CSV file in UTF-8, row {number} on is not: {error}") from None
            except csv.Error as error:
                yield number, f"not a CSV row: {error}"
                continue
            if not cells:
                continue
            if len(cells) != len(header):
                yield number, f"has {len(cells)} columns, the header has {len(header)}"
                continue
            yield number, dict(zip(header, cells, strict=True))


def _read(row: dict[str, str]) -> _Turn:
    index, turns, consistent = (row[c].strip() for c in ("image_index", "turns", "bg_consistency"))
    if not index:
        raise ValueError("image_index is empty")
    if not (turns.isdecimal() and int(turns) >= 1):
        raise ValueError(f"turns must be a whole number of at least 1, got {turns!r}")
    if consistent.lower() not in ("true", "false"):
        raise ValueError(f"bg_consistency must be True or False, got {consistent!r}")
    types, raw, formatted = (_strings(row, c, int(turns)) for c in ("task_type", "instructions", "format_instructions"))
    pools = (_strings(row, c) for c in COLUMNS[6:])
    return _Turn(index, int(turns), types, raw, formatted, consistent.lower() == "true", *pools)


def _strings(row: dict[str, str], column: str, length: int | None = None) -> list[str]:
    try:
        value: Any = ast.literal_eval(row[column].strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{column} must be a list of strings such as ['a', 'b'], got {row[column][:80]!r}")
    if length is not None and len(value) != length:
        raise ValueError(f"{column} must have one entry for each of {length} turns, got {len(value)}")
    return value


def _next_instruction(chain: list[_Turn], turn: _Turn) -> Instruction:
    """The instruction a row adds to the turns before it."""
    if turn.turn != len(chain) + 1:
        raise ValueError(f"turn {turn.turn} of image {turn.image_index}: turn {len(chain) + 1} has no readable row")
    if chain:
        for column, before, now in zip(COLUMNS[2:5], chain[-1][2:5], turn[2:5], strict=True):
            if now[:-1] != before:
                raise ValueError(f"{column} must begin with those of turn {turn.turn - 1}, {before}, got {now[:-1]}")
    made = parse(turn.formatted[-1])
    if made.type != turn.types[-1]:
        raise ValueError(f"task_type is {turn.types[-1]!r}, the instruction {turn.formatted[-1]!r} is {made.type}")
    # what must remain is told only in the raw text
    remain = parse(turn.raw[-1]).remain if made.type == "background_change" else ()
    return replace(made, text=turn.raw[-1], remain=remain)
