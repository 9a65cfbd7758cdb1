"""The benchmark's CSV: read as published, written as read, and bad rows reported by number."""

import csv

import pytest

from mtedit_fast.edival.benchmark import COLUMNS, BenchmarkRow, read_benchmark, write_benchmark
from mtedit_fast.edival.instructions import Instruction
from mtedit_fast.edival.objects import SceneObject
from mtedit_fast.edival.pools import generate
from mtedit_fast.edival.proposers import ListProposer

HEADER = ",".join(COLUMNS)
# Three turns of one image and one of another, as pandas writes lists
PUBLISHED = f"""{HEADER}
7,1,['subject_add'],['Add dog on the left of red car'],['Add [dog] on the [left] of [red car]'],True,"['red car', 'sky']","['red car', 'sky', 'dog']","['red car', 'sky', 'dog']"
7,2,"['subject_add', 'text_change']","['Add dog on the left of red car', ""Add text 'HI' on the image""]","['Add [dog] on the [left] of [red car]', ""Add text '[HI]' on the image""]",True,"['red car', 'sky']","['red car', 'sky', 'dog']","['red car', 'sky', 'dog', 'HI']"
7,3,"['subject_add', 'text_change', 'background_change']","['Add dog on the left of red car', ""Add text 'HI' on the image"", 'Change the background to beach, remain the red car, dog unchanged']","['Add [dog] on the [left] of [red car]', ""Add text '[HI]' on the image"", 'Change the background to [beach]']",False,['red car'],['red car'],"['red car', 'sky', 'dog', 'HI']"
12,1,['subject_remove'],['Remove cup'],['Remove [cup]'],True,[],[],['cup']
"""  # noqa: E501
IMAGE_7 = BenchmarkRow(
    "7",
    [
        Instruction("subject_add", "Add dog on the left of red car", value="dog", reference="red car", position="left"),
        Instruction("text_change", "Add text 'HI' on the image", value="HI"),
        Instruction(
            "background_change",
            "Change the background to beach, remain the red car, dog unchanged",
            value="beach",
            remain=("red car", "dog"),
        ),
    ],
    [
        "Add dog on the left of red car",
        "Add text 'HI' on the image",
        "Change the background to beach, remain the red car, dog unchanged",
    ],
    [["red car", "sky"], ["red car", "sky"], ["red car"]],
    [["red car", "sky", "dog"], ["red car", "sky", "dog"], ["red car"]],
    [["red car", "sky", "dog"], ["red car", "sky", "dog", "HI"], ["red car", "sky", "dog", "HI"]],
    [True, True, False],
)
IMAGE_12 = BenchmarkRow(
    "12", [Instruction("subject_remove", "Remove cup", target="cup")], ["Remove cup"], [[]], [[]], [["cup"]], [True]
)


