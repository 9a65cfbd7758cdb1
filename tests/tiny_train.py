"""A short training run of the random tiny editor; as a program it can be killed: tiny_train.py DIR [key=value]"""

import sys
from pathlib import Path

import torch
from op_backends import GPU  # where the trainer trains
from tiny import SIZE, tiny_editor

from mtedit_fast.training.config import TrainConfig
from mtedit_fast.training.config_file import load_config
from mtedit_fast.training.data import EditChains
from mtedit_fast.training.playground.data import write_dataset
from mtedit_fast.training.rewards import RewardBatch
from mtedit_fast.training.trainer import Trainer


def brightness(batch: RewardBatch) -> torch.Tensor:
    """A reward that the random editor can move."""
    return batch.edits.mean((2, 3, 4))


def tiny_config(folder: Path, overrides: list[str]) -> TrainConfig:
    base = {
        "model": {"lora": {"rank": 2}},
        "data": {"path": str(folder / "data" / "train.jsonl"), "resolution": SIZE},
        "rollout": {
            "groups_per_iteration": 2,
            "group_size": 4,
            "turns": 2,
            "num_steps": 3,
            "micro_batch": 4,
            "max_sequence_length": 16,
        },
        "rewards": [{"name": "brightness", "path": "tiny_train:brightness"}],
        "objective": {"clip_range": 1e-3},
        "run": {"iterations": 4, "output_dir": str(folder / "run"), "checkpoint_every": 1},
    }
    return load_config(base, overrides)


def tiny_trainer(folder: Path, *overrides: str) -> Trainer:
    config = tiny_config(folder, list(overrides))
    if not (folder / "data").exists():
        write_dataset(folder / "data", 6, turns=2)
    chains = EditChains(config.data.path, turns=config.rollout.turns, resolution=SIZE, seed=config.run.seed)
    return Trainer(tiny_editor(device=GPU), chains, config, held_out=chains)


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer = tiny_trainer(Path(sys.argv[1]), *sys.argv[2:])
    for metrics in trainer.fit():
        print("iteration", metrics["iteration"], flush=True)
    print("done", flush=True)
