"""Beam search against best of n on the playground: what the judge's choice is worth, and what it costs.

Held-out chains of three turns, chosen by the learned judge, measured by the oracle, which takes no part in choosing.
"""

from __future__ import annotations

import json
from itertools import pairwise
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mtedit_fast.editors import KontextEditor
from mtedit_fast.edival.statistics import paired_bootstrap
from mtedit_fast.figures import LIGHT, Theme, add_legend, new_axes, set_title
from mtedit_fast.inference_time.beam_search import beam_search
from mtedit_fast.rollout import RolloutConfig, rollout, sample_seeds
from mtedit_fast.training.rewards import RewardBatch

from . import oracle
from .data import split_chains
from .models import GUIDANCE, MAX_TOKENS, load_pipeline
from .rewards import judge_score
from .runs import Run, run_in_processes
from .world import CELLS, render

WIDTHS = (1, 2, 4)
TURNS, STEPS, SPLIT_SEED = 3, 6, 11
SEARCH: dict[str, Any] = {"branching": 2, "lookahead": 0, "branch_at": (1, 2), "window": (0, 2), "eta": 0.7}
"""Two early branchings; the other steps are the ODE's, as best of n has them all."""
MEMBERS = 6
"""Of best of n: as many as cost what the widest search does, and one more."""
MARK = "<!-- results: written by training/playground/beam_study.py -->"
PART = 25
"""Chains of one run."""
ARMS = (*(f"width{width}" for width in WIDTHS), "samples")


def run_study(
    output: Path = Path("runs/beam"),
    *,
    parts: int = 4,
    seeds: int = 3,
    jobs: int = 2,
    page: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run what is not finished, `jobs` at a time; returns what output/summary.json holds, and draws output/beam.png.

    parts: of `PART` chains each; a larger study goes on from a smaller one. page: table and plot go there too, under
    `MARK`; what stands above it stays.

    Raises:
        ValueError: parts or seeds < 1.
        ChildProcessError: a run failed; the others were finished.
    """
    if parts < 1 or seeds < 1:
        raise ValueError(f"parts, seeds: expected >= 1, got {parts}, {seeds}")
    console = console or Console()
    places = [(seed, part) for part in range(parts) for seed in range(seeds)]  # cut short, it has whole comparisons
    todo = [
        Run(output / f"{seed}-{part}", f"seed {seed}, part {part}", (__name__, str(seed), str(part)))
        for seed, part in places
        if any(not _file(output, arm, seed, part).is_file() for arm in ARMS)
    ]
    if todo:
        run_in_processes("beam", todo, finished=len(places) - len(todo), jobs=jobs, console=console)
    summary = summarize(output, parts, seeds)
    text = json.dumps(summary, indent=2)
    (output / "summary.json").write_text(text + "\n", encoding="utf-8")
    plot(LIGHT, summary).savefig(output / "beam.png", facecolor="white")
    if page is not None:
        write_page(page, summary)
    console.print(table(summary))
    console.print(f"summary.json, beam.png → {output}", markup=False)
    return json.loads(text)


def _file(output: Path, arm: str, seed: int, part: int) -> Path:
    return output / f"{seed}-{part}" / f"{arm}.json"


def main(folder: str, seed: str, part: str) -> None:
    """One seed's arms on one part, in the process that `run_study` started for them."""
    for arm in ARMS:
        path = Path(folder) / f"{arm}.json"
        if not path.is_file():
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(run_arm(arm, int(seed), int(part))) + "\n", encoding="utf-8")
            partial.replace(path)


