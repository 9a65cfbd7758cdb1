"""The judge study: its runs, its figures and its page, on a few edits and one step a method."""

import json

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from scipy import stats

from mtedit_fast.training.playground import judge_study, judge_study_report
from mtedit_fast.training.playground.judge_study import (
    ARMS,
    Result,
    agreement_over_seeds,
    difference,
    main,
    read_results,
    run_study,
)
from mtedit_fast.training.playground.models import WEIGHTS

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Base and two methods, one step each, on eight edits."""
    output = tmp_path_factory.mktemp("judge_study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge_study, "TRAIN", 8)
        patch.setattr(judge_study, "HELD_OUT", 8)
        patch.setattr(judge_study, "run_in_processes", lambda *args, **kwargs: None)
        run_study(output, seeds=1, iterations=1, jobs=1, only=None, console=QUIET)
    for name, seed in (("base", "0"), ("sft", "0"), ("real", "0"), ("real", "1")):
        main(str(output / f"{name}-{seed}"), name, seed, "1")
    return output


def test_finished_runs_become_a_page_and_a_summary(finished, tmp_path):
    page = judge_study_report.write_study(finished, tmp_path / "judge.md")
    text = page.read_text()
    assert "| base | one sampled score |" in text
    assert "| real | ŷ after one thought |" in text
    assert (tmp_path / "judge.png").stat().st_size > 10_000
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["edits"] == 8
    assert {name: method["seeds"] for name, method in summary["methods"].items()} == {"base": 1, "sft": 1, "real": 2}
    assert set(summary["methods"]["real"]["expected"]) >= {"pearson", "spearman"}
    page.write_text("# Mine\n\nwords\n\n" + text[text.index("<!--") :])
    assert judge_study_report.write_study(finished, page).read_text().startswith("# Mine\n\nwords\n\n<!--")


def test_the_base_is_the_playgrounds_judge_untouched(finished):
    (base,) = (result for result in read_results(finished) if result.arm.name == "base")
    assert base.summaries[0]["steps"] == 0
    own, committed = (
        load_file(folder / "model.safetensors") for folder in (finished / "base-0/model", WEIGHTS / "judge")
    )
    assert all(torch.equal(own[name], committed[name].float()) for name in committed)


def test_runs_of_another_length_are_not_mixed(finished):
    with pytest.raises(ValueError, match=r"expected 1, the length of the finished run in .*sft-0, got 2"):
        run_study(finished, seeds=1, iterations=2, jobs=1, only=None, console=QUIET)
    with pytest.raises(ValueError, match="only: expected one of base, sft"):
        run_study(finished, seeds=1, iterations=1, jobs=1, only="dpo", console=QUIET)


def test_no_run_is_said(tmp_path):
    with pytest.raises(ValueError, match="no finished run; start one with mtedit-fast study judge"):
        read_results(tmp_path)


def test_agreement_is_scipys_on_what_could_be_read():
    generator = np.random.default_rng(0)
    truth = generator.integers(1, 6, 300).astype(float)
    scores = truth + generator.normal(size=(2, 300))
    scores[0, :20] = np.nan
    result = Result(ARMS[1], truth, {"expected": scores}, [])
    figures = agreement_over_seeds(result, "expected", resamples=400)
    for metric, reference in (
        ("pearson", stats.pearsonr),
        ("spearman", stats.spearmanr),
        ("kendall", stats.kendalltau),
    ):
        expected = [reference(scores[0, 20:], truth[20:]).statistic, reference(scores[1], truth).statistic]
        assert figures[metric]["per_seed"] == pytest.approx(expected)
        assert figures[metric]["mean"] == pytest.approx(np.mean(expected))
        assert figures[metric]["low"] < figures[metric]["mean"] < figures[metric]["high"]
    # Fisher's interval of one run of 300 is about ±2·(1 − r²)/√300
    r = figures["pearson"]["mean"]
    assert figures["pearson"]["high"] - figures["pearson"]["low"] < 8 * (1 - r**2) / np.sqrt(300)
    assert agreement_over_seeds(result, "sampled") is None


def test_differences_are_of_pairs():
    generator = np.random.default_rng(1)
    truth = generator.integers(1, 6, 200).astype(float)
    noise = generator.normal(size=(1, 200))
    close, far = (Result(ARMS[i], truth, {"expected": truth + s * noise}, []) for i, s in ((1, 1.0), (2, 2.0)))
    found = difference(close, far, "expected", resamples=400)["pearson"]
    separate = [agreement_over_seeds(r, "expected", resamples=400)["pearson"] for r in (close, far)]
    assert found["mean"] == pytest.approx(separate[0]["mean"] - separate[1]["mean"])
    assert found["low"] < found["mean"] < found["high"]
    assert found["high"] - found["low"] < sum(s["high"] - s["low"] for s in separate)
    same = difference(close, close, "expected", resamples=50)
    assert all(value == 0 for figure in same.values() for value in figure.values())
