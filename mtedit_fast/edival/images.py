"""Images of edited chains, from files of any mode and size.

A folder holds, for every chain, the image it starts from and the image after every turn:

    {image_index}_{turn}.png            turn 0 … K; 0 is the start
    {image_index}_input_raw.png         the public benchmark's names: the start
    {image_index}_input_raw_turn_{t}.png    and turns 1 … K

with any of the suffixes .png, .jpg, .jpeg, .webp.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_NAME = re.compile(r"(.+)_input_raw(?:_turn_(\d+))?|(.+)_(\d+)")


class UnreadableImage(ValueError):
    """A file that is missing or cannot be read; its message names the file and the reason."""


def load_image(path: str | Path, size: int | None = None) -> Tensor:
    """An image file as fp32 [3, H, W] in [0, 1], a multiple of 1/255.

    Any mode: grey and CMYK become RGB, 16 bits are rounded to 8, transparency is laid over white, EXIF rotation is
    applied. size: Lanczos to size × size pixels, whatever the aspect, as EdiVal does; None leaves the image as it is.
    Raises UnreadableImage where the file is missing, truncated or no image.
    """
    try:
        with Image.open(path) as file:
            image = _rgb(ImageOps.exif_transpose(file))
    except FileNotFoundError:
        raise UnreadableImage(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{path}: {error}") from error
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def save_image(image: Tensor, path: str | Path) -> None:
    """Write an image [3, H, W] in [0, 1], rounded to 8 bit; the suffix of `path` chooses the format."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(path)


def start_images(folder: str | Path) -> dict[str, Path]:
    """{image_index: file} of the images that chains start from: `{image_index}_0` and `{image_index}_input_raw` where
    the folder has such names, else every image under its own name. Raises ValueError where there is none."""
    files = _images(Path(folder))
    if not files:
        raise ValueError(f"images: no {', '.join(SUFFIXES)} in {folder}")
    named = [(match, path) for path in files if (match := _NAME.fullmatch(path.stem))]
    starts = {match[1] or match[3]: path for match, path in named if int(match[2] or match[4] or 0) == 0}
    return starts or {path.stem: path for path in files}


class ImageFolder(Mapping[str, Tensor]):
    """Chains of a folder: `folder[image_index]` is fp32 [K + 1, 3, H, W], the start and every turn there is.

    Turns are read from 1 on for as long as their files follow one another. size: see `load_image`; without it the
    images of a chain must be of one size. Raises ValueError where the folder is missing or holds no image named as
    this module's docstring says; UnreadableImage, a ValueError, on a chain that cannot be read.
    """

    def __init__(self, folder: str | Path, *, size: int | None = 512) -> None:
        self.folder, self.size = Path(folder), size
        if not self.folder.is_dir():
            raise ValueError(f"images: no folder {self.folder}; expected files {{image_index}}_{{turn}}.png, 0 first")
        self.files: dict[str, dict[int, Path]] = {}
        # of one name with several suffixes the first of SUFFIXES counts
        for path in sorted(_images(self.folder), key=lambda p: -SUFFIXES.index(p.suffix.lower())):
            if name := _NAME.fullmatch(path.stem):
                self.files.setdefault(name[1] or name[3], {})[int(name[2] or name[4] or 0)] = path
        if not self.files:
            raise ValueError(f"images: nothing in {self.folder} is named {{image_index}}_{{turn}}.png, e.g. 17_0.png")

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.files))

    def __getitem__(self, index: str) -> Tensor:
        turns = self.files[index]
        if 0 not in turns:
            raise UnreadableImage(f"{self.folder / f'{index}_0.png'}: no such file, the image the chain starts from")
        images = [load_image(turns[0], self.size)]
        while (path := turns.get(len(images))) is not None:
            images.append(load_image(path, self.size))
            if images[-1].shape != images[0].shape:
                sizes = ["×".join(map(str, image.shape[1:])) for image in (images[0], images[-1])]
                raise UnreadableImage(f"{path}: {sizes[1]} pixels, the chain starts with {sizes[0]}; give a size")
        return torch.stack(images)


def _images(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*")) if path.suffix.lower() in SUFFIXES]


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, in PIL's I;16 or I
        values = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray((np.asarray(image) * 255).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
