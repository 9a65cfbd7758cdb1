"""Corruptions y = A x + σ_n ε by name: families of operators whose masks are drawn per image from its own seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtedit_fast.onestep.operators import (
    Blur,
    Composition,
    Inpainting,
    MultiCoilMRI,
    Operator,
    PartialFourier,
    SuperResolution,
)
from mtedit_fast.ops import seeded_noise


class Stream(IntEnum):
    """What an image's random numbers are for: counter steps of `seeded_noise`, so that none is used twice."""

    LATENT = 0
    MASK = 1
    FURTHER_MASK = 2
    MEASUREMENT = 3
    LEVEL = 4
    DIFFUSION = 5
    CHURN = 16
    """of the stochastic sampler's first step; the others follow"""


def image_seeds(seed: int, indices: Tensor) -> Tensor:
    """The seeds [B] int64 of images `indices` [B] int64 in [0, 2³²) of run `seed` in [0, 2³¹): distinct for all."""
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed: expected 0 <= seed < 2**31, got {seed}")
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < 2**32:
        raise ValueError(f"indices: expected 0 … 2**32 - 1, got {int(indices.min())} … {int(indices.max())}")
    return (seed << 32) + indices.to(torch.int64)


class Family:
    """Operators of one kind. Fixed ones are their own only member."""

    random = False
    """whether members differ from image to image, in a mask that the network is to see"""
    hides_pixels = False
    """whether that mask is of pixels"""

    def draw(self, seed: Tensor, size: tuple[int, int]) -> Operator:
        """The operator of the images with seeds [B], for height and width `size`, on seed's device."""
        return Operator()

    def further(self, operator: Operator, seed: Tensor, delta: float | None) -> Operator:
        """`operator` with less of each image measured, so that what it hides is known in part (Ambient diffusion)."""
        raise ValueError(f"{type(self).__name__} has no masks to corrupt further")


FAMILIES: dict[str, Callable[..., Family]] = {}


def register(name: str) -> Callable[[type[Family]], type[Family]]:
    """Class decorator: make a family known to `Corruption` and configurations as `name`; its options are keywords."""

    def add(family: type[Family]) -> type[Family]:
        if name in FAMILIES:
            raise ValueError(f"name: {name!r} is registered already, for {FAMILIES[name]}")
        FAMILIES[name] = family
        return family

    return add


register("noise")(Family)


@register("inpainting")
class RandomInpainting(Family):
    """Every pixel is missing with probability `missing`, in all channels."""

    random = hides_pixels = True

    def __init__(self, missing: float = 0.6) -> None:
        if not 0 <= missing < 1:
            raise ValueError(f"missing: expected 0 <= missing < 1, got {missing}; at 1 nothing is measured")
        self.missing = missing

    def draw(self, seed: Tensor, size: tuple[int, int]) -> Inpainting:
        return Inpainting(_bernoulli(seed, size, self.missing, Stream.MASK))

    def further(self, operator: Operator, seed: Tensor, delta: float | None = None) -> Inpainting:
        """delta: probability with which a measured pixel is hidden, too; 0.1 if None."""
        delta = 0.1 if delta is None else delta
        if not 0 <= delta < 1:
            raise ValueError(f"delta: expected 0 <= delta < 1, got {delta}")
        assert operator.mask is not None
        kept = _bernoulli(seed, (operator.mask.shape[2], operator.mask.shape[3]), delta, Stream.FURTHER_MASK)
        return Inpainting(operator.mask * kept)


@register("box")
class BoxInpainting(RandomInpainting):
    """A square is missing, `share` of the shorter side long and anywhere in the image."""

    def __init__(self, share: float = 0.5) -> None:
        if not 0 < share < 1:
            raise ValueError(f"share: expected 0 < share < 1 of the shorter side, got {share}")
        self.share = share

    def draw(self, seed: Tensor, size: tuple[int, int]) -> Inpainting:
        side = max(1, round(self.share * min(size)))
        place = torch.special.ndtr(seeded_noise(seed, (2,), Stream.MASK))  # uniform in (0, 1)
        inside = []
        for axis, length in enumerate(size):
            first = (place[:, axis] * (length - side + 1)).long()[:, None]
            at = torch.arange(length, device=seed.device)
            inside.append((at >= first) & (at < first + side))
        return Inpainting(1 - (inside[0][:, None, :, None] & inside[1][:, None, None, :]).float())


@register("blur")
class FixedBlur(Family):
    def __init__(self, taps: int = 9, std: float = 2.0) -> None:
        self.operator = Blur(taps, std)

    def draw(self, seed: Tensor, size: tuple[int, int]) -> Blur:
        return self.operator


