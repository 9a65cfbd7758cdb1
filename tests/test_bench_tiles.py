"""bench_tiles.py: candidates are set for a launch alone, and their results checked like every row's."""

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_digit_score
import bench_tiles as tiles
import harness

from mtedit_fast.kernels import linear_logsumexp

CPU = torch.device("cpu")
CHOICES = {choice.name: choice for choice in tiles.CHOICES}


@pytest.mark.parametrize("choice", tiles.CHOICES, ids=lambda choice: choice.name)
def test_candidates_are_set_and_what_is_checked_in_comes_first(choice: tiles.Choice) -> None:
    current = choice.current
    first, *others = choice.values()
    assert first == current
    assert others
    assert current not in others
    assert len({str(value) for value in choice.values()}) == len(choice.values())
    with choice.set(others[0]):
        assert choice.current == others[0]
    assert choice.current == current


def test_every_candidate_is_of_the_constants_form() -> None:
    for choice in tiles.CHOICES:
        for value in choice.values():
            assert type(value) is type(choice.current)
            if isinstance(value, dict):
                assert value.keys() == choice.current.keys()
            if isinstance(value, tuple):
                assert len(value) == len(choice.current)


@pytest.fixture
def product(monkeypatch: pytest.MonkeyPatch) -> tuple[tiles.Choice, Any]:
    """Tiles of the product with an lm_head, small ones and of a small case, under Triton's interpreter."""
    monkeypatch.setattr(harness, "rotations", lambda *_: 1)
    monkeypatch.setattr(harness, "measure", partial(harness.measure, samples=1))
    monkeypatch.setitem(linear_logsumexp.TILES, "half", tiles._product(16, 32, 16))
    candidates = (tiles._product(32, 16, 16), tiles._product(16, 16, 32))
    choice = replace(CHOICES["product"], candidates=candidates, shape=(20, 32, 60))
    return choice, bench_digit_score.BENCH.case("vocab", choice.shape, torch.bfloat16, CPU)


def test_a_row_for_every_candidate(product: tuple[tiles.Choice, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    partial_sums = linear_logsumexp._partial_kernel

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*arguments: Any, **constants: Any) -> None:
                launched.append((constants["BLOCK_N"], constants["BLOCK_V"], constants["BLOCK_H"]))
                partial_sums[grid](*arguments, **constants)

            return launch

    monkeypatch.setattr(linear_logsumexp, "_partial_kernel", Recorder())
    rows = tiles.measured(product[0], bench_digit_score.BENCH, product[1], False, 0.0)
    assert [row.backend for row in rows] == [str(value) for value in product[0].values()]
    assert rows[0].over_current == 1.0
    for row in rows:
        assert row.over_current == pytest.approx(rows[0].median_us / row.median_us, abs=1e-3)
    assert set(launched) == {(16, 32, 16), (32, 16, 16), (16, 16, 32)}
    assert linear_logsumexp.TILES["half"] == tiles._product(16, 32, 16)


def test_wrong_results_are_refused(product: tuple[tiles.Choice, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_digit_score.IMPLEMENTATIONS["fused"]

    def wrong(case: Any) -> Any:
        call = right(case)
        return lambda x: call(x)._replace(values=tuple(1.01 * value for value in call(x).values))

    monkeypatch.setitem(bench_digit_score.IMPLEMENTATIONS, "fused", wrong)
    with pytest.raises(RuntimeError, match="times the error that is allowed: no row"):
        tiles.measured(product[0], bench_digit_score.BENCH, product[1], False, 0.0)
    assert linear_logsumexp.TILES["half"] == tiles._product(16, 32, 16)


def test_a_candidate_that_does_not_fit_is_left_out(
    product: tuple[tiles.Choice, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from triton.runtime.errors import OutOfResources

    right = bench_digit_score.IMPLEMENTATIONS["fused"]

    def tight(case: Any) -> Any:
        if linear_logsumexp.TILES["half"]["BLOCK_N"] == 32:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return right(case)

    monkeypatch.setitem(bench_digit_score.IMPLEMENTATIONS, "fused", tight)
    rows = tiles.measured(product[0], bench_digit_score.BENCH, product[1], False, 0.0)
    assert len(rows) == 2
    assert "out of resource: shared memory" in capsys.readouterr().out


def test_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="--device: expected a GPU"):
        list(tiles.jobs(argparse.Namespace(device=CPU, only=None, min_seconds=0.0)))
