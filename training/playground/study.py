"""`mtedit-fast study multi_turn`: what matters when an editor is trained over several turns, one switch at a time.

Every run is a short training of the playground's editor from the same weights, scored on the same held-out chains of
three turns with the same noise; finished runs are kept, stopped ones go on from their checkpoints.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from mtedit_fast.training.config import TrainConfig
from mtedit_fast.training.config_file import load_config
from mtedit_fast.training.data import EditChains
from mtedit_fast.training.evaluation import Evaluation
from mtedit_fast.training.playground.data import write_dataset
from mtedit_fast.training.playground.runs import Run, run_in_processes
from mtedit_fast.training.run import load_editor
from mtedit_fast.training.trainer import Trainer

CONFIG = Path(__file__).parents[1] / "configs" / "demo_nft.yaml"
TURNS, CHAINS = 3, 300


@dataclass(frozen=True)
class Arm:
    """One setting of one factor; `overrides` are those of `mtedit-fast train`."""

    factor: str
    name: str
    overrides: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        return f"{self.factor}-{self.name}".replace(" ", "_").replace("=", "")


BASE = Arm("base", "base")
# Every arm is compared with the base: NFT, K = 3, mean over turns, broadcast, fusion of advantages, graded scores,
# λ = 0.3, groups of 8. All arms make equally many edits in an iteration.
ARMS = (
    BASE,
    Arm("credit", "per turn", ("advantage.credit=per_turn",)),
    Arm("credit", "reward to go", ("advantage.credit=reward_to_go",)),
    Arm("fusion", "reward", ("advantage.fusion=reward",)),
    Arm("turns", "K=1", ("rollout.turns=1", "rollout.groups_per_iteration=24")),
    Arm("turns", "K=2", ("rollout.turns=2", "rollout.groups_per_iteration=12")),
    Arm("objective", "grpo", ("objective.name=grpo", "rollout.variant=cps", "rollout.eta=0.6", "optimizer.lr=1e-3")),
    Arm("objective", "crd", ("objective.name=crd",)),
    Arm("scores", "binary", ("rewards.0.binarize=3",)),
    Arm("consistency", "λ=0", ("rewards.1.weight=0",)),
    Arm("consistency", "λ=1", ("rewards.1.weight=1",)),
    Arm("group size", "G=4", ("rollout.group_size=4", "rollout.groups_per_iteration=16")),
    Arm("group size", "G=16", ("rollout.group_size=16", "rollout.groups_per_iteration=4")),
)


def study_config(arm: Arm, folder: Path, seed: int, iterations: int) -> TrainConfig:
    """The base's configuration with the arm's switch."""
    data = folder.parent / "data"
    return load_config(
        CONFIG,
        [
            "rollout.groups_per_iteration=8",
            "optimizer.lr=2e-3",
            f"run.iterations={iterations}",
            f"run.seed={seed}",
            f"run.output_dir={folder}",
            f"data.path={data / 'train.jsonl'}",
            f"evaluation.path={data / 'heldout.jsonl'}",
            f"evaluation.chains={CHAINS}",
            *arm.overrides,
        ],
    )


def run_arm(arm: Arm, folder: Path, seed: int, iterations: int) -> None:
    """Train one arm and write `folder`/result.json; the base's untrained editor is scored beside it, once."""
    config = study_config(arm, folder, seed, iterations)
    chains = EditChains(config.data.path, turns=config.rollout.turns, resolution=config.data.size, seed=config.run.seed)
    held_out = EditChains(str(config.evaluation.path), turns=TURNS, resolution=config.data.size)
    trainer = Trainer(load_editor(config), chains, config, held_out)
    for _ in trainer.fit():
        pass
    untrained = folder.parent / "untrained.json"
    if not untrained.exists():
        _write(untrained, _scores(trainer.evaluate(reference=True)))
    scores = _scores(trainer.evaluate())
    _write(folder / "result.json", scores | {"iterations": iterations})


def _scores(evaluation: Evaluation) -> dict[str, object]:
    assert evaluation.success is not None
    consistency = evaluation.rewards["content_consistency"]
    return {"success": evaluation.success.int().tolist(), "consistency": consistency.nanmean(0).tolist()}


def _write(path: Path, content: object) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content) + "\n")
    temporary.replace(path)


def run_study(output: Path, *, seeds: int, iterations: int, jobs: int, only: str | None, console: Console) -> None:
    """Run what is not finished, `jobs` arms at a time in processes of their own with an equal share of the cores.

    Raises:
        ValueError: an unknown factor, or finished runs of another length.
        ChildProcessError: a run failed; the others were finished.
    """
    factors = sorted({arm.factor for arm in ARMS} - {"base"})
    if only is not None and only not in factors:
        raise ValueError(f"only: expected one of {', '.join(factors)}, got {only!r}")
    if not (output / "data" / "heldout.jsonl").exists():
        write_dataset(output / "data", 2000, split="train", turns=TURNS)
        write_dataset(output / "data", CHAINS, split="heldout", turns=TURNS)
    arms = [arm for arm in ARMS if only in (None, arm.factor) or arm is BASE]
    # Seed by seed, so that a study cut short has whole comparisons.
    runs = [(arm, seed) for seed in range(seeds) for arm in arms]
    todo = [(arm, seed) for arm, seed in runs if not _finished(output / f"{arm.folder}-{seed}", iterations)]
    run_in_processes(
        "study",
        [
            Run(
                output / f"{arm.folder}-{seed}",
                f"{arm.factor} {arm.name}, seed {seed}",
                (__name__, arm.folder, str(seed), str(iterations)),
            )
            for arm, seed in todo
        ],
        finished=len(runs) - len(todo),
        jobs=jobs,
        console=console,
    )


def _finished(folder: Path, iterations: int) -> bool:
    result = folder / "result.json"
    if not result.exists():
        return False
    if (length := json.loads(result.read_text())["iterations"]) != iterations:
        raise ValueError(
            f"iterations: expected {length}, the length of the finished run in {folder}, got {iterations}; "
            "runs that are compared must be equally long: choose another --output"
        )
    return True


def main(folder: str, arm: str, seed: str, iterations: str) -> None:
    """One run, in the process that `run_study` started for it."""
    run_arm(next(a for a in ARMS if a.folder == arm), Path(folder), int(seed), int(iterations))


@dataclass(frozen=True)
class Result:
    """The finished runs of one arm, S seeds of N chains."""

    arm: Arm
    success: np.ndarray  # bool [S, N, K]: turn k did what it was asked
    consistency: np.ndarray  # [S, K]

    @property
    def last(self) -> np.ndarray:
        """[S, N]: all turns succeeded."""
        return self.success.all(2).astype(float)


def read_results(output: Path) -> tuple[np.ndarray, list[Result]]:
    """Success bool [N, K] of the untrained editor, and the arms that have a finished run."""
    untrained = output / "untrained.json"
    if not untrained.exists():
        raise ValueError(f"{output}: no finished run; start one with mtedit-fast study multi_turn --output {output}")
    return np.array(json.loads(untrained.read_text())["success"], dtype=bool), list(_results(output))


def _results(output: Path) -> Iterator[Result]:
    for arm in ARMS:
        runs = [json.loads(path.read_text()) for path in sorted(output.glob(f"{arm.folder}-*/result.json"))]
        if runs:
            yield Result(
                arm,
                np.array([run["success"] for run in runs], dtype=bool),
                np.array([run["consistency"] for run in runs]),
            )
