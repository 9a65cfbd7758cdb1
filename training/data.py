"""Multi-turn editing data: JSONL lines `{id, image, instructions, objects?}` -> chains in a seeded, resumable order."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


@dataclass(frozen=True)
class Record:
    """One chain: a reference image [3, H, W] fp32 in [0, 1], its K instructions, and what else its line held."""

    id: str
    image: Tensor
    instructions: list[str]
    objects: list[list[str]] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """What a reward may read beside images and instructions."""
        return {"id": self.id, "objects": self.objects, **self.extra}


def load_image(path: str | Path, size: tuple[int, int]) -> Tensor:
    """Read an image as fp32 [3, H, W] in [0, 1]: centre-cropped to the aspect of `size` = (H, W), Lanczos-resized.

    An image of exactly that size is not resampled.
    """
    height, width = size
    with Image.open(path) as file:
        image = ImageOps.fit(ImageOps.exif_transpose(file).convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


class EditChains:
    """The chains of a JSONL file, checked line by line when opened; images are read when asked for.

    path: one object per line: `id` (unique text), `image` (a path relative to the file), `instructions` (a list of at
    least `turns` texts, of which the first `turns` are used), `objects` (optional: a list of names per turn). Other
    keys are kept in `Record.extra`. resolution: pixels, a side or (height, width). name: of the path, for errors.
    ValueError names file, line, key and what was expected.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        turns: int,
        resolution: int | tuple[int, int],
        seed: int = 0,
        name: str = "data.path",
    ) -> None:
        self.path = Path(path)
        self.turns = turns
        self.size = (resolution, resolution) if isinstance(resolution, int) else resolution
        self.seed = seed
        if not self.path.is_file():
            raise ValueError(f"{name}: no file {self.path}; expected JSONL of {{id, image, instructions}}")
        self._lines: list[tuple[str, dict[str, Any]]] = []  # (file:line, object)
        seen: dict[str, str] = {}
        for number, text in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
            if text.strip():
                where = f"{self.path}:{number}"
                line = self._check(where, text)
                if (chain := line["id"]) in seen:
                    raise ValueError(f"{where}: id: expected a unique text, {chain!r} is already at {seen[chain]}")
                seen[chain] = where
                self._lines.append((where, line))
        if not self._lines:
            raise ValueError(f"{self.path}: expected at least one chain, the file is empty")

    def _check(self, where: str, text: str) -> dict[str, Any]:
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(line, dict):
            raise ValueError(f"{where}: expected an object {{id, image, instructions}}, got {type(line).__name__}")
        for key in ("id", "image"):
            if not isinstance(line.get(key), str) or not line[key]:
                raise ValueError(f"{where}: {key}: expected a text, got {line.get(key)!r}")
        if not (self.path.parent / line["image"]).is_file():
            raise ValueError(f"{where}: image: no file {line['image']} in {self.path.parent}")
        instructions = line.get("instructions")
        if not isinstance(instructions, list) or not all(isinstance(i, str) and i.strip() for i in instructions):
            raise ValueError(f"{where}: instructions: expected a list of texts, one per turn, got {instructions!r}")
        if len(instructions) < self.turns:
            raise ValueError(
                f"{where}: instructions: expected at least {self.turns}, one per turn, got {instructions!r}"
            )
        objects = line.get("objects")
        if objects is not None and not (
            isinstance(objects, list)
            and len(objects) == len(instructions)
            and all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in objects)
        ):
            raise ValueError(
                f"{where}: objects: expected {len(instructions)} lists of names, one list per turn, got {objects!r}"
            )
        return line

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Record:
        where, line = self._lines[index]
        try:
            image = load_image(self.path.parent / line["image"], self.size)
        except (OSError, ValueError) as error:
            raise ValueError(f"{where}: image: {line['image']} is not a readable image: {error}") from error
        objects = line.get("objects")
        return Record(
            id=line["id"],
            image=image,
            instructions=line["instructions"][: self.turns],
            objects=objects and objects[: self.turns],
            extra={k: v for k, v in line.items() if k not in ("id", "image", "instructions", "objects")},
        )

    def order(self, epoch: int) -> list[int]:
        """The order of one epoch: a permutation that depends on (seed, epoch) alone."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self)).tolist()

    def draw(self, iteration: int, n: int) -> list[int]:
        """Indices n·iteration … n·(iteration + 1) − 1 of the endless order: nothing to save for an exact resume."""
        positions = range(n * iteration, n * (iteration + 1))
        orders = {epoch: self.order(epoch) for epoch in {position // len(self) for position in positions}}
        return [orders[position // len(self)][position % len(self)] for position in positions]

    def batch(self, iteration: int, n: int) -> list[Record]:
        """The chains of `draw`."""
        return [self[index] for index in self.draw(iteration, n)]

    def id(self, index: int) -> str:
        """A chain's name, without reading its image."""
        return self._lines[index][1]["id"]
