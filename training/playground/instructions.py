"""Edit instructions of the nine EdiVal types for the playground's world: drawn, parsed and carried out.

A scene is a list of 17 integers: 16 cell classes and the background.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .world import BACKGROUND_NAMES, CELLS, CLASS_OF, COLORS, GRID, LETTERS, MATERIALS, OBJECTS, SHAPES

TYPES = (
    "subject_add",
    "subject_remove",
    "subject_replace",
    "color_alter",
    "material_alter",
    "text_change",
    "position_change",
    "count_change",
    "background_change",
)
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
COUNTS = (1, 2, 3)
_PHRASES = (
    "Add Remove Replace with Change the color material text position count background of to sign left right above below"
)
VOCABULARY = (
    *_PHRASES.split(),
    *SHAPES,
    *COLORS,
    *MATERIALS,
    *LETTERS,
    *map(str, COUNTS),
    *BACKGROUND_NAMES,
)


class Edit(NamedTuple):
    type: str
    target: int = 0  # class of the object the edit acts on; every copy of it is meant
    new: int = 0  # class it becomes, or that is added
    direction: str = ""
    reference: int = 0  # class of the object a position is relative to
    number: int = 0
    background: int = 0


class Chains(NamedTuple):
    scenes: Tensor  # [N, K + 1, 17] int64: start, then the state after every turn
    instructions: list[list[str]]  # [N][K]
    types: list[list[str]]  # [N][K]


def _class(words: list[str], instruction: str) -> int:
    name = " ".join(words)
    if name not in CLASS_OF:
        raise ValueError(f"instruction {instruction!r}: {name!r} is no object of the playground's world")
    return CLASS_OF[name]


@lru_cache(maxsize=65536)
def parse(instruction: str) -> Edit:
    """Reads an instruction back into an Edit. Raises ValueError for text outside the grammar."""
    words = instruction.split()
    match words:
        case ["Add", a, b, c]:
            return Edit("subject_add", new=_class([a, b, c], instruction))
        case ["Add", a, b, c, *direction, d, e, f] if " ".join(direction) in DIRECTIONS:
            new, reference = _class([a, b, c], instruction), _class([d, e, f], instruction)
            return Edit("subject_add", new=new, direction=" ".join(direction), reference=reference)
        case ["Remove", *a]:
            return Edit("subject_remove", _class(a, instruction))
        case ["Replace", a, b, c, "with", *d]:
            return Edit("subject_replace", _class([a, b, c], instruction), _class(d, instruction))
        case ["Change", "the", "background", "to", name] if name in BACKGROUND_NAMES:
            return Edit("background_change", background=BACKGROUND_NAMES.index(name))
        case ["Change", "the", "count", "of", a, b, c, "to", n] if n.isdigit() and int(n) in COUNTS:
            return Edit("count_change", _class([a, b, c], instruction), number=int(n))
        case ["Change", "the", "position", "of", a, b, c, "to", *direction, d, e, f] if (
            " ".join(direction) in DIRECTIONS
        ):
            target, reference = _class([a, b, c], instruction), _class([d, e, f], instruction)
            return Edit("position_change", target, direction=" ".join(direction), reference=reference)
        case ["Change", "the", ("color" | "material" | "text") as attribute, "of", a, b, c, "to", value]:
            target = _class([a, b, c], instruction)
            old = OBJECTS[target - 1]
            is_sign = old.shape == "sign"
            if attribute == "color" and value in COLORS:
                return Edit("color_alter", target, CLASS_OF[str(old._replace(color=value))])
            if attribute == "material" and value in MATERIALS and not is_sign:
                return Edit("material_alter", target, CLASS_OF[str(old._replace(detail=value))])
            if attribute == "text" and value in LETTERS and is_sign:
                return Edit("text_change", target, CLASS_OF[str(old._replace(detail=value))])
    raise ValueError(f"instruction {instruction!r} is not in the playground's grammar")


def phrase(edit: Edit) -> str:
    """The instruction text of an Edit; `parse` inverts it."""
    a, b, ref = (str(OBJECTS[c - 1]) if c else "" for c in (edit.target, edit.new, edit.reference))
    match edit.type:
        case "subject_add":
            return f"Add {b} {edit.direction} {ref}".strip()
        case "subject_remove":
            return f"Remove {a}"
        case "subject_replace":
            return f"Replace {a} with {b}"
        case "color_alter":
            return f"Change the color of {a} to {OBJECTS[edit.new - 1].color}"
        case "material_alter":
            return f"Change the material of {a} to {OBJECTS[edit.new - 1].detail}"
        case "text_change":
            return f"Change the text of {a} to {OBJECTS[edit.new - 1].detail}"
        case "position_change":
            return f"Change the position of {a} to {edit.direction} {ref}"
        case "count_change":
            return f"Change the count of {a} to {edit.number}"
        case "background_change":
            return f"Change the background to {BACKGROUND_NAMES[edit.background]}"
    raise ValueError(f"edit.type must be one of {', '.join(TYPES)}, got {edit.type!r}")


def neighbour(cell: int, direction: str) -> int | None:
    """The adjacent cell in a direction, or None outside the grid."""
    row, column = (a + b for a, b in zip(divmod(cell, GRID), DIRECTIONS[direction], strict=True))
    return row * GRID + column if 0 <= row < GRID and 0 <= column < GRID else None


def apply(scene: Sequence[int], edit: Edit, order: Iterable[int] = range(CELLS)) -> list[int] | None:
    """The scene after an edit, or None where it cannot be carried out.

    Counting and adding without a position leave the place open: cells are taken in `order`. Extra copies go to empty
    cells, and existing copies stay where they are.
    """
    after = list(scene)
    where = [i for i in range(CELLS) if scene[i] == edit.target] if edit.target else []
    if edit.type == "background_change":
        after[CELLS] = edit.background
        return after
    if edit.target and not where:
        return None
    if edit.reference:
        anchors = [i for i in range(CELLS) if scene[i] == edit.reference]
        spot = neighbour(anchors[0], edit.direction) if len(anchors) == 1 else None
        if spot is None or len(where) > 1:
            return None
        if [spot] == where:
            return after
        if scene[spot] != 0:
            return None
        for i in where:
            after[i] = 0
        after[spot] = edit.target or edit.new
        return after
    if edit.type in ("subject_add", "count_change"):
        kind = edit.target or edit.new
        missing = (edit.number - len(where)) if edit.target else 1
        source, value = (0, kind) if missing > 0 else (kind, 0)
        chosen = [i for i in order if scene[i] == source][: abs(missing)]
        if len(chosen) < abs(missing):
            return None
        for i in chosen:
            after[i] = value
        return after
    for i in where:
        after[i] = edit.new  # 0 when removed
    return after


def closest(before: Sequence[int], edit: Edit, after: Sequence[int]) -> list[int] | None:
    """Among all scenes that fulfil the edit, one that differs least from `after`; None where none does."""
    values = (0, edit.target, edit.new)
    return apply(before, edit, sorted(range(CELLS), key=lambda i: after[i] == before[i] or after[i] not in values))


def is_satisfied(before: Sequence[int], edit: Edit, after: Sequence[int]) -> bool:
    """Whether `after` is `before` with the edit done and nothing else touched; never when a cell is unreadable."""
    return min(after[:CELLS]) >= 0 and closest(before, edit, after) == list(after)


class _Pools:
    """EdiVal's bookkeeping over a chain: which objects may still be edited."""

    def __init__(self, scene: list[int]) -> None:
        self.available = sorted(set(scene[:CELLS]) - {0})
        self.original = set(self.available)

    def update(self, edit: Edit) -> None:
        if edit.type == "background_change":
            self.available = [c for c in self.available if c in self.original]
        elif edit.new or edit.type == "subject_remove":
            # a renamed object stays one of the original image's objects, an added or replacing one is not
            if edit.type in ("color_alter", "material_alter", "text_change") and edit.target in self.original:
                self.original.add(edit.new)
            self.available = [c for c in self.available if c != edit.target] + ([edit.new] if edit.new else [])


