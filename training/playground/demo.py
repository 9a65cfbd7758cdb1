"""`mtedit-fast demo`: the whole loop on the playground."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mtedit_fast.training.config_file import load_config
from mtedit_fast.training.playground.data import write_dataset
from mtedit_fast.training.run import train

CONFIGS = {
    objective: Path(__file__).parents[1] / "configs" / name
    for objective, name in (("grpo", "demo.yaml"), ("nft", "demo_nft.yaml"))
}
TRAIN_CHAINS, HELD_OUT_CHAINS = 2000, 400


def run_demo(
    output: Path | None = None,
    *,
    objective: str = "grpo",
    seed: int = 0,
    control: str = "none",
    overrides: list[str] | None = None,
    fresh: bool = False,
) -> dict[str, Any]:
    """Write the scenes, train by the objective's configuration, report; returns the summary. A stopped demo goes on.

    Raises:
        ValueError: an objective without a configuration.
    """
    if objective not in CONFIGS:
        raise ValueError(f"objective: expected one of {', '.join(CONFIGS)}, got {objective!r}")
    output = output or Path("runs") / CONFIGS[objective].stem
    if fresh and output.exists():
        shutil.rmtree(output)
    data = output / "data"
    config = load_config(
        CONFIGS[objective],
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
