"""The one-step bench: images and files are those of EDM's formula, its rows follow from its times, wrong ones are
refused."""

import csv
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_onestep as bench
import command

from mtedit_fast.onestep import OneStepGenerator, image_seeds
from mtedit_fast.training.onestep import loop

CASE = bench.Case("denoising", "png", 3, 2, "fp32", torch.device("cpu"))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The committed network with two narrow resolutions."""
    right = loop.new_denoiser

    def small(config, shape):
        model = config.model.model_copy(update={"widths": [8, 8], "layers": 1})
        return right(config.model_copy(update={"model": model}), shape)

    monkeypatch.setattr(bench, "new_denoiser", small)


@pytest.mark.parametrize(
    ("corruption", "dtype", "files"),
    [("denoising", "fp32", "npz"), ("inpainting", "fp32", "png"), ("super_resolution", "bf16", "png")],
)
def test_images_and_files_are_those_of_the_formula(corruption, dtype, files, tmp_path):
    setup = bench.Setup(replace(CASE, corruption=corruption, dtype=dtype, files=files), tmp_path)
    setup.write("ours")
    assert setup.error() <= 1
    assert setup.pixels("ours").shape[:1] == (2,)
    assert setup.by_formula().dtype == torch.float64
    assert setup.evaluations() == 35
    setup.write("teacher")
    assert (setup.pixels("teacher") != setup.pixels("ours")).any()


def test_the_formula_is_edms_denoiser_in_one_number_less(tmp_path):
    setup = bench.Setup(CASE, tmp_path)
    sigma = torch.tensor(setup.generator.sigma_init)
    with torch.no_grad():
        expected = setup.denoiser(sigma * setup.generator.latents(setup.seeds), sigma)
    torch.testing.assert_close(setup.by_formula().float(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(setup.seeds, image_seeds(0, torch.arange(2)))


def test_a_row_follows_from_its_times():
    row = bench.bench(CASE, min_seconds=0.0, samples=2)
    assert (row.op, row.variant, row.shape, row.backend) == ("onestep", "denoising, png", "3x3x32x32 by 2", "eager")
    assert row.images_per_s == pytest.approx(3e6 / row.median_us, abs=0.1)
    assert row.speedup_teacher == pytest.approx(row.teacher_us / row.median_us, abs=0.01)
    assert row.percent_outside == pytest.approx(100 * (1 - row.network_us / row.median_us), abs=0.1)
    assert row.speedup_preconditioning == pytest.approx(row.batch_eager_us / row.batch_us, abs=1e-3)
    assert row.tflop_per_s == pytest.approx(row.flops / row.median_us / 1e6, abs=1e-4)
    assert row.teacher_evaluations == 35
    assert row.error <= 1


def test_flops_count_the_network_once_per_image(tmp_path):
    one, two = (bench.Setup(replace(CASE, images=n, batch=n), tmp_path / str(n)).flops() for n in (1, 2))
    assert two == 2 * one > 0


@pytest.mark.parametrize("change", [1.01, math.nan])
def test_other_images_are_refused(change, monkeypatch):
    right = OneStepGenerator._forward

    def wrong(self, latents, mask, pixels):
        found = right(self, latents, mask, pixels)
        return found if pixels else found * change

    monkeypatch.setattr(OneStepGenerator, "_forward", wrong)
    with pytest.raises(RuntimeError, match=r"times as far from the formula as is allowed, .*: no row"):
        bench.bench(CASE, min_seconds=0.0, samples=2)


def test_other_files_are_refused(tmp_path, monkeypatch):
    setup = bench.Setup(replace(CASE, files="npz"), tmp_path)
    setup.write("ours")
    with np.load(setup.paths["ours"]) as file:
        pixels = file["arr_0"]
    np.savez(setup.paths["ours"], arr_0=np.where(pixels > 100, pixels - 2, pixels + 2))
    assert setup.error() >= 2


def test_the_command_measures_each_row_once(tmp_path, capsys):
    arguments = ["--device", "cpu", "--images", "2", "--batch", "8", "--min-seconds", "0", "--samples", "2", "--files"]
    arguments += ["npz", "--corruption", "deblurring", "--dtype", "bf16", "--out", str(tmp_path / "rows.csv")]
    bench.main(arguments)
    assert "x the teacher's " in capsys.readouterr().out
    bench.main(arguments)
    assert "holds all 1 rows of this commit already" in capsys.readouterr().out
    bench.main([*arguments, "--fresh"])
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = [(row["variant"], row["shape"], row["dtype"]) for row in csv.DictReader(file)]
    assert rows == [("deblurring, npz", "2x3x32x32 by 2", "bf16")] * 2


def test_defaults_by_device():
    parser = command.parser(None, "onestep", bench.options)
    cpu = bench.cases(parser.parse_args(["--device", "cpu"]))
    assert [(c.corruption, c.files, c.images, c.batch, c.dtype) for c in cpu] == [
        ("denoising", files, 256, 64, "fp32") for files in ("png", "npz")
    ]
    (gpu,) = bench.cases(parser.parse_args(["--device", "cuda", "--files", "png", "--compile"]))
    assert (gpu.corruption, gpu.image_shape, gpu.images, gpu.batch, gpu.dtype) == (
        "ffhq64", (3, 64, 64), 1024, 256, "bf16",
    )  # fmt: skip
    assert gpu.compile
