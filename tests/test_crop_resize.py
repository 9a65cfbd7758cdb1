"""`crop_resize` against PIL and F.interpolate, over layouts, dtypes and devices; and what it refuses."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from mtedit_fast.ops import crop_resize
from mtedit_fast.ops._backend import unavailable_reason

LEVEL = 1 / 255
TOLERANCE = 1e-4 * LEVEL
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEVICES = {"reference": "cpu", "cpp": "cpu"}
if unavailable_reason("cuda", torch.device("cuda" if torch.cuda.is_available() else "cpu"), ()) is None:
    DEVICES["cuda"] = "cuda"
BOXES = torch.tensor([[3, 4, 20, 30], [0, 0, 41, 37], [-5.5, 2.25, 8.125, 90], [7, 7, 8, 8], [12.25, 9.5, 12.5, 9.75]])


@pytest.fixture(params=DEVICES)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def random_boxes(n: int, width: int, height: int, step: float, seed: int) -> Tensor:
    """Corners at multiples of `step`: inside, across the left and top edges, across the others, one step wide."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(n, 2, generator=generator) * torch.tensor([width - 1, height - 1]) for _ in range(2))
    low, high = torch.minimum(a, b).div(step).floor() * step, torch.maximum(a, b).div(step).ceil() * step
    high = torch.maximum(high, low + step)
    low[::5] -= 20
    high[1::5] += 400
    low[2::10], high[3::10] = 0, torch.tensor([width, height])  # exactly at the edges
    high[4::10] = low[4::10] + step
    high = high.clamp(min=step)
    return torch.cat([low, high], 1)


def touched(box: list[float], width: int, height: int) -> tuple[list[int], list[float]]:
    """The pixels of a box cut to its image, and the cut box counted from them."""
    x0, y0, x1, y1 = max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height)
    pixels = [math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)]
    return pixels, [x0 - pixels[0], y0 - pixels[1], x1 - pixels[0], y1 - pixels[1]]


def pil(image: Tensor, box: list[float], size: tuple[int, int], filter: str) -> Tensor:
    """[C, h, w] by PIL's mode "F", a channel at a time."""
    pixels, inside = touched(box, image.shape[2], image.shape[1])
    planes = [Image.fromarray(channel.numpy()).crop(tuple(pixels)) for channel in image]
    found = [plane.resize(size[::-1], RESAMPLING[filter], box=tuple(inside)) for plane in planes]
    return torch.from_numpy(np.stack([np.array(plane) for plane in found]))


# 1,000 boxes; (3, 2) from 300 pixels is 100:1, (100, 120) from one pixel 1:100 and more.
@pytest.mark.parametrize(("step", "seed"), [(1.0, 0), (1 / 16, 1)])
@pytest.mark.parametrize("filter", RESAMPLING)
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (7, 33), (50, 64), (100, 120)])
def test_agrees_with_pil_and_interpolate(filter: str, size: tuple[int, int], step: float, seed: int) -> None:
    image = noise(2, 240, 300)
    boxes = random_boxes(50, 300, 240, step, seed)
    exact = crop_resize(image[None], boxes, size, filter=filter, dtype=torch.float64)
    fast = crop_resize(image[None], boxes, size, filter=filter)
    truth = exact.clone()
    for i, box in enumerate(boxes.tolist()):
        theirs = pil(image, box, size, filter)
        assert (exact[i] - theirs).abs().max() <= TOLERANCE
        assert (fast[i] - theirs).abs().max() <= TOLERANCE
        if step == 1:
            (x0, y0, x1, y1), _ = touched(box, 300, 240)
            crop = image[None, :, y0:y1, x0:x1].double()
            truth[i] = interpolate(crop, size, mode=filter, antialias=True)[0]
            single = interpolate(crop.float(), size, mode=filter, antialias=True)[0]
            # PyTorch's own fp32 weights are good to some 1e-5 on large crops: 50 times the tolerance.
            assert (fast[i] - truth[i]).abs().max() <= (single - truth[i]).abs().max() + TOLERANCE
    assert (exact - truth).abs().max() <= 1e-12
    assert (fast - truth).abs().max() <= TOLERANCE


def test_downscale_by_100(backend: str) -> None:
    image = noise(1, 300, 2300)
    boxes = torch.tensor([[50, 40, 2250, 240], [0, 0, 2300, 300]])
    found = crop_resize(image[None].to(DEVICES[backend]), boxes, (2, 22), backend=backend).cpu()
    for crop, box in zip(found, boxes.tolist(), strict=True):
        assert (crop - pil(image, box, (2, 22), "bicubic")).abs().max() <= TOLERANCE


