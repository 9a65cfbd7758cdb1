"""What `crop_resize` refuses, and what it does with boxes that nobody looked at."""

import math

import pytest
import torch
from test_crop_resize import DEVICES, noise

from mtedit_fast.ops import crop_resize

BAD = {
    "empty": [3, 3, 3, 9],
    "inverted": [9, 3, 3, 9],
    "NaN": [3, math.nan, 9, 9],
    "left": [-9, 3, -1, 9],
    "right": [30, 3, 40, 9],
    "below": [3, 31, 9, 40],
    "at the edge": [3, 3, 9, 0],
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_boxes_are_named(kind: str) -> None:
    boxes = torch.tensor([[0, 0, 5, 5], BAD[kind]], dtype=torch.float32)
    wanted = r"^boxes\[1\] is empty, inverted, NaN or outside .* inside 30 x 20 \(width x height\), got \["
    for images in (noise(1, 3, 20, 30), [noise(3, 40, 50), noise(3, 20, 30)]):
        with pytest.raises(ValueError, match=wanted):
            crop_resize(images, boxes, 8)


@pytest.mark.parametrize("backend", DEVICES)
@pytest.mark.parametrize("threads", [1, 2])
def test_unchecked_bad_boxes_are_nan(backend: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device, where looking at boxes would wait for it."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    device = DEVICES[backend]
    boxes = torch.tensor([[0, 0, 5, 5], *BAD.values(), [1, 1, 9, 9], [1, 1, 9, 9]], dtype=torch.float64, device=device)
    index = torch.tensor([0] * 8 + [1, -1], device=device)
    image = noise(1, 2, 20, 30).to(device)
    args = (8, 70, True, [0.0] * 2, [1.0] * 2, torch.float32, backend)
    found = torch.ops.mtedit_fast.crop_resize([image], boxes, index, *args)
    assert found.isnan().flatten(1).all(1).tolist() == [False] + [True] * 9
    assert not found[0].isnan().any()


@pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU")
def test_device_boxes_are_checked_on_request() -> None:
    boxes = torch.tensor([[0.0, 0, 5, 5], [9, 3, 3, 9]], device="cuda")
    image = noise(1, 3, 20, 30).cuda()
    assert crop_resize(image, boxes, 8)[1].isnan().all()
    with pytest.raises(ValueError, match=r"^boxes\[1\] is empty"):
        crop_resize(image, boxes, 8, check=True)


GOOD = torch.tensor([[0, 0, 5, 5]])
IMAGE = noise(1, 3, 20, 30)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "images must be a tensor or a sequence of at least one, got list", {"images": []}),
        (TypeError, "images must be a tensor or a sequence of at least one, got ndarray", {"images": IMAGE.numpy()}),
        (TypeError, r"images must be a uint8 or floating-point tensor, got torch.int64", {"images": IMAGE.long()}),
        (TypeError, r"images\[1\] must be a uint8 or floating-point tensor, got str", {"images": [IMAGE[0], "x"]}),
        (ValueError, r"images must be \[B, C, H, W\], got \[3, 20, 30\]", {"images": IMAGE[0]}),
        (ValueError, r"images\[0\] must be \[H, W, C\], got \[1, 3, 20, 30\]", {"images": [IMAGE], "layout": "HWC"}),
        (
            ValueError,
            r"images must be \[B, C, H, W\] with 1 to 4 channels, got \[1, 20, 30, 3\]; layout='HWC' reads the other",
            {"images": IMAGE.permute(0, 2, 3, 1)},
        ),
        (ValueError, r"with 1 to 4 channels, got \[1, 3, 20, 30\]; layout='CHW' reads", {"layout": "HWC"}),
        (ValueError, r"images must have pixels, got \[1, 3, 0, 30\]", {"images": IMAGE[:, :, :0]}),
        (
            ValueError,
            r"images must share dtype, device and channels: images\[1\] has torch.float64, cpu and 3",
            {"images": [IMAGE[0], IMAGE[0].double()]},
        ),
        (ValueError, "images requires grad, and crop_resize has no backward: detach", {"images": IMAGE.clone()}),
        (ValueError, r"layout must be one of \('CHW', 'HWC'\), got 'NCHW'", {"layout": "NCHW"}),
        (TypeError, r"boxes must be a tensor of numbers, got list; use torch.tensor", {"boxes": [[0, 0, 5, 5]]}),
        (TypeError, "boxes must be a tensor of numbers, got torch.bool", {"boxes": GOOD.bool()}),
        (ValueError, r"boxes must be \[n, 4\], got \[4\]", {"boxes": GOOD[0]}),
        (ValueError, r"boxes must be \[n, 4\], got \[0\]; torch.empty\(0, 4\)", {"boxes": torch.tensor([])}),
        (ValueError, "1 boxes over 2 images need image_index=", {"images": [IMAGE[0]] * 2}),
        (TypeError, "image_index must be an int64 tensor, got list", {"image_index": [0]}),
        (TypeError, "image_index must be an int64 tensor, got torch.int32", {"image_index": torch.tensor([0]).int()}),
        (ValueError, r"image_index must be \[n\] = \[1\], got \[2\]", {"image_index": torch.tensor([0, 0])}),
        (ValueError, "image_index must be within the images' 0…0, got 1 for box 0", {"image_index": torch.tensor([1])}),
        (ValueError, "within the images' 0…0, got -1 for box 0", {"image_index": torch.tensor([-1])}),
        (ValueError, "boxes must be on the CPU or on images' device cpu, got meta", {"boxes": GOOD.to("meta")}),
        (TypeError, r"size must be an int or \(height, width\), got 8.0", {"size": 8.0}),
        (TypeError, r"size must be an int or \(height, width\), got \(8, 8, 3\)", {"size": (8, 8, 3)}),
        (TypeError, r"size must be an int or \(height, width\), got True", {"size": True}),
        (ValueError, r"size must be positive, got \(0, 8\)", {"size": (0, 8)}),
        (ValueError, r"filter must be one of \('bilinear', 'bicubic'\), got 'box'", {"filter": "box"}),
        (ValueError, r"mean must have a number for each of 3 channels, got \[0.5\]", {"mean": [0.5]}),
        (ValueError, r"std must have a number for each of 3 channels, got \[1.0, 1.0\]", {"std": [1, 1]}),
        (ValueError, r"std must be positive, got \[1.0, 0.0, 1.0\]", {"std": [1, 0, 1]}),
        (ValueError, r"std must be positive, got \[nan, 1.0, 1.0\]", {"std": [math.nan, 1, 1]}),
        (TypeError, "dtype must be a floating-point dtype, got torch.uint8", {"dtype": torch.uint8}),
        (
            ValueError,
            r"backend must be one of \('auto', 'reference', 'cpp', 'cuda'\), got 'triton'",
            {"backend": "triton"},
        ),
        (
            ValueError,
            "backend='cuda' is not available: it runs on CUDA and the tensors are on cpu",
            {"backend": "cuda"},
        ),
        (
            ValueError,
            "backend='cpp' is not available: .* not torch.float64; use backend='auto' or 'reference'",
            {"backend": "cpp", "dtype": torch.float64},
        ),
    ],
)
def test_bad_arguments(error: type[Exception], message: str, change: dict) -> None:
    arguments = {"images": IMAGE, "boxes": GOOD, "size": 8} | change
    if "requires grad" in message:
        arguments["images"].requires_grad_()
    with pytest.raises(error, match=message):
        crop_resize(**arguments)


def test_no_grad_takes_images_that_require_grad() -> None:
    image = IMAGE.clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(crop_resize(image, GOOD, 8), crop_resize(IMAGE, GOOD, 8))
