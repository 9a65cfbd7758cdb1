"""Small scored edits and a tiny judge, for the tests of judge training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mtedit_fast.training.judge.parts import Parts
from mtedit_fast.training.playground.judge_model import IMAGES, PLAYGROUND_PROMPT, new_judge_model, new_judge_tokenizer

SIZE = 32
SMALL = replace(IMAGES, min_pixels=SIZE**2)
RUBRIC = PLAYGROUND_PROMPT.rubric
INSTRUCTIONS = ("Remove the red circle", "Add a blue square", "Change the color of the sign to green")
THOUGHTS = ("changed wanted, rest kept", "missing", "partly wanted: rest changed")


def write_examples(folder: Path, turns: list[int], *, scores: list[Any] | None = None, originals: int = 2) -> Path:
    """A JSONL of examples with so many turns each, their images beside it; the first score of each, or `scores`."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    lines = []
    for number, count in enumerate(turns):
        names = [f"original{number % originals}.png", *(f"{number}_{turn}.png" for turn in range(count))]
        for name in names:
            if not (folder / name).exists():
                Image.fromarray(random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(folder / name)
        lines.append(
            {
                "id": f"e{number}",
                "image": names[0],
                "edits": names[1:],
                "instructions": [INSTRUCTIONS[(number + turn) % 3] for turn in range(count)],
                "scores": scores[number] if scores else [1 + (number + turn) % 5 for turn in range(count)],
                "thought": THOUGHTS[number % 3],
            }
        )
    path = folder / "examples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def new_parts(seed: int = 0) -> Parts:
    tokenizer = new_judge_tokenizer()
    return Parts(new_judge_model(seed, tokenizer), tokenizer, SMALL)


def settings(path: Path, output: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A configuration for these examples."""
    config: dict[str, dict[str, Any]] = {
        "prompt": {"rubric": RUBRIC},
        "data": {"path": str(path)},
        "sampling": {"samples": 4, "max_new_tokens": 12, "top_p": 1.0},
        "optimizer": {"lr": 1e-3, "questions": 4, "micro_batch": 2, "weight_decay": 0.01},
        "run": {"steps": 2, "output_dir": str(output)},
    }
    for name, section in sections.items():
        config[name] = config.get(name, {}) | section
    return config
