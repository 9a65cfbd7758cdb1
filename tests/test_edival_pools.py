"""The object pools: every rule of the specification, invariants over random chains, and what is drawn from them."""

import json
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtedit_fast.edival.instructions import TYPES, instruct
from mtedit_fast.edival.objects import SceneObject, object_key
from mtedit_fast.edival.pools import Pools, generate
from mtedit_fast.edival.proposers import ListProposer, VLMProposer


def scene_object(name, color=None, material=None, *, text=None, count=1, foreground=True):
    box = (0.5, 0.5, 0.2, 0.2)
    return SceneObject(
        object_key(name, color, material),
        name,
        color,
        material,
        text,
        count,
        foreground,
        (box,) * count,
        (0.9,) * count,
    )


CAR = scene_object("car", "red", "metal")
SIGN = scene_object("sign", "white", text="STOP")
DOGS = scene_object("dog", count=2)
HILL = scene_object("hill", "green", foreground=False)
SCENE = [CAR, SIGN, DOGS, HILL]
KEYS = ("metal red car", "white sign", "dog", "green hill")
START = Pools.start(SCENE)


def after(type, **fields):
    return START.apply(instruct(type, **fields))


def state(pools):
    return pools.available, pools.unchanged, pools.all, pools.has_background_change


def test_start():
    assert state(START) == (KEYS, KEYS, KEYS, False)
    assert Pools.start({o.key: o for o in SCENE}) == START
    assert state(Pools.start([])) == ((), (), (), False)


CAR_KEY, *OTHERS = KEYS


@pytest.mark.parametrize(
    ("type", "fields", "available", "unchanged", "new"),
    [
        ("subject_add", {"value": "cat"}, (*KEYS, "cat"), KEYS, ("cat",)),
        ("subject_add", {"value": "cat", "reference": "dog", "position": "left"}, (*KEYS, "cat"), KEYS, ("cat",)),
        ("subject_remove", {"target": CAR_KEY}, OTHERS, OTHERS, ()),
        ("subject_replace", {"target": CAR_KEY, "value": "bus"}, (*OTHERS, "bus"), OTHERS, ("bus",)),
        ("color_alter", {"target": CAR_KEY, "value": "blue"}, (*OTHERS, "metal blue car"), OTHERS, ("metal blue car",)),
        ("color_alter", {"target": "dog", "value": "blue"}, None, None, ("blue dog",)),
        ("material_alter", {"target": CAR_KEY, "value": "wooden"}, None, OTHERS, ("wooden red car",)),
        ("material_alter", {"target": "white sign", "value": "glass"}, None, None, ("glass white sign",)),
        ("count_change", {"target": CAR_KEY, "value": "4"}, KEYS, OTHERS, ()),
        ("text_change", {"target": "white sign", "old_text": "STOP", "value": "GO"}, KEYS, None, ()),
        ("text_change", {"value": "HELLO"}, KEYS, KEYS, ("HELLO",)),
        (
            "position_change",
            {"target": CAR_KEY, "reference": "dog", "position": "above"},
            KEYS,
            ("white sign", "green hill"),
            (),
        ),
    ],
)
def test_rules(type, fields, available, unchanged, new):
    pools = after(type, **fields)
    target = fields.get("target")
    kept = tuple(k for k in KEYS if k != target)
    assert pools.available == tuple(available or (*kept, *new))
    assert pools.unchanged == tuple(unchanged or kept)
    assert pools.all == (*KEYS, *new)
    assert not pools.has_background_change
    assert state(START) == (KEYS, KEYS, KEYS, False)


