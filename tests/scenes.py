"""Scenes described by hand, with a detector and a VLM that know the description and find an image's scene by its
pixels: channel 0 holds the scene's number, channels 1 and 2 the pixel's y and x, so that crops are located too."""

import re
from dataclasses import dataclass, field, replace

import torch

from mtedit_fast.edival import checks
from mtedit_fast.edival.backends import Detection

SIZE = 100


@dataclass(frozen=True)
class Thing:
    name: str
    box: tuple[float, float, float, float] = (0.5, 0.5, 0.2, 0.2)
    score: float = 0.9
    color: str = "red"
    material: str = "wood"
    text: str = ""


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...] = ()
    background: str = "beach"
    answers: dict[str, str] = field(default_factory=dict)  # part of a question -> what the VLM says to it, right or not

    def with_(self, *things, **changes):
        return replace(self, things=self.things + things, **changes)


def _template(text):
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(text)))


class World:
    """`images[i]` shows `scenes[i]`; a Detector and a VLM. `detected` and `asked` record every call."""

    def __init__(self, *scenes):
        self.scenes = scenes
        y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
        self.images = [torch.stack([torch.full_like(x, i), y, x]) / 255 for i in range(len(scenes))]
        self.detected, self.asked = [], []

    def _scene(self, image):
        return self.scenes[round(image[0, 0, 0].item() * 255)]

    def _shown(self, image):
        """Things whose centre lies in the image, which may be a crop."""
        (top, left), (bottom, right) = ((image[1:, i, j] * 255).round().tolist() for i, j in ((0, 0), (-1, -1)))
        inside = lambda box: left <= box[0] * SIZE <= right + 1 and top <= box[1] * SIZE <= bottom + 1  # noqa: E731
        return [thing for thing in self._scene(image).things if inside(thing.box)]

    def detect(self, images, queries, *, box_threshold=0.3, text_threshold=None):
        assert len(images) == len(queries)
        self.detected.append(list(queries))
        found = []
        for image, query in zip(images, queries, strict=True):
            names = query.split(". ")
            hits = [t for t in self._scene(image).things if t.name in names and t.score > box_threshold]
            found.append(
                Detection(
                    torch.tensor([t.box for t in hits], dtype=torch.float32).view(-1, 4),
                    torch.tensor([t.score for t in hits], dtype=torch.float32),
                    [t.name for t in hits],
                )
            )
        return found

    def ask(self, questions):
        self.asked.append(list(questions))
        return [self._answer(question) for question in questions]

    def _answer(self, question):
        for part, answer in self._scene(question.images[-1]).answers.items():
            if part in question.text:
                return answer
        shown = [self._shown(image) for image in question.images]
        count = lambda name: [sum(t.name == name for t in things) for things in shown]  # noqa: E731
        if match := _template(checks.ADDED).fullmatch(question.text):
            before, after = count(match["object"])
            return "Yes." if after > before else "No."
        if match := _template(checks.REPLACED).fullmatch(question.text):
            (old, still), (before, new) = count(match["old"]), count(match["new"])
            return "yes" if still < old and new > before else "no"
        if match := _template(checks.ALTERED).fullmatch(question.text):
            _, attribute, _, value = re.fullmatch(
                r"(Change the) (color|material) of (.+) to (\w+)", match["instruction"]
            ).groups()
            return "Yes" if shown[1] and all(getattr(t, attribute) == value for t in shown[1]) else "No"
        if question.text == checks.READ:
            return " ".join(t.text for t in shown[0])
        match = _template(checks.BACKGROUND).fullmatch(question.text)
        return "YES" if match["background"] == self._scene(question.images[0]).background else "NO"
