"""crop_resize against PIL, F.interpolate(antialias=True) and kornia, each a crop at a time as people write it.

python benchmarks/bench_crop_resize.py                      appends to benchmarks/results/crop_resize.csv
pytest benchmarks/bench_crop_resize.py --benchmark-only     the same calls under pytest-benchmark (make bench)

Every implementation turns the same boxes into one normalised fp32 batch on the device. `interpolate` is torchvision's
resize of float tensors and has our definition; `interpolate_u8` resizes bytes, and `pil` 8-bit images that are ready
beforehand: they round and clip between their passes. kornia's antialiasing is another one, a blur before the resize.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import harness
import numpy as np
import pytest
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
        """Images like pictures, coarse structure and a little noise; `generator` is the CPU's."""
        n, side, _ = self.shape
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
class Row(harness.Measured):
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


IMPLEMENTATIONS = {
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


def bench(case: Case, copy_gb_per_s: float, *, min_seconds: float) -> Row:
    """Measures ours and its peers on the same inputs.

    Raises:
        RuntimeError: an implementation's results are not what they should be, so that its time means nothing.
    """
    generator = torch.Generator().manual_seed(0)
    first = case.inputs(generator)
    moved, flops = case.work(first)
    sets = [first, *(case.inputs(generator) for _ in range(min(harness.rotations(moved, case.device), 8) - 1))]
    truth = true_crops(case, first)
    calls: dict[str, list[harness.Call]] = {}
    errors: dict[str, float] = {}
    for name in implementations(case):
        run = IMPLEMENTATIONS[name](case)
        errors[name] = error(name, run(first), truth)
        if not errors[name] <= 1:
            raise RuntimeError(f"{name} {case}: {errors[name]:.3g} times the error that is allowed: no row")
        calls[name] = [partial(run, x) for x in sets]
    times = harness.measure(calls, case.device, min_seconds=min_seconds)
    own = times.pop("ours")
    medians = {name: timing.median for name, timing in times.items()}
    gb_per_s = moved / own.median / 1e3
    return Row(
        **identity(case),
        median_us=own.median,
        p20_us=own.p20,
        p80_us=own.p80,
        bytes=moved,
        flops=flops,
        gb_per_s=round(gb_per_s, 3),
        gflop_per_s=round(flops / own.median / 1e3, 3),
        copy_gb_per_s=round(copy_gb_per_s, 3),
        percent_of_copy=round(100 * gb_per_s / copy_gb_per_s, 1),
        pil_us=medians["pil"],
        interpolate_us=medians["interpolate"],
        interpolate_u8_us=medians.get("interpolate_u8"),
        kornia_us=medians.get("kornia"),
        speedup_pil=round(medians["pil"] / own.median, 2),
        speedup_interpolate=round(medians["interpolate"] / own.median, 2),
        speedup_best=round(min(medians.values()) / own.median, 2),
        error=round(errors["ours"], 4),
    )


def identity(case: Case) -> dict:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return harness.environment(case.device) | {
        "op": "crop_resize",
        "variant": case.variant,
        "shape": "x".join(map(str, case.shape)),
        "dtype": names[case.dtype],
        "backend": choose_backend("auto", case.device, (torch.float32,), offered=("cpp", "cuda")),
        "timing": "stream" if case.device.type == "cuda" else "call",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "crop_resize.csv")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", action="append", help="crops x image side x crop side, 32x512x224; may be repeated")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="of the images (default: both)")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="default: both")
    parser.add_argument("--min-seconds", type=float, default=0.5, help="per implementation and row")
    args = parser.parse_args(arguments)
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device)
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shape or []] or SHAPES[device.type]
    dtypes = [DTYPES[name] for name in args.dtype or DTYPES]
    cases = [
        Case(variant, *rest, device) for variant, *rest in itertools.product(args.variant or VARIANTS, shapes, dtypes)
    ]
    done = set(harness.measured(args.out))
    left = [case for case in cases if harness.identity(identity(case)) not in done]
    if not left:
        print(f"{args.out} holds all {len(cases)} rows of this commit already")
        return
    copy = harness.copy_bandwidth(device, min_seconds=args.min_seconds)
    print(
        f"{harness.device_name(device)}: copy {copy:.1f} GB/s read + written; kornia: "
        f"{'installed' if kornia_resize else 'not installed'}"
    )
    for case in left:
        row = bench(case, copy, min_seconds=args.min_seconds)
        harness.append(args.out, row)
        each = row.median_us / case.shape[0]
        print(
            f"{row.variant:9}{row.shape:12}{row.dtype:5}{row.backend:10}{each:9.1f} µs a crop, "
            f"{row.gb_per_s:.1f} GB/s; PIL {row.speedup_pil}x, interpolate {row.speedup_interpolate}x, "
            f"best {row.speedup_best}x",
            flush=True,
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_crop_resize(benchmark, variant: str, dtype: str, implementation: str) -> None:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    case = Case(variant, (16, 512, 224), DTYPES[dtype], device)
    if implementation not in implementations(case):
        pytest.skip(f"{implementation} does not take this case, or is not installed")
    x = case.inputs(torch.Generator().manual_seed(0))
    run = IMPLEMENTATIONS[implementation](case)
    assert error(implementation, run(x), true_crops(case, x)) <= 1

    def call() -> None:
        run(x)
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"crop_resize {variant} {dtype}"
    benchmark(call)


if __name__ == "__main__":
    main()