def test_what_resize_with_a_box_reads_beyond_it() -> None:
    """`image.resize(box=)` is not the definition: within the filter's reach of the box's edge it sees the outside."""
    image = torch.zeros(1, 40, 40)
    image[:, 10:30, 10:30] = 0.5
    image[:, :, :10] = 1.0
    ours = crop_resize(image[None], torch.tensor([[10, 10, 30, 30]]), 40)[0, 0]
    theirs = Image.fromarray(image[0].numpy()).resize((40, 40), RESAMPLING["bicubic"], box=(10, 10, 30, 30))
    difference = (ours - torch.from_numpy(np.array(theirs))).abs()
    assert torch.allclose(ours, torch.tensor(0.5))
    assert difference[:, :2].max() > 0.1
    assert difference[4:-4, 4:-4].max() < 1e-6  # further in than two pixels, four here


@pytest.mark.parametrize(("kind", "filter", "levels"), [("smooth", "bicubic", 1.2), ("noise", "bilinear", 1.2)])
def test_distance_from_pils_8_bit_modes(kind: str, filter: str, levels: float) -> None:
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(128.0), indexing="ij")
    smooth = torch.stack([127 + 120 * torch.sin(x / 19 + k) * torch.cos(y / 23) for k in range(3)]).round()
    image = (smooth if kind == "smooth" else noise(3, 96, 128) * 255).to(torch.uint8)
    for size in ((224, 224), (20, 24)):
        ours, theirs = eight_bit(image, size, filter)
        assert 0.2 < (ours - theirs).abs().max() < levels


