"""crop_resize against PIL, F.interpolate(antialias=True) and kornia, each a crop at a time as people write it.

mtedit-fast bench crop_resize                      appends to benchmarks/results/crop_resize.csv
pytest benchmarks/bench_crop_resize.py --benchmark-only     the same calls under pytest-benchmark (make bench)

Every implementation turns the same boxes into one normalised fp32 batch on the device. `interpolate` is torchvision's
resize of float tensors and has our definition; `interpolate_u8` resizes bytes, and `pil` 8-bit images that are ready
beforehand: they round and clip between their passes. kornia's antialiasing is another one, a blur before the resize.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import op_bench
import record
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from mtedit_fast.ops import crop_resize
from mtedit_fast.ops._backend import choose_backend

try:
    from kornia.geometry.transform import resize as kornia_resize
except ImportError:
    kornia_resize = None

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = 8
SIDES = (8, 400)  # of a box, as far as its image allows
VARIANTS = ("bicubic", "bilinear")
DTYPES = {"u8": torch.uint8, "fp32": torch.float32}
# crops, side of an image, side of a crop
SHAPES = {"cpu": ((32, 64, 224), (32, 256, 224), (32, 512, 256)), "cuda": ((256, 512, 224), (256, 1024, 256))}


class Inputs(NamedTuple):
    images: Tensor  # [IMAGES, 3, S, S] of the case's dtype
    boxes: Tensor  # [n, 4] whole pixels
    index: Tensor  # [n]
    pil: list[Image.Image]
    crops: list[tuple[int, list[int]]]  # index and box, for those who take a crop at a time


@dataclass(frozen=True)
class Case:
    variant: str
    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device

    def inputs(self, generator: torch.Generator) -> Inputs:
        """Images like pictures, coarse structure and a little noise, made on the CPU."""
        n, side, _ = self.shape
        seed = torch.randint(2**31, (1,), generator=generator, device=generator.device)
        generator = torch.Generator().manual_seed(int(seed))
        coarse = torch.rand(IMAGES, 3, max(side // 16, 2), max(side // 16, 2), generator=generator)
        images = interpolate(coarse, (side, side), mode="bicubic")
        images = (255 * (images + 0.02 * torch.randn(images.shape, generator=generator))).clamp(0, 255).to(torch.uint8)
        low, high = SIDES[0], min(SIDES[1], side)
        sides = low + (high - low) * torch.rand(n, 2, generator=generator)
        corner = (side - sides) * torch.rand(n, 2, generator=generator)
        boxes = torch.cat([corner, corner + sides], 1).round().int()
        index = torch.arange(n) % IMAGES
        source = images if self.dtype == torch.uint8 else images.to(self.dtype) / 255
        pil = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images]
        crops = list(zip(index.tolist(), boxes.tolist(), strict=True))
        return Inputs(source.to(self.device), boxes.to(self.device), index.to(self.device), pil, crops)

    @cached_property
    def _work(self) -> tuple[int, int]:
        return self.work(self.inputs(torch.Generator().manual_seed(0)))

    @property
    def bytes(self) -> int:
        return self._work[0]

    @property
    def flops(self) -> int:
        return self._work[1]

    def work(self, x: Inputs) -> tuple[int, int]:
        """Bytes that no implementation can avoid (a box's pixels read, its crop written in fp32), and the two passes'
        multiplications and additions, with 2 (bilinear) or 4 (bicubic) taps per step or per pixel."""
        out, taps = self.shape[2], 4 if self.variant == "bicubic" else 2
        moved, flops = 0, 0.0
        for _, (x0, y0, x1, y1) in x.crops:
            width, height = x1 - x0, y1 - y0
            moved += 3 * (width * height * self.dtype.itemsize + out * out * 4)
            rows, columns = (taps * max(size / out, 1) for size in (height, width))
            flops += 3 * 2 * (out * width * rows + out * out * columns)
        return moved, round(flops)


@dataclass(frozen=True)
class Row(record.Measured):
    """One line of crop_resize.csv; an empty peer was not measured or not installed."""

    pil_us: float
    interpolate_us: float
    interpolate_u8_us: float | None
    kornia_us: float | None
    speedup_pil: float
    speedup_interpolate: float
    speedup_best: float
    error: float
    """Largest error against fp64, as a fraction of 2e-4 of an 8-bit level."""


def per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)[:, None, None]


def ours(case: Case) -> Callable[[Inputs], Tensor]:
    options = {"filter": case.variant, "mean": MEAN, "std": STD}
    return lambda x: crop_resize(x.images, x.boxes, case.shape[2], image_index=x.index, **options)


def by_pil(case: Case) -> Callable[[Inputs], Tensor]:
    size, filter = (case.shape[2],) * 2, Image.Resampling[case.variant.upper()]
    mean, std = (per_channel(values, case.device) for values in (MEAN, STD))

    def run(x: Inputs) -> Tensor:
        crops = [np.asarray(x.pil[i].crop(tuple(box)).resize(size, filter)) for i, box in x.crops]
        batch = torch.from_numpy(np.stack(crops)).to(case.device).permute(0, 3, 1, 2)
        return batch.float().div_(255).sub_(mean).div_(std)

    return run


def by_tensor(case: Case, resize: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Callable[[Inputs], Tensor]:
    """Crops of `dtype` (bytes are scaled after the resize, floats before it), normalised as one batch."""
    mean, std = (per_channel(values, case.device) for values in (MEAN, STD))

    def run(x: Inputs) -> Tensor:
        crops = []
        for i, (x0, y0, x1, y1) in x.crops:
            crop = x.images[i : i + 1, :, y0:y1, x0:x1]
            crops.append(resize(crop.to(dtype).div_(255) if crop.dtype != dtype else crop))
        batch = torch.cat(crops)
        batch = batch.float().div_(255) if dtype == torch.uint8 else batch
        return batch.sub_(mean).div_(std)

    return run


def by_interpolate(case: Case, dtype: torch.dtype = torch.float32) -> Callable[[Inputs], Tensor]:
    size = (case.shape[2],) * 2
    return by_tensor(case, partial(interpolate, size=size, mode=case.variant, antialias=True), dtype)


def by_kornia(case: Case) -> Callable[[Inputs], Tensor]:
    options = {"interpolation": case.variant, "antialias": True}
    return by_tensor(case, lambda crop: kornia_resize(crop, (case.shape[2],) * 2, **options), torch.float32)


IMPLEMENTATIONS: dict[str, Callable[[Case], Callable[[Inputs], Tensor]]] = {
    "ours": ours,
    "pil": by_pil,
    "interpolate": by_interpolate,
    "interpolate_u8": partial(by_interpolate, dtype=torch.uint8),
    "kornia": by_kornia,
}
# Largest error in 8-bit levels: ours 1e-4 for the resize and as much for the normalisation; PyTorch's in fp32 a tenth.
# Mean error for 8-bit results and for kornia's other filter, where single pixels say little.
LARGEST = {"ours": 2e-4, "interpolate": 0.1}
MEANS = {"pil": 1.0, "interpolate_u8": 1.0, "kornia": 8.0}


def implementations(case: Case) -> list[str]:
    absent = {"interpolate_u8"} if case.dtype != torch.uint8 or case.device.type != "cpu" else set()
    return [name for name in IMPLEMENTATIONS if name not in absent and (name != "kornia" or kornia_resize)]


def error(name: str, result: Tensor, truth: Tensor) -> float:
    """As a fraction of what is allowed."""
    levels = (result.double() - truth).abs() * 255 * per_channel(STD, result.device)
    found = levels.max() / LARGEST[name] if name in LARGEST else levels.mean() / MEANS[name]
    return math.inf if found.isnan() else found.item()


def true_crops(case: Case, x: Inputs) -> Tensor:
    options = {"filter": case.variant, "mean": MEAN, "std": STD, "dtype": torch.float64, "backend": "reference"}
    return crop_resize(x.images, x.boxes, case.shape[2], image_index=x.index, **options)


def checker(case: Case, x: Inputs) -> op_bench.Checker:
    truth = true_crops(case, x)
    return lambda name, result: error(name, result, truth)


BENCH = op_bench.OpBench(
    __doc__,
    "crop_resize",
    Case,
    IMPLEMENTATIONS,
    checker,
    VARIANTS,
    SHAPES,
    small=(16, 512, 224),
    backend=lambda case: choose_backend("auto", case.device, (torch.float32,), offered=("cpp", "cuda")),
    able=implementations,
    captured=lambda variant: False,
    row=Row,
    dtypes=DTYPES,
)

bench, main, test_crop_resize = BENCH.bench, BENCH.main, BENCH.speed_test()

if __name__ == "__main__":
    main()
