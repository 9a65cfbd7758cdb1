"""`mtedit-fast study judge`: how to train a judge on one rater's scores, method by method, over seeds.

Every run starts from the playground's judge, which was taught another rubric, learns from the same rated edits with
thoughts, and is compared with the rater on the same held-out ones. Finished runs are kept, stopped ones go on.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from mtedit_fast.training.judge.agreement import METRICS, weighted_agreement
from mtedit_fast.training.judge.config import JudgeConfig, load_judge_config
from mtedit_fast.training.judge.run import train
from mtedit_fast.training.playground.judge_data import write_rated
from mtedit_fast.training.playground.judge_model import PLAYGROUND_PROMPT
from mtedit_fast.training.playground.models import load_pipeline
from mtedit_fast.training.playground.runs import Run, run_in_processes

TRAIN, HELD_OUT = 2000, 600
KINDS = {"expected_one": "ŷ after one thought", "sampled_one": "one sampled score", "expected": "ŷ, four thoughts"}


@dataclass(frozen=True)
class Arm:
    """One way to train; `overrides` are those of `mtedit-fast judge train`."""

    name: str
    meaning: str
    overrides: tuple[str, ...] = ()


ARMS = (
    Arm("base", "the playground's judge as it is", ("run.steps=0",)),
    Arm("sft", "cross-entropy of thought and score", ("method.name=sft",)),
    Arm("tract", "the same and (ŷ − y)²", ("method.name=tract",)),
    Arm("rloo", "RL on 0/1 accuracy, leave-one-out baseline", ("method.name=rloo",)),
    Arm("grpo", "RL on 0/1 accuracy, normalised in the group", ("method.name=grpo",)),
    Arm("real", "REAL: −(ŷ − y)² and p(y), β = 0.01", ("method.name=real",)),
    Arm("real_log", "REAL with log p(y)", ("method.name=real", "method.reward=log_probability")),
)


def study_config(arm: Arm, folder: Path, seed: int, steps: int) -> JudgeConfig:
    """What all arms share, with the arm's own."""
    data = folder.parent / "data"
    return load_judge_config(
        {
            "model": {"path": None},
            "prompt": {"scale": PLAYGROUND_PROMPT.scale, "thinking": True, "rubric": PLAYGROUND_PROMPT.rubric},
            "data": {"path": str(data / "train.jsonl")},
            "sampling": {"samples": 8, "top_p": 1.0, "max_new_tokens": 16},
            "optimizer": {"lr": 3e-4, "weight_decay": 0.0, "questions": 32, "micro_batch": 32, "warmup": 5},
            "evaluation": {"path": str(data / "heldout.jsonl"), "examples": HELD_OUT, "batch": 64},
            "run": {"steps": steps, "seed": seed, "output_dir": str(folder)},
        },
        [f"optimizer.warmup={min(5, steps)}", *arm.overrides, *(["optimizer.warmup=0"] if arm.name == "base" else [])],
    )


def run_study(output: Path, *, seeds: int, iterations: int, jobs: int, only: str | None, console: Console) -> None:
    """Run what is not finished, `jobs` at a time in processes of their own with an equal share of the cores.

    Raises:
        ValueError: an unknown arm, or finished runs of another length.
        ChildProcessError: a run failed; the others were finished.
    """
    names = [arm.name for arm in ARMS]
    if only is not None and only not in names:
        raise ValueError(f"only: expected one of {', '.join(names)}, got {only!r}")
    if not (output / "data" / "heldout.jsonl").exists():
        pipeline = load_pipeline()
        for split, count in (("train", TRAIN), ("heldout", HELD_OUT)):
            write_rated(output / "data", count, split=split, pipeline=pipeline)
    arms = [arm for arm in ARMS if only in (None, arm.name)]
    runs = [(arm, seed) for seed in range(seeds) for arm in arms if seed == 0 or arm.name != "base"]
    todo = [(arm, seed) for arm, seed in runs if not _finished(output / f"{arm.name}-{seed}", arm, iterations)]
    run_in_processes(
        "study",
        [
            Run(
                output / f"{arm.name}-{seed}",
                f"{arm.name}, seed {seed}",
                (__name__, arm.name, str(seed), str(iterations)),
            )
            for arm, seed in todo
        ],
        finished=len(runs) - len(todo),
        jobs=jobs,
        console=console,
    )


