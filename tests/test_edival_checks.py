"""The nine instruction-following checks on hand-built scenes: both sides of every threshold."""

from dataclasses import replace

import pytest
import torch
from scenes import SIZE, Scene, Thing, World

from mtedit_fast.edival.backends import Detection
from mtedit_fast.edival.checks import CheckConfig, Turn, check_turns, crop, read_yes_no
from mtedit_fast.edival.finding import Find, Finder, query_for
from mtedit_fast.edival.instructions import TYPES, Instruction

DOG, CAT = Thing("dog"), Thing("cat", (0.2, 0.5, 0.2, 0.2))
EPS = 1e-3


def verdict(before, after, instruction, **config):
    world = World(before, after)
    return check_turns(world.images, [Turn(0, 1, instruction)], world, world, CheckConfig(**config))[0].value


def at(thing, *box, **changes):
    return replace(thing, box=tuple(box) or thing.box, **changes)


ADD = Instruction("subject_add", "Add dog", value="dog")
REMOVE = Instruction("subject_remove", "Remove dog", target="dog")
REPLACE = Instruction("subject_replace", "Replace dog with cat", target="dog", value="cat")
COLOR = Instruction("color_alter", "Change the color of dog to blue", target="dog", value="blue")
MATERIAL = Instruction("material_alter", "Change the material of dog to glass", target="dog", value="glass")
TEXT = Instruction("text_change", "Replace the text 'A' on dog with 'Bow'", target="dog", value="Bow", old_text="A")
ADD_TEXT = Instruction("text_change", "Add text 'Bow' on the image", value="Bow")
COUNT = Instruction("count_change", "Change the count of dog to 2", target="dog", value="2")
BACKGROUND = Instruction("background_change", "Change the background to snow", value="snow", remain=("dog",))


def position(where, type="position_change"):
    roles = {"target": "dog"} if type == "position_change" else {"value": "dog"}
    return Instruction(type, f"dog {where} cat", reference="cat", position=where, **roles)


def test_add_without_reference():
    empty = Scene()
    assert verdict(empty, Scene((DOG,)), ADD) is True
    assert verdict(empty, empty, ADD) is False
    assert verdict(Scene((DOG,)), Scene((DOG,)), ADD) is False  # nothing new
    assert verdict(empty, Scene((at(DOG, score=0.3 + EPS),)), ADD) is True
    assert verdict(empty, Scene((at(DOG, score=0.3 - EPS),)), ADD) is False
    assert verdict(empty, Scene((at(DOG, score=0.2),)), ADD, box_threshold=0.1) is True


@pytest.mark.parametrize(
    ("where", "step"), [("left", (-1, 0)), ("right", (1, 0)), ("above", (0, -1)), ("below", (0, 1))]
)
def test_add_beside_a_reference(where, step):
    cat = at(CAT, 0.5, 0.5, 0.1, 0.1)

    def added(apart, **config):
        dog = at(DOG, 0.5 + step[0] * apart, 0.5 + step[1] * apart, 0.1, 0.1)
        return verdict(Scene((cat,)), Scene((cat, dog)), position(where, "subject_add"), **config)

    assert added(0.03 + EPS) is True
    assert added(0.03 - EPS) is False
    assert added(-0.2) is False
    assert added(0.03 + EPS, margin=0.1) is False


def test_add_takes_any_reference_before_and_any_new_box_after():
    left = position("left", "subject_add")
    far = at(CAT, 0.9, 0.5, 0.1, 0.1)
    dogs = Scene((at(DOG, 0.7, 0.5, 0.1, 0.1, score=0.9), at(DOG, 0.95, 0.5, 0.1, 0.1, score=0.95)))
    assert verdict(Scene((CAT, far)), dogs, left) is True  # the reference is looked for before, and is gone after
    assert verdict(Scene((CAT,)), dogs, left) is False
    assert verdict(Scene(), dogs.with_(CAT), left) is False


