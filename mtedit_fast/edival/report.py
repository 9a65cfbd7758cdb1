"""report.html of an evaluation, and a leaderboard over several.

Both read what `evaluate` writes: report.json and verdicts.jsonl.
"""

from __future__ import annotations

import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mtedit_fast.webpage import data_url, page, picture, section

from .images import UnreadableImage
from .plots import chain_grid, pareto, share_bars, turn_lines
from .statistics import ChainScores

METRICS = {
    "instruction_following": "IF (image success)",
    "marginal": "marginal success",
    "consistency": "CC",
    "object": "objects",
    "background": "background",
    "quality": "VQ",
    "overall": "O = √(IF · CC)",
}
PICTURES = 8
PUBLISHED = {  # per cent at turn 3, from EdiVal's paper and leaderboard
    "Seedream 4.0": {"O": 59.76},
    "Nano Banana": {"O": 56.24},
    "GPT-image-1": {"O": 53.81},
    "FLUX.1-Kontext-max": {"O": 53.04},
    "Gemini 2.0 Flash": {"O": 47.94},
    "Qwen-Image-Edit": {"O": 41.93, "IF": 22.55, "CC": 77.98},
    "Step1X-Edit": {"O": 38.98},
    "FLUX.1-Kontext-dev": {"O": 38.71, "IF": 16.61, "CC": 90.22},
    "OmniGen": {"O": 29.91},
    "UltraEdit": {"O": 22.89},
    "AnyEdit": {"O": 22.50},
    "MagicBrush": {"O": 19.41},
    "InstructPix2Pix": {"O": 12.99},
}


def write_report(folder: str | Path, images: Mapping[str, Tensor] | None = None) -> Path:
    """Write `folder`/report.html from its report.json and return its path.

    images: {image_index: [K + 1, 3, H, W]} for the pictures of the first chains; None leaves them out. ValueError
    names a folder that holds no evaluation.
    """
    folder = Path(folder)
    report = _read(folder)
    sections = [_headline(report), _turns(report), _types(report)]
    if images is not None:
        sections.append(_pictures(read_scores(folder / "verdicts.jsonl"), images))
    sections += [_undefined(report), _settings(report)]
    path = folder / "report.html"
    path.write_text(page(f"EdiVal · {report['name']}", sections), encoding="utf-8")
    return path


def read_scores(path: str | Path) -> list[ChainScores]:
    """The chains of a verdicts.jsonl; its first line, which holds the settings, and a line cut short are left out."""
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)[1:]
    return [ChainScores(**json.loads(line)) for line in lines if line.endswith("\n")]


def leaderboard(folders: Sequence[str | Path], *, turn: int = 3) -> list[dict[str, Any]]:
    """One row per evaluated folder and per published system, best O first: {name, published, O, IF, CC, VQ} in per
    cent (VQ as it is), what is unknown left out.

    turn: 1-based; a folder of fewer turns is a ValueError. Published rows are those of turn 3 on EdiVal-Bench: left out
    at other turns, and beside runs in the playground.
    """
    rows: list[dict[str, Any]] = []
    comparable = turn == 3
    for folder in folders:
        report = _read(Path(folder))
        comparable &= not str(report["settings"].get("detector")).startswith("playground")
        if not 1 <= turn <= report["turns"]:
            raise ValueError(f"turn must be in 1..{report['turns']} for {folder}, got {turn}")
        line = report["per_turn"][turn - 1]
        keys = {"O": "overall", "IF": "instruction_following", "CC": "consistency", "VQ": "quality"}
        values = {short: line[key]["mean"] * (1 if short == "VQ" else 100) for short, key in keys.items() if line[key]}
        rows.append({"name": report["name"], "published": False, **values})
    if comparable:
        rows += [{"name": name, "published": True, **values} for name, values in PUBLISHED.items()]
    return sorted(rows, key=lambda row: -row.get("O", -1.0))


def write_leaderboard(folders: Sequence[str | Path], output: str | Path, *, turn: int = 3) -> Path:
    """Write a page with the leaderboard and its Pareto plots to `output`, and return its path."""
    rows = leaderboard(folders, turn=turn)
    metrics = ("O", "IF", "CC", "VQ")
    cells = "".join(
        f"<tr><td>{html.escape(row['name'])}{' (published)' if row['published'] else ''}"
        + "".join(f"<td>{row[m]:.2f}" if m in row else "<td>" for m in metrics)
        for row in rows
    )
    table = f"<table><tr><th>editor{''.join(f'<th>{m}' for m in metrics)}{cells}</table>"
    note = "In per cent, VQ as it is."
    if any(row["published"] for row in rows):
        note += " Published: quoted, on EdiVal-Bench's 572 images; compare only runs on the same images with them."
    systems = {row["name"]: {m: row[m] for m in metrics if m in row} for row in rows}
    quoted = [row["name"] for row in rows if row["published"]]
    pairs = [
        pair
        for pair in (("IF", "CC"), ("IF", "VQ"), ("CC", "VQ"))
        if any(pair[0] in values and pair[1] in values for values in systems.values())
    ]
    plots = picture(lambda theme: pareto(theme, systems, pairs, quoted), "Pareto plots") if pairs else ""
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    sections = [
        f"<header><h1>EdiVal at turn {turn}</h1></header>",
        section("Leaderboard", table, note),
        section("Pareto plots", plots, "Hollow: published. Dashed: the front.") if plots else "",
    ]
    output.write_text(page(f"EdiVal, turn {turn}", sections), encoding="utf-8")
    return output


