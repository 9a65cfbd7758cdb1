"""Box geometry against brute force over rasters and pairs."""

import math

import pytest
import torch

from mtedit_fast.edival.geometry import contains, corners, iou, nms, offset, usable


def random_boxes(n, seed):
    generator = torch.Generator().manual_seed(seed)
    # corners on a grid of 1/64, so that a raster of 64 × 64 measures areas exactly
    a = torch.randint(0, 56, (n, 2), generator=generator)
    b = a + torch.randint(1, 9, (n, 2), generator=generator)
    return torch.cat([(a + b) / 128, (b - a) / 64], 1)


def raster(box):
    x1, y1, x2, y2 = (round(v * 64) for v in corners(box[None])[0].tolist())
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[y1:y2, x1:x2] = True
    return mask


def test_corners():
    edges = corners(torch.tensor([[0.5, 0.25, 0.5, 0.25], [0.5, 0.5, -1.0, 0.5]]))
    assert edges.tolist() == [[0.25, 0.125, 0.75, 0.375], [0.5, 0.25, 0.5, 0.75]]
    with pytest.raises(ValueError, match=r"boxes must be \[n, 4\] \(cx, cy, w, h\), got \[4\]"):
        corners(torch.zeros(4))


def test_iou_against_rasters():
    a, b = random_boxes(23, 0), random_boxes(31, 1)
    masks = [[raster(box) for box in boxes] for boxes in (a, b)]
    expected = [[(m & n).sum().item() / (m | n).sum().item() for n in masks[1]] for m in masks[0]]
    torch.testing.assert_close(iou(a, b), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)
    assert iou(a, a).diagonal().eq(1).all()
    assert (iou(a, b) > 0).any()


def test_iou_of_touching_empty_and_no_boxes():
    left, right = torch.tensor([[0.25, 0.5, 0.5, 1.0]]), torch.tensor([[0.75, 0.5, 0.5, 1.0]])
    assert iou(left, right).item() == 0
    empty = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    assert iou(empty, empty).item() == 0
    assert iou(torch.zeros(0, 4), left).shape == (0, 1)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.8])
def test_nms_against_brute_force(threshold):
    boxes = random_boxes(60, 2)
    boxes = torch.cat([boxes, boxes[:20] + 1 / 1024])
    scores = torch.rand(80, generator=torch.Generator().manual_seed(3))
    scores[10:30] = 0.5  # ties keep their order
    pool, kept = sorted(range(80), key=lambda i: (-scores[i].item(), i)), []
    while pool:
        best = pool.pop(0)
        kept.append(best)
        pool = [i for i in pool if iou(boxes[best][None], boxes[i][None]).item() <= threshold]
    assert nms(boxes, scores, threshold).tolist() == kept
    assert 1 < len(kept) < 80


def test_nms_keeps_what_only_a_suppressed_box_overlaps():
    boxes = torch.tensor([[0.30, 0.5, 0.2, 0.2], [0.40, 0.5, 0.2, 0.2], [0.50, 0.5, 0.2, 0.2]])
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.2).tolist() == [0, 2]
    assert nms(boxes, torch.tensor([0.7, 0.9, 0.8]), 0.2).tolist() == [1]
    assert nms(boxes[:0], torch.zeros(0), 0.2).tolist() == []


@pytest.mark.parametrize(
    ("position", "difference"),
    [
        ("left", lambda a, b: a[0] - b[0]),
        ("right", lambda a, b: b[0] - a[0]),
        ("above", lambda a, b: a[1] - b[1]),
        ("below", lambda a, b: b[1] - a[1]),
    ],
)
def test_offset_of_centres(position, difference):
    a, b = random_boxes(5, 4), random_boxes(7, 5)
    expected = [[difference(p, q) for q in b.double().tolist()] for p in a.double().tolist()]
    assert offset(a, b, position).tolist() == expected


def test_offset_names_an_unknown_position():
    with pytest.raises(ValueError, match="position must be one of left, right, above, below, got 'behind'"):
        offset(torch.zeros(1, 4), torch.zeros(1, 4), "behind")


def test_contains_against_rasters():
    a, b = random_boxes(40, 6), random_boxes(40, 7)
    a[:, 2:] *= 4
    a = a.clamp(0.0, 0.9)
    a[:20, :2], a[:20, 2:] = 0.5, 0.75
    edges = corners(a).tolist(), corners(b).tolist()
    expected = [[p[0] <= q[0] and p[1] <= q[1] and p[2] >= q[2] and p[3] >= q[3] for q in edges[1]] for p in edges[0]]
    assert contains(a, b).tolist() == expected
    assert contains(a, b).any()
    assert contains(b, b).diagonal().all()


def test_usable_boxes():
    boxes = torch.tensor(
        [
            [0.5, 0.5, 0.2, 0.2],
            [0.0, 0.0, 0.2, 0.2],  # half outside
            [1.2, 0.5, 0.2, 0.2],  # outside
            [0.5, -0.3, 0.2, 0.2],
            [0.5, 0.5, 0.0, 0.2],  # empty
            [0.5, 0.5, 0.2, -0.2],  # inverted
            [math.nan, 0.5, 0.2, 0.2],
            [0.5, 0.5, math.inf, 0.2],
        ]
    )
    assert usable(boxes).tolist() == [True, True] + [False] * 6
    assert usable(boxes[:0]).tolist() == []