def run_arm(arm: str, seed: int, part: int, chains: int = PART) -> dict[str, Any]:
    """Success of all turns and the judge's mean over turns ("reward") of every chain, and what a chain cost.

    A search's are [N], those of "samples" [N][MEMBERS].
    """
    drawn = split_chains((part + 1) * chains, SPLIT_SEED, "heldout", TURNS)
    start, texts = drawn.scenes[-chains:, 0], drawn.instructions[-chains:]
    images = (render(start[:, :CELLS], start[:, CELLS]) * 255).round() / 255
    editor = KontextEditor(load_pipeline(), max_sequence_length=MAX_TOKENS)
    options: dict[str, Any] = {"num_steps": STEPS, "guidance_scale": GUIDANCE}
    if arm == "samples":
        config = RolloutConfig(group_size=MEMBERS, variant="ode", **options)
        edits = rollout(editor, images, texts, config, sample_seeds(seed, part, chains * MEMBERS)).images
        owner = torch.arange(chains).repeat_interleave(MEMBERS)
        repeated = [texts[row] for row in owner.tolist()]
        reward = judge_score(RewardBatch(images[owner], edits, repeated)).mean(1).view(chains, MEMBERS)
        success = _success(images[owner], edits, repeated).view(chains, MEMBERS)
        return {"rows": TURNS * STEPS, "scored": 1, "reward": reward.tolist(), "success": success.tolist()}
    width = int(arm.removeprefix("width"))
    found = beam_search(
        editor, images, texts, judge_score, width=width, seeds=sample_seeds(seed, part, chains), **SEARCH, **options
    )
    success = _success(images, found.best, texts)
    return {
        "rows": found.cost.rows / chains,
        "reward": found.scores[:, 0].mean(1).tolist(),
        "success": success.tolist(),
        "scored": found.cost.scored / chains,
    }


def _success(images: Tensor, edits: Tensor, instructions: list[list[str]]) -> Tensor:
    """[N] 0/1: all turns right."""
    return oracle.evaluate(images, edits, instructions).image[:, -1].int()


def best_of(reward: np.ndarray, value: np.ndarray, n: float) -> np.ndarray:
    """[N]: expected `value` of the sample with the highest reward among n of M drawn without replacement.

    reward, value [N, M]; 1 ≤ n ≤ M. A fractional n stands for the mixture of its neighbours with that mean cost.
    """
    low = int(n)
    if n != low:
        return (low + 1 - n) * best_of(reward, value, low) + (n - low) * best_of(reward, value, low + 1)
    members = reward.shape[1]
    ranked = np.take_along_axis(value, np.argsort(-reward, axis=1, kind="stable"), axis=1)
    # the r-th best is the best of those drawn if the others are among the members − 1 − r that are worse
    weights = [comb(members - 1 - rank, low - 1) / comb(members, low) for rank in range(members)]
    return ranked @ np.asarray(weights)


