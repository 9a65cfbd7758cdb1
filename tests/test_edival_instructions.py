"""Instructions: their text as the specification words it, and back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtedit_fast.edival.instructions import CATEGORY, COLORS, POSITIONS, TYPES, Instruction, instruct, parse, render

# type, fields, bracketed text as in the public benchmark, text for the editor
WORDED = [
    (
        "subject_add",
        {"value": "dog", "position": "left", "reference": "red car"},
        "Add [dog] on the [left] of [red car]",
        "Add dog on the left of red car",
    ),
    ("subject_add", {"value": "dog"}, "Add [dog]", "Add dog"),
    ("subject_remove", {"target": "red car"}, "Remove [red car]", "Remove red car"),
    (
        "subject_replace",
        {"target": "red car", "value": "bus"},
        "Replace [red car] with [bus]",
        "Replace red car with bus",
    ),
    (
        "color_alter",
        {"target": "red car", "value": "blue"},
        "Change the color of [red car] to [blue]",
        "Change the color of red car to blue",
    ),
    (
        "material_alter",
        {"target": "red car", "value": "wood"},
        "Change the material of [red car] to [wood]",
        "Change the material of red car to wood",
    ),
    (
        "text_change",
        {"target": "sign", "old_text": "STOP", "value": "Go on"},
        "Replace the text '[STOP]' on [sign] with '[Go on]'",
        "Replace the text 'STOP' on sign with 'Go on'",
    ),
    ("text_change", {"value": "出口"}, "Add text '[出口]' on the image", "Add text '出口' on the image"),
    (
        "position_change",
        {"target": "red car", "position": "above", "reference": "sign"},
        "Change the position of [red car] to [above] of [sign]",
        "Change the position of red car to above of sign",
    ),
    (
        "count_change",
        {"target": "red car", "value": "4"},
        "Change the count of [red car] to [4]",
        "Change the count of red car to 4",
    ),
    ("background_change", {"value": "beach"}, "Change the background to [beach]", "Change the background to beach"),
]


@pytest.mark.parametrize(("type", "fields", "bracketed", "text"), WORDED)
def test_wording(type, fields, bracketed, text):
    made = instruct(type, **fields)
    assert made == Instruction(type, text, **fields)
    assert render(made) == text
    assert render(made, brackets=True) == bracketed
    assert parse(bracketed) == made
    assert parse(text) == made


def test_what_must_remain():
    text = "Change the background to snowy field, remain the red car, metal sign unchanged"
    made = instruct("background_change", value="snowy field", remain=("red car", "metal sign"))
    assert made.text == render(made) == text
    assert render(made, brackets=True) == "Change the background to [snowy field]"
    assert parse(text) == made


def test_types():
    assert len(TYPES) == 9
    assert len(set(CATEGORY.values())) == 6
    assert CATEGORY["material_alter"] == "attribute"
    assert len(set(COLORS)) == 11


@pytest.mark.parametrize(
    ("text", "type"),
    [("ADD [dog] on the [Left] of [car]", "subject_add"), ("remove red car.", "subject_remove")],
)
def test_case_and_a_final_dot_do_not_matter(text, type):
    assert parse(text).type == type
    assert parse(text).position in (None, "left")


name = st.text("abcdefgh", min_size=1).map(lambda s: f"the {s} thing")
value = st.text(st.characters(exclude_characters="[]", exclude_categories=("C", "Z")), min_size=1)


@settings(deadline=None, derandomize=True)
@given(st.sampled_from([w[:2] for w in WORDED]), st.data())
def test_bracketed_text_reads_back_to_its_fields(worded, data):
    type, fields = worded
    drawn = {"position": st.sampled_from(POSITIONS), "value": value}
    if type == "count_change":
        drawn["value"] = st.integers(1, 99).map(str)
    made = instruct(type, **{k: data.draw(drawn.get(k, value)) for k in fields})
    assert parse(render(made, brackets=True)) == made


@settings(deadline=None, derandomize=True)
@given(st.sampled_from([w[:2] for w in WORDED]), st.data())
def test_plain_text_reads_back_to_its_fields(worded, data):
    type, fields = worded
    drawn = {"position": st.sampled_from(POSITIONS), "value": st.integers(1, 99).map(str)}
    made = instruct(type, **{k: data.draw(drawn.get(k, name)) for k in fields})
    assert parse(made.text) == made


@pytest.mark.parametrize(
    ("type", "fields", "reason"),
    [
        ("paint", {}, "type must be one of subject_add, .*, got 'paint'"),
        ("subject_remove", {}, r"subject_remove needs the fields \['target'\], none empty, got {}"),
        ("subject_remove", {"target": ""}, "none empty"),
        ("subject_remove", {"target": "a", "value": "b"}, "needs the fields"),
        ("subject_add", {"value": "a", "position": "left"}, r"\['value', 'position', 'reference'\] or \['value'\]"),
        ("subject_add", {"value": "a", "position": "near", "reference": "b"}, "position must be one of left, .*'near'"),
        ("count_change", {"target": "a", "value": "0"}, "whole number of at least 1, got '0'"),
        ("count_change", {"target": "a", "value": "two"}, "whole number of at least 1, got 'two'"),
        ("subject_remove", {"target": "a", "remain": ("b",)}, "remain belongs to background_change"),
        ("text_change", {"value": "[b]"}, r"fields must not hold brackets, .* got '\[b\]'"),
        ("text_change", {"target": "a", "value": "b"}, "text_change needs the fields"),
    ],
)
def test_fields_that_do_not_fit(type, fields, reason):
    with pytest.raises(ValueError, match=reason):
        instruct(type, **fields)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "none of EdiVal's nine types"),
        ("Make it nicer", "'Make it nicer' is none of EdiVal's nine types"),
        ("Change the count of [car] to [many]", "cannot be read as count_change: .* got 'many'"),
        ("Change the position of [a] to [near] of [b]", "cannot be read as position_change: .* got 'near'"),
        ("Remove []", "none of EdiVal's nine types"),
    ],
)
def test_text_that_cannot_be_read(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse(text)