def test_attributes_follow_the_edit():
    new = after("subject_replace", target="metal red car", value="bus").objects["bus"]
    assert new == SceneObject("bus", "bus", "red", "metal", None, 1, True)
    assert after("subject_replace", target="green hill", value="lake").objects["lake"].foreground is False
    assert after("subject_replace", target="white sign", value="lamp").objects["lamp"].text is None
    assert after("count_change", target="dog", value="5").objects["dog"].count == 5
    lettered = after("text_change", target="white sign", old_text="STOP", value="GO").objects["white sign"]
    assert (lettered.text, lettered.boxes) == ("GO", ())
    blue = after("color_alter", target="metal red car", value="blue").objects["metal blue car"]
    assert (blue.color, blue.material, blue.object) == ("blue", "metal", "car")
    assert after("color_alter", target="metal red car", value="blue").objects["dog"] is DOGS
    again = after("subject_replace", target="metal red car", value="bus").apply(
        instruct("color_alter", target="bus", value="blue")
    )
    assert again.available[-1] == "blue bus"  # the bus's name never held the car's colour


def test_background_keeps_the_original_foreground_and_sticks():
    pools = after("subject_add", value="cat").apply(instruct("color_alter", target="white sign", value="red"))
    pools = pools.apply(instruct("background_change", value="beach"))
    # an added object and a renamed one are no keys of the original image
    assert state(pools) == (("metal red car", "dog"), ("metal red car", "dog"), (*KEYS, "cat", "red sign"), True)
    pools = pools.apply(instruct("subject_remove", target="dog"))
    assert state(pools)[1:] == (("metal red car",), (*KEYS, "cat", "red sign"), True)


def test_an_object_added_under_a_lost_name_is_not_the_original():
    pools = after("background_change", value="beach").apply(instruct("subject_add", value="green hill"))
    assert "green hill" in pools.available
    assert "green hill" not in pools.unchanged
    pools = after("subject_remove", target="dog").apply(instruct("subject_add", value="dog"))
    assert "dog" in pools.available
    assert "dog" not in pools.unchanged


def test_two_objects_that_become_one_name():
    pools = Pools.start([scene_object("car", "red"), scene_object("car", "blue")])
    merged = pools.apply(instruct("color_alter", target="red car", value="blue"))
    assert state(merged) == (("blue car",), ("blue car",), ("red car", "blue car"), False)


@pytest.mark.parametrize(
    ("type", "fields", "name"),
    [
        ("subject_remove", {"target": "cat"}, "target"),
        ("subject_add", {"value": "b", "position": "left", "reference": "cat"}, "reference"),
        ("position_change", {"target": "dog", "position": "left", "reference": "cat"}, "reference"),
    ],
)
def test_objects_that_are_not_available(type, fields, name):
    with pytest.raises(ValueError, match=f"{name} of .* must be one of the available objects .*'dog'.*, got 'cat'"):
        after(type, **fields)


def test_keys_must_differ():
    with pytest.raises(ValueError, match=r"objects must have different keys, got \['dog'\]"):
        Pools.start([DOGS, DOGS])


PROPOSER = ListProposer(
    objects=["cat", "bus", "lamp", "boat", "tree", "chair", "dog"],
    materials=["wooden", "glass", "metal"],
    texts=["GO", "EXIT"],
    backgrounds=["beach", "forest"],
)
made_objects = st.builds(
    scene_object,
    st.sampled_from(["car", "dog", "sign", "hill", "red barn"]),
    st.sampled_from([None, "red", "blue"]),
    st.sampled_from([None, "metal", "wooden"]),
    text=st.sampled_from([None, "STOP"]),
    count=st.integers(1, 3),
    foreground=st.booleans(),
)
scenes = st.lists(made_objects, max_size=6, unique_by=lambda o: o.key)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(scenes, st.integers(1, 9), st.integers(0, 2**32))
def test_invariants_of_random_chains(scene, turns, seed):
    for i in range(10):  # a scene costs more to draw than its chains
        check_chain(scene, turns, seed + i)