@register("super_resolution")
class FixedSuperResolution(Family):
    """Means of factor × factor blocks, by default repeated to the image's size so that one network serves both."""

    def __init__(self, factor: int = 2, keep_size: bool = True) -> None:
        self.operator = SuperResolution(factor, keep_size=keep_size)

    def draw(self, seed: Tensor, size: tuple[int, int]) -> SuperResolution:
        return self.operator


class CartesianLines(Family):
    """Families that measure some lines (columns) of k-space, chosen at random for each image.

    Args:
        acceleration: R; W / R of the W lines are measured.
        centre: share of the lines, around frequency 0, that is always measured.
    """

    random = True

    def __init__(self, acceleration: float = 4, centre: float = 0.08) -> None:
        if acceleration < 1:
            raise ValueError(f"acceleration: expected ≥ 1, got {acceleration}")
        if not 0 <= centre <= 1 / acceleration:
            raise ValueError(f"centre: expected 0 <= centre <= 1 / acceleration ({1 / acceleration:.3g}), got {centre}")
        self.acceleration, self.centre = acceleration, centre

    def further(self, operator: Operator, seed: Tensor, delta: float | None = None) -> Operator:
        """delta: the acceleration that is left; R + 1 if None."""
        delta = self.acceleration + 1 if delta is None else delta
        if delta < self.acceleration:
            raise ValueError(f"delta: expected at least the acceleration {self.acceleration:g}, got {delta}")
        assert operator.mask is not None
        return self.with_lines(operator, self.lines(operator.mask, seed, delta, Stream.FURTHER_MASK))

    def with_lines(self, operator: Operator, mask: Tensor) -> Operator:
        """`operator` with another mask."""
        raise NotImplementedError

    def first_lines(self, seed: Tensor, width: int) -> Tensor:
        """The mask [B, 1, 1, W] of the images with seeds [B]."""
        everything = torch.ones(len(seed), 1, 1, width, device=seed.device)
        return self.lines(everything, seed, self.acceleration, Stream.MASK)

    def lines(self, allowed: Tensor, seed: Tensor, acceleration: float, stream: Stream) -> Tensor:
        """[B, 1, 1, W] with W / acceleration of the allowed lines: the central ones, and others by lot."""
        width = allowed.shape[3]
        count, centre = max(1, round(width / acceleration)), round(width * self.centre)
        score = seeded_noise(seed, (width,), stream)
        start = width // 2 - centre // 2  # frequency 0 is at width // 2
        score[:, start : start + centre] = torch.inf
        score = score.masked_fill(allowed[:, 0, 0] == 0, -torch.inf)
        chosen = score.topk(max(count, min(centre, width)), dim=1).indices
        return torch.zeros_like(score).scatter_(1, chosen, 1.0)[:, None, None] * allowed


@register("compressed_sensing")
class CompressedSensing(CartesianLines):
    """One coil's k-space of real images, of which W / acceleration lines are measured."""

    def draw(self, seed: Tensor, size: tuple[int, int]) -> PartialFourier:
        return PartialFourier(self.first_lines(seed, size[1]))

    def with_lines(self, operator: Operator, mask: Tensor) -> PartialFourier:
        return PartialFourier(mask)


@register("mri")
class CartesianMRI(CartesianLines):
    """Multi-coil MRI with the same coils for all images.

    Args:
        acceleration, centre: of the lines, as in `CartesianLines`.
        coils: number of synthetic coils (`synthetic_maps`), where there are no maps.
        maps: .npy file of complex [coils, H, W], or such a tensor.
    """

    def __init__(
        self,
        acceleration: float = 4,
        centre: float = 0.08,
        coils: int = 4,
        maps: str | Tensor | None = None,
    ) -> None:
        super().__init__(acceleration, centre)
        if coils < 1:
            raise ValueError(f"coils: expected ≥ 1, got {coils}")
        self.coils = coils
        self.maps = _read_maps(maps) if isinstance(maps, str) else maps

    def draw(self, seed: Tensor, size: tuple[int, int]) -> MultiCoilMRI:
        maps = self.maps if self.maps is not None else synthetic_maps(self.coils, *size)
        return MultiCoilMRI(self.first_lines(seed, size[1]), maps.to(seed.device))

    def with_lines(self, operator: Operator, mask: Tensor) -> MultiCoilMRI:
        assert isinstance(operator, MultiCoilMRI)
        return MultiCoilMRI(mask, operator.maps)


