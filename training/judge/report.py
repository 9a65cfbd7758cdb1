"""report.html of judged judges: agreement with the true scores, model by model, and their scores against the truth."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mtedit_fast.figures import Theme, new_axes, set_title
from mtedit_fast.training.judge.agreement import METRICS
from mtedit_fast.webpage import page, picture, section

KINDS = {
    "expected": "ŷ",
    "sampled": "sampled",
    "expected_one": "ŷ, one thought",
    "sampled_one": "sampled once",
}
UNREADABLE = "no score could be read"
LABELS = {"pearson": "Pearson", "spearman": "Spearman", "kendall": "Kendall", "l1": "L1", "rmse": "RMSE"}


def write_report(folder: str | Path) -> Path:
    """Write `folder`/report.html from its summary.json and predictions/*.jsonl, and return its path."""
    folder = Path(folder)
    path = folder / "summary.json"
    if not path.is_file():
        raise ValueError(f"{path}: missing; expected a folder that `mtedit-fast judge eval` wrote")
    models = json.loads(path.read_text(encoding="utf-8"))["models"]
    sections = [section("Agreement with the true scores", _table(models), NOTE)]
    for name in models:
        lines = (folder / "predictions" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        points = _points([json.loads(line) for line in lines])
        plot = picture(partial(scatter, points=points), f"scores of {name} against the truth") if points else ""
        sections.append(section(name, plot, _counts(models[name])))
    output = folder / "report.html"
    output.write_text(page("Judges against true scores", sections), encoding="utf-8")
    return output


NOTE = (
    "Best first by the expected score's Pearson correlation. Brackets: 95 % bootstrap over original images. ŷ is the "
    "expected score; both it and sampled scores are averaged over the thoughts, or come from the first alone."
)


def _table(models: Mapping[str, Mapping[str, Any]]) -> str:
    heads = "".join(f"<th>{label}</th>" for label in ("", "", *LABELS.values()))
    rows = []
    for name, summary in sorted(models.items(), key=lambda item: -_headline(item[1])):
        if not any(kind in summary for kind in KINDS):
            rows.append(f'<tr><td>{html.escape(name)}</td><td colspan="{1 + len(METRICS)}">{UNREADABLE}</td></tr>')
        for kind in filter(summary.__contains__, KINDS):
            cells = "".join(f"<td>{_shown(summary[kind][metric])}</td>" for metric in METRICS)
            rows.append(f"<tr><td>{html.escape(name)}</td><td>{KINDS[kind]}</td>{cells}</tr>")
    return f'<div class="wide"><table><tr>{heads}</tr>{"".join(rows)}</table></div>'


def _headline(summary: Mapping[str, Any]) -> float:
    kind = "expected" if "expected" in summary else "sampled"
    value = summary[kind]["pearson"]["mean"] if kind in summary else None
    return -2.0 if value is None else value


def _shown(figure: Mapping[str, Any]) -> str:
    if figure["mean"] is None:
        return "–"
    return f"{figure['mean']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def _counts(summary: Mapping[str, Any]) -> str:
    invalid = "".join(f", {v['count']} of {v['of']} {kind} invalid" for kind, v in summary["invalid"].items())
    mass = "" if summary["mass"] is None else f", {summary['mass']:.1%} of the probability on score tokens"
    return f"{summary['examples']} examples, {summary['scores']} scores, {summary['originals']} images{invalid}{mass}"


Points = dict[str, tuple[np.ndarray, np.ndarray]]


def _points(lines: Sequence[Mapping[str, Any]]) -> Points:
    """{kind: (truth, score)} of what is known."""
    found = {}
    for kind in ("expected", "sampled"):
        pairs = [
            (y, score)
            for line in lines
            for y, score in zip(line["truth"], line[kind], strict=True)
            if y is not None and score is not None
        ]
        if pairs:
            truth, score = np.array(pairs).T
            found[kind] = (truth, score)
    return found


def scatter(theme: Theme, points: Points) -> Figure:
    """Scores over the truth, a panel for each kind; the line is the mean, dashes are equality."""
    figure, axes = new_axes(theme, 4.4 * max(len(points), 2), 3.4, len(points))
    for axis, (kind, (truth, score)) in zip(axes, points.items(), strict=True):
        jitter = np.random.default_rng(0).uniform(-0.15, 0.15, len(truth))
        axis.scatter(truth + jitter, score, s=6, alpha=0.35, color=theme.after, linewidths=0)
        levels = np.unique(truth)
        axis.plot(levels, levels, color=theme.before, linewidth=1, linestyle="--")
        axis.plot(levels, [score[truth == level].mean() for level in levels], color=theme.cycle[1], linewidth=1.6)
        axis.set_xlabel("true score", color=theme.text, fontsize=9)
        set_title(axis, theme, KINDS[kind])
    return figure