def read(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "bench.csv"
    path.write_bytes(text.encode(encoding))
    return read_benchmark(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_reads_what_is_published(tmp_path, encoding, newline):
    assert read(tmp_path, PUBLISHED.replace("\n", newline), encoding) == ([IMAGE_7, IMAGE_12], [])


def test_rows_and_columns_in_another_order(tmp_path):
    rows = list(csv.reader(PUBLISHED.splitlines()))
    turned = [[*reversed(row), "more"] for row in (rows[0], rows[4], rows[3], rows[1], rows[2])]
    turned.insert(3, [])
    with (tmp_path / "turned.csv").open("w", newline="") as file:
        csv.writer(file).writerows(turned)
    assert read_benchmark(tmp_path / "turned.csv") == ([IMAGE_12, IMAGE_7], [])


def test_what_is_written_is_what_was_published(tmp_path):
    write_benchmark(tmp_path / "bench.csv", [IMAGE_7, IMAGE_12])
    assert (tmp_path / "bench.csv").read_text() == PUBLISHED


def test_drawn_chains_come_back(tmp_path):
    scene = [
        SceneObject(k, k, None, None, text, 2, foreground)
        for k, text, foreground in (("car", None, True), ("sign", "出口 'A'", True), ("hill", None, False))
    ]
    proposer = ListProposer(["cat", "old bus", "lamp"], ["glass"], ['He said "hi"'], ["a beach\nat night"])
    rows = [BenchmarkRow.of(str(i), generate(scene, turns=3, seed=i, proposer=proposer)) for i in range(60)]
    write_benchmark(tmp_path / "bench.csv", rows)
    images, errors = read_benchmark(tmp_path / "bench.csv")
    assert not errors
    assert len(images) == 60
    for image, row in zip(images, rows, strict=True):
        assert image.raw_instructions == row.raw_instructions == [i.text for i in image.instructions]
        assert (image.unchanged, image.available, image.all_objects) == (row.unchanged, row.available, row.all_objects)
        assert image.background_consistent == row.background_consistent
        for ours, drawn in zip(image.instructions, row.instructions, strict=True):
            assert (ours.type, ours.target, ours.reference, ours.position, ours.remain, ours.old_text) == (
                (drawn.type, drawn.target, drawn.reference, drawn.position, drawn.remain, drawn.old_text)
            )
            assert ours.value == " ".join(drawn.value.split()) if drawn.value else ours.value is None


ROW_12 = "12,1,['subject_remove'],['Remove cup'],['Remove [cup]'],True,[],[],['cup']\n"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("13,1,['subject_remove']\n", "has 3 columns, the header has 9"),
        (ROW_12.replace("12,1", ",1"), "image_index is empty"),
        (ROW_12.replace("12,1", "13,one"), "turns must be a whole number of at least 1, got 'one'"),
        (ROW_12.replace("12,1", "13,0"), "turns must be a whole number of at least 1, got '0'"),
        (ROW_12.replace("12,1", "13,1").replace("True", "yes"), "bg_consistency must be True or False, got 'yes'"),
        (ROW_12.replace("12,1", "13,1").replace("['Remove cup']", "Remove cup"), "instructions must be a list of str"),
        (ROW_12.replace("12,1", "13,1").replace("['cup']", "[1]"), "all_objects must be a list of strings .* got "),
        (ROW_12.replace("12,1", "13,1").replace("['cup']", "(" * 5000), "all_objects must be a list of strings"),
        (ROW_12.replace("12,1", "13,1").replace("['cup']", "open('x')"), "all_objects must be a list of strings"),
        (ROW_12.replace("12,1", "13,2"), "task_type must have one entry for each of 2 turns, got 1"),
        (ROW_12.replace("12,1", "13,1").replace("Remove [cup]", "Take [cup]"), "none of EdiVal's nine types"),
        (ROW_12.replace("12,1", "13,1").replace("subject_remove", "subject_add"), "task_type is 'subject_add', the"),
        (ROW_12, "image 12 has its turn 1 in row 5 already"),
        ("13,1,\0" + ROW_12[5:], "not a CSV row: line contains NUL|task_type must be a list of strings"),
        (f'13,1,"{"x" * 140000}"\n', "not a CSV row: field larger than field limit"),
    ],
)
def test_malformed_rows_are_reported_and_the_others_come_back(tmp_path, row, reason):
    images, errors = read(tmp_path, PUBLISHED + row)
    assert images == [IMAGE_7, IMAGE_12]
    (error,) = errors
    assert error.row_number == 6
    with pytest.raises(ValueError, match=reason):
        raise ValueError(error.reason)


def test_a_chain_ends_before_a_bad_turn(tmp_path):
    text = PUBLISHED.replace("7,2,", "7,2nd,")
    images, errors = read(tmp_path, text)
    assert [len(i.instructions) for i in images] == [1, 1]
    assert images[0].instructions == IMAGE_7.instructions[:1]
    assert images[0].background_consistent == [True]
    assert [(e.row_number, e.reason.split(",")[0]) for e in errors] == [
        (3, "turns must be a whole number of at least 1"),
        (4, "turn 3 of image 7: turn 2 has no readable row"),
    ]
    images, errors = read(tmp_path, PUBLISHED.replace("7,1,", "7,1st,"))
    assert images == [IMAGE_12]
    assert [e.row_number for e in errors] == [2, 3, 4]


def test_rows_of_an_image_must_tell_one_chain(tmp_path):
    lines = PUBLISHED.splitlines(keepends=True)
    images, errors = read(tmp_path, "".join([*lines[:2], lines[2].replace("Add dog", "Add cat"), *lines[3:]]))
    assert images[0].instructions == IMAGE_7.instructions[:1]
    assert [e.row_number for e in errors] == [3, 4]
    assert errors[0].reason.startswith("instructions must begin with those of turn 1, ['Add dog on")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "must have the columns image_index, .*lacks image_index"),
        (b"image_index,turns\n1,1\n", "lacks task_type, instructions"),
        (b"\xff\xfe" + PUBLISHED.encode("utf-16-le"), "must be a CSV file in UTF-8"),
        (f"{HEADER}\n".encode() + b"\xe9\n", "must be a CSV file in UTF-8"),
    ],
)
def test_files_that_are_no_benchmark(tmp_path, content, reason):
    (tmp_path / "bench.csv").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_benchmark(tmp_path / "bench.csv")


def test_an_empty_benchmark(tmp_path):
    write_benchmark(tmp_path / "bench.csv", [])
    assert read_benchmark(tmp_path / "bench.csv") == ([], [])
