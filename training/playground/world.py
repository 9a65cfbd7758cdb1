"""A tiny visual world: coloured, textured, lettered shapes on a 4×4 grid, drawn and read back exactly."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

GRID = 4
CELL = 16
SIZE = GRID * CELL
CELLS = GRID * GRID
UNREADABLE = -1
MAX_ERROR = 0.02  # mean squared error above which a cell shows no object of this world

COLORS = {
    "red": (0.86, 0.12, 0.14),
    "green": (0.12, 0.66, 0.22),
    "blue": (0.14, 0.30, 0.90),
    "yellow": (0.97, 0.88, 0.12),
    "purple": (0.62, 0.16, 0.78),
    "orange": (0.96, 0.50, 0.06),
}
SHAPES = ("circle", "square", "triangle")
MATERIALS = ("rubber", "wood", "metal")
LETTERS = {
    "A": (".###.", "#...#", "#####", "#...#", "#...#"),
    "L": ("#....", "#....", "#....", "#....", "#####"),
    "T": ("#####", "..#..", "..#..", "..#..", "..#.."),
    "X": ("#...#", ".#.#.", "..#..", ".#.#.", "#...#"),
}
BACKGROUNDS = {  # top and bottom colour
    "white": ((0.96, 0.96, 0.96), (0.96, 0.96, 0.96)),
    "gray": ((0.55, 0.55, 0.55), (0.55, 0.55, 0.55)),
    "black": ((0.08, 0.08, 0.10), (0.08, 0.08, 0.10)),
    "sunset": ((0.98, 0.72, 0.60), (0.38, 0.22, 0.45)),
    "ocean": ((0.70, 0.90, 0.98), (0.06, 0.46, 0.56)),
    "meadow": ((0.90, 0.97, 0.76), (0.56, 0.54, 0.30)),
}
BACKGROUND_NAMES = tuple(BACKGROUNDS)


class Object(NamedTuple):
    shape: str  # one of SHAPES, or "sign"
    color: str
    detail: str  # a material, or a sign's letter

    def __str__(self) -> str:
        if self.shape == "sign":
            return f"{self.color} sign {self.detail}"
        return f"{self.detail} {self.color} {self.shape}"


OBJECTS = tuple(Object(s, c, m) for s in SHAPES for c in COLORS for m in MATERIALS) + tuple(
    Object("sign", c, t) for c in COLORS for t in LETTERS
)
CLASSES = len(OBJECTS) + 1  # class 0 is an empty cell; class i shows OBJECTS[i - 1]
CLASS_OF = {str(o): i + 1 for i, o in enumerate(OBJECTS)}


class Scenes(NamedTuple):
    cells: Tensor  # [N, 16] int64 classes in reading order, UNREADABLE where nothing of this world is shown
    background: Tensor  # [N] int64
    error: Tensor  # [N, 16] fp32, mean squared error to the nearest class


def _coverage(shape: str) -> np.ndarray:
    """Share of each of a cell's pixels that the shape covers, [16, 16], by 8×8 supersampling."""
    y, x = (np.mgrid[0 : CELL * 8, 0 : CELL * 8] + 0.5) / 8 - CELL / 2
    inside = {
        "circle": x**2 + y**2 <= 5.5**2,
        "square": np.maximum(abs(x), abs(y)) <= 6.5,
        "triangle": (y <= 6.5) & (y + 6.5 >= 2 * abs(x)),
        "sign": np.maximum(abs(x), abs(y)) <= 7.0,
    }[shape]
    return inside.reshape(CELL, 8, CELL, 8).mean((1, 3))


