"""Boxes in whole pixels, and what they leave of an image's patches, against a mask."""

import pytest
import torch
import torch.nn.functional as F

from mtedit_fast.edival.background import background_weights, pixel_box, pixel_boxes, token_grid


@pytest.mark.parametrize(
    ("size", "grid"), [((45, 61), (5, 5)), ((64, 64), (8, 8)), ((37, 50), (10, 20)), ((7, 9), (7, 9))]
)
def test_background_weights_are_the_area_pooled_mask(size, grid):
    generator = torch.Generator().manual_seed(3)
    height, width = size
    drawn = []
    for count in (0, 1, 2, 7, 30):
        box = torch.rand(count, 4, generator=generator) * torch.tensor([1, 1, 0.5, 0.5])
        drawn.append(pixel_boxes([box], height, width)[0])
    weights = background_weights(drawn, height, width, grid)
    assert weights.shape == (5, grid[0] * grid[1])
    assert weights.dtype == torch.float32
    for boxes, ours in zip(drawn, weights, strict=True):
        keep = torch.ones(height, width, dtype=torch.float64)
        for left, top, right, bottom in boxes.tolist():
            keep[top:bottom, left:right] = 0
        pooled = F.interpolate(keep[None, None], grid, mode="area").flatten()
        assert torch.equal(ours, (pooled * (pooled >= 0.5)).float())
    assert (weights[0] == 1).all()
    assert background_weights([], height, width, grid).shape == (0, grid[0] * grid[1])


def test_half_of_a_patch_is_background_and_less_is_not():
    boxes = [torch.tensor([[0, 0, 4, 8], [8, 0, 13, 8]])]
    assert background_weights(boxes, 8, 16, (1, 2)).tolist() == [[0.5, 0.0]]


@pytest.mark.parametrize(
    ("count", "grid"), [(196, (14, 14)), (200, (10, 20)), (29, (1, 29)), (40, (5, 8)), (1028, (4, 257)), (1, (1, 1))]
)
def test_token_grid(count, grid):
    """14² + 4 tokens and others; 1028 = 32² + 4 = 4 · 257."""
    assert token_grid(count) == grid


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0.5, 0.5, 1.0, 1.0), (0, 45, 0, 61)),
        ((0.0, 0.0, 0.5, 0.5), (0, 11, 0, 15)),
        ((1.0, 1.0, 0.001, 0.001), (44, 45, 60, 61)),
        ((-3.0, 0.5, 0.1, 2.0), (0, 45, 0, 1)),
    ],
)
def test_boxes_are_clipped_and_never_empty(box, expected):
    assert pixel_box(box, 45, 61) == expected
