"""`mtedit-fast demo`: the whole loop on the playground."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mtedit_fast.training.config import load_config
from mtedit_fast.training.playground.data import write_dataset
from mtedit_fast.training.run import train

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
TRAIN_CHAINS, HELD_OUT_CHAINS = 2000, 400


def run_demo(
    output: Path, *, seed: int = 0, control: str = "none", overrides: list[str] | None = None, fresh: bool = False
) -> dict[str, Any]:
    """Write the scenes, train by `configs/demo.yaml`, report; returns the summary. A stopped demo goes on."""
    if fresh and output.exists():
        shutil.rmtree(output)
    data = output / "data"
    config = load_config(
        CONFIG,
        [
            f"run.output_dir={output}",
            f"run.seed={seed}",
            f"run.control={control}",
            f"data.path={data / 'train.jsonl'}",
            f"evaluation.path={data / 'heldout.jsonl'}",
            *(overrides or []),
        ],
    )
    if not (data / "heldout.jsonl").exists():
        write_dataset(data, TRAIN_CHAINS, split="train")
        write_dataset(data, HELD_OUT_CHAINS, split="heldout")
    return train(config)
