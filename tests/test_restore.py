"""`mtedit-fast restore`: corrupt and restore, measured input, k-space, and what is refused."""

import json

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from mtedit_fast.cli_restore import restore
from mtedit_fast.onestep import Corruption, EDMDenoiser, new_unet, save_denoiser
from mtedit_fast.onestep.corruption import synthetic_maps
from mtedit_fast.onestep.operators import PartialFourier
from mtedit_fast.training.playground import restore_study

app = typer.Typer()
app.command()(restore)
FAST = ("--solver", "steps=2", "--device", "cpu")


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run(*arguments) -> str:
    result = invoke(*arguments, *FAST)
    assert result.exit_code == 0, result.exception
    return result.output


def denoiser_folder(folder, channels=3, operators=(), masked=False):
    network = new_unet(16, channels, masked=masked, widths=(8, 8), layers=1, attention=0, seed=0, patch=2)
    return save_denoiser(folder, EDMDenoiser(network, patch=2), Corruption(operators))


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return denoiser_folder(tmp_path_factory.mktemp("prior") / "teacher")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        Image.fromarray(generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


def read(path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path)))


@pytest.mark.parametrize(
    ("problem", "options"),
    [
        ("inpainting", ["missing=0.3"]),
        ("box", ["share=0.25"]),
        ("blur", ["taps=5", "std=1.5"]),
        ("super_resolution", ["factor=4"]),
        ("compressed_sensing", ["acceleration=2", "centre=0.1"]),
    ],
)
def test_corrupt_and_restore(prior, photos, tmp_path, problem, options):
    chosen = [part for option in options for part in ("--option", option)]
    output = run(prior, photos, "--problem", problem, *chosen, "--corrupt", "--batch", "2", "-o", tmp_path / "out")
    assert "PSNR" in output
    assert f"3 images, {problem}" in output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "b.png", "c.png", "grid.png"]
    assert read(tmp_path / "out" / "a.png").shape == (16, 16, 3)  # the prior's size


def test_an_images_result_is_its_own(prior, photos, tmp_path):
    for batch, folder in ((3, "together"), (1, "apart")):
        run(prior, photos, "--corrupt", "--batch", batch, "--published", "--sigma", "0.1", "-o", tmp_path / folder)
    for name in ("a", "b", "c"):
        one, other = (read(tmp_path / folder / f"{name}.png").int() for folder in ("together", "apart"))
        assert (one - other).abs().max() <= 1


def test_measured_pixels_under_a_mask(prior, tmp_path):
    image = np.full((16, 16, 3), 200, dtype=np.uint8)
    mask = np.full((16, 16), 255, dtype=np.uint8)
    mask[4:9, 4:9] = 0
    for name, pixels in (("image", image), ("mask", mask)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    for problem in ("inpainting", "box"):
        arguments = (prior, tmp_path / "image.png", "--problem", problem, "--mask", tmp_path / "mask.png")
        output = run(*arguments, "-o", tmp_path / problem)
        assert "PSNR" not in output
        assert (tmp_path / problem / "image.png").is_file()


def test_small_measurements_are_enlarged(prior, tmp_path):
    Image.fromarray(np.full((8, 8, 3), 90, dtype=np.uint8)).save(tmp_path / "small.png")
    arguments = (prior, tmp_path / "small.png", "--problem", "super_resolution", "--option", "factor=2")
    run(*arguments, "-o", tmp_path / "out", "--solver", "inner_steps=1")
    assert read(tmp_path / "out" / "small.png").shape == (16, 16, 3)


def test_k_space(prior, tmp_path):
    mask = torch.zeros(1, 1, 1, 16)
    mask[..., 4:12] = 1
    y = PartialFourier(mask)(torch.randn(1, 3, 16, 16))[0]
    np.save(tmp_path / "space.npy", torch.complex(y[:, 0], y[:, 1]).numpy())
    np.save(tmp_path / "lines.npy", mask.view(16).numpy())
    arguments = (prior, tmp_path / "space.npy", "--problem", "compressed_sensing", "--mask", tmp_path / "lines.npy")
    run(*arguments, "-o", tmp_path / "out")
    assert (tmp_path / "out" / "space.png").is_file()


def test_mri(tmp_path):
    prior = denoiser_folder(tmp_path / "complex", channels=2)
    image = (np.random.default_rng(0).normal(size=(16, 16)) / 4).astype(np.complex64)
    np.save(tmp_path / "head.npy", image)
    arguments = (prior, tmp_path / "head.npy", "--problem", "mri")
    output = run(*arguments, "--option", "coils=3", "--corrupt", "-o", tmp_path / "drawn")
    assert "PSNR" in output
    assert np.load(tmp_path / "drawn" / "head.npy").dtype == np.complex64
    maps = synthetic_maps(2, 16, 16).numpy()
    space = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(maps * image), norm="ortho"))
    np.save(tmp_path / "maps.npy", maps)
    np.save(tmp_path / "measured.npy", space.astype(np.complex64))
    np.save(tmp_path / "lines.npy", np.ones(16))
    options = ("--option", f"maps={tmp_path / 'maps.npy'}", "--mask", tmp_path / "lines.npy")
    run(prior, tmp_path / "measured.npy", "--problem", "mri", *options, "-o", tmp_path / "out")
    assert (tmp_path / "out" / "measured.png").is_file()
    assert "maps=FILE.npy" in str(invoke(prior, tmp_path / "measured.npy", "--problem", "mri", *options[2:]).exception)


