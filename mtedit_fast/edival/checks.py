"""EdiVal's nine instruction-following checks: did turn t do what it was asked, decided from I_{t-1} and I_t.

A check is a generator: it yields what it needs found or asked and returns a verdict, so that it reads like its
definition while `check_turns` answers the requests of many turns together.

Definitions follow the public code at github.com/TianyuCodings/EdiVal; where the paper differs, `CheckConfig` has a
switch. Left out on purpose: the code's special cases for hats and birds, its stripping of plural endings, and the
model call that shortens names before position counts (counts here use the whole name).
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from .backends import VLM, Detection, Detector, Question
from .consistency import pixel_box
from .finding import Find, Finder, best, query_for, smaller_than
from .geometry import contains, iou, nms, offset
from .instructions import Instruction

ADDED = (
    "The first image was taken before an edit, the second after it. Does the second image show a new {object}, one "
    "that the first image does not show? Answer yes or no; when in doubt, no."
)
REPLACED = (
    "The first image was taken before an edit, the second after it. Did the {old} of the first image give way to a "
    "{new} in the second? Answer yes or no."
)
ALTERED = (
    "The first image was taken before an edit, the second after it. The edit asked for was: {instruction}. Was it "
    "carried out, accurately and completely? Answer yes or no."
)
READ = "Which text is written in this image? Answer with the text alone."
BACKGROUND = (
    "Look at the background of this image and leave its objects aside. Does the background show {background}? "
    "Answer yes or no."
)


@dataclass(frozen=True)
class CheckConfig:
    """Thresholds of the checks and the switches where paper and public code differ.

    Attributes:
        box_threshold: lowest score of a box; remove_, count_ and remain_threshold: for the object to remove, for the
            counts of a position change, for the foreground that a new background must leave.
        margin: how far the centres must be apart for an addition beside a reference, as a share of the image.
        nms_iou: boxes that overlap more count as one.
        remove_iou: below it, what is found after a removal is another object.
        remove_side, remain_side: a box with both sides longer is a false find.
        replace: "code": old found before, new found after, some overlap; "paper": old gone and new found after.
        attributes: colour and material are judged on "crops" (paper) around the object found before, or on the
            "whole" images (code).
    """

    box_threshold: float = 0.3
    remove_threshold: float = 0.35
    count_threshold: float = 0.4
    remain_threshold: float = 0.25
    margin: float = 0.03
    nms_iou: float = 0.8
    remove_iou: float = 0.2
    remove_side: float = 0.98
    remain_side: float = 0.9
    replace: Literal["code", "paper"] = "code"
    attributes: Literal["crops", "whole"] = "crops"

    def __post_init__(self) -> None:
        for name, options in (("replace", ("code", "paper")), ("attributes", ("crops", "whole"))):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be {' or '.join(map(repr, options))}, got {getattr(self, name)!r}")

    @property
    def lowest_threshold(self) -> float:
        return min(self.box_threshold, self.remove_threshold, self.count_threshold, self.remain_threshold)


class Turn(NamedTuple):
    before: int  # index of I_{t-1} among the images
    after: int  # index of I_t
    instruction: Instruction


class Verdict(NamedTuple):
    value: bool | None  # None: the model's answer was neither yes nor no
    reason: str


Check = Generator[list[Find] | Question, Any, Verdict]


def check_turns(
    images: Sequence[Tensor],
    turns: Sequence[Turn],
    detector: Detector | Finder,
    vlm: VLM,
    config: CheckConfig | None = None,
) -> list[Verdict]:
    """One verdict per turn; all detector queries go out together, then all questions in one `ask`.

    images: list of [3, H, W] in [0, 1] that the turns index. detector: a Detector, or a Finder over the same images
    that others have asked already. Raises ValueError where an instruction lacks a field its type needs.
    """
    config = config or CheckConfig()
    finder = detector if isinstance(detector, Finder) else Finder(detector, images, floor=config.lowest_threshold)
    verdicts: dict[int, Verdict] = {}
    waiting: dict[int, tuple[Check, list[Find] | Question]] = {}

    def advance(index: int, check: Check, answer: Any) -> None:
        try:
            waiting[index] = check, check.send(answer)
        except StopIteration as stop:
            waiting.pop(index, None)
            verdicts[index] = stop.value

    for index, turn in enumerate(turns):
        if turn.instruction.type not in _CHECKS:
            raise ValueError(f"type must be one of {', '.join(_CHECKS)}, got {turn.instruction.type!r}")
        advance(index, _CHECKS[turn.instruction.type](images, turn, config), None)
    while waiting:
        finds = {i: (check, request) for i, (check, request) in waiting.items() if isinstance(request, list)}
        if finds:
            found = iter(finder.find([find for _, request in finds.values() for find in request]))
            for i, (check, request) in finds.items():
                advance(i, check, [next(found) for _ in request])
        else:
            asked = [(i, check, request) for i, (check, request) in waiting.items() if isinstance(request, Question)]
            answers = vlm.ask([question for _, _, question in asked])
            for (i, check, _), answer in zip(asked, answers, strict=True):
                advance(i, check, answer)
    return [verdicts[i] for i in range(len(turns))]


def read_yes_no(answer: str) -> bool | None:
    """True or False where an answer begins with yes or no, or holds only one of the two words; else None."""
    words = re.findall(r"[a-z]+", answer.lower())
    if words and words[0] in ("yes", "no"):
        return words[0] == "yes"
    said = {"yes", "no"} & set(words)
    return said == {"yes"} if len(said) == 1 else None


def crop(image: Tensor, box: Tensor) -> Tensor:
    """The part [3, h, w] of an image [3, H, W] under a box (cx, cy, w, h), at least one pixel."""
    top, bottom, left, right = pixel_box(box.tolist(), *image.shape[1:])
    return image[:, top:bottom, left:right]


def _subject_add(images: Sequence[Tensor], turn: Turn, c: CheckConfig) -> Check:
    new, reference = _field(turn, "value"), turn.instruction.reference
    finds = [Find(turn.after, query_for(new), c.box_threshold)]
    if reference is not None:
        finds.append(Find(turn.before, query_for(reference), c.box_threshold))
    found, *references = yield finds
    if not len(found.boxes):
        return Verdict(False, f"{new} not found after")
    for anchor in references:
        position = _field(turn, "position")
        if not len(anchor.boxes):
            return Verdict(False, f"{reference} not found before")
        if not (offset(anchor.boxes, found.boxes, position) > c.margin).any():
            return Verdict(False, f"no {new} {position} of {reference}")
    answer = yield Question([images[turn.before], images[turn.after]], ADDED.format(object=new))
    return _said(answer, f"a new {new}")


def _subject_remove(images: Sequence[Tensor], turn: Turn, c: CheckConfig) -> Check:
    name = _field(turn, "target")
    finds = [Find(i, query_for(name), c.remove_threshold) for i in (turn.before, turn.after)]
    before, after = yield finds
    before, after = smaller_than(before, c.remove_side), smaller_than(after, c.remove_side)
    if not len(before.boxes):
        return Verdict(False, f"{name} not found before")
    if not len(after.boxes):
        return Verdict(True, f"{name} not found after")
    overlap = iou(before.boxes[:1], after.boxes[:1]).item()
    return Verdict(overlap < c.remove_iou, f"IoU {overlap:.2f} of the {name} before and after")


def _subject_replace(images: Sequence[Tensor], turn: Turn, c: CheckConfig) -> Check:
    old, new = _field(turn, "target"), _field(turn, "value")
    where = turn.before if c.replace == "code" else turn.after
    was, now = yield [Find(where, query_for(old), c.box_threshold), Find(turn.after, query_for(new), c.box_threshold)]
    if not len(now.boxes):
        return Verdict(False, f"{new} not found after")
    if c.replace == "paper":
        if len(was.boxes):
            return Verdict(False, f"{old} still found after")
    elif not len(was.boxes):
        return Verdict(False, f"{old} not found before")
    elif not (iou(was.boxes, now.boxes) > 0).any():
        return Verdict(False, f"no {new} where a {old} was")
    answer = yield Question([images[turn.before], images[turn.after]], REPLACED.format(old=old, new=new))
    return _said(answer, f"{old} replaced by {new}")


def _attribute_alter(images: Sequence[Tensor], turn: Turn, c: CheckConfig) -> Check:
    name = _field(turn, "target")
    shown = [images[turn.before], images[turn.after]]
    if c.attributes == "crops":
        (found,) = yield [Find(turn.before, query_for(name), c.box_threshold)]
        if not len(found.boxes):
            return Verdict(False, f"{name} not found before")
        shown = [crop(image, found.boxes[0]) for image in shown]
    answer = yield Question(shown, ALTERED.format(instruction=turn.instruction.text))
    return _said(answer, f"{name} became {_field(turn, 'value')}")


def _text_change(images: Sequence[Tensor], turn: Turn, c: CheckConfig) -> Check:
    wanted, name = _field(turn, "value"), turn.instruction.target
    image = images[turn.after]
    if name is not None:
        before, after = yield [Find(i, query_for(name), c.box_threshold) for i in (turn.before, turn.after)]
        for when, found in (("before", before), ("after", after)):
            if not len(found.boxes):
                return Verdict(False, f"{name} not found {when}")
        image = crop(image, before.boxes[0])
    answer = yield Question([image], READ)
    return Verdict(wanted.lower() in answer.lower(), f"text read: {_shorten(answer)}")


def _position_change(images: Sequence[Tensor], turn: Turn, c: CheckConfig) -> Check:
    names = _field(turn, "target"), _field(turn, "reference")
    position = _field(turn, "position")
    counted = [Find(i, query_for(name), c.count_threshold) for name in names for i in (turn.before, turn.after)]
    placed = [Find(turn.after, query_for(name), c.box_threshold) for name in names]
    *found, target, reference = yield counted + placed
    for name, before, after in zip(names, found[::2], found[1::2], strict=True):
        n, m = _count(before, c), _count(after, c)
        if n != m:
            return Verdict(False, f"{n} {name} before, {m} after")
    for name, detection in zip(names, (target, reference), strict=True):
        if not len(detection.boxes):
            return Verdict(False, f"{name} not found after")
    a, b = reference.boxes[:1], target.boxes[:1]
    if contains(a, b).any() or contains(b, a).any():
        return Verdict(False, f"{names[0]} and {names[1]} lie within one another")
    moved = offset(a, b, position).item() > 0
    return Verdict(moved, f"{names[0]} is {'' if moved else 'not '}{position} of {names[1]}")


def _count_change(images: Sequence[Tensor], turn: Turn, c: CheckConfig) -> Check:
    name, wanted = _field(turn, "target"), _field(turn, "value")
    if not wanted.isdecimal():
        raise ValueError(f"instruction {turn.instruction.text!r}: value must be a whole number, got {wanted!r}")
    before, after = yield [Find(i, query_for(name), c.box_threshold) for i in (turn.before, turn.after)]
    if not len(before.boxes):
        return Verdict(False, f"{name} not found before")
    n = _count(after, c)
    return Verdict(n == int(wanted), f"{n} {name} after, {wanted} asked for")


def _background_change(images: Sequence[Tensor], turn: Turn, c: CheckConfig) -> Check:
    background, remain = _field(turn, "value"), turn.instruction.remain
    found = yield [Find(turn.after, query_for(name), c.remain_threshold) for name in remain]
    for name, detection in zip(remain, found, strict=True):
        if not len(smaller_than(best(detection), c.remain_side).boxes):
            return Verdict(False, f"{name} not found after")
    answer = yield Question([images[turn.after]], BACKGROUND.format(background=background))
    return _said(answer, f"background shows {background}")


_CHECKS = {
    "subject_add": _subject_add,
    "subject_remove": _subject_remove,
    "subject_replace": _subject_replace,
    "color_alter": _attribute_alter,
    "material_alter": _attribute_alter,
    "text_change": _text_change,
    "position_change": _position_change,
    "count_change": _count_change,
    "background_change": _background_change,
}


def _field(turn: Turn, name: str) -> str:
    value = getattr(turn.instruction, name)
    if value is None:
        raise ValueError(f"instruction {turn.instruction.text!r} ({turn.instruction.type}) lacks its {name}")
    return value


def _said(answer: str, what: str) -> Verdict:
    value = read_yes_no(answer)
    return Verdict(value, f"{what}? {_shorten(answer)}")


def _shorten(answer: str, length: int = 80) -> str:
    line = " ".join(answer.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def _count(found: Detection, c: CheckConfig) -> int:
    return len(nms(found.boxes, found.scores, c.nms_iou))