def _draw(rng: random.Random, kind: str, scene: list[int], pools: _Pools) -> Edit | None:
    """One candidate edit of a type, or None when the draw is not feasible."""
    present = set(scene[:CELLS])
    fresh = lambda options: [c for c in options if c not in present]  # noqa: E731
    if kind == "background_change":
        return Edit(kind, background=rng.choice([b for b in range(len(BACKGROUND_NAMES)) if b != scene[CELLS]]))
    if kind == "subject_add":
        new = rng.choice(fresh(range(1, len(OBJECTS) + 1)))
        spots = [(d, r) for r in pools.available for d in DIRECTIONS]
        rng.shuffle(spots)
        placed = (Edit(kind, new=new, direction=d, reference=r) for d, r in spots)
        return next((e for e in placed if apply(scene, e) is not None), Edit(kind, new=new))
    wanted = {"material_alter": False, "text_change": True}.get(kind)
    targets = [c for c in pools.available if wanted is None or (OBJECTS[c - 1].shape == "sign") == wanted]
    if not targets:
        return None
    target = rng.choice(targets)
    old = OBJECTS[target - 1]
    options: list[int] = []
    match kind:
        case "subject_remove":
            return Edit(kind, target)
        case "subject_replace":
            options = fresh(range(1, len(OBJECTS) + 1))
        case "color_alter":
            options = fresh(CLASS_OF[str(old._replace(color=c))] for c in COLORS)
        case "material_alter":
            options = fresh(CLASS_OF[str(old._replace(detail=m))] for m in MATERIALS)
        case "text_change":
            options = fresh(CLASS_OF[str(old._replace(detail=t))] for t in LETTERS)
        case "count_change":
            return Edit(kind, target, number=rng.choice([n for n in COUNTS if n != scene[:CELLS].count(target)]))
        case "position_change":
            spots = [(d, r) for r in pools.available if r != target for d in DIRECTIONS]
            rng.shuffle(spots)
            moves = (Edit(kind, target, direction=d, reference=r) for d, r in spots)
            return next((e for e in moves if apply(scene, e) not in (None, scene)), None)
    return Edit(kind, target, rng.choice(options)) if options else None