def check_chain(scene, turns, seed):
    before = Pools.start(scene)
    originals = set(before.all)
    foreground = {o.key for o in scene if o.foreground}
    edited = set()
    # nine turns can use up the proposer's objects, so it has some to spare
    spare = ListProposer([f"thing {i}" for i in range(12)], PROPOSER.materials, PROPOSER.texts, PROPOSER.backgrounds)
    chain = generate(scene, turns=turns, seed=seed, proposer=spare)
    assert len(chain) == turns
    for instruction, pools in chain:
        kind, value = instruction.type, instruction.value
        edited |= {instruction.target} - {None}
        edited |= {instruction.reference} if kind == "position_change" else set()
        assert pools == before.apply(instruction)
        assert set(pools.unchanged) <= set(pools.available) <= set(pools.all)
        assert set(pools.unchanged) <= originals - edited
        assert set(pools.unchanged) <= set(before.unchanged)
        assert pools.all[: len(before.all)] == before.all
        assert len(set(pools.all)) == len(pools.all)
        assert all(key == o.key for key, o in pools.objects.items())
        assert pools.has_background_change == (before.has_background_change or kind == "background_change")
        for key in (instruction.target, instruction.reference):
            assert key is None or key in before.available
        expected = set(before.available)
        if kind == "subject_add":
            assert value not in before.all
            expected |= {value}
        elif kind == "background_change":
            assert instruction.remain == tuple(k for k in before.available if before.objects[k].foreground)
            expected &= foreground
        elif kind in ("subject_remove", "subject_replace", "color_alter", "material_alter"):
            expected -= {instruction.target}
            expected |= {pools.all[-1]} if kind != "subject_remove" else set()
            assert kind == "subject_remove" or len(pools.all) == len(before.all) + 1
        elif kind == "count_change":
            assert int(value) != before.objects[instruction.target].count
        elif kind == "position_change":
            assert instruction.target != instruction.reference
        assert set(pools.available) == expected
        before = pools
    drawn = Counter(i.type for i, _ in chain)
    assert all(n == 1 for kind, n in drawn.items() if kind != "subject_add")


def test_types_are_drawn_uniformly():
    scene = [scene_object(n, "red", "metal", text="STOP") for n in ("car", "sign", "barn", "hat")]
    n = 4500
    drawn = Counter(generate(scene, turns=1, seed=s, proposer=PROPOSER)[0][0].type for s in range(n))
    assert set(drawn) == set(TYPES)
    chi_squared = sum((drawn[t] - n / 9) ** 2 / (n / 9) for t in TYPES)
    assert chi_squared < 26.12  # 99.9th percentile, 8 degrees of freedom


def test_a_seed_repeats_a_chain():
    assert generate(SCENE, seed=5, proposer=PROPOSER) == generate(SCENE, seed=5, proposer=PROPOSER)
    assert generate(SCENE, seed=random.Random(5), proposer=PROPOSER) == generate(SCENE, seed=5, proposer=PROPOSER)
    assert len({generate(SCENE, seed=s, proposer=PROPOSER)[0][0].text for s in range(20)}) > 5


def test_what_cannot_be_done_becomes_an_addition():
    only_add = ListProposer(["cat", "bus", "lamp"])
    for seed in range(30):
        first, *_ = generate([], turns=1, seed=seed, proposer=only_add)
        assert first[0].type == "subject_add"
        assert first[0].reference is None
    kinds = {generate([DOGS], turns=1, seed=s, proposer=only_add)[0][0].type for s in range(60)}
    # one object cannot be placed relative to another, and nothing is proposed for material, text and background
    assert kinds == {"subject_add", "subject_remove", "subject_replace", "color_alter", "count_change"}


def test_texts_are_replaced_where_there_are_any():
    def of(scene):
        chains = (generate(scene, turns=1, seed=s, proposer=PROPOSER)[0][0] for s in range(100))
        return {(i.target, i.old_text) for i in chains if i.type == "text_change"}

    assert of(SCENE) == {("white sign", "STOP")}
    assert of([CAR, DOGS]) == {(None, None)}