def summarize(output: Path, parts: int, seeds: int) -> dict[str, Any]:
    """Figures of finished runs: per width and measure its mean, per seed and over seeds, and against best of n at
    equally many transformer rows, with paired bootstrap intervals over chains of the means over seeds."""

    def read(arm: str) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Values [S, N] or [S, N, M], and the mean cost of a chain."""
        files = [[_file(output, arm, seed, part) for part in range(parts)] for seed in range(seeds)]
        runs = [[json.loads(file.read_text(encoding="utf-8")) for file in row] for row in files]
        values = {
            key: np.asarray([[value for run in row for value in run[key]] for row in runs], dtype=float)
            for key in ("reward", "success")
        }
        return values, {key: np.mean([run[key] for row in runs for run in row]).item() for key in ("rows", "scored")}

    sampled, costs = read("samples")
    price = costs["rows"]
    summary: dict[str, Any] = {
        "chains": sampled["reward"].shape[1],
        "seeds": seeds,
        "turns": TURNS,
        "steps": STEPS,
        "search": SEARCH,
        "widths": [],
        "best_of": [
            {
                "n": n,
                "rows": n * price,
                **{key: _best(sampled, key, n).mean().item() for key in sampled},
            }
            for n in range(1, MEMBERS + 1)
        ],
    }
    previous: dict[str, np.ndarray] | None = None
    for width in WIDTHS:
        values, costs = read(f"width{width}")
        n = min(costs["rows"] / price, MEMBERS)
        line: dict[str, Any] = {"width": width, **costs, "equal_n": n}
        for key, value in values.items():
            equal = _best(sampled, key, n).mean(0)
            line[key] = {
                "mean": value.mean().item(),
                "per_seed": value.mean(1).tolist(),
                "against_best_of_n": paired_bootstrap(equal, value.mean(0))._asdict(),
            }
            if previous is not None:
                line[key]["against_previous"] = paired_bootstrap(previous[key].mean(0), value.mean(0))._asdict()
        summary["widths"].append(line)
        previous = values
    return summary


def _best(sampled: dict[str, np.ndarray], key: str, n: float) -> np.ndarray:
    """[S, N]."""
    return np.stack([best_of(r, v, n) for r, v in zip(sampled["reward"], sampled[key], strict=True)])


COLUMNS = ("", "rows", "judge's reward", "− best of n", "image success", "− best of n")


def _rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for line in summary["widths"]:
        reward, success = line["reward"], line["success"]
        lines.append(
            (
                f"width {line['width']}",
                f"{line['rows']:.0f}",
                f"{reward['mean']:.3f}",
                _signed(reward["against_best_of_n"], 1, 3),
                f"{100 * success['mean']:.1f} %",
                _signed(success["against_best_of_n"], 100, 1),
            )
        )
    for line in summary["best_of"]:
        success = f"{100 * line['success']:.1f} %"
        lines.append((f"best of {line['n']}", f"{line['rows']:.0f}", f"{line['reward']:.3f}", "", success, ""))
    return lines


def _title(summary: dict[str, Any]) -> str:
    return f"{summary['chains']} held-out chains of {summary['turns']} turns, {summary['seeds']} seeds"


def table(summary: dict[str, Any]) -> Table:
    """The summary for a terminal."""
    shown = Table(*COLUMNS, title=_title(summary))
    for row in _rows(summary):
        shown.add_row(*row)
    return shown


def write_page(page: Path, summary: dict[str, Any]) -> None:
    """Table, steps of the width and plot in Markdown, the plot beside `page`."""
    plot(LIGHT, summary).savefig(page.with_suffix(".png"), facecolor="white")
    head = page.read_text(encoding="utf-8").partition(MARK)[0] if page.is_file() else "# Beam search\n\n"
    lines = ["| " + " | ".join(row) + " |" for row in (COLUMNS, ("---",) * len(COLUMNS), *_rows(summary))]
    steps = [
        f"width {low['width']} → {high['width']}: reward {_signed(high['reward']['against_previous'], 1, 3)}, success "
        f"{_signed(high['success']['against_previous'], 100, 1)} points; by seed "
        + ", ".join(f"{b - a:+.3f}" for a, b in zip(low["reward"]["per_seed"], high["reward"]["per_seed"], strict=True))
        for low, high in pairwise(summary["widths"])
    ]
    text = f"{_title(summary)}; means, 95 % bootstrap intervals over chains, best of n at equally many rows.\n\n"
    text += "\n".join([*lines, "", *(f"- {step}" for step in steps), "", f"![reward and success]({page.stem}.png)"])
    page.write_text(f"{head}{MARK}\n\n{text}\n", encoding="utf-8")


def _signed(estimate: dict[str, float], scale: float, digits: int) -> str:
    mean, low, high = (f"{scale * estimate[key]:+.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def plot(theme: Theme, summary: dict[str, Any]) -> Figure:
    """Reward and success against transformer rows per chain: a dot per seed, lines through the means."""
    figure, axes = new_axes(theme, 8.4, 3.2, 2)
    for axis, key, scale, title in (
        (axes[0], "reward", 1, "judge's reward, which chooses"),
        (axes[1], "success", 100, "image success by the oracle, %"),
    ):
        widths, best = summary["widths"], summary["best_of"]
        axis.plot(
            [line["rows"] for line in best],
            [scale * line[key] for line in best],
            "s--",
            color=theme.before,
            markersize=4,
            label="best of n",
        )
        means = [scale * line[key]["mean"] for line in widths]
        axis.plot([line["rows"] for line in widths], means, "-", color=theme.after, label="beam search")
        for line in widths:
            values = [scale * value for value in line[key]["per_seed"]]
            axis.plot([line["rows"]] * len(values), values, "o", color=theme.after, markersize=4)
        axis.set_xlabel("transformer rows per chain", color=theme.text, fontsize=9)
        set_title(axis, theme, title)
    add_legend(axes[0], theme, loc="lower right")
    return figure
