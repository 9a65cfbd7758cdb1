"""Corrupted training images: read, corrupted once and for all, and drawn in an order that depends on the step alone."""

from __future__ import annotations

import warnings
from copy import copy
from enum import IntEnum
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mtedit_fast.onestep import Corruption, Operator, estimate_noise, image_seeds
from mtedit_fast.training.onestep.config import DataConfig

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Part(IntEnum):
    """Who draws: seeds of different parts of a run are never the same."""

    DATA = 0
    TEACHER = 1
    FAKE = 2
    GENERATOR = 3
    MASKS = 4
    EVALUATION = 5


def part_seed(seed: int, part: Part) -> int:
    """The `image_seeds` run of one part of run `seed`."""
    return 8 * seed + part


class CorruptedImages:
    """Measurements of images, of which nothing else is kept for training.

    Args:
        images: [N, C, H, W], uint8 or float in [-1, 1] (two channels: complex); measurements if `measured`.
        corruption: applied when an image is drawn, with its own seed: always the same measurement.
        seed: of the corruption.

    Warns where the images' noise contradicts σ_n.
    """

    def __init__(self, images: Tensor, corruption: Corruption, seed: int = 0, *, measured: bool = False) -> None:
        if images.ndim != 4 or not len(images):
            raise ValueError(f"images: expected [N, C, H, W] with N ≥ 1, got {list(images.shape)}")
        self.images, self.corruption, self.seed, self.measured = (
            images,
            corruption,
            part_seed(seed, Part.DATA),
            measured,
        )
        self.device = torch.device("cpu")
        self._epoch: tuple[tuple[int, int], Tensor] | None = None
        if measured and corruption.sigma:
            self._check_noise()
        self[torch.arange(1)]  # an operator that does not fit says so now

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Operator]:
        """Measurements of images `indices` [B] and their operator, on `device`."""
        x = self.clean(indices)
        if self.measured:
            return x, Operator()
        return self.corruption(x, image_seeds(self.seed, indices).to(self.device))

    def on(self, device: torch.device) -> CorruptedImages:
        """The same, corrupted on `device`; the images stay where they are."""
        other = copy(self)
        other.device = device
        return other

    @property
    def measured_shape(self) -> tuple[int, int, int]:
        """Of what a teacher draws: the measurements' own, but with masks an image's."""
        if self.corruption.random:
            return self.shape
        channels, height, width = self[torch.arange(1)][0].shape[1:]
        return channels, height, width

    def clean(self, indices: Tensor) -> Tensor:
        """The images themselves, fp32 in [-1, 1]; for evaluation."""
        x = self.images[indices].to(self.device)
        return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x.float()

    def order(self, start: int, count: int, seed: int) -> Tensor:
        """Images `start` … of an endless sequence of epochs, each a permutation that depends on (seed, epoch)."""
        parts = []
        while count:
            epoch, offset = divmod(start, len(self))
            if self._epoch is None or self._epoch[0] != (seed, epoch):
                generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
                self._epoch = (seed, epoch), torch.randperm(len(self), generator=generator)
            part = self._epoch[1][offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def _check_noise(self) -> None:
        some = self.clean(torch.arange(min(len(self), 256)))
        found, stated = estimate_noise(some), self.corruption.sigma
        if not 0.75 * stated <= found <= 1.5 * stated + 0.02:
            warnings.warn(
                f"corruption.sigma: {stated:g}, but the images' noise is estimated at {found:.3g}; give the noise they "
                "have (a blur makes it smaller, textures larger)",
                stacklevel=3,
            )


def load_data(config: DataConfig, corruption: Corruption) -> CorruptedImages:
    """What a configuration's `data` names."""
    return CorruptedImages(read_images(config), corruption, config.seed, measured=config.measured)


def read_images(config: DataConfig) -> Tensor:
    """[N, C, H, W], uint8 or float. ValueError names what is missing, empty or of several sizes."""
    path = Path(config.path)
    if path.is_dir():
        return read_folder(path, config.count)
    if path.suffix in (".npy", ".npz") and path.is_file():
        return _read_array(path)[: config.count]
    module, separator, name = config.path.partition(":")
    if not separator:
        raise ValueError(f"data.path: expected a folder, .npy, .npz or module:function, got {config.path!r}")
    if config.count is None:
        raise ValueError(f"data.count: expected how many images {config.path} is to make, got null")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"data.path: {config.path} cannot be imported: {error}") from error
    return function(config.count, config.seed)


def read_folder(folder: Path, count: int | None = None) -> Tensor:
    """All images of a folder and those below, uint8 [N, 3, H, W], in the order of their names.

    Files that cannot be read are left out, with a warning that counts and names them.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    images: list[Tensor] = []
    first, unreadable = "", []
    for file in files:
        if len(images) == count:
            break
        try:
            with Image.open(file) as opened:
                image = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            unreadable.append(f"{file.name} ({type(error).__name__})")
            continue
        if images and image.shape != images[0].shape:
            raise ValueError(
                f"{folder}: expected images of one size, got {_size(images[0])} ({first}) and {_size(image)} "
                f"({file.name}); crop or resize them"
            )
        first = first or file.name
        images.append(image)
    if unreadable:
        shown = ", ".join(unreadable[:8]) + (" …" if len(unreadable) > 8 else "")
        warnings.warn(f"{folder}: {len(unreadable)} of {len(files)} images unreadable, left out: {shown}", stacklevel=2)
    if not images:
        raise ValueError(f"{folder}: no readable images ({', '.join(SUFFIXES)}) in it, {len(files)} files of that kind")
    return torch.stack(images)


def _size(image: Tensor) -> str:
    return f"{image.shape[2]}×{image.shape[1]}"


def _read_array(path: Path) -> Tensor:
    try:
        loaded = np.load(path, allow_pickle=False)
        array = loaded[loaded.files[0]] if isinstance(loaded, np.lib.npyio.NpzFile) else loaded
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if array.ndim == 4 and array.dtype == np.uint8:
        return torch.from_numpy(array).permute(0, 3, 1, 2)
    if array.ndim == 4 and array.dtype.kind == "f":
        return torch.from_numpy(array).float()
    raise ValueError(
        f"{path}: expected uint8 [N, H, W, C] or float [N, C, H, W], got {array.dtype} {list(array.shape)}"
    )