def sample_chains(rng: random.Random, n: int, turns: int = 3, objects: tuple[int, int] = (3, 6)) -> Chains:
    """Draws n scenes and, for each, `turns` instructions of EdiVal types with the scenes they lead to.

    Each turn draws a type not yet used in its chain; an infeasible one becomes subject_add. Start scenes hold between
    objects[0] and objects[1] distinct objects. Free places are drawn uniformly.
    Raises ValueError on turns outside 1..9.
    """
    if not 1 <= turns <= len(TYPES):
        raise ValueError(f"turns must be in 1..{len(TYPES)} (no type is used twice), got {turns}")
    states, texts, kinds = [], [], []
    for _ in range(n):
        scene = [0] * CELLS + [rng.randrange(len(BACKGROUND_NAMES))]
        count = rng.randint(*objects)
        for cell, c in zip(rng.sample(range(CELLS), count), rng.sample(range(1, len(OBJECTS) + 1), count), strict=True):
            scene[cell] = c
        pools, unused = _Pools(scene), list(TYPES)
        chain, text, kind = [scene], [], []
        for _ in range(turns):
            name = rng.choice(unused)
            unused.remove(name)
            edit = _draw(rng, name, scene, pools)
            after = apply(scene, edit, rng.sample(range(CELLS), CELLS)) if edit else None
            if edit is None or after is None:
                edit = _draw(rng, "subject_add", scene, pools)
                assert edit is not None
                after = apply(scene, edit, rng.sample(range(CELLS), CELLS))
                assert after is not None
            pools.update(edit)
            scene = after
            chain.append(scene)
            text.append(phrase(edit))
            kind.append(edit.type)
        states.append(chain)
        texts.append(text)
        kinds.append(kind)
    return Chains(torch.tensor(states, dtype=torch.int64).view(n, turns + 1, CELLS + 1), texts, kinds)