def test_remove_threshold_and_large_boxes():
    gone = Scene()
    assert verdict(Scene((DOG,)), gone, REMOVE) is True
    assert verdict(Scene((DOG,)), Scene((DOG,)), REMOVE) is False
    assert verdict(gone, gone, REMOVE) is False  # was not there
    assert verdict(Scene((at(DOG, score=0.35 + EPS),)), gone, REMOVE) is True
    assert verdict(Scene((at(DOG, score=0.35 - EPS),)), gone, REMOVE) is False
    assert verdict(Scene((DOG,)), Scene((at(DOG, score=0.35 - EPS),)), REMOVE) is True
    for sides, found in (((0.981, 0.981), False), ((0.979, 0.981), True), ((0.981, 0.979), True)):
        assert verdict(Scene((at(DOG, 0.5, 0.5, *sides),)), gone, REMOVE) is found
    assert verdict(Scene((DOG,)), Scene((at(DOG, 0.5, 0.5, 0.99, 0.99),)), REMOVE) is True


def test_remove_by_overlap_of_best_boxes():
    # two boxes of side s shifted by d in x: IoU = (s − d) / (s + d) = 0.2 at d = 2s/3
    side = 0.3
    for shift, removed in ((2 / 3 * side + EPS, True), (2 / 3 * side - EPS, False)):
        after = Scene((at(DOG, 0.5 + shift, 0.5, side, side),))
        assert verdict(Scene((at(DOG, 0.5, 0.5, side, side),)), after, REMOVE) is removed
    near, other = at(DOG, score=0.5), at(DOG, 0.9, 0.9, 0.1, 0.1, score=0.8)
    assert verdict(Scene((at(DOG, score=0.9),)), Scene((near, other)), REMOVE) is True
    assert verdict(Scene((at(DOG, score=0.9),)), Scene((at(near, score=0.81), other)), REMOVE) is False


def test_replace_in_code_and_in_paper():
    dog, cat = Scene((DOG,)), Scene((at(CAT, 0.55, 0.5, 0.2, 0.2),))
    elsewhere = Scene((at(CAT, 0.9, 0.9, 0.1, 0.1),))
    both = cat.with_(at(DOG, 0.1, 0.1, 0.1, 0.1))
    for mode in ("code", "paper"):
        assert verdict(dog, cat, REPLACE, replace=mode) is True
        assert verdict(dog, Scene(), REPLACE, replace=mode) is False
        assert verdict(dog, dog, REPLACE, replace=mode) is False
        refused = replace(cat, answers={"give way": "No."})
        assert verdict(dog, refused, REPLACE, replace=mode) is False
    # the two differ: where the new one stands, whether the old one may stay, whether it must have been found
    agreed = {"answers": {"give way": "Yes"}}
    assert verdict(dog, elsewhere, REPLACE, replace="code") is False
    assert verdict(dog, elsewhere, REPLACE, replace="paper") is True
    assert verdict(dog, replace(both, **agreed), REPLACE, replace="code") is True
    assert verdict(dog, replace(both, **agreed), REPLACE, replace="paper") is False
    assert verdict(Scene(), replace(cat, **agreed), REPLACE, replace="code") is False
    assert verdict(Scene(), replace(cat, **agreed), REPLACE, replace="paper") is True


def test_replace_needs_any_overlap():
    for x, overlap in ((0.7 - EPS, True), (0.7 + EPS, False)):
        assert verdict(Scene((DOG,)), Scene((at(CAT, x, 0.5, 0.2, 0.2),)), REPLACE) is overlap
    faint = at(CAT, 0.5, 0.5, 0.2, 0.2, score=0.3 - EPS)
    assert verdict(Scene((DOG,)), Scene((faint,)), REPLACE) is False


@pytest.mark.parametrize(("instruction", "attribute"), [(COLOR, "color"), (MATERIAL, "material")])
def test_colour_and_material_on_crops_and_whole_images(instruction, attribute):
    changed = {attribute: instruction.value}
    before, after = Scene((DOG, CAT)), Scene((at(DOG, **changed), CAT))
    assert verdict(before, after, instruction) is True
    assert verdict(before, before, instruction) is False
    # the whole image also shows the cat, which keeps its look: this world's VLM then says no
    assert verdict(before, after, instruction, attributes="whole") is False
    assert verdict(Scene((DOG,)), Scene((at(DOG, **changed),)), instruction, attributes="whole") is True
    # crops need the object found before; whole images do not
    lost = Scene((at(DOG, score=0.3 - EPS),))
    assert verdict(lost, Scene((at(DOG, **changed),)), instruction) is False
    assert verdict(lost, Scene((at(DOG, **changed),)), instruction, attributes="whole") is True


