"""Antialiased crops: ragged boxes over a batch of images, resized, normalised and cast in one pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtedit_fast.ops._backend import choose_backend
from mtedit_fast.ops._operator import Operator

FILTERS = ("bilinear", "bicubic")
LAYOUTS = ("CHW", "HWC")
MAX_CHANNELS = 4


def crop_resize(
    images: Tensor | Sequence[Tensor],
    boxes: Tensor,
    size: int | tuple[int, int],
    *,
    image_index: Tensor | None = None,
    filter: str = "bicubic",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str = "CHW",
    check: bool = False,
    backend: str = "auto",
) -> Tensor:
    """(resize(images[image_index[i]] in boxes[i]) - mean) / std for every box i, antialiased as PIL does it.

    Pixel j covers [j, j + 1). A box, cut to its image, is divided into `size` equal steps; an output is the filter's
    mean around the centre of its step, the filter being stretched by the step where that exceeds a pixel. Only the
    pixels that the box touches are read, ⌊x0⌋ … ⌈x1⌉ - 1: what lies outside a crop never leaks into it. So, with boxes
    whose corners are integers, it is `F.interpolate(crop, antialias=True)` (torchvision's resize of a tensor) and
    `image.crop(box).resize(size)` of a PIL image of mode "F"; with others `image.crop(touched).resize(size, box=...)`.

    `image.resize(size, box=box)` without the crop is another thing: it reads beyond the box. So are PIL's 8-bit modes,
    which round and clip between the two passes and after them: bicubic up-scales of noise or of checks differ by up to
    40 of 255 levels, smooth images by 1. Here nothing is clipped, and bicubic results overshoot the pixels' range where
    edges are sharp.

    Weights are computed in fp64 and applied in fp32 (in fp64 on the reference), rows first. A crop depends neither on
    the other boxes nor on the number of threads. No gradients.

    The filters are PIL's (J. Clark and others, Resample.c): the triangle, and the cubic of R. Keys, "Cubic convolution
    interpolation", IEEE TASSP 1981, with a = -1/2. PIL's "box" is left out: it is not continuous, so that rounding
    would decide which pixels count.

    Args:
        images: [B, C, H, W], or a sequence of [C, H, W] that may differ in size, 1 to 4 channels: floats, as a rule in
            [0, 1], or uint8, which is divided by 255. Strided views, such as channels-last ones, are read in place.
        boxes: [n, 4] x0, y0, x1, y1 in pixels, any integer or float dtype, fractions allowed. They are cut to their
            images. On the CPU they are checked here; on images' device they are not (that would wait for it), and a
            box that is empty, inverted, NaN or outside gives a crop of NaN.
        size: (height, width) of every crop, or one number for both.
        image_index: [n] int64, which image each box belongs to; checked as boxes are. Default: image i for box i, or
            the only image for all.
        filter: "bicubic" or "bilinear".
        mean, std: C numbers each, in units of the scaled image. Default: 0 and 1.
        dtype: of the result.
        layout: "HWC" for images [B, H, W, C] or [H, W, C].
        check: wait for the device and raise on bad boxes there too (not inside torch.compile).
        backend: "auto", "reference", "cpp" or "cuda". An explicit one never falls back.

    Returns:
        [n, C, height, width] of dtype, contiguous, on images' device.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or channels that do not fit, an image that requires grad, a box that is empty,
            inverted, NaN or outside its image, an image_index of no image, an unknown option, or a backend that cannot
            run here.
    """
    batches = _batches(images, layout)
    first = batches[0]
    count = first.shape[0] if len(batches) == 1 else len(batches)
    height, width = _size(size)
    means, stds = _normalisation(mean, std, first.shape[1])
    if filter not in FILTERS:
        raise ValueError(f"filter must be one of {FILTERS}, got {filter!r}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
    boxes, index, on_host = _boxes(boxes, image_index, count, first.device)
    if (on_host or check) and not torch.compiler.is_compiling():
        _raise_if_bad(boxes, index, batches, count)
    dtypes = (dtype,) if first.dtype == torch.uint8 else (first.dtype, dtype)
    chosen = choose_backend(backend, first.device, dtypes, offered=("cpp", "cuda"))
    boxes, index = (_to(tensor, first.device) for tensor in (boxes, index))
    return _op(batches, boxes, index, height, width, filter == "bicubic", means, stds, dtype, chosen)


def _batches(images: Tensor | Sequence[Tensor], layout: str) -> list[Tensor]:
    """[B, C, H, W], or a [1, C, H, W] for each image of a sequence."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    many = not isinstance(images, Tensor)
    if many and (not isinstance(images, Sequence) or not images):
        raise TypeError(f"images must be a tensor or a sequence of at least one, got {type(images).__name__}")
    batches: list[Tensor] = []
    for i, image in enumerate(images if many else [images]):
        name = f"images[{i}]" if many else "images"
        if not isinstance(image, Tensor) or not (image.dtype == torch.uint8 or image.dtype.is_floating_point):
            got = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"{name} must be a uint8 or floating-point tensor, got {got}")
        shape = ("" if many else "B, ") + ", ".join(layout)
        if image.ndim != 4 - many:
            raise ValueError(f"{name} must be [{shape}], got {list(image.shape)}")
        batch = image[None] if many else image
        batch = batch.permute(0, 3, 1, 2) if layout == "HWC" else batch
        if not 1 <= batch.shape[1] <= MAX_CHANNELS:
            other = LAYOUTS[layout == "CHW"]
            raise ValueError(
                f"{name} must be [{shape}] with 1 to {MAX_CHANNELS} channels, got {list(image.shape)}; "
                f"layout={other!r} reads the other order"
            )
        if 0 in batch.shape[2:]:
            raise ValueError(f"{name} must have pixels, got {list(image.shape)}")
        if batches and (batch.dtype, batch.device, batch.shape[1]) != (
            batches[0].dtype,
            batches[0].device,
            batches[0].shape[1],
        ):
            raise ValueError(
                f"images must share dtype, device and channels: {name} has {batch.dtype}, {batch.device} and "
                f"{batch.shape[1]}, images[0] {batches[0].dtype}, {batches[0].device} and {batches[0].shape[1]}"
            )
        if image.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires grad, and crop_resize has no backward: detach it, or use torch.no_grad")
        batches.append(batch)
    return batches


