"""JSONL chains: images against PIL, the endless order, and errors that name the line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mtedit_fast.training.data import EditChains, load_image


def write(folder, lines):
    path = folder / "chains.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (7, 40, 60, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{index}.png")
    return tmp_path


def line(index, **changes):
    chain = {"id": f"c{index}", "image": f"images/{index}.png", "instructions": ["Add a", "Remove b", "Replace c"]}
    return {key: value for key, value in (chain | changes).items() if value is not None}


def test_records(folder):
    lines = [line(0, objects=[["a"], ["b", "b2"], []], task="edit"), "", line(1)]
    chains = EditChains(write(folder, lines), turns=2, resolution=(32, 48))
    assert len(chains) == 2
    record = chains[0]
    assert record.id == "c0"
    assert record.instructions == ["Add a", "Remove b"]
    assert record.objects == [["a"], ["b", "b2"]]
    assert record.extra == {"task": "edit"}
    assert record.image.shape == (3, 32, 48)
    assert record.image.dtype == torch.float32
    assert chains[1].objects is None
    assert chains[1].extra == {}


def test_exact_size_is_not_resampled(folder):
    pixels = np.array(Image.open(folder / "images" / "3.png"))
    image = load_image(folder / "images" / "3.png", (40, 60))
    np.testing.assert_array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), pixels)
    assert 0 <= image.min() < image.max() <= 1


@pytest.mark.parametrize(("size", "box"), [((20, 20), (10, 0, 50, 40)), ((10, 30), (0, 10, 60, 30))])
def test_centre_crop_then_lanczos(folder, size, box):
    path = folder / "images" / "2.png"
    expected = Image.open(path).resize(size[::-1], Image.Resampling.LANCZOS, box=box)
    np.testing.assert_array_equal((load_image(path, size) * 255).round().permute(1, 2, 0).numpy(), np.array(expected))


def test_grey_images_become_rgb(folder):
    Image.new("L", (8, 8), 51).save(folder / "images" / "grey.png")
    torch.testing.assert_close(load_image(folder / "images" / "grey.png", (8, 8)), torch.full((3, 8, 8), 0.2))


def test_order_is_endless_seeded_and_stateless(folder):
    path = write(folder, [line(i) for i in range(7)])
    chains = EditChains(path, turns=3, resolution=8, seed=5)
    ids = [record.id for iteration in range(7) for record in chains.batch(iteration, 3)]
    for epoch in range(3):
        assert sorted(ids[7 * epoch : 7 * epoch + 7]) == [f"c{i}" for i in range(7)]
    assert ids[:7] != ids[7:14]
    resumed = EditChains(path, turns=3, resolution=8, seed=5)
    assert [record.id for record in resumed.batch(4, 3)] == ids[12:15]
    assert [record.id for record in chains.batch(0, 20)] == ids[:20]  # one batch over three epochs
    other = EditChains(path, turns=3, resolution=8, seed=6)
    assert [record.id for record in other.batch(0, 7)] != ids[:7]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", r"chains\.jsonl:2: not valid JSON"),
        ("[1]", r"chains\.jsonl:2: expected an object \{id, image, instructions\}, got list"),
        (line(1, id=None), r":2: id: expected a text, got None"),
        (line(1, id=7), r":2: id: expected a text, got 7"),
        (line(1, id="c0"), r":2: id: expected a unique text, 'c0' is already at .*:1"),
        (line(1, image=3), r":2: image: expected a text, got 3"),
        (line(1, image="no.png"), r":2: image: no file no\.png in "),
        (line(1, instructions="Add a"), r":2: instructions: expected a list of texts, one per turn, got 'Add a'"),
        (line(1, instructions=["Add a", " ", "b"]), r":2: instructions: expected a list of texts"),
        (line(1, instructions=["Add a"]), r":2: instructions: expected at least 3, one per turn, got \['Add a'\]"),
        (line(1, objects=["a", "b", "c"]), r":2: objects: expected 3 lists of names, one list per turn"),
        (line(1, objects=[["a"]]), r":2: objects: expected 3 lists of names"),
    ],
)
def test_bad_lines_are_named(folder, bad, message):
    with pytest.raises(ValueError, match=message):
        EditChains(write(folder, [line(0), bad]), turns=3, resolution=8)


def test_bad_files_are_named(folder):
    with pytest.raises(ValueError, match=r"data\.path: no file .*nothing\.jsonl"):
        EditChains(folder / "nothing.jsonl", turns=1, resolution=8)
    with pytest.raises(ValueError, match=r"^evaluation\.path: no file .*nothing\.jsonl"):
        EditChains(folder / "nothing.jsonl", turns=1, resolution=8, name="evaluation.path")
    with pytest.raises(ValueError, match=r"chains\.jsonl: expected at least one chain"):
        EditChains(write(folder, [""]), turns=1, resolution=8)
    (folder / "images" / "1.png").write_bytes(b"no image")
    chains = EditChains(write(folder, [line(0), line(1)]), turns=3, resolution=8)
    with pytest.raises(ValueError, match=r"chains\.jsonl:2: image: images/1\.png is not a readable image"):
        chains[1]