def test_attribute_crops_are_the_same_box_of_both_images():
    world = World(Scene((at(DOG, 0.3, 0.6, 0.2, 0.4),)), Scene((DOG,)))
    check_turns(world.images, [Turn(0, 1, COLOR)], world, world)
    shown = world.asked[0][0].images
    assert all(image.shape == (3, 40, 20) for image in shown)
    assert [round(image[0, 0, 0].item() * 255) for image in shown] == [0, 1]
    assert torch.equal(shown[0][1:], world.images[0][1:, 40:80, 20:40])
    assert torch.equal(shown[1][1:], shown[0][1:])


def test_text_on_an_object_and_on_the_image():
    before, after = Scene((at(DOG, text="A"), CAT)), Scene((at(DOG, text="the BOW tie"), CAT))
    assert verdict(before, after, TEXT) is True  # substring, whatever the case
    assert verdict(before, Scene((at(DOG, text="Bo w"),)), TEXT) is False
    assert verdict(before, Scene((DOG, at(CAT, text="Bow"))), TEXT) is False  # on another object
    assert verdict(before, Scene((DOG, at(CAT, text="Bow"))), ADD_TEXT) is True
    assert verdict(before, before, ADD_TEXT) is False
    for lost in (before, after):
        scenes = [replace(s, things=(at(s.things[0], score=0.29),)) if s is lost else s for s in (before, after)]
        assert verdict(*scenes, TEXT) is False


@pytest.mark.parametrize(("where", "x", "y"), [("left", -1, 0), ("right", 1, 0), ("above", 0, -1), ("below", 0, 1)])
def test_position_compares_centres(where, x, y):
    cat = at(CAT, 0.5, 0.5, 0.1, 0.2)
    before = Scene((at(DOG, 0.1, 0.1, 0.2, 0.1), cat))
    for step, moved in ((EPS, True), (-EPS, False), (0.3, True)):
        dog = at(DOG, 0.5 + step * x, 0.5 + step * y, 0.2, 0.1)
        assert verdict(before, Scene((dog, cat)), position(where)) is moved


def test_position_keeps_counts_at_their_own_threshold():
    left, cat = position("left"), at(CAT, 0.5, 0.5, 0.1, 0.1)
    before = Scene((at(DOG, 0.9, 0.5, 0.1, 0.1), cat))
    moved = Scene((at(DOG, 0.1, 0.5, 0.1, 0.1), cat))
    assert verdict(before, moved, left) is True
    for thing in (at(DOG, 0.7, 0.9, 0.1, 0.1, score=0.4), at(CAT, 0.7, 0.9, 0.1, 0.1, score=0.4)):
        assert verdict(before, moved.with_(replace(thing, score=0.4 + EPS)), left) is False
        assert verdict(before, moved.with_(replace(thing, score=0.4 - EPS)), left) is True
    assert verdict(before, Scene((cat,)), left) is False
    assert verdict(Scene((cat,)), Scene((cat,)), left) is False  # none before, none after
    assert verdict(before, moved.with_(at(DOG, 0.7, 0.9, 0.1, 0.1)), left) is False
    # between the two thresholds nothing is counted, and the best box after still decides
    faint = [Scene((at(DOG, x, 0.5, 0.1, 0.1, score=0.35), cat)) for x in (0.9, 0.1)]
    assert verdict(*faint, left) is True
    assert verdict(*faint, left, box_threshold=0.36) is False


def test_position_counts_near_duplicates_once():
    left, cat = position("left"), at(CAT, 0.5, 0.5, 0.1, 0.1)
    before, moved = Scene((at(DOG, 0.9, 0.5, 0.1, 0.1), cat)), Scene((at(DOG, 0.1, 0.5, 0.1, 0.1), cat))
    # IoU (s − d) / (s + d) = 0.8 at d = s / 9
    for shift, kept in ((0.1 / 9 - EPS, True), (0.1 / 9 + EPS, False)):
        assert verdict(before, moved.with_(at(DOG, 0.1 + shift, 0.5, 0.1, 0.1, score=0.8)), left) is kept


