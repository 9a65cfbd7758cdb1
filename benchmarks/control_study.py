"""Is the demo's rise due to the reward? The same run with true and with shuffled advantages, over seeds.

    python benchmarks/control_study.py --seeds 3        # about 9 minutes a run on one core; finished runs are kept

Rows go to results/control_study.csv, one per run. Intervals of the difference (gain − control gain at the last turn):
`scenes` resamples the held-out chains, which all runs share, with the seeds as they are; `seeds` is Student's t over
the seeds, so it also holds what another training seed would change.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import torch
from record import environment
from scipy import stats

from mtedit_fast.training.playground.demo import run_demo
from mtedit_fast.training.report import paired_bootstrap

# the question is about the algorithm: the reward is the oracle's graded score, not the demo's learned judge
EXACT_REWARD = [
    "rewards.0.path=mtedit_fast.training.playground.rewards:oracle_score",
    "rewards.0.audit=null",
]
RESULTS = Path(__file__).parent / "results" / "control_study.csv"


def run(folder: Path, seed: int, control: str, iterations: int) -> dict:
    """Summary of one run, from disk if it is finished."""
    summary = folder / "summary.json"
    if not summary.exists():
        run_demo(folder, seed=seed, control=control, overrides=[f"run.iterations={iterations}", *EXACT_REWARD])
        _append(json.loads(summary.read_text()), seed, control)
    return json.loads(summary.read_text())


def last_turn(folder: Path) -> np.ndarray:
    """Image success at the last turn after training, [N]."""
    with np.load(folder / "evaluation.npz") as evaluation:
        return np.logical_and.accumulate(evaluation["success_after"], axis=1)[:, -1].astype(float)


def _append(summary: dict, seed: int, control: str) -> None:
    row = {
        **environment(torch.device("cpu")),
        "seed": seed,
        "control": control,
        "chains": summary["n_scenes"],
        "iterations": summary["iterations"],
        "seconds": round(summary["seconds"]),
        "max_ratio_error_first_update": summary["max_ratio_error_first_update"],
    }
    for when in ("before", "after"):
        for turn, rate in enumerate(summary["image_success"][when], 1):
            row[f"{when}_t{turn}"] = round(rate, 4)
    gain = summary[f"gain_t{len(summary['image_success']['after'])}"]
    row |= {f"gain_{name}": round(value, 4) for name, value in gain.items()}
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 … n-1")
    parser.add_argument("--iterations", type=int, default=45, help="of each run; the demo's own are more")
    parser.add_argument("--runs", type=Path, default=Path("runs/control_study"), help="folder of the runs")
    parser.add_argument("--only", choices=("none", "shuffle"), help="one arm only, e.g. on a machine of its own")
    arguments = parser.parse_args()
    arms = (arguments.only,) if arguments.only else ("none", "shuffle")
    for seed in range(arguments.seeds):
        for control in arms:
            run(arguments.runs / f"{control}-{seed}", seed, control, arguments.iterations)
    if arguments.only:
        return
    true, shuffled = (
        np.stack([last_turn(arguments.runs / f"{control}-{seed}") for seed in range(arguments.seeds)])
        for control in ("none", "shuffle")
    )
    difference = (true - shuffled).mean(1)  # [seeds]
    scenes = paired_bootstrap(shuffled.mean(0), true.mean(0))
    print(f"gain − control gain: {difference.mean():+.3f}, per seed {np.round(difference, 3).tolist()}")
    print(f"  95 % interval, scenes: {scenes.low:+.3f} to {scenes.high:+.3f}")
    if len(difference) > 1:
        low, high = stats.t.interval(0.95, len(difference) - 1, difference.mean(), stats.sem(difference))
        print(f"  95 % interval, seeds:  {low:+.3f} to {high:+.3f}")


if __name__ == "__main__":
    main()
