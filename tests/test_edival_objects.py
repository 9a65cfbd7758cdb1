"""Objects read from a model's answer, in the forms models give and the ones they should not."""

import json

import pytest

from mtedit_fast.edival.objects import SceneObject, all_objects, find_json, object_key, parse_objects

TABLE = {"object": "table", "color": "brown", "material": "wooden", "text": None, "count": 2, "foreground": True}
SKY = {"object": "sky", "color": "Blue", "material": "unknown", "count": 1, "foreground": False}
EXPECTED = {
    "wooden brown table": SceneObject("wooden brown table", "table", "brown", "wooden", None, 2, True),
    "blue sky": SceneObject("blue sky", "sky", "blue", None, None, 1, False),
}


@pytest.mark.parametrize(
    "answer",
    [
        json.dumps([TABLE, SKY]),
        json.dumps({"objects": [TABLE, SKY]}),
        json.dumps({"wooden brown table": TABLE, "blue sky": SKY, "All Objects": "wooden brown table. blue sky"}),
        f"Here they are:\n```json\n{json.dumps([TABLE, SKY], indent=2)}\n```\nAnything else?",
        f"In [this] picture {{two things}}: {json.dumps({'objects': [TABLE, SKY]})} - done.",
    ],
)
def test_forms_of_an_answer(answer):
    found = parse_objects(answer)
    assert found == EXPECTED
    assert list(found) == list(EXPECTED)


def test_a_key_is_material_colour_object_without_what_is_unknown():
    assert object_key("car") == "car"
    assert object_key("car", "red") == "red car"
    assert object_key("car", None, "metal") == "metal car"
    assert object_key("car", "red", "metal") == "metal red car"


@pytest.mark.parametrize(
    ("entry", "key", "name"),
    [
        ({"object": "wooden brown table", "color": "brown", "material": "wooden"}, "wooden brown table", "table"),
        ({"object": "Traffic  Light", "color": "N/A"}, "traffic light", "traffic light"),
        ({"object": "orange", "color": "orange"}, "orange orange", "orange"),
        ({"object": "No. 5 sign"}, "no 5 sign", "no 5 sign"),
        ({"object": "bottle, [open]", "color": "green."}, "green bottle open", "bottle open"),
    ],
)
def test_names_are_cleaned(entry, key, name):
    assert [(o.key, o.object) for o in parse_objects(json.dumps([entry])).values()] == [(key, name)]


def test_lettering_keeps_its_case():
    assert parse_objects('[{"object": "sign", "text": "STOP  [Now]."}]')["sign"].text == "STOP Now."


@pytest.mark.parametrize(("count", "truth"), [(None, 1), ("3", 3), ("two", 2), (7, 7)])
def test_counts(count, truth):
    assert parse_objects(json.dumps([{"object": "dog", "count": count}]))["dog"].count == truth


@pytest.mark.parametrize(("foreground", "truth"), [(None, True), ("False", False), (0, False), (True, True)])
def test_foreground(foreground, truth):
    assert parse_objects(json.dumps([{"object": "dog", "foreground": foreground}]))["dog"].foreground is truth


def test_objects_of_one_key_are_one():
    found = parse_objects(json.dumps([{"object": "dog", "count": 2}, {"object": "cat"}, {"object": "Dog"}]))
    assert [(k, o.count) for k, o in found.items()] == [("dog", 3), ("cat", 1)]


def test_no_objects():
    assert parse_objects('{"objects": []}') == parse_objects("[]") == parse_objects("{}") == {}
    assert all_objects({}) == ""


def test_all_objects_joins_keys():
    assert all_objects(EXPECTED) == "wooden brown table. blue sky"
    assert all_objects(EXPECTED.values()) == "wooden brown table. blue sky"
    assert all_objects(["a", "b c"]) == "a. b c"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("I see a table and a sky.", "it holds no JSON; the answer begins 'I see a table"),
        ("", "it holds no JSON"),
        ('{"objects": [{"object": "table"', "its JSON breaks off at character 31"),
        ("[" * 100000, "cannot be read"),
        ('["table"]', "an object must be a JSON object .* got 'table'"),
        ('{"table": 3}', "an object must be a JSON object .* got 3"),
        ('[{"color": "red"}]', "'object' must name it"),
        ('[{"object": ""}]', "'object' must name it"),
        ('[{"object": " . "}]', "'object' must name it"),
        ('[{"object": "red", "color": "red", "material": ["a"]}]', r"'material' must be a string or null, got \['a'\]"),
        ('[{"object": "car", "color": 5}]', "'color' must be a string or null, got 5"),
        ('[{"object": "car", "count": 0}]', "'count' must be a whole number of at least 1, got 0"),
        ('[{"object": "car", "count": 1.5}]', "'count' must be a whole number of at least 1, got 1.5"),
        ('[{"object": "car", "count": true}]', "'count' must be a whole number of at least 1, got True"),
        ('[{"object": "car", "count": "many"}]', "'count' must be a whole number of at least 1, got 'many'"),
        ('[{"object": "car", "foreground": "maybe"}]', "'foreground' must be true or false, got 'maybe'"),
        ('[{"object": "car", "foreground": 2}]', "'foreground' must be true or false, got 2"),
    ],
)
def test_answers_that_cannot_be_read(answer, reason):
    with pytest.raises(ValueError, match=reason):
        parse_objects(answer)


def test_the_first_json_wins():
    assert find_json('x {"a": 1} [2]') == {"a": 1}
    assert find_json("{no} [1, 2] {}") == [1, 2]