def test_position_refuses_boxes_within_one_another():
    left, before = position("left"), Scene((at(DOG, 0.9, 0.5, 0.1, 0.1), CAT))
    for dog, cat, apart in (
        ((0.45, 0.5, 0.1, 0.1), (0.5, 0.5, 0.3, 0.3), False),
        ((0.45, 0.5, 0.4, 0.4), (0.5, 0.5, 0.1, 0.1), False),
        ((0.36, 0.5, 0.1, 0.1), (0.5, 0.5, 0.3, 0.3), True),
    ):
        assert verdict(before, Scene((at(DOG, *dog), at(CAT, *cat))), left) is apart


def test_count():
    one = Scene((at(DOG, 0.1, 0.1, 0.1, 0.1),))
    two, three = one.with_(DOG), one.with_(DOG, at(DOG, 0.9, 0.9, 0.1, 0.1))
    assert verdict(one, two, COUNT) is True
    assert verdict(three, two, COUNT) is True
    assert verdict(one, one, COUNT) is False
    assert verdict(one, three, COUNT) is False
    assert verdict(Scene(), two, COUNT) is False
    for score, found in ((0.3 + EPS, True), (0.3 - EPS, False)):
        assert verdict(one, one.with_(at(DOG, score=score)), COUNT) is found
        assert verdict(Scene((at(DOG, score=score),)), two, COUNT) is found
    for shift, counted in ((0.2 / 9 - EPS, True), (0.2 / 9 + EPS, False)):
        assert verdict(one, two.with_(at(DOG, 0.5 + shift, 0.5, 0.2, 0.2, score=0.8)), COUNT) is counted
    assert verdict(one, two.with_(at(DOG, 0.5 + 0.2 / 9 - EPS, 0.5, 0.2, 0.2, score=0.8)), COUNT, nms_iou=0.9) is False


def test_background_and_what_must_remain():
    snow = Scene((DOG,), "snow")
    assert verdict(Scene((DOG,)), snow, BACKGROUND) is True
    assert verdict(Scene((DOG,)), Scene((DOG,)), BACKGROUND) is False
    assert verdict(Scene((DOG,)), Scene((), "snow"), BACKGROUND) is False
    assert verdict(Scene(), Scene((), "snow"), replace(BACKGROUND, remain=())) is True
    assert verdict(Scene((DOG, CAT)), snow, replace(BACKGROUND, remain=("dog", "cat"))) is False
    for score, found in ((0.25 + EPS, True), (0.25 - EPS, False)):
        assert verdict(Scene((DOG,)), Scene((at(DOG, score=score),), "snow"), BACKGROUND) is found
    for sides, small in (((0.901, 0.901), False), ((0.899, 0.901), True), ((0.901, 0.899), True)):
        assert verdict(Scene((DOG,)), Scene((at(DOG, 0.5, 0.5, *sides),), "snow"), BACKGROUND) is small
    # only the best box counts, as in the public code
    large = Scene((at(DOG, 0.5, 0.5, 0.95, 0.95, score=0.95), DOG), "snow")
    assert verdict(Scene((DOG,)), large, BACKGROUND) is False


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("Yes.", True),
        ("**NO**, because yes", False),
        ("yes\n", True),
        ("The answer is: no", False),
        ("", None),
        ("I cannot tell.", None),
        ("Maybe yes, maybe no", None),
        ("Nothing eyes", None),
        ("42", None),
    ],
)
def test_read_yes_no(answer, value):
    assert read_yes_no(answer) is value


def test_an_unreadable_answer_leaves_the_verdict_open():
    before, after = Scene((CAT, DOG)), Scene((CAT, DOG, at(DOG, 0.1, 0.1, 0.1, 0.1)), answers={"": "Hard to say"})
    turns = [Turn(0, 1, instruction) for instruction in (ADD, COLOR, BACKGROUND, TEXT, REMOVE)]
    world = World(before, after)
    results = check_turns(world.images, turns, world, world)
    assert [result.value for result in results] == [None, None, None, False, False]
    assert "Hard to say" in results[0].reason
    # what the detector refutes needs no answer
    assert verdict(before, replace(after, things=()), ADD) is False


