"""What `mtedit-fast plan` predicts of an iteration, beside what it then takes.

mtedit-fast bench plan                  the playground's editor on a CPU, one change of the configuration after another

A probe of two groups at the first configuration gives the device's rates, at another size one at that size; a row is
predicted from them and its own count of operations. The probe and the row's iterations take turns, so that whatever
else the machine does falls on both alike. Memory: what the update's graph and its largest block take by shapes, beside
the most bytes of tensors that an update makes.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import command
import harness
import record
from torch import Tensor

from mtedit_fast.rewards import RewardBatch
from mtedit_fast.training import plan as planner
from mtedit_fast.training.config import TrainConfig
from mtedit_fast.training.config_file import load_config
from mtedit_fast.training.data import EditChains
from mtedit_fast.training.memory import estimate, peak_bytes
from mtedit_fast.training.playground.data import write_dataset
from mtedit_fast.training.probe import Probe
from mtedit_fast.training.run import load_editor
from mtedit_fast.training.trainer import Trainer

CONFIG = Path(__file__).resolve().parents[1] / "training/configs/demo_nft.yaml"
BASE = ("rollout.groups_per_iteration=4", "rollout.group_size=8", "rollout.micro_batch=8", "rollout.turns=2",
        "rollout.num_steps=4", "optimizer.forward_rows=8", "advantage.filter=none")  # fmt: skip
CHANGES = {
    "base": (),
    "8 groups": ("rollout.groups_per_iteration=8",),
    "group of 16": ("rollout.group_size=16", "rollout.micro_batch=8"),
    "3 turns": ("rollout.turns=3",),
    "8 steps": ("rollout.num_steps=8", "objective.draws=3"),
    "128 x 128": (
        "data.resolution=128",
        "rewards.0.path=bench_plan:brightness",
        "rewards.0.range=null",
        "rewards.1.path=bench_plan:brightness",
    ),
    "grpo": ("objective.name=grpo", "objective.draws=1", "rollout.variant=sde"),
}
OWN_PROBE = ("128 x 128",)
"""What a device reaches depends on the number of tokens."""
CHAINS = 8
FOLDER = tempfile.TemporaryDirectory()  # gone with the process


@dataclass(frozen=True)
class Row(record.Line):
    """One line of a results file. Seconds of an iteration, predicted from a probe and measured, medians."""

    probe: str
    predicted_s: float
    measured_s: float
    p20_s: float
    p80_s: float
    error_percent: float
    predicted_rollout_s: float
    rollout_s: float
    predicted_reward_s: float
    reward_s: float
    predicted_update_s: float
    update_s: float
    predicted_update_bytes: int
    update_bytes: int
    error_bytes_percent: float
    repetitions: int


def brightness(batch: RewardBatch) -> Tensor:
    """For sizes that the oracle cannot read."""
    return batch.edits.mean((2, 3, 4))


def settings(folder: Path, change: str) -> TrainConfig:
    where = [f"data.path={folder / 'train.jsonl'}", "evaluation.path=null", f"run.output_dir={folder / 'run'}"]
    return load_config(CONFIG, [*BASE, *CHANGES[change], *where])


def trainer_of(config: TrainConfig) -> Trainer:
    chains = EditChains(config.data.path, turns=config.rollout.turns, resolution=config.data.size)
    return Trainer(load_editor(config), chains, config)


@cache
def data() -> Path:
    write_dataset(folder := Path(FOLDER.name), CHAINS, turns=3)
    return folder


def update_bytes(trainer: Trainer) -> int:
    """Of the tensors that an update makes, the most that are alive at once."""
    names = trainer.chains.draw(0, trainer.config.rollout.groups_per_iteration)
    records = [trainer.chains[name] for name in names]
    trajectories, rewards = trainer.sample(records, iteration=0)
    batch = trainer.learning_batch(trajectories, trainer.advantages(trajectories, rewards, records))
    return peak_bytes(lambda: trainer.update(batch), grad=True)


def bench(columns: dict[str, Any], change: str, repetitions: int) -> Row:
    config = settings(data(), change)
    probed = change if change in OWN_PROBE else "base"
    probe, trainer = Probe(settings(data(), probed)), trainer_of(config)
    calls = []
    for _ in range(repetitions + 1):
        probe.round()
        calls.append(trainer.step())
    del calls[0]
    predicted = planner.plan(config, 1, probe.rates())
    measured = {phase: median(call[f"seconds/{phase}"] for call in calls) for phase in predicted.seconds}
    total, memory = sum(measured.values()), sum(estimate(config).update.values())
    whole = harness.summary([sum(call[f"seconds/{phase}"] for phase in measured) for call in calls])
    found = update_bytes(trainer)
    return Row(
        **columns,
        probe=f"two groups of {probed}",
        predicted_s=round(predicted.iteration, 4),
        measured_s=round(total, 4),
        p20_s=round(whole.p20, 4),
        p80_s=round(whole.p80, 4),
        error_percent=round(100 * (predicted.iteration / total - 1), 1),
        **{f"predicted_{phase}_s": round(seconds, 4) for phase, seconds in predicted.seconds.items()},
        **{f"{phase}_s": round(seconds, 4) for phase, seconds in measured.items()},
        predicted_update_bytes=memory,
        update_bytes=found,
        error_bytes_percent=round(100 * (memory / found - 1), 1),
        repetitions=repetitions,
    )


def describe(row: Row) -> str:
    return (
        f"{row.variant:12} predicted {row.predicted_s:6.2f} s, measured {row.measured_s:6.2f} s: "
        f"{row.error_percent:+.1f} %; rollout {row.predicted_rollout_s:.2f} | {row.rollout_s:.2f}, reward "
        f"{row.predicted_reward_s:.2f} | {row.reward_s:.2f}, update {row.predicted_update_s:.2f} | {row.update_s:.2f}; "
        f"update's memory {row.predicted_update_bytes / 2**20:.0f} | {row.update_bytes / 2**20:.0f} MiB: "
        f"{row.error_bytes_percent:+.1f} %"
    )


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--change", action="append", choices=CHANGES, help="only these rows")
    parser.add_argument("--repetitions", type=int, default=4, help="iterations of a row, after one to warm up")


def jobs(args: argparse.Namespace) -> Iterator[command.Job]:
    if args.device.type != "cpu":
        raise ValueError("--device: the playground is measured on a CPU; at full size: mtedit-fast plan --probe")
    for change in args.change or CHANGES:
        columns = record.environment(args.device) | {
            "op": "plan",
            "variant": change,
            "shape": "4x8x2x64 in 4, changed",
            "dtype": "fp32",
            "backend": "both",
            "timing": "call",
        }
        yield command.Job(columns, partial(bench, columns, change, args.repetitions))


main = partial(command.run, __doc__, "plan", options, jobs, describe)


if __name__ == "__main__":
    main()