def _size(size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, Sequence) else ()
    if len(pair) != 2 or any(isinstance(side, bool) or not isinstance(side, int) for side in pair):
        raise TypeError(f"size must be an int or (height, width), got {size!r}")
    if min(pair) < 1:
        raise ValueError(f"size must be positive, got {size!r}")
    return pair


def _normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[list[float], list[float]]:
    means = [0.0] * channels if mean is None else [float(value) for value in mean]
    stds = [1.0] * channels if std is None else [float(value) for value in std]
    for name, values in (("mean", means), ("std", stds)):
        if len(values) != channels:
            raise ValueError(f"{name} must have a number for each of {channels} channels, got {values}")
    if not all(value > 0 for value in stds):
        raise ValueError(f"std must be positive, got {stds}")
    return means, stds


def _boxes(boxes: Tensor, image_index: Tensor | None, count: int, device: torch.device) -> tuple[Tensor, Tensor, bool]:
    """Boxes in fp64, an index for each, and whether both are on the host, where looking at them costs no wait."""
    if not isinstance(boxes, Tensor) or boxes.dtype == torch.bool or boxes.dtype.is_complex:
        got = boxes.dtype if isinstance(boxes, Tensor) else type(boxes).__name__
        raise TypeError(f"boxes must be a tensor of numbers, got {got}; use torch.tensor(boxes)")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be [n, 4], got {list(boxes.shape)}; torch.empty(0, 4) holds none")
    n = boxes.shape[0]
    if image_index is None:
        if count not in (1, n):
            raise ValueError(f"{n} boxes over {count} images need image_index=, [n] int64")
        zeros = count == 1
        image_index = torch.zeros(n, dtype=torch.int64) if zeros else torch.arange(n)
        if boxes.device.type != "cpu":
            image_index = torch.zeros_like(boxes[:, 0], dtype=torch.int64) if zeros else torch.arange(n, device=device)
    elif not isinstance(image_index, Tensor) or image_index.dtype != torch.int64:
        got = image_index.dtype if isinstance(image_index, Tensor) else type(image_index).__name__
        raise TypeError(f"image_index must be an int64 tensor, got {got}; use torch.tensor(image_index)")
    if image_index.shape != boxes.shape[:1]:
        raise ValueError(f"image_index must be [n] = [{n}], got {list(image_index.shape)}")
    for name, tensor in (("boxes", boxes), ("image_index", image_index)):
        if tensor.device.type != "cpu" and tensor.device != device:
            raise ValueError(f"{name} must be on the CPU or on images' device {device}, got {tensor.device}")
    on_host = boxes.device.type == image_index.device.type == "cpu"
    if not on_host:
        boxes, image_index = _to(boxes, device), _to(image_index, device)
    return boxes.detach().to(torch.float64), image_index, on_host


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """On `device`, without waiting for it."""
    if tensor.device == device:
        return tensor
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def _raise_if_bad(boxes: Tensor, index: Tensor, batches: list[Tensor], count: int) -> None:
    outside = ((index < 0) | (index >= count)).nonzero().flatten().tolist()
    if outside:
        raise ValueError(
            f"image_index must be within the images' 0…{count - 1}, got {int(index[outside[0]])} for box {outside[0]}"
        )
    sizes = torch.tensor([[*batch.shape[:1:-1]] for batch in batches], dtype=boxes.dtype, device=boxes.device)
    sizes = sizes if len(batches) == 1 else sizes[index]
    low, high = boxes[:, :2], boxes[:, 2:]
    good = ((low < high) & (low < sizes) & (high > 0)).all(1)
    bad = (~good).nonzero().flatten().tolist()
    if bad:
        width, height = sizes.expand(len(boxes), 2)[bad[0]].int().tolist()
        raise ValueError(
            f"boxes[{bad[0]}] is empty, inverted, NaN or outside its image: expected x0 < x1 and y0 < y1 and a part "
            f"inside {width} x {height} (width x height), got {boxes[bad[0]].tolist()}; drop it, or mend it"
        )