def _paint(item: Object) -> np.ndarray:
    """Surface colour of an object, [3, 16, 16]."""
    y, x = np.mgrid[0:CELL, 0:CELL]
    base = np.asarray(COLORS[item.color])[:, None, None]
    surface = np.broadcast_to(base, (3, CELL, CELL)).copy()
    if item.detail == "wood":
        surface = np.where(y // 2 % 2 == 1, base * 0.35, surface)
    elif item.detail == "metal":
        surface = np.where((x + y) // 3 % 2 == 1, 0.35 * base + 0.65, surface)
    elif item.shape == "sign":
        strokes = np.kron(np.asarray([[c == "#" for c in row] for row in LETTERS[item.detail]]), np.ones((2, 2)))
        surface[:, 3:13, 3:13] = np.where(strokes, 0.04, surface[:, 3:13, 3:13])
    return surface


@lru_cache(maxsize=1)
def templates() -> Tensor:
    """Every class on every background at every cell: [6, 16, classes, 3, 16, 16] fp32 in [0, 1]."""
    top, bottom = (np.asarray([b[i] for b in BACKGROUNDS.values()])[:, :, None] for i in (0, 1))
    ramp = np.linspace(0.0, 1.0, SIZE)[None, None]
    rows = top + (bottom - top) * ramp  # [6, 3, 64]
    canvas = np.broadcast_to(rows[..., None], (len(BACKGROUNDS), 3, SIZE, SIZE))
    canvas = canvas.reshape(-1, 3, GRID, CELL, GRID, CELL).transpose(0, 2, 4, 1, 3, 5)
    canvas = canvas.reshape(-1, CELLS, 1, 3, CELL, CELL)
    alpha = np.stack([np.zeros((CELL, CELL))] + [_coverage(o.shape) for o in OBJECTS])[:, None]  # [C, 1, 16, 16]
    paint = np.stack([np.zeros((3, CELL, CELL))] + [_paint(o) for o in OBJECTS])
    return torch.from_numpy(canvas * (1 - alpha) + paint * alpha).float()


def render(cells: Tensor, background: Tensor) -> Tensor:
    """Draws scenes.

    cells: [N, 16] int64 classes in [0, classes), reading order. background: [N] int64 in [0, 6).
    Returns [N, 3, 64, 64] fp32 in [0, 1]. Raises ValueError on a shape or class out of range.
    """
    if cells.ndim != 2 or cells.shape[1] != CELLS or background.shape != cells.shape[:1]:
        raise ValueError(
            f"cells and background must be [N, {CELLS}] and [N], got {list(cells.shape)} and {list(background.shape)}"
        )
    for name, value, stop in (("cells", cells, CLASSES), ("background", background, len(BACKGROUNDS))):
        if value.numel() and (value.min() < 0 or value.max() >= stop):
            raise ValueError(f"{name} must hold classes in [0, {stop}), got {int(value.min())}..{int(value.max())}")
    patches = templates()[background[:, None], torch.arange(CELLS), cells]  # [N, 16, 3, 16, 16]
    return patches.view(-1, GRID, GRID, 3, CELL, CELL).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, SIZE, SIZE)


def random_scenes(n: int, generator: torch.Generator, share: float = 0.4) -> tuple[Tensor, Tensor]:
    """Cells [n, 16], each filled with probability `share`, and backgrounds [n], for `render`."""
    cells = torch.randint(1, CLASSES, (n, CELLS), generator=generator)
    cells *= torch.rand(n, CELLS, generator=generator) < share
    return cells, torch.randint(len(BACKGROUNDS), (n,), generator=generator)


@lru_cache(maxsize=1)
def _search_table() -> tuple[Tensor, Tensor]:
    """Templates as matrices per cell, [16, 768, 6·classes], and their squared norms, [16, 1, 6·classes]."""
    table = templates().transpose(0, 1).reshape(CELLS, len(BACKGROUNDS) * CLASSES, -1)
    return table.transpose(1, 2).contiguous(), table.square().sum(-1)[:, None]


@torch.no_grad()
def read(images: Tensor) -> Scenes:
    """Reads images back into scenes: the background of smallest summed error, then each cell's nearest class.

    images: [N, 3, 64, 64] float in [0, 1]. A cell whose mean squared error exceeds 0.02 is UNREADABLE (-1).
    Raises ValueError on another shape.
    """
    if images.ndim != 4 or images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"images must be [N, 3, {SIZE}, {SIZE}] in [0, 1], got {list(images.shape)}")
    table, norms = _search_table()
    cells, backgrounds, errors = [], [], []
    for chunk in images.detach().float().cpu().split(128):
        n = len(chunk)
        x = chunk.view(n, 3, GRID, CELL, GRID, CELL).permute(2, 4, 0, 1, 3, 5).reshape(CELLS, n, 3 * CELL**2)
        distance = torch.baddbmm(norms, x, table, alpha=-2).view(CELLS, n, len(BACKGROUNDS), CLASSES)
        best, index = distance.min(-1)  # [16, N, 6]
        background = best.sum(0).argmin(-1)  # [N]
        pick = background[None, :, None].expand(CELLS, n, 1)
        error = (best.gather(2, pick)[..., 0] + x.square().sum(-1)).clamp_min(0) / x.shape[-1]
        cell = index.gather(2, pick)[..., 0]
        # written so that a NaN image is unreadable too
        cells.append(torch.where(error <= MAX_ERROR, cell, UNREADABLE).T)
        backgrounds.append(background)
        errors.append(error.T)
    return Scenes(torch.cat(cells), torch.cat(backgrounds), torch.cat(errors))
