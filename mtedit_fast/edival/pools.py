"""EdiVal's object pools over a chain of edits, and chains of instructions drawn from them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from .instructions import POSITIONS, TYPES, Instruction, instruct
from .objects import SceneObject

ATTEMPTS = 20
_NEEDS = {"subject_add": 0, "background_change": 0, "position_change": 2}  # available objects; every other type: 1


@dataclass(frozen=True)
class Pools:
    """What has been in the image, what may be edited now, and what nobody has touched.

    `unchanged` is a subset of `available` and `available` of `all`; `unchanged` only shrinks, `all` only grows. As in
    EdiVal's public code, a renamed object is a new key, so a later background change drops it from `available`, and a
    text added to the image joins `all`. Unlike there, a renamed key keeps the order material, colour, object.
    """

    objects: Mapping[str, SceneObject]
    """The available objects as they are now, by key."""
    all: tuple[str, ...]
    """Every key there has been."""
    unchanged: tuple[str, ...]
    """Keys of original objects that have not been edited and are still available."""
    foreground: frozenset[str]
    """Keys of the original foreground objects."""
    has_background_change: bool = False

    @classmethod
    def start(cls, objects: Mapping[str, SceneObject] | Iterable[SceneObject]) -> Pools:
        """The pools before the first edit. Raises ValueError when two objects share a key."""
        listed = list(objects.values() if isinstance(objects, Mapping) else objects)
        by_key = {o.key: o for o in listed}
        if len(by_key) < len(listed):
            keys = [o.key for o in listed]
            raise ValueError(f"objects must have different keys, got {sorted(k for k in by_key if keys.count(k) > 1)}")
        original = tuple(by_key)
        return cls(by_key, original, original, frozenset(o.key for o in listed if o.foreground))

    @property
    def available(self) -> tuple[str, ...]:
        """Keys of the objects that may be edited now."""
        return tuple(self.objects)

    def apply(self, instruction: Instruction) -> Pools:
        """The pools after an edit; self is left as it is.

        add → available, all · remove → out of available · replace → old out, new in with the old one's attributes ·
        colour, material → renamed · count, text → set · position → target and reference edited · background →
        available = original foreground ∩ available, and has_background_change stays. Raises ValueError when target or
        reference is not available.
        """
        kind, target, value = instruction.type, instruction.target, instruction.value
        for name, key in (("target", target), ("reference", instruction.reference)):
            if key is not None and key not in self.objects:
                raise ValueError(
                    f"{name} of {instruction.text!r} must be one of the available objects {list(self.available)}, "
                    f"got {key!r}"
                )
        objects = dict(self.objects)
        edited = set() if target is None else {target}
        added: str | None = None
        if kind == "subject_add":
            added = value
            assert value is not None
            objects.setdefault(value, SceneObject(value, value, None, None, None, 1, True))
        elif kind == "background_change":
            objects = {k: o for k, o in objects.items() if k in self.foreground}
        elif kind == "text_change" and target is None:
            added = value
        elif kind == "position_change":
            edited.add(instruction.reference or "")
        elif target is not None:
            new = edited_object(objects[target], instruction)
            if new is not None and new.key == target:
                objects[target] = new
            else:
                del objects[target]
            if new is not None:
                added = new.key
                objects.setdefault(new.key, new)
        return Pools(
            objects,
            self.all if added is None or added in self.all else (*self.all, added),
            tuple(k for k in self.unchanged if k in objects and k not in edited),
            self.foreground,
            self.has_background_change or kind == "background_change",
        )


def edited_object(old: SceneObject, instruction: Instruction) -> SceneObject | None:
    """What an instruction on one object makes of it; None when it is removed. Its boxes are no longer known."""
    kind, value = instruction.type, instruction.value
    bare = replace(old, boxes=(), scores=())
    if value is None:
        return None if kind == "subject_remove" else bare
    if kind == "subject_replace":
        return replace(bare, key=value, object=value, text=None)
    if kind == "color_alter":
        # a key of the spec's form holds the colour after the material
        lead = f"{old.material} " if old.material and old.key.startswith(f"{old.material} ") else ""
        key = _rename(old.key, old.color, value, lead)
        return replace(bare, key=key, color=value)
    if kind == "material_alter":
        return replace(bare, key=_rename(old.key, old.material, value, ""), material=value)
    if kind == "count_change":
        return replace(bare, count=int(value))
    if kind == "text_change":
        return replace(bare, text=value)
    return bare


def _rename(key: str, old: str | None, new: str, lead: str) -> str:
    """The key with `new` in the place of the attribute `old`, or after `lead` where the key does not hold it."""
    words = f" {key} "
    if old and f" {old} " in words:
        return words.replace(f" {old} ", f" {new} ", 1).strip()
    return lead + f"{new} {key.removeprefix(lead)}"


class Proposer(Protocol):
    """Gives an instruction its new object, colour, material, text, count or background."""

    def propose(self, type: str, target: SceneObject | None, pools: Pools, rng: random.Random) -> str | None:
        """A value for an instruction of `type`, or None where it has none that would change anything.

        target: the object to edit; None for additions and backgrounds. New objects must not be in `pools.all`.
        """
        ...


def generate(
    objects: Mapping[str, SceneObject] | Iterable[SceneObject],
    *,
    proposer: Proposer,
    turns: int = 3,
    seed: int | random.Random = 0,
    accept: Callable[[Sequence[Instruction], Instruction], bool] | None = None,
) -> list[tuple[Instruction, Pools]]:
    """A chain of instructions for one image, each with the pools after it.

    Each turn draws one of the types not yet drawn, uniformly; where that is infeasible (no available object, for a
    position fewer than two, nothing proposed, or refused) the turn adds an object. A text is replaced if any available
    object has one, else added to the image. seed: an int, or a generator to draw on.
    accept: (earlier instructions, candidate) -> whether it can be carried out; a refused one is drawn again, up to
    ATTEMPTS times. Raises ValueError on turns outside 1..9, and when no object can be added.
    """
    if not 1 <= turns <= len(TYPES):
        raise ValueError(f"turns must be in 1..{len(TYPES)} (no type is drawn twice), got {turns}")
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    pools = Pools.start(objects)
    chain: list[tuple[Instruction, Pools]] = []
    for drawn in rng.sample(TYPES, turns):
        earlier = [instruction for instruction, _ in chain]
        made = _draw(drawn, pools, proposer, rng, earlier, accept)
        if made is None and drawn != "subject_add":
            made = _draw("subject_add", pools, proposer, rng, earlier, accept)
        if made is None:
            raise ValueError(
                f"turn {len(chain) + 1} ({drawn}): no object can be added; give the proposer objects other than "
                f"{', '.join(pools.all)}, or let accept pass more"
            )
        pools = pools.apply(made)
        chain.append((made, pools))
    return chain


def _draw(
    kind: str,
    pools: Pools,
    proposer: Proposer,
    rng: random.Random,
    earlier: list[Instruction],
    accept: Callable[[Sequence[Instruction], Instruction], bool] | None,
) -> Instruction | None:
    if len(pools.objects) < _NEEDS.get(kind, 1):
        return None
    for attempt in range(ATTEMPTS):
        # the last attempts at adding do without a place
        made = _candidate(kind, pools, proposer, rng, placed=attempt < ATTEMPTS - 2)
        if made is not None and (accept is None or accept(earlier, made)):
            return made
    return None


def _candidate(kind: str, pools: Pools, proposer: Proposer, rng: random.Random, placed: bool) -> Instruction | None:
    keys = pools.available
    if kind == "position_change":
        target, reference = rng.sample(keys, 2)
        return instruct(kind, target=target, reference=reference, position=rng.choice(POSITIONS))
    if kind == "subject_remove":
        return instruct(kind, target=rng.choice(keys))
    old: SceneObject | None = None
    if kind == "text_change":
        lettered = [o for o in pools.objects.values() if o.text]
        old = rng.choice(lettered) if lettered else None
    elif kind not in ("subject_add", "background_change"):
        old = pools.objects[rng.choice(keys)]
    value = proposer.propose(kind, old, pools, rng)
    if value is None:
        return None
    if kind == "subject_add":
        if value in pools.all:
            return None
        if not (keys and placed):
            return instruct(kind, value=value)
        return instruct(kind, value=value, reference=rng.choice(keys), position=rng.choice(POSITIONS))
    if kind == "background_change":
        remain = tuple(key for key, o in pools.objects.items() if o.foreground)
        return instruct(kind, value=value, remain=remain)
    if old is None:
        return instruct(kind, value=value)
    made = instruct(kind, target=old.key, value=value, old_text=old.text if kind == "text_change" else None)
    new = edited_object(old, made)
    # a name that another object has, or had, would make two things one
    return None if new is not None and new.key != old.key and new.key in pools.all else made
