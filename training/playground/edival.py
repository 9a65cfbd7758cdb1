"""EdiVal on the playground: the oracle as detector and vision-language model, and the whole pipeline offline.

How EdiVal's checks and `oracle.evaluate` differ, by design, when both see a scene exactly: the oracle demands that the
edit is done as the grammar says *and that nothing else changed*; a check looks only at the objects it names. Beyond
that, a check accepts any place on the right side of the reference where the oracle wants the neighbouring cell, and a
position that held before; it holds a removal for done when the first copy is gone though others are left, and judges
colour, material and text on the first copy. So the oracle's success implies the check's, and not the other way round.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from random import Random
from typing import Any

import torch
from torch import Tensor

from mtedit_fast.edival import checks
from mtedit_fast.edival.backends import Detection, Question
from mtedit_fast.edival.instructions import Instruction
from mtedit_fast.edival.objects import SEPARATOR, SceneObject, object_key
from mtedit_fast.edival.pools import Pools, generate
from mtedit_fast.edival.proposers import ListProposer

from .instructions import COUNTS, Edit, apply
from .oracle import read_states
from .world import (
    BACKGROUND_NAMES,
    CELL,
    CELLS,
    CLASS_OF,
    CLASSES,
    COLORS,
    GRID,
    LETTERS,
    MATERIALS,
    MAX_ERROR,
    OBJECTS,
    SHAPES,
    SIZE,
    UNREADABLE,
    templates,
)

PLAIN = [str(o) for o in OBJECTS if o.shape != "sign"]  # signs are named by what is written on them, which may change
PROPOSER = ListProposer(PLAIN, MATERIALS, tuple(LETTERS), BACKGROUND_NAMES, tuple(COLORS), COUNTS)


@lru_cache(maxsize=4096)
def classes_named(name: str) -> frozenset[int]:
    """Classes a name fits, its words in any order and case: "red circle" is three materials, "red sign" all letters."""
    words = set(name.lower().split())
    if not words & {*SHAPES, "sign"}:
        return frozenset()
    return frozenset(i for i, o in enumerate(OBJECTS, 1) if words <= set(str(o).lower().split()))


class PlaygroundOracle:
    """Detector and VLM that read the playground's images exactly.

    A box is a cell, its score 1, its phrase the name asked for. Answered are the questions of `checks` and requests
    for the objects of an image as JSON; to anything else it says that it cannot tell.
    """

    name = "playground oracle"

    def detect(
        self,
        images: Tensor,
        queries: list[str],
        *,
        box_threshold: float = 0.3,
        text_threshold: float | None = None,
    ) -> list[Detection]:
        """Cells of [B, 3, 64, 64] images, in reading order, that show one of the names of each query."""
        if len(images) != len(queries):
            raise ValueError(f"queries must have one entry per image ({len(images)}), got {len(queries)}")
        found = []
        for state, query in zip(read_states(images), queries, strict=True):
            names = {name: classes_named(name) for name in query.split(SEPARATOR)}
            hits = [
                (i, next(name for name, classes in names.items() if state[i] in classes))
                for i in range(CELLS)
                if box_threshold < 1 and any(state[i] in classes for classes in names.values())
            ]
            boxes = [((i % GRID + 0.5) / GRID, (i // GRID + 0.5) / GRID, 1 / GRID, 1 / GRID) for i, _ in hits]
            found.append(
                Detection(torch.tensor(boxes).view(-1, 4), torch.ones(len(hits)), [phrase for _, phrase in hits])
            )
        return found

    def ask(self, questions: list[Question]) -> list[str]:
        """Answers about whole images, 64×64, or single cells, 16×16."""
        scenes = iter(_read_all([image for question in questions for image in question.images]))
        return [_answer(question.text, [next(scenes) for _ in question.images]) for question in questions]


def _read_all(images: Sequence[Tensor]) -> list[list[int] | None]:
    """A state of 17 integers per whole image, its class alone per cell, None for images of other sizes."""
    scenes: list[list[int] | None] = [None] * len(images)
    for size, read in ((SIZE, read_states), (CELL, _read_cells)):
        chosen = [i for i, image in enumerate(images) if image.shape == (3, size, size)]
        if chosen:
            for i, state in zip(chosen, read(torch.stack([images[i] for i in chosen])), strict=True):
                scenes[i] = state
    return scenes


@lru_cache(maxsize=1)
def _cell_table() -> tuple[Tensor, Tensor]:
    table = templates().flatten(0, 2).flatten(1)  # [backgrounds · cells · classes, 768]
    return table, table.square().sum(1)


def _read_cells(crops: Tensor) -> list[list[int]]:
    """The nearest class of each cell [N, 3, 16, 16], whatever the background and the place."""
    table, norms = _cell_table()
    x = crops.float().cpu().flatten(1)
    distance, index = (norms - 2 * x @ table.T).min(1)
    error = (distance + x.square().sum(1)) / x.shape[1]
    return torch.where(error <= MAX_ERROR, index % CLASSES, UNREADABLE)[:, None].tolist()


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(template)))


_ADDED, _REPLACED, _ALTERED, _BACKGROUND = map(
    _pattern, (checks.ADDED, checks.REPLACED, checks.ALTERED, checks.BACKGROUND)
)
_ALTER = re.compile(r"Change the (?:color|material) of (?P<name>.+) to (?P<value>\w+)")


def _answer(text: str, scenes: Sequence[list[int] | None]) -> str:
    seen = [scene for scene in scenes if scene is not None]
    if not seen or len(seen) < len(scenes):
        return "I cannot tell."
    count = lambda name: [sum(c in classes_named(name) for c in scene[:CELLS]) for scene in seen]  # noqa: E731
    if match := _ADDED.fullmatch(text):
        before, after = count(match["object"])
        return _yes(after > before)
    if match := _REPLACED.fullmatch(text):
        (old, left), (before, after) = count(match["old"]), count(match["new"])
        return _yes(left < old and after > before)
    if (match := _ALTERED.fullmatch(text)) and (edit := _ALTER.match(match["instruction"])):
        return _yes(_altered(seen[0][:CELLS], seen[1][:CELLS], edit["name"], edit["value"]))
    if text == checks.READ:
        return " ".join(OBJECTS[c - 1].detail for c in seen[0][:CELLS] if c > 0 and OBJECTS[c - 1].shape == "sign")
    if (match := _BACKGROUND.fullmatch(text)) and len(seen[0]) > CELLS:
        return _yes(BACKGROUND_NAMES[seen[0][CELLS]] == match["background"])
    if "JSON" in text and "object" in text and len(seen) == 1:
        return json.dumps(_listing(seen[0][:CELLS]))
    return "I cannot tell."


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _altered(before: list[int], after: list[int], name: str, value: str) -> bool:
    """Whether every cell that showed `name` shows it with the new colour or material."""
    old = classes_named(name)
    part = "color" if value in COLORS else "detail"
    where = [i for i, c in enumerate(before) if c in old]
    wanted = [CLASS_OF.get(str(OBJECTS[before[i] - 1]._replace(**{part: value}))) for i in where]
    return bool(where) and [after[i] for i in where] == wanted


def _listing(cells: list[int]) -> list[dict[str, Any]]:
    """The objects of a scene as a VLM lists them."""
    present = dict.fromkeys(c for c in cells if c > 0)
    return [
        {
            "object": (item := OBJECTS[c - 1]).shape,
            "color": item.color,
            "material": None if item.shape == "sign" else item.detail,
            "text": item.detail if item.shape == "sign" else None,
            "count": cells.count(c),
            "foreground": True,
        }
        for c in present
    ]


def to_edit(instruction: Instruction, pools: Pools) -> Edit | None:
    """The playground's edit for an EdiVal instruction, given the pools before it; None where there is none."""
    kind, value = instruction.type, instruction.value or ""
    target = _class_of(pools, instruction.target)
    reference = _class_of(pools, instruction.reference)
    if None in (target, reference) or (kind == "text_change" and not target):
        return None
    position = instruction.position or ""
    direction = f"{position} of" if position in ("left", "right") else position
    new = 0
    if kind in ("subject_add", "subject_replace"):
        new = CLASS_OF.get(value, 0)
    elif kind in ("color_alter", "material_alter", "text_change"):
        old, listed = OBJECTS[(target or 0) - 1], pools.objects[instruction.target or ""]
        # only a key made of its attributes is renamed to what this world calls the object
        if listed.key != object_key(listed.object, listed.color, listed.material):
            return None
        if (old.shape == "sign") == (kind == "material_alter") and kind != "color_alter":
            return None
        new = CLASS_OF.get(str(old._replace(**{"color" if kind == "color_alter" else "detail": value})), 0)
    elif kind == "background_change":
        return Edit(kind, background=BACKGROUND_NAMES.index(value)) if value in BACKGROUND_NAMES else None
    elif kind == "count_change":
        return Edit(kind, target or 0, number=int(value)) if value.isdecimal() and int(value) in COUNTS else None
    elif kind == "position_change":
        return Edit(kind, target or 0, direction=direction, reference=reference or 0)
    else:
        return Edit(kind, target or 0)
    return Edit(kind, target or 0, new, direction, reference or 0) if new else None


