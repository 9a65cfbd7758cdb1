"""What an instruction changes things to: values drawn from lists, or asked of a vision-language model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .backends import VLM, Question
from .instructions import COLORS
from .objects import SceneObject, find_json
from .pools import Pools

COUNTS = (3, 4, 5)  # what the public benchmark asks for


@dataclass(frozen=True)
class ListProposer:
    """Draws uniformly from lists, among what would change something. An empty list makes its types infeasible."""

    objects: Sequence[str]
    materials: Sequence[str] = ()
    texts: Sequence[str] = ()
    backgrounds: Sequence[str] = ()
    colors: Sequence[str] = COLORS
    counts: Sequence[int] = COUNTS

    def propose(self, type: str, target: SceneObject | None, pools: Pools, rng: random.Random) -> str | None:
        choices, excluded = self.options(type, target, pools)
        fresh = [c for c in choices if c not in excluded]
        return rng.choice(fresh) if fresh else None

    def options(self, type: str, target: SceneObject | None, pools: Pools) -> tuple[Sequence[str], Sequence[str]]:
        """What there is for a type, and what would change nothing."""
        if type == "color_alter":
            return self.colors, [target.color or ""] if target else ()
        if type == "material_alter":
            return self.materials, [target.material or ""] if target else ()
        if type == "text_change":
            return self.texts, [target.text or ""] if target else ()
        if type == "count_change":
            return [str(n) for n in self.counts], [str(target.count)] if target else ()
        if type == "background_change":
            return self.backgrounds, ()
        return self.objects, pools.all


_ASK = {
    "subject_add": "Name one object that is not in this picture and could well be added to it.",
    "subject_replace": "Name one object that could stand in this picture in place of the {name}, and is not in it.",
    "color_alter": "Name one colour that the {name} could have instead of its own, one of: {colors}.",
    "material_alter": "Name one material that the {name} could be made of, plainly different from its own.",
    "text_change": "Write one short text, at most two words, that {place}.",
    "background_change": "Name one place, in at most two words, that could be the background of these objects instead.",
}
_FORM = 'Answer with JSON only: {"value": "..."}'


class VLMProposer:
    """Asks a vision-language model what would suit an image; counts are drawn from `fallback`.

    image: [3, H, W] in [0, 1]. fallback: gives the value where the model's answer cannot be read or would change
    nothing. `failures` counts those answers.
    """

    def __init__(self, vlm: VLM, image: Tensor, fallback: ListProposer) -> None:
        self.vlm = vlm
        self.image = image
        self.fallback = fallback
        self.failures = 0

    def propose(self, type: str, target: SceneObject | None, pools: Pools, rng: random.Random) -> str | None:
        choices, excluded = self.fallback.options(type, target, pools)
        if type not in _ASK:
            return self.fallback.propose(type, target, pools, rng)
        name = target.key if target else ""
        place = f"could replace '{target.text}' on the {name}" if target else "could be written on this picture"
        asked = _ASK[type].format(name=name, colors=", ".join(self.fallback.colors), place=place)
        if excluded:
            asked += f" Do not answer with any of: {', '.join(excluded)}."
        value = _value(self.vlm.ask([Question([self.image], f"{asked} {_FORM}")])[0], type)
        if value and value not in excluded and (type != "color_alter" or value in choices):
            return value
        self.failures += 1
        return self.fallback.propose(type, target, pools, rng)


def _value(answer: str, type: str) -> str | None:
    """The model's value, None where there is none. Marks that an instruction's wording uses are left out."""
    try:
        found = find_json(answer)
    except ValueError:
        return None
    value = found.get("value") if isinstance(found, dict) else None
    if not isinstance(value, str):
        return None
    value = " ".join("".join(c for c in value if c not in "[]{}'\".,").split())
    return value if type == "text_change" else value.lower()
