"""The one-step playground and its commands."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mtedit_fast.cli_rsd import rsd_app
from mtedit_fast.onestep import FeatureStatistics, load_denoiser
from mtedit_fast.training.onestep.config import load_onestep_config
from mtedit_fast.training.onestep.data import load_data
from mtedit_fast.training.playground import rsd_compare
from mtedit_fast.training.playground.rsd import dino_features, phantom, shapes
from mtedit_fast.training.playground.rsd_compare import CONFIGS, CORRUPTIONS, MARK, STUDENT_T, compare, write_page
from mtedit_fast.training.playground.world import CELL, templates

TINY = (
    "data.count=60", "model.widths=[8, 16]", "model.attention=0", "teacher.steps=1", "teacher.batch=2",
    "distill.steps=1", "distill.batch=2", "evaluation.every=0",
)  # fmt: skip


def test_shapes_are_pieces_of_the_world():
    images = shapes(20, 0)
    assert images.shape == (20, 3, 32, 32)
    assert images.equal(shapes(20, 0))
    assert not images.equal(shapes(20, 1))
    cells = (images.unfold(2, CELL, CELL).unfold(3, CELL, CELL).permute(0, 2, 3, 1, 4, 5)[:5].reshape(20, -1) + 1) / 2
    known = templates().flatten(0, 2).flatten(1)
    nearest = torch.stack([(known - cell).square().mean(1).min() for cell in cells])
    assert nearest.max() < 1e-10


@pytest.mark.parametrize("side", [32, 48])
def test_phantoms_are_complex_and_bounded(side):
    images = phantom(10, 0, side)
    assert images.shape == (10, 2, side, side)
    magnitude = images.square().sum(1).sqrt()
    assert magnitude.max() <= 1 + 1e-6
    assert magnitude[:, 0, 0].max() < 0.05  # air around the head
    assert magnitude[:, side // 2].amax(1).min() > 0.2
    assert images[:, 1].abs().max() > 0.1
    assert images.equal(phantom(10, 0, side))
    assert not images.equal(phantom(10, 1, side))


def test_dino_tells_scenes_apart_and_sees_corruption():
    features = dino_features()
    pixels = ((shapes(4, 0) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    seen = features(pixels)
    assert (seen.shape, seen.dtype) == ((4, 128), torch.float32)
    torch.testing.assert_close(features(pixels[1:2]), seen[1:2], rtol=1e-4, atol=1e-4)
    assert (seen[0] - seen[1]).norm() > 1


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("rsd_*.yaml")), ids=lambda path: path.stem)
def test_committed_configurations(path):
    config = load_onestep_config(path)
    assert config.evaluation.every
    if path.stem != "rsd_ffhq64":
        assert path.stem.removeprefix("rsd_") in (*CORRUPTIONS, "mri", "clean")
        tiny = load_onestep_config(path, ["data.count=3"])
        y, _ = load_data(tiny.data, tiny.corruption.build())[torch.arange(3)]
        assert y.isfinite().all()


# ---- side by side


def test_comparison_keeps_what_is_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(rsd_compare, "WEIGHTS", tmp_path)  # without the repository's
    calls = []
    train = rsd_compare.train_teacher
    monkeypatch.setattr(rsd_compare, "train_teacher", lambda *a, **k: calls.append(1) or train(*a, **k))
    settings = {"corruptions": ["deblurring"], "samples": 20, "overrides": TINY}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 20 samples for 128 features
        first = compare(tmp_path / "out", seeds=1, **settings)
        second = compare(tmp_path / "out", seeds=2, **settings)
        third = compare(tmp_path / "out", seeds=2, keep=tmp_path / "kept", **settings)
    assert len(calls) == 2
    assert second == third
    assert second["runs"]["deblurring"]["0"] == first["runs"]["deblurring"]["0"]
    assert json.loads((tmp_path / "out/summary.json").read_text()) == third
    row = third["table"]["deblurring"]
    runs = [run["distances"] for run in third["runs"]["deblurring"].values()]
    gains = np.array([run["student"] - run["teacher"] for run in runs])
    half = STUDENT_T[2] * gains.std(ddof=1) / np.sqrt(2)
    assert row["student_minus_teacher"] == pytest.approx(gains.mean())
    assert row["interval"] == pytest.approx([gains.mean() - half, gains.mean() + half])
    assert row["corrupted"] > row["clean"]
    assert first["table"]["deblurring"]["interval"] is None
    page = tmp_path / "page.md"
    for text, wanted in (("# One step\n\n", second), (None, first)):  # the second replaces what the first wrote
        if text is not None:
            page.write_text(text)
        write_page(wanted, tmp_path / "out", page)
    written = page.read_text()
    assert written.startswith("# One step\n\n" + MARK)
    assert written.count("| deblurring |") == 1
    assert f"| {first['table']['deblurring']['student']:.2f} |" in written
    assert (tmp_path / "page_deblurring.png").read_bytes() == (tmp_path / "out/deblurring/seed0/grid.png").read_bytes()
    for kind in ("teacher", "student"):
        kept = load_denoiser(tmp_path / "kept/deblurring" / kind, dtype=torch.bfloat16)
        trained = load_denoiser(tmp_path / "out/deblurring/seed0" / kind / "model", dtype=torch.bfloat16)
        assert (kept.corruption.describe(), kept.card) == (trained.corruption.describe(), trained.card)
        for a, b in zip(kept.denoiser.parameters(), trained.denoiser.parameters(), strict=True):
            assert a.equal(b)
    with Image.open(tmp_path / "out/deblurring/seed0/grid.png") as grid:
        assert grid.width > 8 * 96
        assert grid.height > 4 * 96


@pytest.mark.parametrize("name", ["denoising", "inpainting", "deblurring"])
def test_committed_students_are_nearer_to_clean_images_than_their_teachers(tmp_path, name):
    row = compare(tmp_path, corruptions=[name], samples=800, short=True)["table"][name]
    assert row["trained"] == "the repository's weights"
    assert row["clean"] < row["student"] < row["teacher"]


def test_students_t_is_scipys():
    from scipy.stats import t

    for seeds, value in STUDENT_T.items():
        assert value == pytest.approx(t.ppf(0.975, seeds - 1), abs=6e-4)


@pytest.mark.parametrize(
    ("options", "message"), [({"corruptions": ["fog"]}, "got 'fog'"), ({"seeds": 99}, "seeds: exp")]
)
def test_bad_comparisons(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        compare(tmp_path, **options)


# ---- commands


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(rsd_app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_commands(tmp_path):
    run = ["data.count=12", *TINY[1:], f"run.output_dir={tmp_path / 'run'}"]
    config = CONFIGS / "rsd_inpainting.yaml"
    invoke("teacher", config, *run)
    invoke("distill", config, *run)
    student, teacher = tmp_path / "run/student/model", tmp_path / "run/teacher/model"
    assert "5 images" in invoke("sample", student, "-o", tmp_path / "s", "--count", 5, "--batch", 2, "--seed", 3)
    assert len(list((tmp_path / "s").iterdir())) == 5
    invoke("sample", student, "-o", tmp_path / "s.npz", "--count", 5, "--batch", 5, "--seed", 3, "--dtype", "bf16")
    low = np.load(tmp_path / "s.npz")["arr_0"].astype(int)
    high = np.stack([np.asarray(Image.open(f)) for f in sorted((tmp_path / "s").iterdir())]).astype(int)
    assert 0 < abs(low - high).max() < 64
    invoke("sample", teacher, "-o", tmp_path / "t.zip", "--count", 2, "--steps", 2, "--churn", 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = invoke("fid", tmp_path / "s", tmp_path / "s", "--save", tmp_path / "stats.npz")
        assert float(out.split()[-1]) < 0.01
        assert FeatureStatistics.load(tmp_path / "stats.npz").count == 5
        assert float(invoke("fid", tmp_path / "stats.npz", tmp_path / "s").split()[-1]) < 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "{0}/none", "-o", "{0}/out"], "expected a UNet2DModel"),
        (["sample", "{0}/none", "-o", "{0}/out", "--dtype", "int8"], "dtype: expected one of fp32, bf16, fp16"),
        (["fid", "{0}/none", "{0}"], "images: expected a folder or .npz"),
        (["distill", "{0}/none.yaml"], "config: no file"),
    ],
)
def test_bad_commands(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        invoke(*(argument.format(tmp_path) for argument in arguments))


def test_files_that_were_not_written_fail_the_command(tmp_path):
    from mtedit_fast.onestep import Corruption, EDMDenoiser, new_unet, save_denoiser

    unet = new_unet(8, 3, masked=False, widths=(8,), layers=1, attention=0, seed=0)
    save_denoiser(tmp_path / "m", EDMDenoiser(unet), Corruption(), {"sigma_init": 2.5, "shape": [3, 8, 8]})
    (tmp_path / "out/000001.png").mkdir(parents=True)
    with pytest.raises(OSError, match=r"1 of 3 images could not be written to .*, the first 000001.png"):
        invoke("sample", tmp_path / "m", "-o", tmp_path / "out", "--count", 3)
