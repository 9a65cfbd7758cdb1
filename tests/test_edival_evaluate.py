"""Evaluation: scores against direct calls, and resuming."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from scenes import Scene, Thing, World

from mtedit_fast.edival.benchmark import BenchmarkRow, RowError
from mtedit_fast.edival.checks import CheckConfig
from mtedit_fast.edival.consistency import ContentConsistency
from mtedit_fast.edival.evaluate import VERDICTS, EvaluationConfig, evaluate, score_chains
from mtedit_fast.edival.images import ImageFolder, save_image
from mtedit_fast.edival.instructions import instruct
from mtedit_fast.edival.report import read_scores
from mtedit_fast.training.playground.models import load_dino

DOG, CAT, OWL = Thing("dog"), Thing("cat", (0.2, 0.5, 0.2, 0.2)), Thing("owl", (0.8, 0.2, 0.3, 0.3))


class Sharpness:
    """A Quality that can be computed by hand: mean plus the number of words."""

    def score(self, images, instructions):
        return images.mean((1, 2, 3)) + torch.tensor([len(text.split()) for text in instructions])


def row(index, instructions, unchanged, everything, background=None):
    k = len(instructions)
    texts = [i.text for i in instructions]
    return BenchmarkRow(index, instructions, texts, unchanged, unchanged, everything, background or [True] * k)


def example():
    """Three chains over one world: (rows, images, world)."""
    start = Scene((DOG, CAT, OWL))
    blue = replace(DOG, color="blue")
    scenes = [
        start,  # chain a: 0 → 1 → 2
        Scene((blue, CAT, OWL)),
        Scene((blue, OWL)),
        start,  # chain b: 3 → 4, a new background without its owl
        Scene((DOG, CAT), "snow"),
        Scene((OWL,)),  # chain c: 5 → 6 → 7
        Scene((OWL, DOG), answers={"Answer yes or no": "Who knows"}),
        Scene((OWL, DOG)),
    ]
    world = World(*scenes)
    color = instruct("color_alter", target="dog", value="blue")
    rows = [
        row(
            "a",
            [color, instruct("subject_remove", target="cat")],
            [["cat", "owl"], ["owl"]],
            [["dog", "cat", "owl", "blue dog"]] * 2,
        ),
        row(
            "b",
            [instruct("background_change", value="snow", remain=("dog", "owl"))],
            [["dog", "owl"]],
            [["dog", "cat", "owl"]],
            [False],
        ),
        row(
            "c",
            [instruct("subject_add", value="dog"), instruct("subject_remove", target="owl")],
            [["owl"], []],
            [["owl", "dog"]] * 2,
        ),
    ]
    images = {
        "a": torch.stack(world.images[:3]),
        "b": torch.stack(world.images[3:5]),
        "c": torch.stack(world.images[5:]),
    }
    return rows, images, world


@pytest.fixture(scope="module")
def dino():
    return ContentConsistency(load_dino())


def test_scores_of_chains(dino):
    rows, images, world = example()
    chains = [(one, images[one.image_index]) for one in rows]
    scores = {s.image_index: s for s in score_chains(chains, world, world, dino, Sharpness())}
    assert scores["a"].verdicts == [True, True]
    assert scores["b"].verdicts == [False]
    assert scores["c"].verdicts == [None, False]
    assert "owl not found after" in scores["b"].reasons[0]
    assert scores["a"].quality == pytest.approx(
        [images["a"][t + 1].mean().item() + len(rows[0].raw_instructions[t].split()) for t in range(2)]
    )

    def direct(index, turn, unchanged, cut):
        boxes = torch.tensor([t.box for t in unchanged])
        result = dino(
            images[index][:1],
            images[index][None, turn : turn + 1],
            [[boxes]],
            [torch.tensor([t.box for t in cut])],
            [[torch.zeros(0, 4)]],
        )
        return [part.item() for part in result]

    for index, turn, unchanged, cut in (
        ("a", 1, (CAT, OWL), (DOG, CAT, OWL)),
        ("a", 2, (OWL,), (DOG, CAT, OWL)),
        ("c", 1, (OWL,), (OWL, DOG)),
    ):
        expected = direct(index, turn, unchanged, cut)
        one = scores[index]
        given = [one.consistency[turn - 1], one.object[turn - 1], one.background[turn - 1]]
        assert given == pytest.approx(expected, abs=2e-5)
    assert scores["b"].consistency == scores["b"].object == scores["b"].background == [None]
    assert scores["c"].object[1] is None  # no object is unchanged
    assert scores["c"].background[1] is not None
    assert scores["c"].consistency[1] is None
    assert len(world.asked) == 1


def test_unchanged_objects_that_are_not_found(dino):
    rows, images, world = example()
    lost = [replace(rows[0], unchanged=[["unicorn"], ["unicorn"]])]
    chains = [(lost[0], images["a"])]
    assert score_chains(chains, world, world, dino)[0].consistency == [None, None]
    compat = ContentConsistency(load_dino(), registers="edival_compat")
    one = score_chains(chains, world, world, compat)[0]
    assert one.object == [0.0, 0.0]
    assert one.consistency == pytest.approx([b / 2 for b in one.background])
    # boxes below the threshold are not found
    faint = EvaluationConfig(object_threshold=0.95)
    assert score_chains([(rows[0], images["a"])], world, world, dino, config=faint)[0].object == [None, None]


@pytest.mark.parametrize("step", [1, 2, 8])
def test_batching_changes_nothing(dino, step):
    rows, images, world = example()
    config = EvaluationConfig(chains_per_step=step, detector_batch=step)
    given = evaluate(rows, images, detector=world, vlm=world, consistency=dino, config=config)
    whole = evaluate(rows, images, detector=world, vlm=world, consistency=dino)
    for mine, theirs in zip(given["per_turn"], whole["per_turn"], strict=True):
        for key in ("instruction_following", "marginal", "consistency", "object", "background", "overall"):
            assert (mine[key] is None) == (theirs[key] is None)
            if mine[key]:
                assert mine[key]["mean"] == pytest.approx(theirs[key]["mean"], abs=2e-5)
    assert given["undefined"] == whole["undefined"]
    assert len(world.asked) == {1: 2, 2: 2, 8: 1}[step] + 1  # chain b needs no answer


def test_images_of_different_sizes_and_without_models():
    rows, images, world = example()
    images["b"] = images["b"][..., :90]  # another shape in the same step
    report = evaluate(rows, images, detector=world, vlm=world, name="mine", extra={"note": 1})
    assert report["chains"] == 3
    assert (report["name"], report["note"]) == ("mine", 1)
    assert all(line["consistency"] is None and line["overall"] is None for line in report["per_turn"])
    assert report["settings"]["consistency"] is None


def test_what_cannot_be_evaluated_is_named(tmp_path):
    rows, images, world = example()
    del images["b"]
    images["c"] = images["c"][:2]
    report = evaluate(
        rows, images, detector=world, vlm=world, output=tmp_path / "out", errors=[RowError(7, "turns must be …")]
    )
    assert report["skipped"] == [
        {"row": 7, "reason": "turns must be …"},
        {"image_index": "b", "reason": "no images of this image_index"},
        {"image_index": "c", "reason": "turn 2 of 2 has no image"},
    ]
    page = (tmp_path / "out/report.html").read_text()
    assert "row 7 skipped" in page
    assert "turn 2 of 2 has no image" in page
    # skipped chains are tried again
    rows, images, world = example()
    again = evaluate(rows, images, detector=world, vlm=world, output=tmp_path / "out")
    assert (again["chains"], again["skipped"]) == (3, [])
    with pytest.raises(ValueError, match="rows: expected one per image_index, got several of a"):
        evaluate([*rows, rows[0]], images, detector=world, vlm=world)


class Stopping:
    """A VLM that fails when asked for the n-th time."""

    def __init__(self, world, calls):
        self.world, self.calls, self.name = world, calls, "vlm"

    def ask(self, questions):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return self.world.ask(questions)


def test_a_stopped_evaluation_goes_on(tmp_path, dino):
    rows, images, world = example()
    config = EvaluationConfig(chains_per_step=1)
    common = {"consistency": dino, "config": config}
    evaluate(rows, images, detector=world, vlm=Stopping(world, 9), output=tmp_path / "whole", **common)
    with pytest.raises(KeyboardInterrupt):
        evaluate(rows, images, detector=world, vlm=Stopping(world, 1), output=tmp_path / "cut", **common)
    path = tmp_path / "cut" / VERDICTS
    assert [s.image_index for s in read_scores(path)] == ["a", "b"]
    with path.open("a") as file:
        file.write('{"image_index": "c", "typ')  # killed while writing
    asked = len(world.asked)
    report = evaluate(rows, images, detector=world, vlm=Stopping(world, 9), output=tmp_path / "cut", **common)
    assert len(world.asked) == asked + 1
    assert path.read_text() == (tmp_path / "whole" / VERDICTS).read_text()
    whole = json.loads((tmp_path / "whole/report.json").read_text())
    assert {**report, "name": ""} == {**whole, "name": ""}
    assert json.loads((tmp_path / "cut/report.json").read_text()) == report
    # other batch sizes go on, other settings or rows do not
    other = EvaluationConfig(chains_per_step=3, detector_batch=4)
    done = {"detector": world, "vlm": Stopping(world, 0), "output": tmp_path / "cut"}
    evaluate(rows, images, consistency=dino, config=other, **done)
    for changed, message in (
        ({"config": EvaluationConfig(checks=CheckConfig(replace="paper"))}, "other settings; give another output"),
        ({"consistency": None}, "other settings"),
        ({"rows": rows[:2]}, "other benchmark"),
    ):
        arguments = {"rows": rows, **common, **changed}
        with pytest.raises(ValueError, match=message):
            evaluate(arguments.pop("rows"), images, **done, **arguments)


def test_scores_are_written_as_they_are_read(tmp_path):
    rows, images, world = example()
    evaluate(rows, images, detector=world, vlm=world, quality=Sharpness(), output=tmp_path)
    direct = score_chains([(r, images[r.image_index]) for r in rows], world, world, quality=Sharpness())
    assert [asdict(s) for s in read_scores(tmp_path / VERDICTS)] == [asdict(s) for s in direct]


def test_config_errors():
    with pytest.raises(ValueError, match="chains_per_step and detector_batch must be >= 1, got 0, 32"):
        EvaluationConfig(chains_per_step=0)


def test_a_folder_with_broken_files(tmp_path):
    rows, images, world = example()
    for index, chain in images.items():
        for turn, image in enumerate(chain):
            save_image(image, tmp_path / f"{index}_{turn}.png")
    (tmp_path / "a_1.png").write_bytes((tmp_path / "a_1.png").read_bytes()[:60])
    (tmp_path / "c_2.png").unlink()
    report = evaluate(rows, ImageFolder(tmp_path, size=None), detector=world, vlm=world)
    assert report["chains"] == 1
    reasons = {entry["image_index"]: entry["reason"] for entry in report["skipped"]}
    assert set(reasons) == {"a", "c"}
    assert "a_1.png" in reasons["a"]
    assert reasons["c"] == "turn 2 of 2 has no image"
