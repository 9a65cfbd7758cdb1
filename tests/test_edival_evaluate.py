"""Evaluation: images of every kind, scores against direct calls, statistics against brute force, resuming."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import Scene, Thing, World
from scipy import stats

from mtedit_fast.edival.benchmark import BenchmarkRow, RowError
from mtedit_fast.edival.checks import CheckConfig
from mtedit_fast.edival.consistency import ContentConsistency
from mtedit_fast.edival.evaluate import VERDICTS, EvaluationConfig, evaluate, score_chains
from mtedit_fast.edival.images import ImageFolder, UnreadableImage, load_image, save_image, start_images
from mtedit_fast.edival.instructions import instruct
from mtedit_fast.edival.report import read_scores
from mtedit_fast.edival.statistics import ChainScores, image_success, overall, summarize
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


def test_overall_golden_numbers():
    assert overall(0.4159, 0.8586) == pytest.approx(0.5976, abs=5e-5)
    # published per turn, in per cent: FLUX.1-Kontext-dev, and Qwen-Image-Edit's third
    for following, consistency, expected in (
        (59.97, 95.32, 75.61),
        (32.69, 92.24, 54.91),
        (16.61, 90.22, 38.71),
        (22.55, 77.98, 41.93),
    ):
        assert 100 * overall(following / 100, consistency / 100) == pytest.approx(expected, abs=0.01)
    assert overall(0.5, -0.1) == 0
    assert math.isnan(overall(math.nan, 0.5))


def test_image_success_is_the_product():
    values = np.array([[a, b, c] for a in (0, 1, math.nan) for b in (0, 1, math.nan) for c in (0, 1, math.nan)])

    def product(prefix):
        if 0 in prefix:
            return 0.0  # a known failure decides, whatever is unknown
        return math.nan if any(math.isnan(v) for v in prefix) else 1.0

    expected = [[product(list(line[: t + 1])) for t in range(3)] for line in values]
    np.testing.assert_array_equal(image_success(values), expected)


def scored(index, verdicts, consistency, types=None):
    k = len(verdicts)
    types = types or ["subject_add"] * k
    return ChainScores(
        index, types, ["do"] * k, verdicts, ["so"] * k, consistency, consistency, consistency, [None] * k
    )


def test_summary_against_brute_force():
    generator = np.random.default_rng(0)
    chains = []
    kinds = np.array(["subject_add", "color_alter", "background_change"])
    for i in range(60):
        k = int(generator.integers(1, 4))
        verdicts = generator.choice([True, False, None], size=k, p=[0.6, 0.3, 0.1]).tolist()
        consistency = [None if v < 0.2 else v for v in generator.random(k).tolist()]
        chains.append(scored(str(i), verdicts, consistency, generator.choice(kinds, k).tolist()))
    summary = summarize(chains)
    assert (summary["chains"], summary["turns"]) == (60, 3)
    for t, line in enumerate(summary["per_turn"]):
        long = [c for c in chains if len(c.types) > t]
        image = []
        for chain in long:
            prefix = chain.verdicts[: t + 1]
            if False in prefix:
                image.append(0.0)
            elif None not in prefix:
                image.append(1.0)
        marginal = [c.verdicts[t] for c in long if c.verdicts[t] is not None]
        cc = [c.consistency[t] for c in long if c.consistency[t] is not None]
        for key, values in (("instruction_following", image), ("marginal", marginal), ("consistency", cc)):
            assert line[key]["mean"] == pytest.approx(np.mean(values), rel=1e-12)
            assert line[key]["n"] == len(values)
            assert line[key]["low"] <= line[key]["mean"] <= line[key]["high"]
        interval = stats.binomtest(int(sum(image)), len(image)).proportion_ci(method="wilson")
        assert (line["instruction_following"]["low"], line["instruction_following"]["high"]) == pytest.approx(interval)
        assert line["overall"]["mean"] == pytest.approx(math.sqrt(np.mean(image) * np.mean(cc)), rel=1e-12)
        assert line["quality"] is None
    for kind in kinds:
        values = [v for c in chains for k, v in zip(c.types, c.verdicts, strict=True) if k == kind and v is not None]
        assert summary["per_type"][kind]["mean"] == pytest.approx(np.mean(values))
    after, without = 0, 0
    for chain in chains:
        for t, value in enumerate(chain.consistency):
            if value is None:
                changed = "background_change" in chain.types[: t + 1]
                after, without = after + changed, without + (not changed)
    assert summary["undefined"] == {
        "verdicts": sum(c.verdicts.count(None) for c in chains),
        "consistency_after_background_change": after,
        "consistency_without_parts": without,
    }
    assert summarize(chains) == summary
    json.dumps(summary, allow_nan=False)


def test_bootstrap_intervals_against_scipy():
    generator = np.random.default_rng(1)
    verdicts, consistency = generator.random(200) < 0.4, generator.beta(5, 2, 200)
    chains = [scored(str(i), [bool(v)], [float(c)]) for i, (v, c) in enumerate(zip(verdicts, consistency, strict=True))]
    line = summarize(chains, resamples=8000)["per_turn"][0]
    for key, data, statistic in (
        ("consistency", (consistency,), lambda c: c.mean()),
        ("overall", (verdicts.astype(float), consistency), lambda v, c: np.sqrt(v.mean() * c.mean())),
    ):
        theirs = stats.bootstrap(
            data, statistic, paired=True, n_resamples=8000, method="percentile", vectorized=False, rng=generator
        ).confidence_interval
        tolerance = 0.1 * (theirs.high - theirs.low)  # both are Monte Carlo
        assert line[key]["low"] == pytest.approx(theirs.low, abs=tolerance)
        assert line[key]["high"] == pytest.approx(theirs.high, abs=tolerance)


def test_nothing_to_summarize():
    assert summarize([])["per_turn"] == []
    line = summarize([scored("a", [None], [None])])["per_turn"][0]
    assert {line[key] for key in line if key != "turn"} == {None}


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


def picture(mode, size=(12, 8)):
    generator = np.random.default_rng(0)
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    return Image.fromarray(generator.integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8), mode)


def test_images_of_every_mode(tmp_path):
    def loaded(image, name="x.png", **options):
        image.save(tmp_path / name, **options)
        return (load_image(tmp_path / name) * 255).permute(1, 2, 0).numpy()

    rgb, grey, clear = picture("RGB"), picture("L"), picture("RGBA")
    np.testing.assert_array_equal(loaded(rgb), np.array(rgb))
    np.testing.assert_array_equal(loaded(grey), np.array(grey)[..., None].repeat(3, 2))
    pixels = np.array(clear).astype(float)
    alpha = pixels[..., 3:] / 255
    over_white = pixels[..., :3] * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(loaded(clear), over_white, atol=1)
    np.testing.assert_allclose(loaded(picture("LA")), loaded(picture("LA").convert("RGBA")), atol=1)
    deep = np.random.default_rng(1).integers(0, 65536, (8, 12), dtype=np.uint16)
    np.testing.assert_allclose(loaded(Image.fromarray(deep)), (deep / 257).round()[..., None].repeat(3, 2), atol=0)
    np.testing.assert_allclose(loaded(Image.fromarray(deep), "x.tiff")[..., 0], (deep / 257).round())
    floats = np.random.default_rng(2).random((8, 12), dtype=np.float32)
    np.testing.assert_allclose(loaded(Image.fromarray(floats), "x.tiff")[..., 1], floats * 255, atol=0.5)
    cmyk = picture("CMYK")
    np.testing.assert_array_equal(loaded(cmyk, "x.tiff"), np.array(cmyk.convert("RGB")))
    palette = rgb.quantize(8)
    np.testing.assert_array_equal(loaded(palette), np.array(palette.convert("RGB")))
    see_through = loaded(palette, transparency=0)
    assert (see_through[np.array(palette) == 0] == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90° to display
    assert loaded(rgb, exif=exif).shape == (12, 8, 3)


def test_images_are_resized_and_written(tmp_path):
    image = picture("RGB", (50, 30))
    image.save(tmp_path / "x.png")
    expected = np.array(image.resize((16, 16), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal((load_image(tmp_path / "x.png", 16) * 255).permute(1, 2, 0), expected)
    tensor = torch.rand(3, 5, 7)
    save_image(tensor, tmp_path / "y.png")
    torch.testing.assert_close(load_image(tmp_path / "y.png"), (tensor * 255).round() / 255)


def test_unreadable_files(tmp_path):
    whole = tmp_path / "whole.png"
    picture("RGB", (64, 64)).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:-3000])
    picture("RGB", (64, 64)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-800])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.png", "cut.jpg", "text.png", "empty.png"):
        with pytest.raises(UnreadableImage, match=name):
            load_image(tmp_path / name)
    with pytest.raises(UnreadableImage, match=r"missing\.png: no such file"):
        load_image(tmp_path / "missing.png")


def test_folder_layouts(tmp_path):
    def write(*names, size=(8, 8)):
        for i, name in enumerate(names):
            Image.new("RGB", size, (i, 0, 0)).save(tmp_path / name)

    write("3_0.png", "3_1.png", "3_2.jpg", "3_10.png", "a_b_0.webp", "a_b_1.PNG", "notes.png")
    write("9_input_raw.jpg", "9_input_raw_turn_1.png", "9_input_raw_turn_2.png")
    write("5_1.png")
    (tmp_path / "3_3.txt").write_text("")
    folder = ImageFolder(tmp_path, size=None)
    assert list(folder) == ["3", "5", "9", "a_b"]
    assert [len(folder[i]) for i in ("3", "9", "a_b")] == [3, 3, 2]
    assert (folder["9"][:, 0, 0, 0] * 255).round().tolist() == [0, 1, 2]
    with pytest.raises(UnreadableImage, match=r"5_0\.png: no such file, the image the chain starts from"):
        folder["5"]
    write("3_1.png", size=(8, 9))
    with pytest.raises(UnreadableImage, match=r"3_1.png: 9×8 pixels, the chain starts with 8×8; give a size"):
        ImageFolder(tmp_path, size=None)["3"]
    assert ImageFolder(tmp_path, size=6)["3"].shape == (3, 3, 6, 6)
    assert ImageFolder(tmp_path)["3"].shape[2:] == (512, 512)
    assert set(start_images(tmp_path)) == {"3", "9", "a_b"}
    (tmp_path / "plain").mkdir()
    with pytest.raises(ValueError, match=r"nothing in .* is named \{image_index\}_\{turn\}.png"):
        ImageFolder(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"images: no \.png"):
        start_images(tmp_path / "plain")
    with pytest.raises(ValueError, match="images: no folder"):
        ImageFolder(tmp_path / "nowhere")
    picture("RGB").save(tmp_path / "plain/my dog.jpeg")
    assert start_images(tmp_path / "plain") == {"my dog": tmp_path / "plain/my dog.jpeg"}


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
