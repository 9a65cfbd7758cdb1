"""The report: intervals against scipy and formulas, the page from a run's files, the grid of edits."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from mtedit_fast.training.plots import edit_grid, running_mean
from mtedit_fast.training.report import (
    paired_bootstrap,
    phase_seconds,
    read_metrics,
    success_summary,
    wilson_interval,
    write_report,
)


@pytest.mark.parametrize(("successes", "n"), [(0, 7), (1, 1), (13, 40), (166, 400), (400, 400)])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_wilson_interval_against_scipy(successes, n, confidence):
    expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    np.testing.assert_allclose(wilson_interval(successes, n, confidence), [expected.low, expected.high], atol=1e-12)


def test_wilson_interval_edges():
    assert wilson_interval(0, 0) == (0, 1)
    with pytest.raises(ValueError, match="successes: expected between 0 and n = 3, got 4"):
        wilson_interval(4, 3)


@pytest.mark.parametrize("confidence", [0.95, 0.5])
def test_paired_bootstrap_against_scipy(confidence):
    generator = np.random.default_rng(0)
    before = generator.random(300) < 0.3
    after = before | (generator.random(300) < 0.2)
    ours = paired_bootstrap(before, after, resamples=20_000, confidence=confidence, seed=1)
    difference = after.astype(float) - before
    theirs = stats.bootstrap(
        (difference,), np.mean, n_resamples=20_000, confidence_level=confidence, method="percentile", rng=generator
    ).confidence_interval
    assert ours.mean == pytest.approx(difference.mean(), rel=1e-12)
    # Both are Monte Carlo: a quantile of the mean moves by about its standard error / √resamples · 4.
    tolerance = 8 * difference.std() / np.sqrt(300) * 4 / np.sqrt(20_000)
    assert ours.low == pytest.approx(theirs.low, abs=tolerance + 1 / 300)
    assert ours.high == pytest.approx(theirs.high, abs=tolerance + 1 / 300)
    assert paired_bootstrap(before, after, seed=1) == paired_bootstrap(before, after, seed=1)


def test_paired_bootstrap_is_normal_for_many_scenes():
    difference = np.random.default_rng(2).normal(0.3, 1.0, 4000)
    low, high = stats.norm.interval(0.95, difference.mean(), difference.std() / np.sqrt(4000))
    estimate = paired_bootstrap(np.zeros(4000), difference, resamples=4000)
    np.testing.assert_allclose([estimate.low, estimate.high], [low, high], atol=0.004)


def test_paired_bootstrap_errors():
    with pytest.raises(ValueError, match=r"before, after: expected the same \[N\], got \[3\] and \[4\]"):
        paired_bootstrap(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match=r"got \[0\] and \[0\]"):
        paired_bootstrap([], [])


def test_success_summary_is_the_definition():
    before = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]], bool)
    after = np.array([[1, 1, 1], [1, 1, 1], [0, 1, 1], [1, 1, 1]], bool)
    summary = success_summary(torch.from_numpy(before), after)
    assert summary["image_success"] == {"before": [0.75, 0.5, 0.25], "after": [0.75, 0.75, 0.75]}
    assert summary["marginal_success"] == {"before": [0.75, 0.75, 0.75], "after": [0.75, 1.0, 1.0]}
    assert summary["n_scenes"] == 4
    assert summary["gain_t3"]["mean"] == 0.5
    assert 0 <= summary["gain_t3"]["low"] <= 0.5 <= summary["gain_t3"]["high"] <= 1
    json.dumps(summary)
    with pytest.raises(ValueError, match=r"success: expected the same \[N, K\] twice, got \[4, 3\] and \[4, 2\]"):
        success_summary(before, after[:, :2])


def test_running_mean():
    values = [1.0, 2.0, float("nan"), 4.0, 10.0]
    np.testing.assert_allclose(running_mean(values, 3), [1.5, 1.5, 3.0, 7.0, 7.0])
    np.testing.assert_allclose(running_mean([3.0], 5), [3.0])


def test_phases_add_up():
    lines = [
        {"seconds/rollout": 5.0, "seconds/denoise": 3.0, "seconds/decode": 1.5, "seconds/update": 2.0},
        {"seconds/rollout": 4.0, "seconds/denoise": 4.5, "seconds/update": 2.5, "loss": 1.0},
    ]
    assert phase_seconds(lines) == {
        "denoise": [3.0, 4.5],
        "update": [2.0, 2.5],
        "decode": [1.5, 0.0],
        "rollout, rest": [0.5, 0.0],
    }
    assert phase_seconds([{"seconds/rollout": 5.0}]) == {"rollout": [5.0]}
    assert phase_seconds([{"loss": 1.0}]) == {}


def test_metrics_with_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0}\n{"iteration": 1}\n{"iterat')
    assert read_metrics(path) == [{"iteration": 0}, {"iteration": 1}]
    path.write_text('{"iteration": 0}\n{"iterat\n{"iteration": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not valid JSON"):
        read_metrics(path)


def grid_inputs(n=2, turns=3, height=8, width=12):
    """Chains in flat colours; success alternates."""
    edits = torch.rand(n, turns, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, -1, height, width)
    success = (torch.arange(n * turns) % 2 == 0).view(n, turns)
    instructions = [[f"Replace the <b>thing</b> number {k} with another" for k in range(turns)]] * n
    return edits[:, 0], edits, 1 - edits, instructions, success, ~success


def test_edit_grid_shows_every_image_and_its_success():
    references, before, after, instructions, success, failure = grid_inputs()
    grid = edit_grid(references, before, after, instructions, success, failure, cell=60)
    colours = {tuple(colour) for colour in np.array(grid).reshape(-1, 3).tolist()}
    for image in (references, before.flatten(0, 1), after.flatten(0, 1)):
        for pixel in (image[:, :, 0, 0] * 255).round().int().tolist():
            assert tuple(pixel) in colours
    assert {(0x1D, 0x8A, 0x4E), (0xCF, 0x3B, 0x3B)} <= colours
    larger = edit_grid(references, before, after, instructions, success.numpy(), failure.numpy())
    assert larger.width > grid.width
    one_colour = np.array(edit_grid(references, before, after, instructions, success, success)).reshape(-1, 3)
    all_good = edit_grid(references, before, after, instructions, success | True, success | True)
    assert (0xCF, 0x3B, 0x3B) in {tuple(c) for c in one_colour.tolist()}
    assert (0xCF, 0x3B, 0x3B) not in {tuple(c) for c in np.array(all_good).reshape(-1, 3).tolist()}


def test_edit_grid_errors():
    references, before, after, instructions, success, failure = grid_inputs()
    with pytest.raises(ValueError, match=r"expected references \[N, 3, H, W\] and two edits"):
        edit_grid(references, before, after[:, :2], instructions, success, failure)
    with pytest.raises(ValueError, match=r"success: expected \[N, K\] = \[2, 3\], got \[2, 2\]"):
        edit_grid(references, before, after, instructions, success[:, :2], failure)
    with pytest.raises(ValueError, match=r"instructions: expected 2 lists of 3, got \[3\]"):
        edit_grid(references, before, after, instructions[:1], success, failure)


@pytest.fixture
def run_dir(tmp_path):
    generator = np.random.default_rng(0)
    before = generator.random((40, 3)) < 0.6
    after = before | (generator.random((40, 3)) < 0.5)
    summary = success_summary(before, after)
    summary |= {"iterations": 12, "seconds": 83.4, "max_ratio_error_first_update": 0.0}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for i in range(12):
            metrics = {"iteration": i, "reward/oracle_score": 0.5 + i / 50, "reward_nan/judge": 0.0, "loss": -1e-4}
            metrics |= {"ratio/mean": 1.0, "ratio/max_error_first_update": 0.0, "grad_norm": 1.0, "log_prob/drift": 0.0}
            metrics |= {
                "ratio/clip_fraction": 0.1,
                "seconds/rollout": 2.0,
                "seconds/decode": 0.5,
                "seconds/update": 1.0,
            }
            if i % 5 == 0:
                metrics["eval/image_success_t3"] = 0.3 + i / 100
            file.write(json.dumps(metrics) + "\n")
    return tmp_path, summary, before, after


def test_report_is_one_self_contained_page(run_dir):
    folder, summary, before, after = run_dir
    types = np.array(["subject_add", "color_alter", "count_change"])[np.arange(120).reshape(40, 3) % 3]
    np.savez(folder / "evaluation.npz", success_before=before, success_after=after, edit_types=types)
    edit_grid(*grid_inputs()).save(folder / "edit_grid.png")
    path = write_report(folder)
    page = path.read_text(encoding="utf-8")
    assert path == folder / "report.html"
    assert not re.search(r'(src|srcset|href)="(?!data:)|url\(|@import|<script|<link', page)
    assert "prefers-color-scheme: dark" in page
    image = summary["image_success"]
    assert f"{100 * image['before'][2]:.1f} % → {100 * image['after'][2]:.1f} %" in page
    assert f"95 % interval {100 * summary['gain_t3']['low']:+.1f}" in page
    assert "1 min 23 s" in page
    for title in ("Success per turn", "Success per edit type", "Edits", "Training", "Time"):
        assert f"<h2>{title}</h2>" in page
    assert "Held-out success during training" in page
    assert "Undefined rewards" not in page  # nothing was undefined
    assert "<tr><td>rollout, rest<td>18.0<td>1.500<td>50.0%" in page
    images = re.findall(r'data:image/png;base64,([^"]+)"', page)
    assert len(images) >= 2 * 5 + 1
    for data in images:
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert np.array(picture).std() > 0  # not blank


def test_report_without_evaluation_or_gain(run_dir):
    folder, summary, *_ = run_dir
    del summary["gain_t3"]
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("")
    page = write_report(folder).read_text(encoding="utf-8")
    assert "95 % interval" not in page.partition("</header>")[0]
    assert re.findall("<h2>(.*?)</h2>", page) == ["Success per turn"]


def test_report_needs_a_run(tmp_path):
    with pytest.raises(ValueError, match=r"summary\.json: missing; expected the folder of a finished training run"):
        write_report(tmp_path)