def synthetic_maps(coils: int, height: int, width: int) -> Tensor:
    """Smooth complex sensitivities [coils, H, W] of coils around the field of view, with Σ|maps|² = 1 everywhere."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    angle = (2 * torch.pi * torch.arange(coils) / coils)[:, None, None]
    near = torch.exp(-0.5 * ((x - torch.cos(angle)).square() + (y - torch.sin(angle)).square()))
    maps = torch.polar(near, x * torch.sin(angle) - y * torch.cos(angle) + angle)
    return maps / maps.abs().square().sum(0).sqrt()


class Corruption:
    """y = A x + σ_n ε, with A drawn per image.

    Args:
        operators: families by name with their options, applied in order, such as [{"name": "blur", "std": 1.5}];
            `FAMILIES` has the names. Empty for noise alone.
        sigma: σ_n, in the images' units ([-1, 1]).

    Raises:
        ValueError: an unknown name or option, or one out of range.
    """

    def __init__(self, operators: Sequence[Mapping[str, Any]] = (), sigma: float = 0.0) -> None:
        if not 0 <= sigma < float("inf"):
            raise ValueError(f"sigma: expected a standard deviation ≥ 0, got {sigma}")
        self.described = [dict(item) for item in operators] or [{"name": "noise"}]
        self.sigma = sigma
        self.families = [_family(item) for item in self.described]
        self.random = any(family.random for family in self.families)
        """The network is conditioned on the mask."""
        self.hides_pixels = self.families[0].hides_pixels
        if self.random and len(self.families) > 1:
            raise ValueError(
                f"operators: expected a family with masks to stand alone, got {[i['name'] for i in self.described]}; "
                "compose such operators with `Composition`"
            )

    def operator(self, seed: Tensor, size: tuple[int, int]) -> Operator:
        """A of the images with seeds [B] int64."""
        members = [family.draw(seed, size) for family in self.families]
        return members[0] if len(members) == 1 else Composition(members)

    def further(self, operator: Operator, seed: Tensor, delta: float | None = None) -> Operator:
        return self.families[0].further(operator, seed, delta)

    def __call__(self, x: Tensor, seed: Tensor) -> tuple[Tensor, Operator]:
        """Measurements of images [B, C, H, W], and the operator. Image i's are a function of x[i] and seed[i] alone."""
        operator = self.operator(seed, (x.shape[2], x.shape[3]))
        return self.add_noise(operator(x), seed), operator

    def add_noise(self, y: Tensor, seed: Tensor) -> Tensor:
        if self.sigma == 0:
            return y
        return y + self.sigma * seeded_noise(seed, y.shape[1:], Stream.MEASUREMENT, dtype=y.dtype)

    def describe(self) -> dict[str, Any]:
        """For JSON; `Corruption(**described)` is the same corruption."""
        return {"operators": self.described, "sigma": self.sigma}

    def __str__(self) -> str:
        return f"{json.dumps(self.described)} with sigma {self.sigma:g}"


def estimate_noise(images: Tensor) -> float:
    """The standard deviation of white noise in images [N, C, H, W]: median |diagonal Haar detail| / 0.6745.

    Robust where most 2 × 2 blocks hold no diagonal structure (Donoho & Johnstone, "Ideal spatial adaptation by wavelet
    shrinkage", Biometrika 1994); textures raise it.
    """
    height, width = (side // 2 * 2 for side in images.shape[2:])
    a, b, c, d = (images[..., i:height:2, j:width:2].double() for i in (0, 1) for j in (0, 1))
    return ((a - b - c + d) / 2).abs().flatten().median().item() / NormalDist().inv_cdf(0.75)


def _family(item: Mapping[str, Any]) -> Family:
    options = dict(item)
    name = options.pop("name", None)
    if name not in FAMILIES:
        raise ValueError(f"operators: expected a name of {', '.join(FAMILIES)}, got {name!r}")
    try:
        return FAMILIES[name](**options)
    except TypeError as error:
        raise ValueError(f"operators: {name}: {error}") from None


def _bernoulli(seed: Tensor, size: tuple[int, int], missing: float, stream: Stream) -> Tensor:
    """[B, 1, H, W] of 0 with probability `missing` and 1."""
    if missing == 0:
        return torch.ones(len(seed), 1, *size, device=seed.device)
    return (seeded_noise(seed, (1, *size), stream) > NormalDist().inv_cdf(missing)).float()


def _read_maps(path: str) -> Tensor:
    if not Path(path).is_file():
        raise ValueError(f"maps: no file {path}; expected .npy of complex [coils, H, W]")
    return torch.from_numpy(np.load(path, allow_pickle=False)).to(torch.complex64)