def _read(folder: Path) -> dict[str, Any]:
    if not (folder / "report.json").is_file():
        raise ValueError(f"{folder / 'report.json'}: missing; expected the output folder of `mtedit-fast evaluate`")
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def _percent(value: Mapping[str, float] | None, *, interval: bool = True) -> str:
    if value is None:
        return "–"
    text = f"{100 * value['mean']:.1f}"
    return f"{text} <small>[{100 * value['low']:.1f}, {100 * value['high']:.1f}]</small>" if interval else text


def _headline(report: Mapping[str, Any]) -> str:
    if not report["per_turn"]:
        return "<header><h1>No chain could be evaluated</h1></header>"
    last = report["per_turn"][-1]
    key = "overall" if last["overall"] else "instruction_following"
    cards = {"chains": f"{report['chains']:,}", "turns": str(report["turns"])}
    for name in ("instruction_following", "consistency"):
        if last[name]:
            cards[f"{METRICS[name]}, turn {last['turn']}"] = f"{_percent(last[name], interval=False)} %"
    if report["skipped"]:
        cards["skipped"] = str(len(report["skipped"]))
    boxes = "".join(f"<div class=card><b>{value}</b>{html.escape(name)}</div>" for name, value in cards.items())
    title = f"{METRICS[key]} at turn {last['turn']}: {_percent(last[key], interval=False)} %"
    return f'<header><h1>{html.escape(title)}</h1><div class="cards">{boxes}</div></header>'


def _turns(report: Mapping[str, Any]) -> str:
    lines = report["per_turn"]
    metrics = {key: label for key, label in METRICS.items() if any(line[key] for line in lines)}
    if not metrics:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(label)}" + "".join(f"<td>{_number(key, line[key])}" for line in lines)
        for key, label in metrics.items()
    )
    if strict := report.get("oracle"):
        rows += "<tr><td>nothing else touched (oracle)" + "".join(f"<td>{100 * value:.1f}" for value in strict)
    head = "".join(f"<th>turn {line['turn']}" for line in lines)
    table = f"<table><tr><th>{head}{rows}</table>"
    shown = {key: METRICS[key] for key in ("instruction_following", "marginal", "consistency", "overall")}
    figure = picture(lambda theme: turn_lines(theme, lines, shown), "figures per turn")
    note = "In per cent (VQ as it is) with 95 % intervals. Image success counts a turn if all turns so far succeeded."
    return section("Turn by turn", figure + table, note)


def _number(key: str, value: Mapping[str, float] | None) -> str:
    if value is not None and key == "quality":
        return f"{value['mean']:.3f} <small>[{value['low']:.3f}, {value['high']:.3f}]</small>"
    return _percent(value)


def _types(report: Mapping[str, Any]) -> str:
    shares = {kind: share for kind, share in report["per_type"].items() if share}
    if not shares:
        return ""
    return section(
        "By instruction type",
        picture(lambda theme: share_bars(theme, shares), "marginal success per type"),
        "Marginal success over all turns, with Wilson's 95 % intervals.",
    )


def _pictures(scores: Sequence[ChainScores], images: Mapping[str, Tensor]) -> str:
    shown: list[tuple[ChainScores, Tensor]] = []
    for one in scores:
        try:
            shown.append((one, images[one.image_index]))
        except (UnreadableImage, KeyError):  # removed since it was evaluated
            continue
        if len(shown) == PICTURES:
            break
    if not shown:
        return ""
    grid = chain_grid(
        [chain for _, chain in shown],
        [one.instructions for one, _ in shown],
        [one.verdicts for one, _ in shown],
        [one.image_index for one, _ in shown],
    )
    buffer = io.BytesIO()
    grid.save(buffer, format="png")
    image = f'<div class="wide"><img class="grid" src="{data_url(buffer.getvalue())}" alt="edited chains"></div>'
    reasons = "".join(
        f"<tr><td>{html.escape(one.image_index)}, turn {turn + 1}<td>{html.escape(text)}<td>{html.escape(reason)}"
        for one, _ in shown
        for turn, (text, reason) in enumerate(zip(one.instructions, one.reasons, strict=True))
    )
    table = f"<details><summary>Why</summary><table><tr><th>turn<th>instruction<th>finding{reasons}</table></details>"
    return section("Edits", image + table, "The first chains. Green: the instruction was followed. Red: it was not.")


def _undefined(report: Mapping[str, Any]) -> str:
    counts = {key.replace("_", " "): n for key, n in report["undefined"].items() if n}
    rows = "".join(f"<tr><td>{html.escape(key)}<td>{n}" for key, n in counts.items())
    for entry in report["skipped"]:
        what = f"row {entry['row']}" if "row" in entry else f"image {entry['image_index']}"
        rows += f"<tr><td>{html.escape(what)} skipped<td>{html.escape(entry['reason'])}"
    return section("Undefined and skipped", f"<table>{rows}</table>") if rows else ""


def _settings(report: Mapping[str, Any]) -> str:
    return section("Settings", f"<pre>{html.escape(json.dumps(report['settings'], indent=2))}</pre>")