def _class_of(pools: Pools, key: str | None) -> int | None:
    """0 without a key; None for an object this world does not have."""
    if key is None:
        return 0
    one = pools.objects[key]
    return CLASS_OF.get(f"{one.color} sign {one.text}" if one.object == "sign" else key)


def signs_differ(state: Sequence[int]) -> bool:
    """Whether every sign's colour names it: no two letters on signs of one colour."""
    colors = [OBJECTS[c - 1].color for c in set(state[:CELLS]) if c > 0 and OBJECTS[c - 1].shape == "sign"]
    return len(colors) == len(set(colors))


def instruct_scene(
    state: Sequence[int], objects: Mapping[str, SceneObject], *, turns: int = 3, seed: int | Random = 0
) -> tuple[list[tuple[Instruction, Pools]], list[Edit]]:
    """An EdiVal chain for a scene of 17 integers that this world can carry out, and its edits for the editor.

    Raises ValueError where `objects` are not the scene's, or two signs of a colour make two things one key.
    """
    start = Pools.start(objects)
    if not signs_differ(state) or any(_class_of(start, key) not in state[:CELLS] for key in objects):
        raise ValueError(f"objects must be the scene's, with at most one sign of a colour, got {list(objects)}")

    def follow(instructions: Sequence[Instruction]) -> tuple[list[Edit], list[int] | None]:
        """The edits, and the scene after them in any order of free places; None where one cannot be done."""
        pools, scene = start, list(state)
        edits: list[Edit] = []
        for instruction in instructions:
            edit = to_edit(instruction, pools)
            after = apply(scene, edit) if edit else None
            if edit is None or after is None or after == scene or edit.new in set(scene[:CELLS]) - {0}:
                return edits, None
            edits.append(edit)
            pools, scene = pools.apply(instruction), after
        return edits, scene

    chain = generate(
        objects,
        proposer=PROPOSER,
        turns=turns,
        seed=seed,
        accept=lambda earlier, candidate: follow([*earlier, candidate])[1] is not None,
    )
    return chain, follow([instruction for instruction, _ in chain])[0]