def _finished(folder: Path, arm: Arm, iterations: int) -> bool:
    summary = folder / "summary.json"
    if not summary.exists():
        return False
    if arm.name != "base" and (length := json.loads(summary.read_text())["steps"]) != iterations:
        raise ValueError(
            f"iterations: expected {length}, the length of the finished run in {folder}, got {iterations}; "
            "runs that are compared must be equally long: choose another --output"
        )
    return True


def main(folder: str, arm: str, seed: str, steps: str) -> None:
    """One run, in the process that `run_study` started for it."""
    train(study_config(next(a for a in ARMS if a.name == arm), Path(folder), int(seed), int(steps)))


@dataclass(frozen=True)
class Result:
    """The finished runs of one arm, S seeds, on the same N edits."""

    arm: Arm
    truth: np.ndarray  # [N]
    scores: dict[str, np.ndarray]  # kind -> [S, N], NaN where an answer could not be read
    summaries: list[dict[str, Any]]


def read_results(output: Path) -> list[Result]:
    """The arms that have a finished run. ValueError where there is none."""
    results = []
    for arm in ARMS:
        folders = sorted(path.parent for path in output.glob(f"{arm.name}-[0-9]*/summary.json"))
        if not folders:
            continue
        runs = []
        for folder in folders:
            (predictions,) = (folder / "predictions").glob("*.jsonl")
            runs.append([json.loads(line) for line in predictions.read_text().splitlines()])
        scores = {
            kind: np.array([[_number(line[kind]) for line in run] for run in runs])
            for kind in KINDS
            if kind in runs[0][0]
        }
        truth = np.array([line["truth"][0] for line in runs[0]], dtype=float)
        results.append(Result(arm, truth, scores, [json.loads((f / "summary.json").read_text()) for f in folders]))
    if not results:
        raise ValueError(f"{output}: no finished run; start one with mtedit-fast study judge --output {output}")
    return results


def _number(values: list[float | None]) -> float:
    return math.nan if values[0] is None else values[0]


def agreement_over_seeds(
    result: Result, kind: str, *, resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, Any]] | None:
    """{metric: {mean, low, high, per_seed}} of one kind of score, None where it was not recorded.

    The mean is over seeds; its 95 % interval resamples seeds and, alike for all of them, edits. An edit whose answer
    could not be read is left out of its run.
    """
    if kind not in result.scores:
        return None
    figures = {}
    for metric, (per_seed, resampled) in _resampled(result, kind, resamples, seed).items():
        low, high = np.nanquantile(resampled, [0.025, 0.975])
        mean = float(np.mean(per_seed))
        figures[metric] = {"mean": mean, "low": float(low), "high": float(high), "per_seed": per_seed}
    return figures


def difference(
    result: Result, other: Result, kind: str, *, resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """{metric: {mean, low, high}} of result − other; both see the same resampled edits, so that the interval is that of
    pairs."""
    ours, theirs = (_resampled(r, kind, resamples, seed) for r in (result, other))
    figures = {}
    for metric in METRICS:
        low, high = np.nanquantile(ours[metric][1] - theirs[metric][1], [0.025, 0.975])
        mean = float(np.mean(ours[metric][0]) - np.mean(theirs[metric][0]))
        figures[metric] = {"mean": mean, "low": float(low), "high": float(high)}
    return figures


def _resampled(result: Result, kind: str, resamples: int, seed: int) -> dict[str, tuple[list[float], np.ndarray]]:
    """{metric: ([S] of the runs, [resamples] means over resampled runs on resampled edits)}."""
    generator = np.random.default_rng(seed)
    n, runs = len(result.truth), len(result.scores[kind])
    draws = generator.multinomial(n, np.full(n, 1 / n), size=resamples)
    chosen = generator.integers(runs, size=(resamples, runs))
    weights = np.concatenate([np.ones((1, n)), draws])
    tables = []
    for scores in result.scores[kind]:
        known = ~np.isnan(scores)
        tables.append(weighted_agreement(scores[known], result.truth[known], weights[:, known]))
    values = {metric: np.array([table[metric] for table in tables]) for metric in METRICS}  # [S, 1 + resamples]
    rows = np.arange(1, resamples + 1)[:, None]
    return {metric: (value[:, 0].tolist(), value[chosen, rows].mean(1)) for metric, value in values.items()}
