"""A page of all results: ours against peers, how close to the device's limits, and what changed.

mtedit-fast bench report                                  benchmarks/results → runs/bench.html
mtedit-fast bench report --compare 55774e5 a8316fb        two commits (the beginning is enough), or two devices

Rows that were measured twice on one commit (--fresh) and whose medians are further apart than the larger of their own
spreads, p80 − p20, are flagged; so are rows of files with other columns than this version writes.
"""

import argparse
import html
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from itertools import groupby, pairwise
from math import log10
from pathlib import Path
from statistics import median as middle
from typing import Any

import record
from matplotlib.figure import Figure
from tables import newest

from mtedit_fast.figures import Theme, add_legend, new_axes, set_title
from mtedit_fast.webpage import page, picture, section

Row = Mapping[str, str]
PEERS = {
    "eager_us": "eager", "compile_us": "torch.compile", "library_us": "library products", "fused_us": "fused kernel",
    "chunked_us": "chunked cross-entropy", "liger_us": "Liger", "cut_us": "cut cross-entropy", "pil_us": "PIL",
    "interpolate_us": "F.interpolate", "interpolate_u8_us": "F.interpolate, bytes", "kornia_us": "kornia",
    "loop_us": "loop of public trainers", "loop_s": "loop of public trainers", "full_us": "full attention",
    "unshared_us": "without a shared prefix", "one_by_one_us": "one generate per score", "baseline_us": "baseline",
    "teacher_us": "teacher, 18 steps",
}  # fmt: skip
"""Columns with the time of a peer for what ours does in `median_us` or `median_s`."""
LABEL = ("op", "variant", "shape", "dtype", "backend", "timing")
BARS = 16  # rows to a picture


def microseconds(row: Row, column: str) -> float | None:
    """Of a column of times; None where it is empty."""
    value = row.get(column)
    return float(value) * (1e6 if column.endswith("_s") else 1) if value else None


def median(row: Row) -> float | None:
    return next(filter(None, (microseconds(row, name) for name in ("median_us", "median_s", "measured_s"))), None)


def spread(row: Row) -> float | None:
    """p80 − p20, µs."""
    low, high = (microseconds(row, f"{end}_us") or microseconds(row, f"{end}_s") for end in ("p20", "p80"))
    return None if low is None or high is None else high - low


def label(row: Row, names: Sequence[str] = LABEL) -> str:
    return ", ".join(filter(None, (row.get(name) for name in names)))


def speedups(row: Row) -> dict[str, float]:
    """Of ours over each peer of the row."""
    own = median(row)
    found = {name: microseconds(row, column) for column, name in PEERS.items()}
    return {name: time / own for name, time in found.items() if time and own}