def test_bad_input(prior, photos, tmp_path):
    masked = denoiser_folder(tmp_path / "masked", operators=[{"name": "inpainting"}], masked=True)
    small = tmp_path / "mask.png"
    Image.fromarray(np.full((8, 8), 255, dtype=np.uint8)).save(small)
    grey = denoiser_folder(tmp_path / "grey", channels=1)
    np.save(tmp_path / "space.npy", np.zeros((3, 16, 16), dtype=np.complex64))
    for arguments, message in (
        ((prior, photos, "--problem", "fog"), "problem: expected one of inpainting, box.*got 'fog'"),
        ((prior, tmp_path / "none.png", "--corrupt"), "images: nothing at"),
        ((prior, "--corrupt"), "images: expected files or folders"),
        ((tmp_path, photos, "--corrupt"), "folder: expected a UNet2DModel"),
        ((masked, photos, "--corrupt"), "model: expected a denoiser of clean images"),
        ((prior, photos), "mask: expected the file of what was measured for inpainting"),
        ((prior, photos, "--problem", "blur", "--mask", small), "mask: expected none for blur"),
        ((prior, photos, "--corrupt", "--mask", small), "mask: expected none with --corrupt"),
        ((prior, photos, "--mask", small), r"does not fit the operator's mask \[1, 1, 8, 8\]"),
        ((prior, photos, "--corrupt", "--option", "missing"), "option: expected KEY=VALUE, got 'missing'"),
        ((prior, photos, "--corrupt", "--option", "width=3"), "operators: inpainting: .*width"),
        ((prior, photos, "--corrupt", "--solver", "rate=3"), "solver: expected .*got rate"),
        ((prior, photos, "--corrupt", "--solver", "step_size=-1"), "step_size: expected a finite number ≥ 0, got -1"),
        ((prior, photos, "--problem", "compressed_sensing", "--mask", small), "is no complex"),
        (
            (grey, tmp_path / "space.npy", "--problem", "compressed_sensing", "--mask", photos / "a.png"),
            "images: expected 1 channels",
        ),
    ):
        result = invoke(*arguments, "-o", tmp_path / "out", "--device", "cpu")
        assert isinstance(result.exception, ValueError), (arguments, result.output)
        with pytest.raises(ValueError, match=message):
            raise result.exception


# ---- the study


def test_the_study_restores_edits_and_goes_on(prior, tmp_path, monkeypatch):
    bigger = save_denoiser(
        tmp_path / "prior",
        EDMDenoiser(new_unet(32, 3, masked=False, widths=(8, 8), layers=1, attention=0, seed=0, patch=4), patch=4),
        Corruption(),
    )
    fast = restore_study.recommended
    monkeypatch.setattr(restore_study, "recommended", lambda: fast(steps=2))
    monkeypatch.setattr(restore_study, "STEPS", 2)
    options = {"images": 3, "chains": 3, "prior": bigger}
    summary = restore_study.run_study(tmp_path / "study", **options)
    assert json.loads((tmp_path / "study" / "summary.json").read_text())["settings"]["images"] == 3
    assert {len(result["plain"]) for result in summary["restoration"].values()} == {3}
    plain, kept = (restore_study._tensor(summary["editing"][name]["outside"]) for name in ("plain edit", "keep-mask"))
    both = plain.isfinite() & kept.isfinite()
    assert bool((kept[both] >= 59.9).all())  # the reference's pixels
    assert bool((plain[both] < kept[both]).all())
    monkeypatch.setattr(restore_study, "edit_chains", None)  # what is there is not measured again
    monkeypatch.setattr(restore_study, "restore_scenes", None)
    again = restore_study.run_study(tmp_path / "study", **options)
    assert again["restoration"] == summary["restoration"]
    page = restore_study.write_page(summary, tmp_path / "study", tmp_path / "page.md")
    text = page.read_text()
    assert text.startswith("# Flow Priors")
    assert text.count("| keep-mask |") == 1
    for name in ("inpainting", "box", "super_resolution", "keep_mask"):
        assert (tmp_path / f"page_{name}.png").is_file()
        assert f"page_{name}.png" in text
    restore_study.write_page(summary, tmp_path / "study", page)
    assert page.read_text() == text


def test_cells_an_instruction_leaves_alone():
    from mtedit_fast.training.playground.world import BACKGROUND_NAMES, CLASS_OF, render

    cells = torch.zeros(4, 16, dtype=torch.int64)
    cells[:, 5] = CLASS_OF["wood red circle"]
    images = render(cells, torch.zeros(4, dtype=torch.int64))
    texts = [
        "Remove wood red circle",
        f"Change the background to {BACKGROUND_NAMES[1]}",
        "Remove metal blue square",  # not there
        "Add metal blue square above wood red circle",
    ]
    keep = restore_study.untouched(images, texts, 0)
    assert keep.shape == (4, 1, 64, 64)
    free = (~keep).view(4, 4, 16, 4, 16).amax((2, 4)).flatten(1)
    assert free[0].nonzero().flatten().tolist() == [5]
    assert free[1].all()
    assert free[2].all()
    assert free[3].nonzero().flatten().tolist() == [1]


def test_without_a_prior(tmp_path):
    with pytest.raises(ValueError, match="prior: no folder"):
        restore_study.restore_scenes(
            "×2 super-resolution", 2, 0, tmp_path / "none", tmp_path / "x.png", restore_study.Console(quiet=True)
        )


def test_help_teaches():
    text = invoke("--help").output
    for words in ("--corrupt", "--mask", "Examples", "playground"):
        assert words in text
