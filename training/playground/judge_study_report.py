"""The page of the judge study: summary.json, a table and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mtedit_fast.figures import LIGHT, Theme, new_axes, set_title
from mtedit_fast.training.playground.judge_study import KINDS, Result, agreement_over_seeds, difference, read_results
from mtedit_fast.training.playground.study_report import MARK

SHOWN = {"pearson": "Pearson", "spearman": "Spearman", "l1": "L1"}


def write_study(output: Path, page: Path) -> Path:
    """Write `output`/summary.json, and table and plot under the mark in `page` (made if missing); what stands above it
    stays. ValueError where no run is finished."""
    results = read_results(output)
    summary = summarize(results)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    page.parent.mkdir(parents=True, exist_ok=True)
    plot = page.with_suffix(".png")
    dot_plot(LIGHT, summary).savefig(plot, facecolor="white")
    head = page.read_text(encoding="utf-8").partition(MARK)[0] if page.exists() else "# The judge study\n\n"
    content = f"{head}{MARK}\n\n![agreement by method]({plot.name})\n\n{table(summary)}\n"
    page.write_text(content, encoding="utf-8")
    return page


def summarize(results: Sequence[Result]) -> dict[str, Any]:
    """{"edits", "methods": {name: {"meaning", "seeds", "seconds", kind: {metric: {mean, low, high, per_seed}}}}}."""
    methods = {}
    real = next((result for result in results if result.arm.name == "real"), None)
    for result in results:
        kinds = {kind: agreement_over_seeds(result, kind) for kind in KINDS}
        methods[result.arm.name] = {
            "meaning": result.arm.meaning,
            "seeds": len(result.summaries),
            "seconds": float(np.median([summary["seconds"] for summary in result.summaries])),
            "unreadable": [summary["models"][summary["method"]]["invalid"] for summary in result.summaries],
            **{kind: figures for kind, figures in kinds.items() if figures is not None},
        }
        if real is not None and result is not real:
            methods[result.arm.name]["real_minus"] = difference(real, result, "expected_one")
    return {"edits": len(results[0].truth), "methods": methods}


def table(summary: dict[str, Any]) -> str:
    """Markdown: every method by every kind of score."""
    lines = [
        "| method | score | " + " | ".join(f"{name} [95 %]" for name in SHOWN.values()) + " | per seed (Pearson) |",
        "|---|---|" + "---|" * (len(SHOWN) + 1),
    ]
    for name, method in summary["methods"].items():
        for kind, label in KINDS.items():
            if kind not in method:
                continue
            cells = [
                f"{f['mean']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" for f in (method[kind][metric] for metric in SHOWN)
            ]
            seeds = ", ".join(f"{value:.3f}" for value in method[kind]["pearson"]["per_seed"])
            lines.append(f"| {name} | {label} | {' | '.join(cells)} | {seeds} |")
    compared = {name: method["real_minus"] for name, method in summary["methods"].items() if "real_minus" in method}
    if compared:
        lines += ["", "REAL less another method, ŷ after one thought, on the same edits [95 %, seeds and edits]:", ""]
        lines += ["| REAL less | " + " | ".join(SHOWN.values()) + " |", "|---|" + "---|" * len(SHOWN)]
        for name, figures in compared.items():
            cells = [f"{f['mean']:+.3f} [{f['low']:+.3f}, {f['high']:+.3f}]" for f in (figures[m] for m in SHOWN)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def dot_plot(theme: Theme, summary: dict[str, Any]) -> Figure:
    """Pearson and Spearman of every method, with intervals: the expected score after one thought, and a sampled one."""
    names = list(summary["methods"])
    figure, axes = new_axes(theme, 9.0, 0.42 * len(names) + 1.3, 2)
    for axis, metric in zip(axes, ("pearson", "spearman"), strict=True):
        for offset, kind, colour in (
            (-0.14, "expected_one", theme.after),
            (0.14, "sampled_one", theme.before),
        ):
            for row, name in enumerate(names):
                if (found := summary["methods"][name].get(kind)) is None:
                    continue
                value = found[metric]
                axis.plot([value["low"], value["high"]], [row + offset] * 2, color=colour, linewidth=1.4)
                axis.plot(
                    value["mean"],
                    row + offset,
                    "o",
                    color=colour,
                    markersize=5,
                    label=KINDS[kind] if row == 0 else None,
                )
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        set_title(axis, theme, SHOWN[metric])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure
