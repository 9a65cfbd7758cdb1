"""EdiVal's nine instruction types: their fields, their wording, and reading the wording back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

CATEGORY = {
    "subject_add": "subject",
    "subject_remove": "subject",
    "subject_replace": "subject",
    "color_alter": "attribute",
    "material_alter": "attribute",
    "text_change": "text",
    "position_change": "relational",
    "count_change": "counting",
    "background_change": "global",
}
TYPES: tuple[str, ...] = tuple(CATEGORY)
POSITIONS = ("left", "right", "above", "below")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")

# A type's wordings, the one with most fields first. The public benchmark marks every field with brackets.
_WORDINGS = {
    "subject_add": ("Add {value} on the {position} of {reference}", "Add {value}"),
    "subject_remove": ("Remove {target}",),
    "subject_replace": ("Replace {target} with {value}",),
    "color_alter": ("Change the color of {target} to {value}",),
    "material_alter": ("Change the material of {target} to {value}",),
    "text_change": ("Replace the text '{old_text}' on {target} with '{value}'", "Add text '{value}' on the image"),
    "position_change": ("Change the position of {target} to {position} of {reference}",),
    "count_change": ("Change the count of {target} to {value}",),
    "background_change": ("Change the background to {value}",),
}
_FIELD = re.compile(r"{(\w+)}")
_FIELDS = ("target", "value", "reference", "position", "old_text")
_REMAIN = re.compile(r",? remain the (?P<remain>.+?) unchanged\.?\s*$", re.IGNORECASE | re.DOTALL)
# "Replace the text" and "Add text" would also read as a replaced and an added object
_READING_ORDER = ("text_change", *(t for t in TYPES if t != "text_change"))


@dataclass(frozen=True)
class Instruction:
    """One edit. The fields a type does not use are None; `instruct` makes one from its fields."""

    type: str
    text: str
    """What the editor is told."""
    target: str | None = None
    """Key of the edited object, before the edit."""
    value: str | None = None
    """What it becomes: new object (add: the added one; replace), colour, material, text, count or background."""
    reference: str | None = None
    """Reference object of an addition or a position."""
    position: str | None = None
    """One of POSITIONS."""
    remain: tuple[str, ...] = ()
    """Foreground objects that a background change must leave."""
    old_text: str | None = None
    """Text that is replaced; None: text is added, and without a target it is added to the image."""


def instruct(
    type: str,
    *,
    target: str | None = None,
    value: str | None = None,
    reference: str | None = None,
    position: str | None = None,
    remain: tuple[str, ...] = (),
    old_text: str | None = None,
) -> Instruction:
    """The instruction with these fields and the text they give.

    Raises ValueError on an unknown type, on fields that fit none of the type's wordings or hold brackets, on a
    position outside POSITIONS and on a count that is not a whole number of at least 1.
    """
    fields = {"target": target, "value": value, "reference": reference, "position": position, "old_text": old_text}
    wording = _wording(type, fields)
    if position is not None and position not in POSITIONS:
        raise ValueError(f"position must be one of {', '.join(POSITIONS)}, got {position!r}")
    if type == "count_change" and not (value and value.isdecimal() and int(value) >= 1):
        raise ValueError(f"value of a count_change must be a whole number of at least 1, got {value!r}")
    if marked := [v for v in fields.values() if v and ("[" in v or "]" in v)]:
        raise ValueError(f"fields must not hold brackets, which mark a field in the benchmark, got {marked[0]!r}")
    if remain and type != "background_change":
        raise ValueError(f"remain belongs to background_change, got {remain} with {type}")
    text = _fill(wording, fields, "{}")
    if remain:
        text += f", remain the {', '.join(remain)} unchanged"
    return Instruction(type, text, target, value, reference, position, tuple(remain), old_text)


def render(instruction: Instruction, *, brackets: bool = False) -> str:
    """An instruction's text from its fields; brackets=True marks each field, as the public benchmark's
    `format_instructions` do (which leave out what a background change must keep)."""
    if not brackets:
        return instruct(instruction.type, remain=instruction.remain, **_fields(instruction)).text
    fields = _fields(instruction)
    return _fill(_wording(instruction.type, fields), fields, "[{}]")


@lru_cache(maxsize=65536)
def parse(text: str) -> Instruction:
    """Reads an instruction, bracketed or not, back into its fields.

    Brackets make the reading unique. Without them a field ends at the wording's next words, so that an object named
    "house to let" is read wrongly; the public benchmark and `render` offer both texts. Raises ValueError, with the
    text, where it is none of the nine types or its fields are not allowed.
    """
    body = text.strip()
    remain: tuple[str, ...] = ()
    if found := _REMAIN.search(body):
        body, remain = body[: found.start()], tuple(k.strip() for k in found["remain"].split(",") if k.strip())
    for type, pattern in _patterns("[" in body):
        if match := pattern.search(body):
            fields = {k: " ".join(v.split()) for k, v in match.groupdict().items()}
            if "position" in fields:
                fields["position"] = fields["position"].lower()
            try:
                made = instruct(type, remain=remain if type == "background_change" else (), **fields)
            except ValueError as error:
                raise ValueError(f"instruction {text!r} cannot be read as {type}: {error}") from None
            return made if "[" in body else Instruction(**{**vars(made), "text": text.strip()})
    raise ValueError(f"instruction {text!r} is none of EdiVal's nine types ({', '.join(TYPES)})")


def _wording(type: str, fields: dict[str, str | None]) -> str:
    if type not in _WORDINGS:
        raise ValueError(f"type must be one of {', '.join(TYPES)}, got {type!r}")
    given = {name for name, value in fields.items() if value is not None}
    for wording in _WORDINGS[type]:
        if set(_FIELD.findall(wording)) == given and all(fields[name] for name in given):
            return wording
    forms = " or ".join(str(_FIELD.findall(w)) for w in _WORDINGS[type])
    raise ValueError(f"{type} needs the fields {forms}, none empty, got { {k: fields[k] for k in sorted(given)} }")


def _fields(instruction: Instruction) -> dict[str, str | None]:
    return {name: getattr(instruction, name) for name in _FIELDS}


def _fill(wording: str, fields: dict[str, str | None], mark: str) -> str:
    return wording.format(**{name: mark.format(value) for name, value in fields.items()})


@lru_cache(maxsize=2)
def _patterns(bracketed: bool) -> list[tuple[str, re.Pattern[str]]]:
    return list(_make_patterns(bracketed))


def _make_patterns(bracketed: bool) -> Iterator[tuple[str, re.Pattern[str]]]:
    positions = "|".join(POSITIONS)
    for type in _READING_ORDER:
        for wording in _WORDINGS[type]:
            pattern = "".join(
                re.escape(part)
                if i % 2 == 0
                else rf"\[(?P<{part}>[^\]]+)\]"
                if bracketed
                else rf"(?P<{part}>{positions if part == 'position' else '.+?'})"
                for i, part in enumerate(_FIELD.split(wording))
            )
            yield type, re.compile(pattern if bracketed else rf"^{pattern}\.?\s*$", re.IGNORECASE | re.DOTALL)
