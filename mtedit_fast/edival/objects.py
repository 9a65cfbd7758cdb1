"""The objects of a scene: their names, attributes and boxes, and how they are read from a model's answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

SEPARATOR = ". "
# A dot separates keys in a query, a comma in an instruction, and brackets mark an instruction's fields.
_MARKS = str.maketrans(".,[]", "    ")
_UNKNOWN = {"", "none", "null", "unknown", "n/a"}
_NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
_NUMBERS |= {"nine": 9, "ten": 10}


@dataclass(frozen=True)
class SceneObject:
    key: str
    """`{material} {color} {object}`, unknown parts left out."""
    object: str
    color: str | None
    material: str | None
    text: str | None
    """What is written on it."""
    count: int
    foreground: bool
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    """(cx, cy, w, h) in [0, 1]."""
    scores: tuple[float, ...] = ()
    """One per box."""


def object_key(object: str, color: str | None = None, material: str | None = None) -> str:
    """The name of an object: "{material} {color} {object}`, unknown parts left out."""
    return " ".join(part for part in (material, color, object) if part)


def all_objects(objects: Mapping[str, SceneObject] | Iterable[SceneObject] | Iterable[str]) -> str:
    """Keys joined by ". ", which is how a detector is asked for several objects at once."""
    return SEPARATOR.join(o.key if isinstance(o, SceneObject) else o for o in objects)


def find_json(answer: str) -> Any:
    """The first JSON object or array in a model's answer, whatever prose or code fence stands around it.

    Raises ValueError, with the answer's beginning, where there is none.
    """
    decoder = json.JSONDecoder()
    first: json.JSONDecodeError | None = None
    for start, character in enumerate(answer):
        if character in "{[":
            try:
                return decoder.raw_decode(answer, start)[0]
            except json.JSONDecodeError as error:
                first = first or error
            except RecursionError:
                break
    reason = f"its JSON breaks off at character {first.pos}: {first.msg}" if first else "it holds no JSON"
    raise ValueError(f"the model's answer cannot be read, {reason}; the answer begins {answer[:80]!r}")


def parse_objects(answer: str) -> dict[str, SceneObject]:
    """The objects a vision-language model listed as JSON, by key, in its order.

    Read are {"<key>": {"object": ..., "color": ..., "material": ..., "text": ..., "count": ..., "foreground": ...}},
    a list of such entries, and either of them under "objects". Only "object" is needed, and a key of its own making is
    replaced by "{material} {color} {object}"; an entry "All Objects" is skipped. Objects of one key are one, their
    counts added. Raises ValueError, with the reason, on anything else.
    """
    entries = find_json(answer)
    if isinstance(entries, dict) and isinstance(entries.get("objects"), list | dict):
        entries = entries["objects"]
    if isinstance(entries, dict):
        entries = [
            {"object": name, **entry} if isinstance(entry, dict) else entry
            for name, entry in entries.items()
            if name.lower().replace("_", " ") != "all objects"
        ]
    found: dict[str, SceneObject] = {}
    for entry in entries:
        one = _read(entry)
        if one.key in found:
            count = found[one.key].count + one.count
            one = SceneObject(**{**vars(found[one.key]), "count": count})
        found[one.key] = one
    return found


def _read(entry: Any) -> SceneObject:
    if not isinstance(entry, dict):
        raise ValueError(f"an object must be a JSON object with at least the field 'object', got {entry!r}")
    name, color, material, text = (_word(entry, field) for field in ("object", "color", "material", "text"))
    name, color, material = (v and " ".join(v.lower().translate(_MARKS).split()) for v in (name, color, material))
    if not name:
        raise ValueError(f"an object's field 'object' must name it, got {entry!r}")
    for attribute in (material, color):  # a name that holds its attributes does not get them twice
        if attribute and name.startswith(f"{attribute} "):
            name = name.removeprefix(f"{attribute} ")
    return SceneObject(
        object_key(name, color, material),
        name,
        color or None,
        material or None,
        text,
        _count(entry),
        _foreground(entry),
    )


def _word(entry: dict[str, Any], field: str) -> str | None:
    value = entry.get(field)
    if value is None or (isinstance(value, str) and value.strip().lower() in _UNKNOWN):
        return None
    if not isinstance(value, str):
        raise ValueError(f"an object's field {field!r} must be a string or null, got {value!r} in {entry!r}")
    return " ".join(value.replace("[", "").replace("]", "").split())


def _count(entry: dict[str, Any]) -> int:
    value = entry.get("count", 1)
    if isinstance(value, str):
        value = int(value) if value.strip().isdecimal() else _NUMBERS.get(value.strip().lower(), value)
    if value is None:
        value = 1
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"an object's field 'count' must be a whole number of at least 1, got {value!r} in {entry!r}")
    return value


def _foreground(entry: dict[str, Any]) -> bool:
    value = entry.get("foreground", True)
    if isinstance(value, str) and value.strip().lower() in ("true", "yes", "false", "no"):
        value = value.strip().lower() in ("true", "yes")
    if value is None:
        value = True
    if not isinstance(value, bool | int) or value not in (0, 1):
        raise ValueError(f"an object's field 'foreground' must be true or false, got {value!r} in {entry!r}")
    return bool(value)
