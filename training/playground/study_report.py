"""The page of the multi-turn study: a table, a plot, and what agrees with the published findings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mtedit_fast.figures import LIGHT, Theme, new_axes, set_title
from mtedit_fast.training.playground.study import BASE, Result, read_results
from mtedit_fast.training.report import paired_bootstrap

MARK = "<!-- results: written by mtedit-fast study -->"


def write_study(output: Path, page: Path) -> Path:
    """Write table and plot of the finished runs under the mark in `page` (made if missing); what stands above stays.

    Raises:
        ValueError: no run is finished, or none of the base's.
    """
    untrained, results = read_results(output)
    if not any(result.arm is BASE for result in results):
        raise ValueError(
            f"{output}: no finished run of the base, which every arm is compared with; start the study again"
        )
    page.parent.mkdir(parents=True, exist_ok=True)
    plot = page.with_suffix(".png")
    dot_plot(LIGHT, untrained, results).savefig(plot, facecolor="white")
    head = page.read_text(encoding="utf-8").partition(MARK)[0] if page.exists() else "# The multi-turn study\n\n"
    content = f"{head}{MARK}\n\n![gains by arm]({plot.name})\n\n{table(untrained, results)}\n"
    page.write_text(content, encoding="utf-8")
    return page


def gains(untrained: np.ndarray, result: Result) -> np.ndarray:
    """[S, N] of −1, 0, 1: each run's change of the last turn's image success on each chain."""
    return result.last - untrained.all(1)


def against_base(result: Result, base: Result) -> tuple[float, float, float] | None:
    """Mean difference of the last turn's image success to the base, paired by seed and chain, with its 95 % interval.

    The interval resamples seeds and, within them, the chains all runs share (a two-level bootstrap).
    """
    seeds = min(len(result.last), len(base.last))
    if result.arm is BASE or seeds == 0:
        return None
    difference = result.last[:seeds] - base.last[:seeds]
    generator = np.random.default_rng(0)
    draws = [
        difference[generator.integers(seeds, size=seeds)][
            :, generator.integers(difference.shape[1], size=difference.shape[1])
        ].mean()
        for _ in range(4000)
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def table(untrained: np.ndarray, results: list[Result]) -> str:
    """Markdown: one row per arm."""
    base = next(result for result in results if result.arm is BASE)
    rate = np.logical_and.accumulate(untrained, axis=1).mean(0)
    lines = [
        "| factor | arm | seeds | image success t1 / t2 / t3 | gain at t3 [95 %, chains] | per seed | against the base "
        "[95 %, seeds and chains] | consistency t3 |",
        "|---|---|---|---|---|---|---|---|",
        f"| | untrained | | {_rates(rate)} | | | | |",
    ]
    for result in results:
        gain = gains(untrained, result)
        interval = paired_bootstrap(np.broadcast_to(untrained.all(1), gain.shape).mean(0), result.last.mean(0))
        difference = against_base(result, base)
        success = np.logical_and.accumulate(result.success, axis=2).mean((0, 1))
        lines.append(
            f"| {result.arm.factor} | {result.arm.name} | {len(gain)} | {_rates(success)} "
            f"| {_points(gain.mean(), interval.low, interval.high)} "
            f"| {', '.join(f'{100 * value:+.1f}' for value in gain.mean(1))} "
            f"| {_points(*difference) if difference else ''} "
            f"| {result.consistency[:, -1].mean():.3f} |"
        )
    return "\n".join(lines)


def dot_plot(theme: Theme, untrained: np.ndarray, results: list[Result]) -> Figure:
    """Gain at the last turn by arm: a dot per seed, a bar for the mean."""
    figure, (axis,) = new_axes(theme, 7.5, 0.36 * len(results) + 1.1)
    names = [r.arm.name if r.arm is BASE else f"{r.arm.factor}: {r.arm.name}" for r in results]
    places = np.arange(len(results))[::-1]
    for place, result in zip(places, results, strict=True):
        values = 100 * gains(untrained, result).mean(1)
        axis.barh(place, values.mean(), color=theme.after if result.arm is BASE else theme.before, height=0.62)
        axis.plot(values, np.full(len(values), place), "o", color=theme.text, markersize=4)
    axis.set_yticks(places, names, color=theme.text)
    axis.axvline(0, color=theme.text, linewidth=0.8)
    set_title(axis, theme, f"gain in turn-{untrained.shape[1]} image success, points")
    return figure


def _rates(values: np.ndarray) -> str:
    return " / ".join(f"{100 * value:.1f}" for value in values) + " %"


def _points(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