def _weights(low: float, high: float, size: int, out: int, cubic: bool) -> tuple[slice, Tensor] | None:
    """The pixels that [low, high) touches of `size`, and their weights [out, pixels] in fp64. None: it misses them."""
    if not low < high or low >= size or high <= 0:
        return None
    ends = torch.tensor([low, high], dtype=torch.float64).clamp(0, size)
    first, last = int(ends[0].floor()), int(ends[1].ceil())
    scale = (ends[1] - ends[0]) / out
    centre = ends[0] - first + (torch.arange(out, dtype=torch.float64) + 0.5) * scale
    pixel = torch.arange(last - first, dtype=torch.float64) + 0.5
    x = ((pixel - centre[:, None]) / scale.clamp(min=1)).abs()
    if cubic:
        near, far = (1.5 * x - 2.5) * x * x + 1, -0.5 * (((x - 5) * x + 8) * x - 4)
        weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    else:
        weights = (1 - x).clamp(min=0)
    return slice(first, last), weights / weights.sum(1, keepdim=True)


def reference_forward(
    batches: list[Tensor],
    boxes: Tensor,
    index: Tensor,
    height: int,
    width: int,
    cubic: bool,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
) -> Tensor:
    """Plain PyTorch in fp64, a crop at a time: the definition. Every back end has this signature. Waits for boxes."""
    first = batches[0]
    images = first if len(batches) == 1 else [batch[0] for batch in batches]
    means, stds = (torch.tensor(v, dtype=torch.float64, device=first.device)[:, None, None] for v in (mean, std))
    scale = 255 if first.dtype == torch.uint8 else 1
    out = first.new_empty((boxes.shape[0], first.shape[1], height, width), dtype=dtype)
    for crop, box, i in zip(out, boxes.tolist(), index.tolist(), strict=True):
        if not 0 <= i < len(images):
            crop.fill_(torch.nan)
            continue
        image = images[i]
        columns = _weights(box[0], box[2], image.shape[2], width, cubic)
        rows = _weights(box[1], box[3], image.shape[1], height, cubic)
        if columns is None or rows is None:
            crop.fill_(torch.nan)
            continue
        pixels = image[:, rows[0], columns[0]].double() / scale
        y, x = rows[1].to(first.device), columns[1].to(first.device)
        crop.copy_((y @ pixels @ x.T - means) / stds)
    return out


def _forward(
    batches: list[Tensor],
    boxes: Tensor,
    index: Tensor,
    height: int,
    width: int,
    cubic: bool,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    run: Any = reference_forward
    if backend != "reference":
        from mtedit_fast.ops import _cpp

        run = _cpp.crop_resize
    return run(batches, boxes, index, height, width, cubic, mean, std, dtype)


def _fake(batches: list[Tensor], boxes: Tensor, index: Tensor, height: int, width: int, *options: Any) -> Tensor:
    dtype = options[-2]
    return batches[0].new_empty((boxes.shape[0], batches[0].shape[1], height, width), dtype=dtype)


_op = Operator("crop_resize", _forward, _fake)
