"""The report of a run: `runs/<name>/report.html`, one file with everything inline, readable in light and dark.

`write_report(run_dir)` reads what the trainer writes: `metrics.jsonl` (a line per iteration: `iteration`, `reward/*`,
`reward_nan/*`, `ratio/*`, `log_prob/*`, `loss`, `grad_norm`, `seconds/<phase>`, `eval/*`), `summary.json`
(`image_success` and `marginal_success` with `before` and `after` per turn, `n_scenes`, `iterations`, `seconds`,
`max_ratio_error_first_update`, `gain_t<K>`), and where present `evaluation.npz` (`success_before`, `success_after`
bool [N, K]: did turn k succeed; `edit_types` str [N, K]) and `edit_grid.png`.
"""

import html
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mtedit_fast.edival.statistics import paired_bootstrap, wilson_interval
from mtedit_fast.training.plots import Bars, curves, stacked_seconds, success_bars
from mtedit_fast.webpage import data_url, page, picture, section

# Phases timed inside another phase: the outer one keeps the rest.
INNER_PHASES = {"rollout": ("encode", "denoise", "decode")}


def success_summary(success_before: Any, success_after: Any) -> dict[str, Any]:
    """The success part of summary.json from per-turn success bool [N, K] of the same scenes before and after.

    Image success of turn t needs every turn up to t, marginal success turn t alone. `gain_t<K>`: the last turn's rise
    in image success with its paired 95 % interval.
    """
    before, after = np.asarray(success_before, dtype=bool), np.asarray(success_after, dtype=bool)
    if before.ndim != 2 or before.shape != after.shape or before.size == 0:
        raise ValueError(f"success: expected the same [N, K] twice, got {list(before.shape)} and {list(after.shape)}")
    image_before, image_after = (np.logical_and.accumulate(s, axis=1) for s in (before, after))
    return {
        "image_success": {"before": image_before.mean(0).tolist(), "after": image_after.mean(0).tolist()},
        "marginal_success": {"before": before.mean(0).tolist(), "after": after.mean(0).tolist()},
        "n_scenes": len(before),
        f"gain_t{before.shape[1]}": paired_bootstrap(image_before[:, -1], image_after[:, -1])._asdict(),
    }


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Lines of metrics.jsonl; a last line cut short by a killed run is left out, any other bad line is a ValueError."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    metrics = []
    for number, line in enumerate(lines, 1):
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not valid JSON: {error}") from None
    return metrics


def write_report(run_dir: str | Path) -> Path:
    """Write `run_dir`/report.html and return its path. ValueError names a missing or unreadable input."""
    run = Path(run_dir)
    for name in ("summary.json", "metrics.jsonl"):
        if not (run / name).is_file():
            raise ValueError(f"{run / name}: missing; expected the folder of a finished training run")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    metrics = read_metrics(run / "metrics.jsonl")
    sections = [_headline(summary), _success(summary)]
    if (run / "evaluation.npz").is_file():
        with np.load(run / "evaluation.npz") as evaluation:
            sections.append(_by_type(dict(evaluation)))
    if (run / "edit_grid.png").is_file():
        image = data_url((run / "edit_grid.png").read_bytes())
        sections.append(
            section(
                "Edits",
                f'<div class="wide"><img class="grid" src="{image}" alt="multi-turn edits before and after training">'
                "</div>",
                "The same scenes and noise before and after training. Green: this turn's instruction succeeded.",
            )
        )
    sections += [_audits(summary, metrics), _training(metrics), _timing(metrics)]
    (run / "report.html").write_text(page(f"mtedit_fast · {run.name}", sections), encoding="utf-8")
    return run / "report.html"


def _headline(summary: dict[str, Any]) -> str:
    cards = {"iterations": f"{summary['iterations']:,}", "total time": _duration(summary["seconds"])}
    if (error := summary["max_ratio_error_first_update"]) is not None:
        cards["largest |ratio − 1|, first update"] = f"{error:g}"
    for name, values in summary.get("rewards", {}).items():
        cards[f"{name}, held out"] = f"{values['before']:.3f} → {values['after']:.3f}"
    text, detail = f"{summary['iterations']:,} iterations", ""
    if "image_success" in summary:
        before, after = summary["image_success"]["before"], summary["image_success"]["after"]
        turn = len(after)
        text = f"Turn-{turn} image success {100 * before[-1]:.1f} % → {100 * after[-1]:.1f} %"
        detail = f"{100 * (after[-1] - before[-1]):+.1f} points"
        if gain := summary.get(f"gain_t{turn}"):
            detail += f" (95 % interval {100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}, paired)"
        cards = {"held-out chains": f"{summary['n_scenes']:,}", **cards}
    boxes = "".join(f"<div class=card><b>{value}</b>{html.escape(name)}</div>" for name, value in cards.items())
    return f'<header><h1>{text}</h1><p class="lead">{detail}</p><div class="cards">{boxes}</div></header>'


def _success(summary: dict[str, Any]) -> str:
    if "image_success" not in summary:  # trained without a success function: rewards only
        return ""
    n = summary["n_scenes"]
    panels = []
    for key, title in (("image_success", "Image success: every turn so far"), ("marginal_success", "Marginal success")):
        before, after = summary[key]["before"], summary[key]["after"]
        labels = [f"turn {turn + 1}" for turn in range(len(after))]
        intervals = [[wilson_interval(round(rate * n), n) for rate in rates] for rates in (before, after)]
        panels.append(Bars(title, labels, before, after, *intervals))
    note = f"{n} held-out chains, the same scenes and noise; bars carry Wilson's 95 % intervals."
    return section("Success per turn", picture(lambda theme: success_bars(theme, panels), "success per turn"), note)


