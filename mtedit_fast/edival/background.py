"""Boxes in whole pixels, and what of every patch of an image lies outside them."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor

Boxes = Sequence[Sequence[float]] | Tensor  # [n, 4] (cx, cy, w, h), each in [0, 1]


def pixel_boxes(boxes: Sequence[Boxes | None], height: int, width: int, name: str = "boxes") -> list[Tensor]:
    """Whole pixels (left, top, right, bottom), int64 [n, 4], of each list of normalised boxes; None is an empty list.

    Edges are rounded, clipped to the image, and at least one pixel apart. Raises ValueError, with `name`, on boxes that
    are not [n, 4], not finite, or of negative width or height.
    """
    lists = [torch.as_tensor([] if b is None else b, dtype=torch.float64, device="cpu") for b in boxes]
    lists = [b.view(0, 4) if b.numel() == 0 else b for b in lists]
    for i, b in enumerate(lists):
        if b.ndim != 2 or b.shape[1] != 4:
            raise ValueError(f"{name} must be lists of (cx, cy, w, h), got shape {list(b.shape)} in list {i}")
    flat = torch.cat([torch.empty(0, 4, dtype=torch.float64), *lists])
    bad = ~flat.isfinite().all(1) | (flat[:, 2:] < 0).any(1)
    if bad.any():
        raise ValueError(f"{name} must be finite, with w and h >= 0, got {flat[bad][0].tolist()}; leave such boxes out")
    size = flat.new_tensor([width, height])
    centre, half = flat[:, :2], flat[:, 2:] / 2
    start = torch.minimum(((centre - half) * size).round().clamp_min(0), size - 1)
    end = torch.minimum(torch.maximum(((centre + half) * size).round(), start + 1), size)
    return list(torch.cat([start, end], 1).long().split([len(b) for b in lists]))


def pixel_box(box: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) in whole pixels of a normalised (cx, cy, w, h) box, clipped, at least one pixel."""
    left, top, right, bottom = pixel_boxes([[box]], height, width)[0][0].tolist()
    return top, bottom, left, right


def token_grid(count: int) -> tuple[int, int]:
    """The rows and columns of `count` tokens of a square image, nearest to square, as EdiVal's code infers them: by
    |rows / columns - 1|, so that 200 tokens are 10 × 20 rather than 20 × 10."""
    sides = [side for side in range(1, isqrt(count) + 1) if count % side == 0]
    shapes = [shape for side in sides for shape in ((count // side, side), (side, count // side))]
    return min(shapes, key=lambda shape: abs(shape[0] / shape[1] - 1))


def background_weights(boxes: Sequence[Tensor], height: int, width: int, grid: tuple[int, int]) -> Tensor:
    """What part of each cell's pixels no box covers, [n, rows · columns] fp32, 0 where less than half.

    boxes: whole pixels (left, top, right, bottom) [m, 4] of each of n images of height × width pixels. Cells are those
    of `F.interpolate(mask, grid, mode="area")`, whose result this is without a mask: the edges of m boxes cut an image
    into at most (2m + 1)² rectangles, each covered or not.
    """
    padded = torch.nn.utils.rnn.pad_sequence([torch.empty(0, 4, dtype=torch.int64), *boxes], batch_first=True)[1:]
    within, overlap, cells = [], [], []
    for axis, (length, count) in enumerate(((width, grid[1]), (height, grid[0]))):
        first, last = padded[..., axis], padded[..., axis + 2]  # [n, m]; (0, 0) where there is no box
        ends = torch.tensor([0, length]).expand(len(padded), 2)
        edges = torch.cat([ends, first, last], 1).sort(1).values
        low, high = edges[:, None, :-1], edges[:, None, 1:]  # [n, 1, s] of segments between edges
        within.append(((first[..., None] <= low) & (high <= last[..., None])).double())  # [n, m, s]
        cell = torch.arange(count)
        start, end = cell * length // count, -(-(cell + 1) * length // count)
        shared = torch.minimum(high, end[:, None]) - torch.maximum(low, start[:, None])
        overlap.append(shared.clamp_min(0).double())  # [n, cells, s] pixels
        cells.append(end - start)
    free = (within[1].mT @ within[0] == 0).double()  # [n, s, s]
    pixels = overlap[1] @ free @ overlap[0].mT
    part = (pixels / (cells[1][:, None] * cells[0])).flatten(1)
    return torch.where(part >= 0.5, part, 0).float()