def test_pils_8_bit_modes_clip_and_ours_overshoots() -> None:
    y, x = torch.meshgrid(torch.arange(96), torch.arange(128), indexing="ij")
    checks = torch.where((x // 16 + y // 16) % 2 == 0, 255, 0).to(torch.uint8).expand(3, -1, -1)
    ours, theirs = eight_bit(checks, (224, 224), "bicubic")
    assert ours.max() > 255 * 1.1
    assert ours.min() < -255 * 0.1
    assert 10 < (ours.clamp(0, 255) - theirs).abs().max() < 20  # the clip between the passes remains
    assert 30 < (ours - theirs).abs().max() < 45


def eight_bit(image: Tensor, size: tuple[int, int], filter: str) -> tuple[Tensor, Tensor]:
    theirs = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).resize(size[::-1], RESAMPLING[filter])
    whole = torch.tensor([[0, 0, image.shape[2], image.shape[1]]])
    ours = crop_resize(image[None], whole, size, filter=filter)[0] * 255
    return ours, torch.from_numpy(np.array(theirs)).permute(2, 0, 1).float()


@pytest.mark.parametrize("filter", RESAMPLING)
@pytest.mark.parametrize("source", [torch.uint8, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_normalisation(backend: str, filter: str, source: torch.dtype, dtype: torch.dtype) -> None:
    image = noise(2, 3, 37, 41)
    image = (image * 255).to(torch.uint8) if source == torch.uint8 else image.to(source)
    index = torch.tensor([1, 0, 1, 1, 0])
    options = {"image_index": index, "filter": filter, "mean": MEAN, "std": STD}
    device = DEVICES[backend]
    found = crop_resize(image.to(device), BOXES, (19, 65), **options, dtype=dtype, backend=backend)
    assert (found.dtype, found.device.type, tuple(found.shape)) == (dtype, device, (5, 3, 19, 65))
    assert found.is_contiguous()
    scaled = image.double() / (255 if source == torch.uint8 else 1)
    plain = crop_resize(scaled, BOXES, (19, 65), image_index=index, filter=filter, dtype=torch.float64)
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    truth = (plain - mean) / std
    torch_error = (truth.to(dtype).double() - truth).abs().max()
    assert (found.cpu().double() - truth).abs().max() <= torch_error + 1e-5


def variants(image: Tensor) -> Iterator[tuple[str, Tensor, str]]:
    """[B, C, H, W] in the memory layouts that are read in place, and one that is not."""
    yield "contiguous", image, "CHW"
    yield "channels last", image.contiguous(memory_format=torch.channels_last), "CHW"
    yield "HWC", image.permute(0, 2, 3, 1).contiguous(), "HWC"
    yield "HWC view", image.permute(0, 2, 3, 1), "HWC"
    larger = torch.full((*image.shape[:2], image.shape[2] + 5, image.shape[3] + 7), 7).to(image.dtype)
    larger[:, :, 2:-3, 3:-4] = image
    yield "window", larger[:, :, 2:-3, 3:-4], "CHW"
    rgba = torch.cat([image, image[:, :1]], 1).permute(0, 2, 3, 1).contiguous()
    yield "of RGBA", rgba[..., : image.shape[1]], "HWC"
    yield "transposed", image.transpose(2, 3).contiguous().transpose(2, 3), "CHW"
    yield "reversed batch", image.flip(0), "CHW"


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_layouts_give_the_same_bits(backend: str, channels: int, dtype: torch.dtype) -> None:
    image = (noise(2, channels, 37, 41) * 255).to(dtype)
    device = DEVICES[backend]

    def crop(images: Tensor | list[Tensor], index: list[int], layout: str) -> Tensor:
        placed = [i.to(device) for i in images] if isinstance(images, list) else images.to(device)
        return crop_resize(placed, BOXES, (33, 18), image_index=torch.tensor(index), layout=layout, backend=backend)

    expected = crop(image, [1, 0, 1, 0, 1], "CHW")
    for name, view, layout in variants(image):
        index = [0, 1, 0, 1, 0] if name == "reversed batch" else [1, 0, 1, 0, 1]
        assert torch.equal(crop(view, index, layout), expected), name
        assert torch.equal(crop(list(view), index, layout), expected), name


def test_four_channels_and_thin_images(backend: str) -> None:
    device = DEVICES[backend]
    for height, width in ((1, 1), (1, 50), (50, 1), (5, 700)):
        image = noise(1, 4, height, width)
        for layout in (image, image.contiguous(memory_format=torch.channels_last)):
            found = crop_resize(layout.to(device), torch.tensor([[0, 0, width, height]]), (9, 70), backend=backend)
            truth = interpolate(image.double(), (9, 70), mode="bicubic", antialias=True)
            assert (found.cpu() - truth).abs().max() <= TOLERANCE


def test_images_of_different_sizes(backend: str) -> None:
    device = DEVICES[backend]
    images = [noise(3, 20 + 9 * i, 60 - 11 * i, seed=i).to(device) for i in range(4)]
    boxes = torch.tensor([[0, 0, 8, 8], [1.5, 2, 100, 100], [2, 3, 9, 17], [0, 1, 20, 40], [4, 4, 5, 5]])
    index = torch.tensor([3, 0, 2, 1, 0])
    found = crop_resize(images, boxes, 12, image_index=index, backend=backend)
    for i, image in enumerate(index.tolist()):
        alone = crop_resize([images[image]], boxes[i : i + 1], 12, backend=backend)
        assert torch.equal(found[i : i + 1], alone)
    by_default = crop_resize(images, boxes[:4], 12, backend=backend)
    assert torch.equal(by_default, crop_resize(images, boxes[:4], 12, image_index=torch.arange(4), backend=backend))


def test_a_crop_depends_on_neither_batch_nor_threads(two_threads: None) -> None:
    image = noise(2, 3, 150, 170)
    boxes = random_boxes(9, 170, 150, 1 / 16, 3)
    index = torch.arange(9) % 2
    for source in (image, (image * 255).to(torch.uint8)):
        torch.set_num_threads(2)
        together = crop_resize(source, boxes, (61, 45), image_index=index)
        strips = [crop_resize(source, boxes[i : i + 1], (61, 45), image_index=index[i : i + 1]) for i in range(9)]
        torch.set_num_threads(1)
        assert torch.equal(together, crop_resize(source, boxes, (61, 45), image_index=index))
        assert torch.equal(together, torch.cat(strips))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [224, 221])
def test_large_results_have_the_bits_of_small_ones(dtype: torch.dtype, width: int) -> None:
    """The C++ kernel writes results of 4 MiB and more past the cache."""
    image = noise(1, 3, 60, 80)
    boxes = random_boxes(16, 80, 60, 1 / 16, 6)
    together = crop_resize(image, boxes, (224, width), dtype=dtype)
    assert together.nbytes >= 4 << 20
    for i in range(16):
        assert torch.equal(together[i : i + 1], crop_resize(image, boxes[i : i + 1], (224, width), dtype=dtype))


def test_batch_invariance_of_every_backend(backend: str) -> None:
    image = noise(2, 3, 50, 70).to(DEVICES[backend])
    boxes, index = random_boxes(6, 70, 50, 1 / 16, 4), torch.arange(6) % 2
    together = crop_resize(image, boxes, 31, image_index=index, backend=backend)
    for i in range(6):
        alone = crop_resize(image, boxes[i : i + 1], 31, image_index=index[i : i + 1], backend=backend)
        assert torch.equal(together[i : i + 1], alone)


def test_crops_of_a_pixel_and_less_are_constant(backend: str) -> None:
    image = noise(1, 3, 20, 20)
    found = crop_resize(image.to(DEVICES[backend]), BOXES[3:], 16, backend=backend).cpu()
    assert (found[0] - image[0, :, 7, 7, None, None]).abs().max() <= TOLERANCE
    assert (found[1] - image[0, :, 9, 12, None, None]).abs().max() <= TOLERANCE


def test_nothing_outside_a_crop_is_read(backend: str) -> None:
    image = torch.full((1, 3, 40, 50), math.nan)
    image[:, :, 11:23, 17:30] = noise(3, 12, 13)
    boxes = torch.tensor([[17, 11, 30, 23], [17.25, 11.5, 29.75, 22.125]])
    assert not crop_resize(image.to(DEVICES[backend]), boxes, 24, backend=backend).isnan().any()


def test_box_dtypes_and_default_index(backend: str) -> None:
    device = DEVICES[backend]
    image = noise(2, 3, 30, 30).to(device)
    boxes = torch.tensor([[2, 3, 20, 25], [0, 0, 30, 30]])
    expected = crop_resize(image, boxes, 10, backend=backend)
    for dtype in (torch.int32, torch.uint8, torch.float16, torch.float32, torch.float64):
        assert torch.equal(crop_resize(image, boxes.to(dtype), 10, backend=backend), expected)
    assert torch.equal(crop_resize(image, boxes.to(device), (10, 10), backend=backend), expected)
    one = crop_resize(image[:1], boxes, 10, backend=backend)
    zeros = torch.zeros(2, dtype=torch.int64)
    assert torch.equal(one, crop_resize(image, boxes, 10, image_index=zeros, backend=backend))


def test_no_boxes(backend: str) -> None:
    image = noise(3, 3, 9, 9).to(DEVICES[backend])
    index = torch.empty(0, dtype=torch.int64)
    found = crop_resize(image, torch.empty(0, 4), (5, 6), image_index=index, dtype=torch.bfloat16, backend=backend)
    assert (tuple(found.shape), found.dtype) == ((0, 3, 5, 6), torch.bfloat16)


@pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU")
def test_cuda_agrees_with_cpp() -> None:
    image = noise(2, 3, 240, 300)
    boxes = random_boxes(100, 300, 240, 1 / 16, 5)
    index = torch.arange(100) % 2
    for size in ((2, 3), (50, 130)):
        for source in (image, (image * 255).to(torch.uint8)):
            ours = crop_resize(source.cuda(), boxes, size, image_index=index)
            assert (ours.cpu() - crop_resize(source, boxes, size, image_index=index)).abs().max() <= 1e-6


def test_compiled_equals_eager(backend: str) -> None:
    device = DEVICES[backend]
    image = noise(2, 37, 41, 3).to(device)
    boxes = BOXES.to(device)
    index = torch.tensor([1, 0, 1, 0, 1], device=device)

    def run(image: Tensor, boxes: Tensor) -> Tensor:
        options = {"image_index": index, "mean": MEAN, "std": STD, "layout": "HWC", "backend": backend}
        return crop_resize(image, boxes, (16, 12), **options) + 1

    compiled = torch.compile(run, fullgraph=True)
    assert torch.equal(compiled(image, boxes), run(image, boxes))


def test_opcheck(backend: str) -> None:
    device = DEVICES[backend]
    options = (8, 9, True, [0.5] * 3, [2.0] * 3, torch.bfloat16, backend)
    index = torch.tensor([1, 0, 1, 0, 1], device=device)
    batch = noise(2, 3, 37, 41).to(device)
    for batches in ([batch], [batch[:1], batch[1:, :, :30]]):
        args = (batches, BOXES.double().to(device), index, *options)
        torch.library.opcheck(torch.ops.mtedit_fast.crop_resize.default, args)
