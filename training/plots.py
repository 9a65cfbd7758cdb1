"""Figures of a training report: matplotlib plots in a light and a dark theme, and the grid of multi-turn edits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mtedit_fast.figures import FAINT, INK, Theme, add_legend, mark, new_axes, paste, set_title, wrap_text

Interval = tuple[float, float]


@dataclass(frozen=True)
class Bars:
    """Rates in [0, 1] before and after with their intervals, one bar pair per label."""

    title: str
    labels: list[str]
    before: list[float]
    after: list[float]
    before_intervals: list[Interval]
    after_intervals: list[Interval]


def success_bars(theme: Theme, panels: Sequence[Bars]) -> Figure:
    """Bar pairs in percent with error bars, a panel for each of `panels`."""
    widest = max(len(panel.labels) for panel in panels)
    figure, axes = new_axes(theme, max(8.0, 1.15 * widest * len(panels)), 3.1, len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        x = np.arange(len(panel.labels))
        for offset, rates, intervals, colour, label in (
            (-0.2, panel.before, panel.before_intervals, theme.before, "before"),
            (0.2, panel.after, panel.after_intervals, theme.after, "after"),
        ):
            height = 100 * np.array(rates)
            error = np.abs(100 * np.array(intervals).T - height)  # [2, n]: down, up
            axis.bar(x + offset, height, 0.38, color=colour, label=label)
            axis.errorbar(x + offset, height, error, fmt="none", ecolor=theme.text, elinewidth=1, capsize=3)
            for position, value, up in zip(x + offset, height, error[1], strict=True):
                axis.text(position, value + up + 1.5, f"{value:.0f}", color=theme.text, fontsize=8, ha="center")
        axis.set_xticks(x, panel.labels)
        axis.set_ylim(0, 122)  # room for the legend
        axis.set_yticks(range(0, 101, 25), [f"{tick} %" for tick in range(0, 101, 25)])
        axis.grid(visible=False, axis="x")
        set_title(axis, theme, panel.title)
    add_legend(axes[0], theme, loc="upper right", ncols=2)
    return figure


def curves(theme: Theme, panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> Figure:
    """Lines {panel title: {label: (iterations, values)}}; a running mean over the raw values where there are many."""
    figure, axes = new_axes(theme, 4.4 * max(len(panels), 2), 2.9, len(panels))
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for colour, (label, (x, y)) in zip(theme.cycle * len(lines), lines.items(), strict=False):
            smooth = len(y) >= 10
            axis.plot(x, y, color=colour, alpha=0.35 if smooth else 1, linewidth=1.2, marker="." if len(y) < 2 else "")
            if smooth:
                axis.plot(x, running_mean(y, 5), color=colour, linewidth=1.8)
            axis.plot([], [], color=colour, label=label)
        axis.set_xlabel("iteration", color=theme.text, fontsize=9)
        axis.yaxis.get_offset_text().set_color(theme.text)
        axis.margins(y=0.15)
        set_title(axis, theme, title)
        add_legend(axis, theme)
    return figure


def running_mean(values: Sequence[float], width: int) -> np.ndarray:
    """Centred mean over `width` values (odd), over fewer at the ends; NaNs are left out."""
    padded = np.pad(np.asarray(values, dtype=np.float64), width // 2, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)
    count = (~np.isnan(windows)).sum(axis=1)
    return np.where(count > 0, np.nansum(windows, axis=1) / np.maximum(count, 1), np.nan)


def stacked_seconds(theme: Theme, iterations: Sequence[float], phases: Mapping[str, Sequence[float]]) -> Figure:
    """Seconds of each iteration, a stacked bar split by phase."""
    figure, (axis,) = new_axes(theme, 8.8, 2.9)
    bottom = np.zeros(len(iterations))
    for colour, (name, seconds) in zip(theme.cycle * len(phases), phases.items(), strict=False):
        axis.bar(iterations, seconds, 0.85, bottom=bottom, color=colour, label=name)
        bottom += np.asarray(seconds)
    axis.set_xlabel("iteration", color=theme.text, fontsize=9)
    axis.grid(visible=False, axis="x")
    set_title(axis, theme, "Seconds per iteration")
    add_legend(axis, theme, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def edit_grid(
    references: Tensor,
    edits_before: Tensor,
    edits_after: Tensor,
    instructions: Sequence[Sequence[str]],
    success_before: Tensor | np.ndarray | None,
    success_after: Tensor | np.ndarray | None,
    *,
    cell: int = 128,
) -> Image.Image:
    """Chains as rows: the reference, then every turn before (upper) and after training (lower), under its instruction.

    references [N, 3, H, W] and edits [N, K, 3, H, W] in [0, 1]; instructions: N lists of K; success bool [N, K]: a
    green frame and tick, or a red frame and cross; None: no marks. Images are fitted into cells of `cell` pixels.
    """
    n, turns = edits_before.shape[:2]
    if edits_after.shape != edits_before.shape or references.shape != (n, *edits_before.shape[2:]):
        shapes = [list(t.shape) for t in (references, edits_before, edits_after)]
        raise ValueError(f"expected references [N, 3, H, W] and two edits [N, K, 3, H, W], got {shapes}")
    for success in (success_before, success_after):
        if success is not None and tuple(success.shape) != (n, turns):
            raise ValueError(f"success: expected [N, K] = [{n}, {turns}], got {list(success.shape)}")
    if [len(chain) for chain in instructions] != [turns] * n:
        raise ValueError(f"instructions: expected {n} lists of {turns}, got {[len(chain) for chain in instructions]}")
    gap, label, head = 16, 58, 46
    font = ImageFont.load_default(size=12)
    row = head + 2 * cell + 3 * gap
    canvas = Image.new("RGB", (2 * gap + cell + label + turns * (cell + gap), n * row + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for chain in range(n):
        top = chain * row + gap
        upper = top + head
        paste(canvas, references[chain], (gap, upper + (cell + gap) // 2), cell)
        draw.text((gap, upper + (cell + gap) // 2 - 18), "reference", fill=FAINT, font=font)
        for y, name, edits, success in (
            (upper, "before", edits_before, success_before),
            (upper + cell + gap, "after", edits_after, success_after),
        ):
            draw.text((gap + cell + label - 12, y + cell // 2), name, fill=FAINT, font=font, anchor="rm")
            for turn in range(turns):
                x = gap + cell + label + turn * (cell + gap)
                paste(canvas, edits[chain, turn], (x, y), cell)
                if success is not None:
                    mark(draw, x, y, cell, bool(success[chain, turn]))
        for turn in range(turns):
            x = gap + cell + label + turn * (cell + gap)
            text = wrap_text(instructions[chain][turn], font, cell, lines=3)
            draw.multiline_text((x, upper - 7), text, fill=INK, font=font, anchor="ld", spacing=2)
    return canvas