def test_many_turns_in_few_calls_and_each_pair_once():
    scenes = [Scene((DOG, CAT)), Scene((CAT,)), Scene((CAT, DOG)), Scene((CAT, at(DOG, color="blue")), "snow")]
    turns = [
        Turn(0, 1, REMOVE),
        Turn(1, 2, ADD),
        Turn(2, 3, COLOR),
        Turn(2, 3, BACKGROUND),
        Turn(0, 2, position("right")),
        Turn(1, 2, position("right", "subject_add")),
        Turn(0, 3, COUNT),
        Turn(0, 3, ADD_TEXT),
    ]
    world = World(*scenes)
    together = check_turns(world.images, turns, world, world)
    assert [result.value for result in together] == [True, True, True, True, True, True, False, False]
    queries = [query for call in world.detected for query in call]
    assert len(world.detected) == 1
    assert sorted(queries) == ["cat"] * 3 + ["dog"] * 4  # of 4 images × 2 names, those needed, each once
    assert [len(call) for call in world.asked] == [5]
    alone = [check_turns(world.images, [turn], world, world)[0] for turn in turns]
    assert alone == together


def test_finder_splits_by_size_and_batch_and_drops_unusable_boxes():
    class Fixed:
        calls: list = []  # noqa: RUF012

        def detect(self, images, queries, *, box_threshold=0.3, text_threshold=None):
            self.calls.append((list(images.shape), box_threshold))
            boxes = torch.tensor([[0.5, 0.5, 0.1, 0.1], [float("nan"), 0.5, 0.1, 0.1], [0.2, 0.2, 0.1, 0.1]])
            return [Detection(boxes, torch.tensor([0.5, 0.9, 0.7]), ["a", "b", "c"]) for _ in queries]

    images = [torch.zeros(3, 8, 8), torch.zeros(3, 8, 12), torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)]
    finder = Finder(Fixed(), images, floor=0.1, batch_size=2)
    found = finder.find([Find(i, "x", 0.6) for i in range(4)] + [Find(0, "x", 0.2)])
    assert sorted(Fixed.calls) == [([1, 3, 8, 8], 0.1), ([1, 3, 8, 12], 0.1), ([2, 3, 8, 8], 0.1)]
    assert [f.phrases for f in found] == [["c"]] * 4 + [["c", "a"]]
    assert found[4].scores.tolist() == pytest.approx([0.7, 0.5])
    finder.find([Find(2, "x", 0.3)])
    assert len(Fixed.calls) == 3


def test_queries_and_crops():
    assert query_for(" Dr. Pepper  Can") == "dr pepper can"
    image = torch.rand(3, SIZE, SIZE)
    assert torch.equal(crop(image, torch.tensor([0.5, 0.25, 0.2, 0.1])), image[:, 20:30, 40:60])
    assert crop(image, torch.tensor([1.0, 1.0, 0.001, 0.001])).shape == (3, 1, 1)


def test_every_type_has_a_check_and_names_what_it_lacks():
    world = World(Scene(), Scene())
    for kind in TYPES:
        with pytest.raises(ValueError, match=rf"instruction 'do it' \({kind}\) lacks its (target|value)"):
            check_turns(world.images, [Turn(0, 1, Instruction(kind, "do it"))], world, world)
    with pytest.raises(ValueError, match="value must be a whole number, got 'two'"):
        check_turns(world.images, [Turn(0, 1, replace(COUNT, value="two"))], world, world)
    with pytest.raises(ValueError, match=r"type must be one of subject_add, .*, got 'style_change'"):
        check_turns(world.images, [Turn(0, 1, Instruction("style_change", "do it"))], world, world)
    assert check_turns([], [], world, world) == []


def test_config_names_unknown_switches():
    with pytest.raises(ValueError, match="replace must be 'code' or 'paper', got 'both'"):
        CheckConfig(replace="both")
    with pytest.raises(ValueError, match="attributes must be 'crops' or 'whole', got 'boxes'"):
        CheckConfig(attributes="boxes")
