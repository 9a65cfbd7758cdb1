"""Thoughts to learn from and to evaluate: answers sampled from the model in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mtedit_fast.judge.sampling import continue_answers, stops
from mtedit_fast.training.judge.batch import Packer
from mtedit_fast.training.judge.data import JudgeExample


def generator_for(seed: int, step: int, index: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """Random numbers of one purpose in one step."""
    return torch.Generator(device).manual_seed(((seed * 1_000_003 + step) * 1_000_003 + index) % 2**63)


@torch.no_grad()
def sample(
    packer: Packer,
    examples: Sequence[JudgeExample],
    *,
    n: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    batch: int,
    generator: torch.Generator,
    progress: Callable[[int], None] | None = None,
) -> list[list[list[int]]]:
    """[examples][n] token ids of answers, up to the end of the last score.

    batch: questions prefilled together, which are of equally many turns. progress: called with the number of
    questions done.
    """
    training = packer.model.training
    packer.model.eval()
    answers: list[list[list[int]]] = [[] for _ in examples]
    for turns in sorted({len(example.edits) for example in examples}):
        same = [index for index, example in enumerate(examples) if len(example.edits) == turns]
        for start in range(0, len(same), batch):
            part = same[start : start + batch]
            found = continue_answers(
                packer.model,
                packer.tokenizer,
                *packer.prefill([examples[index] for index in part]),
                rope_axes=3,
                n=n,
                temperature=temperature,
                top_p=top_p,
                max_new_tokens=max_new_tokens,
                stop=stops(packer.prompt, turns),
                generator=generator,
            )
            for index, own in zip(part, found, strict=True):
                answers[index] = [packer.cut(ids) for ids in own]
            if progress is not None:
                progress(len(part))
    packer.model.train(training)
    return answers