def test_refused_instructions_are_drawn_again():
    def accept(earlier, candidate):
        assert all(i.text for i in earlier)
        return candidate.type == "subject_add" and candidate.reference in (None, "dog") and candidate.position != "left"

    for seed in range(20):
        for instruction, _ in generate(SCENE, seed=seed, proposer=PROPOSER, accept=accept):
            assert accept([], instruction)
    with pytest.raises(ValueError, match=r"turn 1 \(.*\): no object can be added"):
        generate(SCENE, proposer=PROPOSER, accept=lambda earlier, candidate: False)


@pytest.mark.parametrize("turns", [0, 10])
def test_turns_outside(turns):
    with pytest.raises(ValueError, match=rf"turns must be in 1\.\.9 .*, got {turns}"):
        generate(SCENE, turns=turns, proposer=PROPOSER)


def test_no_objects_to_add():
    with pytest.raises(ValueError, match=r"no object can be added; give the proposer objects other than dog"):
        generate([DOGS], turns=9, proposer=ListProposer(["dog"]))


class Answers:
    """A model that gives one answer and keeps what it was asked."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = []

    def ask(self, questions):
        self.asked += questions
        return [self.answer] * len(questions)


IMAGE = torch.zeros(3, 4, 4)


@pytest.mark.parametrize(
    ("type", "target", "answer", "truth"),
    [
        ("subject_add", None, '{"value": "A Lamp."}', "a lamp"),
        ("subject_replace", CAR, '```json\n{"value": "bus"}\n```', "bus"),
        ("color_alter", CAR, '{"value": "blue"}', "blue"),
        ("material_alter", CAR, '{"value": "[Glass]"}', "glass"),
        ("text_change", SIGN, '{"value": "\'GO  ON\'"}', "GO ON"),
        ("text_change", None, '{"value": "出口"}', "出口"),
        ("background_change", None, '{"value": "snowy field"}', "snowy field"),
    ],
)
def test_a_model_proposes(type, target, answer, truth):
    vlm = Answers(answer)
    proposer = VLMProposer(vlm, IMAGE, PROPOSER)
    assert proposer.propose(type, target, START, random.Random(0)) == truth
    assert proposer.failures == 0
    (question,) = vlm.asked
    assert question.images[0] is IMAGE
    assert target is None or target.key in question.text


@pytest.mark.parametrize(
    ("type", "target", "answer"),
    [
        ("subject_add", None, "a lamp"),
        ("subject_add", None, '["lamp"]'),
        ("subject_add", None, '{"value": 3}'),
        ("subject_add", None, '{"value": " "}'),
        ("subject_add", None, '{"value": "dog"}'),  # in the image already
        ("color_alter", CAR, '{"value": "red"}'),  # it is red
        ("color_alter", CAR, '{"value": "crimson"}'),  # not one of the eleven
        ("text_change", SIGN, '{"value": "STOP"}'),
    ],
)
def test_a_model_that_proposes_nothing_usable(type, target, answer):
    proposer = VLMProposer(Answers(answer), IMAGE, PROPOSER)
    value = proposer.propose(type, target, START, random.Random(0))
    assert value == PROPOSER.propose(type, target, START, random.Random(0))
    assert value not in ("dog", "red", "STOP", "crimson")
    assert proposer.failures == 1


def test_counts_are_drawn_without_asking():
    vlm = Answers(json.dumps({"value": "9"}))
    values = {
        VLMProposer(vlm, IMAGE, PROPOSER).propose("count_change", DOGS, START, random.Random(s)) for s in range(20)
    }
    assert values == {"3", "4", "5"}
    assert not vlm.asked
    four = scene_object("dog", count=4)
    assert {PROPOSER.propose("count_change", four, START, random.Random(s)) for s in range(20)} == {"3", "5"}
    own = ListProposer(["a"], counts=(1, 2), colors=("red",))
    assert {own.propose("count_change", DOGS, START, random.Random(s)) for s in range(20)} == {"1"}
    assert own.propose("color_alter", CAR, START, random.Random(0)) is None
