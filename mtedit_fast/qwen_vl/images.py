"""Images as Qwen's vision towers take them: resized, normalised and cut into patches on the device they are on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtedit_fast.ops import crop_resize

__all__ = ["ImageSpec", "prepare_images"]

MAX_ASPECT = 200


@dataclass(frozen=True)
class ImageSpec:
    """How a model of the Qwen2-VL, Qwen2.5-VL or Qwen3-VL family wants its images. The defaults are Qwen3-VL's.

    patch_size: side of a patch in pixels. temporal_patch_size: frames in a patch; a still image is repeated.
    merge_size: a token stands for merge_size² patches. min_pixels, max_pixels: images are scaled to between these, with
    sides that are multiples of patch_size · merge_size. mean, std: of the channels, in units of [0, 1].
    """

    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 256 * 256
    max_pixels: int = 4096 * 4096
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in ("patch_size", "temporal_patch_size", "merge_size", "min_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.max_pixels < max(self.min_pixels, self.factor**2):
            raise ValueError(
                f"max_pixels must be at least min_pixels = {self.min_pixels} and one token of {self.factor} x "
                f"{self.factor} pixels, got {self.max_pixels}"
            )

    @classmethod
    def from_pretrained(cls, path: str, **options: Any) -> ImageSpec:
        """From the preprocessor_config.json of a folder or of a model on the Hub; `options` as `from_pretrained`'s of
        transformers. ValueError for an image processor of another family."""
        from transformers import Qwen2VLImageProcessorPil

        config, _ = Qwen2VLImageProcessorPil.get_image_processor_dict(path, **options)
        kind = str(config.get("image_processor_type", ""))
        if not kind.startswith("Qwen2VL"):  # the processor of all three families
            raise ValueError(f"{path}: expected the image processor Qwen2VLImageProcessor, got {kind or 'none'!r}")
        return cls.from_processor(Qwen2VLImageProcessorPil.from_dict(config))

    @classmethod
    def from_processor(cls, image_processor: Any) -> ImageSpec:
        """From an image processor of transformers that has Qwen2VLImageProcessor's attributes."""
        processor = getattr(image_processor, "image_processor", image_processor)
        missing = [n for n in ("patch_size", "temporal_patch_size", "merge_size", "size") if not hasattr(processor, n)]
        if missing:
            name = type(image_processor).__name__
            raise ValueError(f"image_processor: expected one of the Qwen2-VL kind, got {name} without {missing}")
        return cls(
            patch_size=processor.patch_size,
            temporal_patch_size=processor.temporal_patch_size,
            merge_size=processor.merge_size,
            min_pixels=processor.size["shortest_edge"],
            max_pixels=processor.size["longest_edge"],
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
        )

    @property
    def factor(self) -> int:
        """Side of a token in pixels."""
        return self.patch_size * self.merge_size

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image is resized to: Qwen2-VL's rule, which keeps the aspect as far as whole tokens
        allow. ValueError for an image without pixels, or a side more than 200 times the other."""
        short, long = sorted((height, width))
        if short < 1 or long > MAX_ASPECT * short:
            raise ValueError(f"images must have sides in a ratio of at most {MAX_ASPECT}, got {height} x {width}")
        unit = self.factor
        rows, columns = round(height / unit), round(width / unit)
        if rows * columns * unit**2 > self.max_pixels:
            scale = math.sqrt(height * width / self.max_pixels)
            rows = max(1, math.floor(height / scale / unit))
            columns = max(1, math.floor(width / scale / unit))
        elif rows * columns * unit**2 < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (height * width))
            rows, columns = math.ceil(height * scale / unit), math.ceil(width * scale / unit)
        return rows * unit, columns * unit

    def grid(self, height: int, width: int) -> tuple[int, int, int]:
        """(frames, rows, columns) of patches of an image: its row of image_grid_thw."""
        resized = self.size(height, width)
        return 1, resized[0] // self.patch_size, resized[1] // self.patch_size

    def tokens(self, height: int, width: int) -> int:
        """Tokens an image takes in the language model, after merging."""
        _, rows, columns = self.grid(height, width)
        return rows * columns // self.merge_size**2


@torch.no_grad()
def prepare_images(
    images: Tensor | Sequence[Tensor],
    spec: ImageSpec,
    *,
    quantize: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """(pixel_values, image_grid_thw) of images, on their device, without a detour over PIL or the host.

    The resize is `ops.crop_resize`, PIL's bicubic filter without the rounding of its 8-bit images. So a resized image
    differs from transformers' Qwen2VLImageProcessorPil by what PIL rounds and clips: as a rule up to one level of 255,
    more at edges as sharp as those of noise. An image that needs no resize agrees exactly.

    Args:
        images: [N, 3, H, W], or a sequence of [3, H, W] that may differ in size: floats in [0, 1], or uint8.
        spec: the model's `ImageSpec`.
        quantize: round to 8 bits before and after the resize, as a PNG and PIL do; what is left is PIL's rounding
            between rows and columns. For parity with a judge that is sent files.
        dtype: of the patches.

    Returns:
        patches: [n, 3 · temporal_patch_size · patch_size²], the images after each other, on images' device. Their
            order is the model's, merge_size² neighbours together.
        grid_thw: [N, 3] int64, frames, rows and columns of patches of every image, on images' device.

    Raises:
        TypeError, ValueError: as `ops.crop_resize` raises them, and sizes that `ImageSpec.size` refuses.
    """
    sizes = [tuple(image.shape[-2:]) for image in images]
    resized = [spec.size(*size) for size in sizes]
    device = images.device if isinstance(images, Tensor) else (images[0].device if images else torch.device("cpu"))
    grid = torch.tensor([spec.grid(*size) for size in sizes], dtype=torch.int64).view(-1, 3).to(device)
    if not resized:
        return torch.empty(0, 3 * spec.temporal_patch_size * spec.patch_size**2, dtype=dtype, device=device), grid
    if isinstance(images, Tensor) or len(set(resized)) == 1:
        return _patches(_resize(images, resized[0], spec, quantize, dtype), spec).flatten(0, 1), grid
    patches: list[Tensor] = [torch.empty(0)] * len(resized)
    for size in dict.fromkeys(resized):
        index = [i for i, other in enumerate(resized) if other == size]
        batch = _patches(_resize([images[i] for i in index], size, spec, quantize, dtype), spec)
        for i, own in zip(index, batch, strict=True):
            patches[i] = own
    return torch.cat(patches), grid


def _resize(
    images: Tensor | Sequence[Tensor], size: tuple[int, int], spec: ImageSpec, quantize: bool, dtype: torch.dtype
) -> Tensor:
    """[N, 3, *size], normalised."""
    boxes = torch.tensor([[0, 0, *image.shape[:-3:-1]] for image in images])
    index = torch.arange(len(boxes))
    if not quantize:
        return crop_resize(images, boxes, size, image_index=index, mean=spec.mean, std=spec.std, dtype=dtype)
    images = _levels(images) if isinstance(images, Tensor) else [_levels(image) for image in images]
    pixels = (crop_resize(images, boxes, size, image_index=index) * 255).round_().clamp_(0, 255).div_(255)
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (spec.mean, spec.std))
    return ((pixels - mean) / std).to(dtype)


def _levels(image: Tensor) -> Tensor:
    """Pixels as the 256 levels of a PNG, in fp32: NaN, which uint8 cannot hold, stays NaN."""
    return image if image.dtype == torch.uint8 else (image.float() * 255).round().clamp(0, 255) / 255


def _patches(images: Tensor, spec: ImageSpec) -> Tensor:
    """[N, rows · columns, 3 · t · p · p] of [N, 3, H, W], merge_size² neighbours after each other."""
    n, channels, height, width = images.shape
    m, p, t = spec.merge_size, spec.patch_size, spec.temporal_patch_size
    blocks = images.view(n, channels, height // (m * p), m, p, width // (m * p), m, p)
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)  # N, block rows, block columns, m, m, C, p, p
    frames = blocks[:, :, :, :, :, :, None].expand(*blocks.shape[:6], t, p, p)
    return frames.reshape(n, -1, channels * t * p * p)