def twice(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Rows of one commit, each with the next of the same kind."""

    def key(row: Row) -> tuple[str, ...]:
        return tuple(row.get(name, "") for name in record.IDENTITY)

    groups = (list(group) for _, group in groupby(sorted(rows, key=key), key=key))
    return [pair for group in groups for pair in pairwise(sorted(group, key=lambda row: row.get("date", "")))]


def repeats(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Those of `twice` that differ by more than the larger of their spreads."""
    flagged = []
    for one, two in twice(rows):
        times, spreads = (median(one), median(two)), (spread(one), spread(two))
        if None not in times + spreads and abs(times[0] - times[1]) > max(spreads):  # type: ignore[operator, type-var]
            flagged.append((one, two))
    return flagged


def ratios_apart(rows: Iterable[Row]) -> list[float]:
    """Of those of `twice` that have peers: how far apart the two runs are over the fastest of them, a share."""
    pairs = ((speedups(one), speedups(two)) for one, two in twice(rows))
    return [abs(min(one.values()) / min(two.values()) - 1) for one, two in pairs if one and two]


def columns_now(file: str) -> list[str] | None:
    """What this version writes into `file`; None where that cannot be known here."""
    try:
        module = importlib.import_module(f"bench_{file.partition('.')[0]}")
    except ImportError:
        return None
    return [field.name for field in fields(getattr(module, "Row", record.Row))]


def other_versions(rows: Iterable[Row], now: Callable[[str], list[str] | None] = columns_now) -> dict[str, str]:
    """What the columns of a file lack and have besides, by file, where they are not this version's."""
    marks = {}
    for file, row in {row["file"]: row for row in rows}.items():
        own, expected = [name for name in row if name != "file"], now(file)
        if expected is not None and own != expected:
            lacks, besides = ([x for x in a if x not in b] for a, b in ((expected, own), (own, expected)))
            marks[file] = f"lacks {', '.join(lacks) or 'none'}; has besides {', '.join(besides) or 'none'}"
    return marks


def compared(rows: Sequence[Row], first: str, second: str) -> list[tuple[Row, Row]]:
    """Newest rows of the same kind from two commits (their beginnings) or two devices (parts of their names).

    Raises:
        ValueError: one of them names no row.
    """
    chosen: list[list[Row]] = []
    kind: tuple[str, ...] = LABEL
    for name in (first, second):
        own = [row for row in rows if row.get("commit", "").startswith(name)]
        by_device = not own
        own = own or [row for row in rows if name.lower() in row["device"].lower()]
        if not own:
            known = sorted({row.get("commit", "") for row in rows} | {row["device"] for row in rows})
            raise ValueError(f"--compare: expected commits or devices out of {', '.join(known)}; got {name!r}")
        kind = kind if by_device else ("device", "threads", *LABEL)
        chosen.append(newest(own))
    found = [{tuple(row.get(x, "") for x in kind): row for row in own} for own in chosen]
    return [(row, found[1][key]) for key, row in found[0].items() if key in found[1]]


def bars(theme: Theme, rows: Sequence[Row]) -> Figure:
    """Speed-ups over the peers, logarithmic; 1 is a line."""
    found = [speedups(row) for row in rows]
    names = list(dict.fromkeys(name for each in found for name in each))
    height = 0.8 / max(len(names), 1)
    figure, (axis,) = new_axes(theme, 9, 0.9 + len(rows) * max(0.3, 0.14 * len(names)))
    for i, (name, colour) in enumerate(zip(names, theme.cycle * len(names), strict=False)):
        places = [y + (i - (len(names) - 1) / 2) * height for y in range(len(rows))]
        lengths = [log10(each[name]) if name in each else 0.0 for each in found]
        axis.barh(places, lengths, height, color=colour, label=name)
        for y, length, each in zip(places, lengths, found, strict=True):
            if name in each:
                side = "left" if length >= 0 else "right"
                axis.text(length, y, f" {each[name]:.2f}× ", color=theme.text, fontsize=7, va="center", ha=side)
    axis.axvline(0, color=theme.text, linewidth=1)
    axis.set_yticks(range(len(rows)), [label(row, LABEL[1:]) for row in rows])
    axis.invert_yaxis()
    axis.set_xticks([])
    axis.grid(visible=False)
    axis.margins(x=0.12)
    set_title(axis, theme, "Time of a peer over ours")
    add_legend(axis, theme, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def matrix_products(rows: Sequence[Row]) -> dict[str, float]:
    """GFLOP/s that a large matrix product reached at most, by dtype."""
    found: dict[str, float] = {}
    for row in rows:
        rate = float(row.get("matmul_gflop_per_s") or 0) or 1e3 * float(row.get("matmul_tflop_per_s") or 0)
        if rate:
            found[row["dtype"]] = max(rate, found.get(row["dtype"], 0.0))
    return found


def roofline(theme: Theme, rows: Sequence[Row], products: Mapping[str, float]) -> Figure:
    """Rates over arithmetic intensity, below what copies reached in these runs, and matrix products on this device."""
    figure, (axis,) = new_axes(theme, 9, 4)
    points = {op: list(group) for op, group in groupby(sorted(rows, key=lambda r: r["op"]), key=lambda r: r["op"])}
    intensity = [float(row["flops"]) / float(row["bytes"]) for row in rows]
    copy = max(float(row["copy_gb_per_s"]) for row in rows)
    ends = [min(intensity) / 2, max(intensity) * 2]
    axis.plot(ends, [copy * x for x in ends], color=theme.text, linewidth=1, label=f"copy, {copy:.0f} GB/s")
    for dtype, rate in products.items():
        axis.axhline(rate, color=theme.text, linewidth=1, linestyle=":")
        axis.text(ends[0], rate, f"matrix product, {dtype}", color=theme.text, fontsize=7, va="bottom")
    markers = "o" * len(theme.cycle) + "^" * len(theme.cycle)
    for (op, own), colour, marker in zip(points.items(), theme.cycle * 2, markers, strict=False):
        x = [float(row["flops"]) / float(row["bytes"]) for row in own]
        axis.scatter(x, [float(row["gflop_per_s"]) for row in own], s=14, color=colour, marker=marker, label=op)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOPs per byte", color=theme.text, fontsize=9)
    axis.set_ylabel("GFLOP/s", color=theme.text, fontsize=9)
    add_legend(axis, theme, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def utilisation(theme: Theme, rows: Sequence[Row]) -> Figure:
    """Percent of what a large matrix product reached in the same run."""
    figure, (axis,) = new_axes(theme, 9, 0.9 + 0.3 * len(rows))
    shares = [float(row["percent_of_matmul"]) for row in rows]
    axis.barh(range(len(rows)), shares, 0.7, color=theme.after)
    for y, share in enumerate(shares):
        axis.text(share, y, f" {share:.1f} %", color=theme.text, fontsize=8, va="center")
    axis.set_yticks(range(len(rows)), [label(row) for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, max(100.0, *shares))
    return figure


def predictions(theme: Theme, rows: Sequence[Row]) -> Figure:
    """Seconds that the planner predicts over those an iteration took, by phase, and 15 % to either side."""
    figure, (axis,) = new_axes(theme, 9, 4)
    for (phase, marker), colour in zip({"rollout": "o", "update": "^"}.items(), theme.cycle, strict=False):
        x, y = ([float(row[f"{side}{phase}_s"]) for row in rows] for side in ("", "predicted_"))
        axis.scatter(x, y, s=20, color=colour, marker=marker, label=phase)
    x, y = ([float(row[f"{side}_s"]) for row in rows] for side in ("measured", "predicted"))
    axis.scatter(x, y, s=30, color=theme.cycle[2], marker="s", label="iteration")
    for at, height, row in zip(x, y, rows, strict=True):
        axis.text(at, height, f"  {row['variant']}", color=theme.text, fontsize=7, va="top")
    ends = [0.0, 1.1 * max(x + y)]
    for factor, style in ((1.0, "-"), (0.85, ":"), (1.15, ":")):
        axis.plot(ends, [factor * end for end in ends], color=theme.text, linewidth=1, linestyle=style)
    axis.set_xlabel("measured, s", color=theme.text, fontsize=9)
    axis.set_ylabel("predicted, s", color=theme.text, fontsize=9)
    add_legend(axis, theme, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def table(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    def row(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f'<div class="wide"><table>{row(head, "th")}{"".join(row(line, "td") for line in lines)}</table></div>'


def _compare_section(rows: Sequence[Row], first: str, second: str) -> str:
    lines = []
    for one, two in compared(rows, first, second):
        a, b = median(one), median(two)
        if a and b:
            widest = max(spread(one) or 0.0, spread(two) or 0.0)
            verdict = "within the spread" if abs(a - b) <= widest else "faster" if b < a else "slower"
            lines.append((label(one), f"{a:,.1f}", f"{b:,.1f}", f"{a / b:.2f}×", f"{widest:,.1f}", verdict))
    head = ("row", f"{first}, µs", f"{second}, µs", "speed-up", "spread, µs", "")
    return section(f"{first} against {second}", table(head, lines), f"{len(lines)} rows that both have.")


def over_fastest_peer(row: Row) -> str:
    found = speedups(row)
    return f"{min(found.values()):.2f}×" if found else ""


def _flag_section(rows: Sequence[Row]) -> str:
    lines = [
        (label(one), f"{median(one):,.1f}", f"{median(two):,.1f}", f"{max(spread(one) or 0, spread(two) or 0):,.1f}",
         over_fastest_peer(one), over_fastest_peer(two))
        for one, two in repeats(rows)
    ]  # fmt: skip
    if not lines:
        return ""
    note = f"Measured twice on one commit: {len(twice(rows))}. Further apart than the spread of either: {len(lines)}."
    apart = ratios_apart(rows)
    if apart:
        note += (
            f" Where all of a machine is slower the peers are, too: over the fastest of them, {len(apart)} such rows "
            f"are {100 * middle(apart):.1f} % apart in the median, and {sum(x > 0.2 for x in apart)} more than 20 %."
        )
    head = ("row", "first, µs", "then, µs", "spread, µs", "over the fastest peer, first", "then")
    return section("Rows that do not repeat", table(head, lines), note)


def _version_section(marks: Mapping[str, str]) -> str:
    note = "Files with other columns than this version writes. Their rows are read as far as they go, and marked †."
    return section("Of another version", table(("file", "columns"), marks.items()), note) if marks else ""


def _device_sections(device: str, rows: Sequence[Row], marks: Mapping[str, str]) -> list[str]:
    made = []
    for file, group in groupby(sorted(rows, key=lambda r: r["file"]), key=lambda r: r["file"]):
        own = list(group)
        with_peers = [row for row in own if speedups(row)]
        parts = [with_peers[i : i + BARS] for i in range(0, len(with_peers), BARS)]
        pictures = [picture(partial(bars, rows=part), f"{file}: time of peers over ours") for part in parts]
        lines = [
            (label(row), f"{median(row) or 0:,.1f}", f"{spread(row) or 0:,.1f}", row.get("error", ""),
             row.get("date", ""), row.get("commit", ""), row.get("torch", ""))
            for row in own if median(row)
        ]  # fmt: skip
        head = ("row", "median, µs", "p80 − p20, µs", "error", "date", "commit", "torch")
        title = f"{file.removesuffix('.csv')}{' †' if file in marks else ''} · {device}"
        made.append(section(title, "".join(pictures) + table(head, lines)))
    ops = [row for row in rows if row.get("copy_gb_per_s") and float(row.get("flops") or 0) > 0]
    if ops:
        drawn = picture(partial(roofline, rows=ops, products=matrix_products(rows)), "roofline")
        made.append(section(f"Roofline of single ops · {device}", drawn))
    planned = [row for row in rows if row.get("predicted_s")]
    if planned:
        drawn = picture(partial(predictions, rows=planned), "what the planner predicts, and what an iteration takes")
        made.append(section(f"Predicted and measured · {device}", drawn, "Dotted: 15 % to either side."))
    models = [row for row in rows if row.get("percent_of_matmul")]
    if models:
        note = "Of what a large matrix product of the dtype reached in the same run, over the whole of the time."
        drawn = picture(partial(utilisation, rows=models), "model FLOP utilisation")
        made.append(section(f"Model FLOP utilisation · {device}", drawn, note))
    return made


def write_report(results: Path, out: Path, compare: tuple[str, str] | None = None) -> Path:
    """Writes the page of the CSV files in `results`; ValueError where there is nothing to draw."""
    rows = record.read_all(results)
    if not rows:
        raise ValueError(f"--results: no rows in {results}; mtedit-fast bench all measures some")
    marks = other_versions(rows)
    flagged = len(repeats(rows))
    cards = {"rows": len(rows), "devices": len({row["device"] for row in rows}), "do not repeat": flagged}
    boxes = "".join(f"<div class=card><b>{value}</b>{name}</div>" for name, value in cards.items())
    dates = [row.get("date", "") for row in rows]
    lead = f"{min(dates)} to {max(dates)}; the newest row of each kind is shown"
    sections = [f'<header><h1>Benchmarks</h1><p class="lead">{lead}</p><div class="cards">{boxes}</div></header>']
    if compare:
        sections.append(_compare_section(rows, *compare))
    sections += [_flag_section(rows), _version_section(marks)]
    for device, group in groupby(sorted(newest(rows), key=lambda r: r["device"]), key=lambda r: r["device"]):
        sections += _device_sections(device, list(group), marks)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page("mtedit_fast · benchmarks", sections), encoding="utf-8")
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "mtedit-fast bench report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the CSV files")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.html"))
    parser.add_argument("--compare", nargs=2, metavar=("FIRST", "SECOND"), help="commits or devices")
    args = parser.parse_args(arguments)
    try:
        print(f"report: {write_report(args.results, args.out, args.compare)}")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