def _by_type(evaluation: dict[str, np.ndarray]) -> str:
    types = evaluation.get("edit_types")
    if types is None:
        return ""
    before, after = evaluation["success_before"].astype(bool), evaluation["success_after"].astype(bool)
    names = sorted(np.unique(types).tolist())
    members = [types == name for name in names]
    rates = [[success[member].mean().item() for member in members] for success in (before, after)]
    intervals = [
        [wilson_interval(success[member].sum().item(), member.sum().item()) for member in members]
        for success in (before, after)
    ]
    labels = [f"{name.replace('_', chr(10), 1)}\nn={member.sum()}" for name, member in zip(names, members, strict=True)]
    bars = Bars("Marginal success", labels, *rates, *intervals)
    return section("Success per edit type", picture(lambda theme: success_bars(theme, [bars]), "success per type"))


def _audits(summary: dict[str, Any], metrics: Sequence[dict[str, float]]) -> str:
    """Every audited reward beside the one that audits it, on the training batches, and what held-out chains say."""
    blocks = []
    for name, found in summary.get("audits", {}).items():
        lines = {}
        for label, key in ((name, f"reward/{name}"), (f"{found['against']} (held out)", f"reward/{found['against']}")):
            points = [(line["iteration"], line[key]) for line in metrics if line.get(key) is not None]
            lines[label] = ([x for x, _ in points], [y for _, y in points])
        panels = {"Trained reward and its audit": lines}
        emphasis = "b" if found["hacked"] else "span"
        blocks.append(
            f"<p><{emphasis}>{html.escape(found['text'])}</{emphasis}></p>"
            + picture(partial(curves, panels=panels), f"{name} against {found['against']} over training")
        )
    note = "A reward that training sees beside one it never sees, on one scale; the figures are of held-out chains."
    return section("Can the reward be trusted?", "".join(blocks), note) if blocks else ""


# Panels of the training section: title, patterns of keys. {} stands for a reward, each of which has its own panel.
CURVES = {
    "Rewards": (r"reward/[^/]+",),
    "{} per turn": (r"reward/([^/]+)/(turn\d+)",),
    "{} per edit type": (r"reward/([^/]+)/type/(.+)",),
    "Deviation of rewards within a group": (r"reward_std/.+",),
    "Share of groups without spread": (r"reward_zero_std/.+",),
    "Held-out success during training": (r"eval/.+",),
    "Advantages": (r"advantage/.+",),
    "Ratio − 1": ("ratio/mean", "ratio/max_error"),
    "Clipped fraction": ("ratio/clip_fraction",),
    "Log-prob": (r"log_prob/.+",),
    "Loss": ("loss",),
    "Gradient norm": ("grad_norm",),
    "Distance to the reference": ("kl",),
    "Undefined rewards (fraction)": (r"reward_nan/.+",),
}


def _training(metrics: Sequence[dict[str, float]]) -> str:
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    keys = list(dict.fromkeys(key for line in metrics for key in line))
    for title, patterns in CURVES.items():
        for key in keys:
            match = next(filter(None, (re.fullmatch(pattern, key) for pattern in patterns)), None)
            if match is None:
                continue
            points = [(line["iteration"], line[key]) for line in metrics if line.get(key) is not None]
            x, y = ([point[i] for point in points] for i in (0, 1))
            if title.startswith("Undefined") and not any(y):
                continue
            reward, name = match.groups() or ("", (key.partition("/")[2] or key).replace("/", " "))
            lines = panels.setdefault(title.format(reward), {})
            lines[name] = (x, [value - 1 for value in y] if key == "ratio/mean" else y)
    if not panels:
        return ""
    titles = list(panels)
    rows = [{title: panels[title] for title in titles[i : i + 2]} for i in range(0, len(titles), 2)]
    figures = [picture(partial(curves, panels=row), ", ".join(row)) for row in rows]
    return section("Training", "".join(figures), "Thin: each iteration. Thick: running mean over five.")


def phase_seconds(metrics: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """{phase: seconds per iteration}; phases inside another are taken out of it, so that the phases add up."""
    keys = dict.fromkeys(key for line in metrics for key in line if key.startswith("seconds/"))
    phases = {key.removeprefix("seconds/"): [line.get(key) or 0.0 for line in metrics] for key in keys}
    for outer, inner in INNER_PHASES.items():
        if outer in phases and any(name in phases for name in inner):
            parts = [phases[name] for name in inner if name in phases]
            rest = [max(0.0, total - sum(part)) for total, *part in zip(phases.pop(outer), *parts, strict=True)]
            phases[f"{outer}, rest"] = rest
    return dict(sorted(phases.items(), key=lambda item: -sum(item[1])))


def _timing(metrics: Sequence[dict[str, float]]) -> str:
    phases = phase_seconds(metrics)
    if not phases:
        return ""
    total = sum(map(sum, phases.values())) or 1.0
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td>{sum(seconds):.1f}<td>{np.median(seconds):.3f}<td>{sum(seconds) / total:.1%}"
        for name, seconds in phases.items()
    )
    table = f"<table><tr><th>phase<th>total s<th>median s per iteration<th>share{rows}</table>"
    iterations = [line["iteration"] for line in metrics]
    figure = picture(lambda theme: stacked_seconds(theme, iterations, phases), "seconds per iteration by phase")
    return section("Time", figure + table)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
