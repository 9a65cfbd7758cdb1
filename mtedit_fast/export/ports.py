"""Names, dtypes and shapes of what goes into and out of a graph, and the shapes that an engine is built for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "bool": torch.bool,
}

Range = tuple[int, int, int]
"""Smallest, best and largest size of a dimension."""


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" of torch.float32; ValueError for a dtype that graphs here do not have."""
    for name, value in DTYPES.items():
        if value == dtype:
            return name
    raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype}; convert the module first")


@dataclass(frozen=True)
class Port:
    """An input or output of a graph.

    name: in the graph, and the keyword of the torch module's own call.
    dtype: a name in `DTYPES`.
    shape: an int is a fixed size, a string names a dynamic one; ports with the same name share it.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def sized(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every name replaced by its size."""
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.shape)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.shape))}]"

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> Self:
        """From what `dataclasses.asdict` made of it."""
        return cls(saved["name"], saved["dtype"], tuple(saved["shape"]))


@dataclass(frozen=True)
class Bucket:
    """What one optimisation profile serves: (smallest, best, largest), or one number for all three.

    batch: rows of a forward, both branches of guidance counted.
    height, width: pixels of the edited image.
    references: images the edit is conditioned on, of the same size.
    """

    batch: int | Range
    height: int | Range
    width: int | Range
    references: int = 1

    def __post_init__(self) -> None:
        for name in ("batch", "height", "width"):
            low, best, high = self.ranged(name)
            if not 0 < low <= best <= high:
                raise ValueError(
                    f"{name}: expected 0 < smallest <= best <= largest, got {getattr(self, name)}; give one number, or "
                    "three in that order"
                )

    @classmethod
    def parse(cls, text: str) -> Self:
        """ "1-4x512x768+2": rows 1 to 4, 512×768 pixels, two references.

        A number, LOW-HIGH (tuned for HIGH) or LOW-BEST-HIGH each.
        """
        match = re.fullmatch(r"([\d-]+)x([\d-]+)x([\d-]+)(?:\+(\d+))?", text)
        try:
            assert match is not None
            batch, height, width = (_range(part) for part in match.groups()[:3])
            return cls(batch, height, width, int(match[4] or 1))
        except (AssertionError, ValueError) as error:
            raise ValueError(
                f"bucket: expected BATCHxHEIGHTxWIDTH such as 1x1024x1024, 1-4x512x768 or 2x512x512+2 (references), "
                f"got {text!r}" + (f" ({error})" if str(error) else "")
            ) from None

    def ranged(self, name: str) -> Range:
        """The three values of batch, height or width."""
        value = getattr(self, name)
        return (value,) * 3 if isinstance(value, int) else tuple(value)

    def __str__(self) -> str:
        def span(name: str) -> str:
            low, _, high = self.ranged(name)
            return str(low) if low == high else f"{low}-{high}"

        more = f"+{self.references}" if self.references != 1 else ""
        return f"{span('batch')}x{span('height')}x{span('width')}{more}"


def _range(text: str) -> Range:
    low, *rest = map(int, text.split("-"))
    if len(rest) > 2:
        raise ValueError(f"{text}: expected LOW-BEST-HIGH at most")
    return low, rest[0] if rest else low, rest[-1] if rest else low


@dataclass(frozen=True)
class Profile:
    """The sizes of every dynamic dimension that one optimisation profile covers."""

    name: str
    sizes: dict[str, Range]

    def covers(self, sizes: Mapping[str, int]) -> bool:
        return all(low <= sizes[name] <= high for name, (low, _, high) in self.sizes.items())

    def distance(self, sizes: Mapping[str, int]) -> float:
        """How far outside, as the sum over dimensions of relative excess; 0 if covered."""
        excess = 0.0
        for name, (low, _, high) in self.sizes.items():
            excess += max(low - sizes[name], sizes[name] - high, 0) / high
        return excess

    def waste(self, sizes: Mapping[str, int]) -> float:
        """How far from what it was tuned for, to choose among profiles that cover the sizes."""
        return sum(abs(best - sizes[name]) / best for name, (_, best, _) in self.sizes.items())

    def shapes(self, port: Port) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Smallest, best and largest shape of a port."""
        low, best, high = (port.sized({name: size[i] for name, size in self.sizes.items()}) for i in range(3))
        return low, best, high

    def __str__(self) -> str:
        spans = (
            f"{name} {low}" if low == high else f"{name} {low}-{high}" for name, (low, _, high) in self.sizes.items()
        )
        return f"{self.name} ({', '.join(spans)})"

    def saved(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> Self:
        return cls(saved["name"], {name: tuple(size) for name, size in saved["sizes"].items()})


def sizes_of(ports: Sequence[Port], shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The size of every dynamic dimension, from the shapes of all inputs.

    Raises:
        ValueError: an input has another number of dimensions, a fixed size differs, or two inputs disagree.
    """
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    for port in ports:
        shape = tuple(shapes[port.name])
        if len(shape) != len(port.shape):
            raise ValueError(f"{port.name}: expected [{', '.join(map(str, port.shape))}], got {list(shape)}")
        for axis, (expected, size) in enumerate(zip(port.shape, shape, strict=True)):
            if isinstance(expected, str):
                if sizes.setdefault(expected, size) != size:
                    raise ValueError(
                        f"{port.name}: expected {sizes[expected]} in dimension {axis} ({expected}), as in "
                        f"{owner[expected]}, got {size}; shape {list(shape)}"
                    )
                owner.setdefault(expected, port.name)
            elif expected != size:
                raise ValueError(
                    f"{port.name}: expected {expected} in dimension {axis}, got {size}; shape {list(shape)}"
                )
    return sizes


def choose_profile(profiles: Sequence[Profile], sizes: Mapping[str, int]) -> int:
    """Index of the profile that covers the sizes, the one tuned nearest to them where several do.

    Raises:
        ValueError: none does; the nearest two are named.
    """
    covering = [index for index, profile in enumerate(profiles) if profile.covers(sizes)]
    if covering:
        return min(covering, key=lambda index: (profiles[index].waste(sizes), index))
    nearest = sorted(profiles, key=lambda profile: profile.distance(sizes))[:2]
    asked = ", ".join(f"{name} {size}" for name, size in sizes.items())
    raise ValueError(
        f"shape: no profile covers {asked}; the nearest: {'; '.join(map(str, nearest))}. Use one of these sizes, or "
        "export again with a bucket for this one"
    )


def random_inputs(
    ports: Sequence[Port], sizes: Mapping[str, int], *, seed: int = 0, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Values of these sizes for every input: normal floats, integers 0 and 1, masks of ones."""
    generator, values = torch.Generator().manual_seed(seed), {}
    for port in ports:
        shape, dtype = port.sized(sizes), DTYPES[port.dtype]
        if dtype.is_floating_point:
            value = torch.randn(shape, generator=generator).to(dtype)
        elif dtype == torch.bool:
            value = torch.ones(shape, dtype=dtype)
        else:
            value = torch.randint(2, shape, generator=generator, dtype=dtype)
        values[port.name] = value.to(device)
    return values
