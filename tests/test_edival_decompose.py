"""Decomposition with a scripted model and detector: what stays, what is dropped, what is counted."""

import json

import pytest
import torch

from mtedit_fast.edival.backends import Detection
from mtedit_fast.edival.decompose import Decomposition, decompose, why_dropped
from mtedit_fast.edival.objects import SceneObject


class Model:
    """Gives each image the answer under its number, which is the image's first value."""

    def __init__(self, answers):
        self.answers = answers

    def ask(self, questions):
        assert all(len(q.images) == 1 for q in questions)
        return [self.answers[round(float(q.images[0][0, 0, 0]) * 10)] for q in questions]


class Boxes:
    """Finds what it is told to, and keeps how it was asked."""

    def __init__(self, boxes):
        self.boxes = boxes
        self.calls = []

    def detect(self, images, queries, *, box_threshold=0.3, text_threshold=None):
        self.calls.append((tuple(images.shape), list(queries), box_threshold, text_threshold))
        found = []
        for image, query in zip(images, queries, strict=True):
            boxes = torch.tensor(self.boxes.get((round(float(image[0, 0, 0]) * 10), query), [])).view(-1, 4)
            found.append(Detection(boxes, torch.linspace(0.9, 0.5, len(boxes)), [query] * len(boxes)))
        return found


def image(number, height=8, width=8):
    return torch.full((3, height, width), number / 10)


SMALL, OTHER, HUGE = [0.5, 0.5, 0.25, 0.25], [0.25, 0.25, 0.125, 0.5], [0.5, 0.5, 0.9375, 0.5]
CAR = {"object": "car", "color": "red", "count": 3}
DOG = {"object": "dog", "text": "REX", "foreground": False}


def run(answers, boxes, images=None, **options):
    detector = Boxes(boxes)
    images = [image(i) for i in range(len(answers))] if images is None else images
    return decompose(images, Model(answers), detector, **options), detector.calls


def test_boxes_scores_and_count_come_from_the_detector():
    found, calls = run([json.dumps([CAR, DOG])], {(0, "red car"): [SMALL, OTHER], (0, "dog"): [OTHER]})
    scenes = [
        {
            "red car": SceneObject(
                "red car", "car", "red", None, None, 2, True, (tuple(SMALL), tuple(OTHER)), (0.8999999761581421, 0.5)
            ),
            "dog": SceneObject("dog", "dog", None, None, "REX", 1, False, (tuple(OTHER),), (0.8999999761581421,)),
        }
    ]
    assert found == Decomposition(scenes, [], [{}])
    assert calls == [((2, 3, 8, 8), ["red car", "dog"], 0.35, 0.35)]


def test_objects_that_are_not_found_or_fill_the_image_are_dropped():
    found, _ = run([json.dumps([CAR, DOG, {"object": "cup"}])], {(0, "red car"): [SMALL, HUGE], (0, "cup"): [SMALL]})
    assert list(found.scenes[0]) == ["cup"]
    assert found.dropped == [
        {"red car": "a box of 0.94 × 0.50 covers too much of the image", "dog": "not found by the detector"}
    ]


@pytest.mark.parametrize(
    ("w", "h", "stays"),
    [
        (0.91, 0.43, True),  # long side, area 0.391
        (0.91, 0.45, False),  # long side, area 0.410
        (0.45, 0.91, False),
        (0.89, 0.89, True),  # area 0.792, no side above 0.9
        (1.0, 1.0, False),
    ],
)
def test_both_limits_of_size(w, h, stays):
    detection = Detection(torch.tensor([[0.5, 0.5, w, h]]), torch.tensor([0.9]), ["a"])
    assert (why_dropped(detection) is None) == stays


def test_unreadable_answers_are_counted():
    found, calls = run(["I see nothing", json.dumps([DOG]), "[]"], {(1, "dog"): [SMALL]})
    assert [list(scene) for scene in found.scenes] == [[], ["dog"], []]
    assert [i for i, _ in found.failures] == [0]
    assert "it holds no JSON" in found.failures[0][1]
    assert [c[1] for c in calls] == [["dog"]]


def test_batches_hold_images_of_one_size():
    answers = [json.dumps([CAR, DOG])] * 3
    boxes = {(i, k): [SMALL] for i in range(3) for k in ("red car", "dog")}
    images = [image(0), image(1, 4, 6), image(2)]
    found, calls = run(answers, boxes, images, batch_size=3, threshold=0.5)
    assert [list(scene) for scene in found.scenes] == [["red car", "dog"]] * 3
    assert calls == [
        ((3, 3, 8, 8), ["red car", "dog", "red car"], 0.5, 0.5),
        ((1, 3, 8, 8), ["dog"], 0.5, 0.5),
        ((2, 3, 4, 6), ["red car", "dog"], 0.5, 0.5),
    ]


def test_a_batch_of_images_and_none():
    answers = [json.dumps([DOG])] * 2
    found, _ = run(answers, {(i, "dog"): [SMALL] for i in range(2)}, torch.stack([image(0), image(1)]))
    assert [list(scene) for scene in found.scenes] == [["dog"], ["dog"]]
    assert run([], {})[0] == Decomposition([], [], [])


@pytest.mark.parametrize("bad", [torch.zeros(1, 8, 8), torch.zeros(8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)])
def test_bad_images(bad):
    with pytest.raises(ValueError, match=r"images\[1\] must be \[3, H, W\] float in \[0, 1\], got "):
        run(["[]", "[]"], {}, [image(0), bad])
