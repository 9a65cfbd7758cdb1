"""Geometry of boxes (cx, cy, w, h), each in [0, 1], in fp64: overlap, suppression, offsets, containment.

A negative width or height counts as zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

_AXES = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}  # position: axis, sign; y points down


def corners(boxes: Tensor) -> Tensor:
    """[n, 4] (x1, y1, x2, y2) fp64 of boxes [n, 4]. Raises ValueError on another shape."""
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be [n, 4] (cx, cy, w, h), got {list(boxes.shape)}")
    centre, half = boxes[:, :2].double(), boxes[:, 2:].double().clamp_min(0) / 2
    return torch.cat([centre - half, centre + half], 1)


def usable(boxes: Tensor) -> Tensor:
    """[n] bool: finite, of positive width and height, and at least partly inside the image."""
    edges = corners(boxes)
    inside = (edges[:, 2:] > 0).all(1) & (edges[:, :2] < 1).all(1)
    return boxes.isfinite().all(1) & (boxes[:, 2:] > 0).all(1) & inside


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union [n, m] of boxes [n, 4] and [m, 4]; 0 where both are empty."""
    a, b = corners(a), corners(b)
    overlap = torch.minimum(a[:, None, 2:], b[None, :, 2:]) - torch.maximum(a[:, None, :2], b[None, :, :2])
    shared = overlap.clamp_min(0).prod(-1)
    areas = [(edges[:, 2:] - edges[:, :2]).prod(-1) for edges in (a, b)]
    union = areas[0][:, None] + areas[1][None] - shared
    return torch.where(union > 0, shared / union, 0.0)


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices [k] of the boxes that stay, best first: a box goes when its IoU with a better one that stays exceeds
    `threshold`. Equal scores keep their order."""
    order = scores.argsort(descending=True, stable=True)
    close = (iou(boxes[order], boxes[order]) > threshold).tolist()
    kept: list[int] = []
    for i in range(len(close)):
        if not any(close[j][i] for j in kept):
            kept.append(i)
    return order[torch.tensor(kept, dtype=torch.long, device=order.device)]


def offset(a: Tensor, b: Tensor, position: str) -> Tensor:
    """How far the centre of b [m, 4] lies from that of a [n, 4] towards `position` (left, right, above, below), as a
    share of the image: [n, m], negative on the other side. Raises ValueError on another position."""
    if position not in _AXES:
        raise ValueError(f"position must be one of {', '.join(_AXES)}, got {position!r}")
    axis, sign = _AXES[position]
    return sign * (b[None, :, axis].double() - a[:, None, axis].double())


def contains(a: Tensor, b: Tensor) -> Tensor:
    """[n, m] bool: box a [n, 4] contains box b [m, 4]; a box contains itself."""
    a, b = corners(a)[:, None], corners(b)[None]
    return (a[..., :2] <= b[..., :2]).all(-1) & (a[..., 2:] >= b[..., 2:]).all(-1)
