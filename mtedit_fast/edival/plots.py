"""Figures of an EdiVal report: success per turn and type, Pareto plots, and the pictures of edited chains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mtedit_fast.figures import FAINT, INK, Theme, add_legend, mark, new_axes, paste, set_title, wrap_text


def turn_lines(theme: Theme, per_turn: Sequence[Mapping[str, Any]], metrics: Mapping[str, str]) -> Figure:
    """Per cent over turns of {key of a turn: label}, each with its interval as a band."""
    figure, (axis,) = new_axes(theme, 8.8, 3.1)
    for colour, (key, label) in zip(theme.cycle * len(metrics), metrics.items(), strict=False):
        points = [(line["turn"], line[key]) for line in per_turn if line[key] is not None]
        if points:
            x = [turn for turn, _ in points]
            low, mean, high = ([100 * point[end] for _, point in points] for end in ("low", "mean", "high"))
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.plot(x, mean, color=colour, linewidth=1.8, marker="o", markersize=4, label=label)
    axis.set_xticks([line["turn"] for line in per_turn], [f"turn {line['turn']}" for line in per_turn])
    axis.set_ylim(0, 102)
    axis.set_yticks(range(0, 101, 25), [f"{tick} %" for tick in range(0, 101, 25)])
    add_legend(axis, theme, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def share_bars(theme: Theme, shares: Mapping[str, Mapping[str, float]]) -> Figure:
    """A bar in per cent with its interval for each {label: {mean, low, high, n}}."""
    figure, (axis,) = new_axes(theme, max(5.0, 1.05 * len(shares)), 3.1)
    mean, low, high = (100 * np.array([share[end] for share in shares.values()]) for end in ("mean", "low", "high"))
    x = list(range(len(shares)))
    axis.bar(x, mean, 0.6, color=theme.after)
    error = np.abs([mean - low, high - mean])  # rounding may put an interval's end beyond its mean
    axis.errorbar(x, mean, error, fmt="none", ecolor=theme.text, elinewidth=1, capsize=3)
    for position, value, top in zip(x, mean, high, strict=True):
        axis.text(position, top + 1.5, f"{value:.0f}", color=theme.text, fontsize=8, ha="center")
    labels = [f"{name.replace('_', chr(10), 1)}\nn={share['n']}" for name, share in shares.items()]
    axis.set_xticks(x, labels)
    axis.set_ylim(0, 112)
    axis.set_yticks(range(0, 101, 25), [f"{tick} %" for tick in range(0, 101, 25)])
    axis.grid(visible=False, axis="x")
    return figure


def pareto_front(points: Sequence[Sequence[float]]) -> list[bool]:
    """Which points [n][d] no other reaches or exceeds in every coordinate and exceeds in one."""
    if not points:
        return []
    table = np.asarray(points, dtype=np.float64)
    at_least = np.all(table[None] >= table[:, None], axis=-1)  # [i, j]: j reaches i everywhere
    beyond = np.any(table[None] > table[:, None], axis=-1)
    return np.logical_not(np.any(at_least & beyond, axis=1)).tolist()


def pareto(
    theme: Theme, systems: Mapping[str, Mapping[str, float]], pairs: Sequence[tuple[str, str]], published: Sequence[str]
) -> Figure:
    """A panel for each pair of metrics: every system of {name: {metric: value}} that has both, and the front's line.

    published: names drawn hollow, whose values are quoted.
    """
    figure, axes = new_axes(theme, 4.4 * max(len(pairs), 2), 3.4, len(pairs))
    for axis, (x, y) in zip(axes, pairs, strict=True):
        known = {name: (values[x], values[y]) for name, values in systems.items() if x in values and y in values}
        front = sorted(
            point for point, first in zip(known.values(), pareto_front(list(known.values())), strict=True) if first
        )
        axis.plot([p[0] for p in front], [p[1] for p in front], color=theme.before, linewidth=1, linestyle="--")
        for name, point in known.items():
            fill = "none" if name in published else theme.after
            axis.scatter(*point, s=36, facecolors=fill, edgecolors=theme.after)
            axis.annotate(name, point, (5, 4), textcoords="offset points", color=theme.text, fontsize=8)
        axis.set_xlabel(x, color=theme.text, fontsize=9)
        axis.set_ylabel(y, color=theme.text, fontsize=9)
        axis.margins(0.2)
        set_title(axis, theme, f"{y} against {x}")
    return figure


def chain_grid(
    chains: Sequence[Tensor],
    instructions: Sequence[Sequence[str]],
    verdicts: Sequence[Sequence[bool | None]],
    names: Sequence[str],
    *,
    cell: int = 144,
) -> Image.Image:
    """Chains [K + 1, 3, H, W] in [0, 1] as rows: the start, then every turn under its instruction, marked by its
    verdict (None: no mark). Images are fitted into cells of `cell` pixels."""
    gap, head = 16, 46
    font = ImageFont.load_default(size=12)
    turns = max(len(texts) for texts in instructions)
    row = head + cell + 2 * gap
    canvas = Image.new("RGB", (gap + (turns + 1) * (cell + gap), len(chains) * row + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (chain, texts, marks) in enumerate(zip(chains, instructions, verdicts, strict=True)):
        y = i * row + gap + head
        paste(canvas, chain[0], (gap, y), cell)
        draw.text((gap, y - 18), str(names[i]), fill=FAINT, font=font)
        for turn, (text, verdict) in enumerate(zip(texts, marks, strict=True)):
            x = gap + (turn + 1) * (cell + gap)
            paste(canvas, chain[turn + 1], (x, y), cell)
            if verdict is not None:
                mark(draw, x, y, cell, verdict)
            wrapped = wrap_text(text, font, cell, lines=3)
            draw.multiline_text((x, y - 7), wrapped, fill=INK, font=font, anchor="ld", spacing=2)
    return canvas
