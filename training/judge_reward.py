"""The judge as a reward: a vision-language model scores every turn of a trajectory in one query."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from mtedit_fast.judge import HuggingFaceJudge, Judge, JudgePrompt, ServedJudge
from mtedit_fast.training.dtypes import DTYPES
from mtedit_fast.training.rewards import RewardBatch


@lru_cache(maxsize=2)
def load_judge(
    path: str,
    model: str | None,
    prompt: JudgePrompt,
    dtype: str,
    normalize: Literal["set", "vocab"],
    min_mass: float,
    device: torch.device,
) -> Judge:
    """A judge, kept for the calls to come; see `instruction_following`."""
    if path.startswith(("http://", "https://")):
        if model is None:
            raise ValueError(f"options.model: expected the name of the model that {path} serves, got none")
        return ServedJudge(path, model, prompt, normalize=normalize, min_mass=min_mass)
    if dtype not in DTYPES:
        raise ValueError(f"options.dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    return HuggingFaceJudge.from_pretrained(
        path, prompt=prompt, dtype=DTYPES[dtype], device=device, normalize=normalize, min_mass=min_mass
    )


def instruction_following(
    batch: RewardBatch,
    *,
    path: str,
    model: str | None = None,
    scale: str = "1-5",
    thinking: bool = False,
    rubric: str | None = None,
    dtype: str = "bf16",
    normalize: Literal["set", "vocab"] = "set",
    min_mass: float = 0.0,
) -> Tensor:
    """Expected score of every turn, [B, K] fp32 on the scale's range, NaN where the judge gave none.

    path: folder or hub id of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint, which runs on the edits' device, or the
    http address of an OpenAI-compatible server, which serves it as `model`. scale, thinking, rubric: of `JudgePrompt`.
    dtype: "bf16" or "fp32". normalize, min_mass: of the judge. What failed is counted in a warning.
    """
    prompt = JudgePrompt(scale, thinking, rubric)
    judge = load_judge(path, model, prompt, dtype, normalize, min_mass, batch.edits.device)
    scores = judge.score(batch.references, batch.edits, batch.instructions)
    if scores.failures:
        reasons = ", ".join(f"{count} {reason}" for reason, count in scores.failures.items())
        warnings.warn(f"judge {path}: scores left undefined: {reasons}", stacklevel=2)
    return scores.score
