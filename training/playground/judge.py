"""Training of the playground's judge on edits graded by the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtedit_fast.training.judge.batch import Packer, Row
from mtedit_fast.training.judge.data import JudgeExample

from .fit import fit, generator_for, muon_and_adamw
from .judge_data import Graded, thought
from .judge_model import IMAGES, PLAYGROUND_PROMPT
from .world import BACKGROUNDS, CELLS, CLASSES


class JudgeLoss(nn.Module):
    """The judge with the losses of one step.

    Cross-entropy of the answers, and two helpers that are thrown away afterwards: a visual token tells the class of
    its cell and the background, and an edited image's token in the language model tells whether its cell was meant to
    change and whether it is right. Without these the answers alone teach a tiny model nothing for many minutes.
    """

    def __init__(self, model: Any, tokenizer: Any, graded: Graded) -> None:
        super().__init__()
        self.model, self.graded = model, graded
        width = model.config.text_config.hidden_size
        self.cell = nn.Linear(width, CLASSES)
        self.background = nn.Linear(width, len(BACKGROUNDS))
        self.status = nn.Linear(width, 4)
        self.packers = [
            Packer(model, tokenizer, IMAGES, replace(PLAYGROUND_PROMPT, thinking=thinking), self.image)
            for thinking in (False, True)
        ]

    def image(self, file: Path) -> Tensor:
        """Of an `example`: its files are named by chain and state, and are nowhere but in `graded`."""
        row, state = map(int, file.parts)
        return self.graded.images[row, state]

    def example(self, row: int, first: int, length: int) -> JudgeExample:
        """`length` turns of a chain from turn `first` on, and what can be said of the first of them."""
        original, *edits = (Path(str(row), str(state)) for state in range(first, first + length + 1))
        turns = slice(first, first + length)
        return JudgeExample(
            id=str(original),
            image=original,
            edits=tuple(edits),
            instructions=tuple(self.graded.instructions[row][turns]),
            scores=tuple(self.graded.grades[row, turns].float().tolist()),
            thoughts=(thought(self.graded.status[row, first].tolist()),),
        )

    def forward(self, batch: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        n, turns = self.graded.grades.shape
        kind = int(torch.randint(4, (), generator=generator))  # half the steps: all turns; else one, half with thought
        one_turn = kind >= 2
        rows = torch.randint(n, (batch * (2 if one_turn else 1),), generator=generator)
        first = torch.randint(turns, rows.shape, generator=generator) if one_turn else torch.zeros_like(rows)
        return self.losses(rows, first, 1 if one_turn else turns, kind == 3)

    def losses(self, rows: Tensor, first: Tensor, length: int, thinking: bool) -> tuple[Tensor, dict[str, float]]:
        """About `length` turns of chains `rows` [B], from turns `first` [B] on; thinking takes single turns."""
        packer = self.packers[thinking]
        examples = [self.example(row, k, length) for row, k in zip(rows.tolist(), first.tolist(), strict=True)]
        branches = [[packer.written_branch(e, *e.thoughts)] if thinking else packer.slot_branches(e) for e in examples]
        batch = packer.pack(list(map(Row, examples, branches)))
        features = packer.features(batch.files)
        hidden = packer.states(batch, features)
        predicted = packer.read(hidden, batch, torch.tensor([e.scores for e in examples]).flatten())
        answer = -torch.cat([predicted.log_prob, predicted.true_log_prob]).mean()
        states = first[:, None] + torch.arange(length + 1)
        scenes = self.graded.scenes[rows[:, None], states].long().flatten(0, 1)
        seen = torch.stack([image[0] for image in features])  # [images, 16, hidden]
        cells = scenes[:, :CELLS].flatten()
        reading = F.cross_entropy(self.cell(seen).flatten(0, 1), cells, ignore_index=-1)
        reading = reading + F.cross_entropy(self.background(seen.mean(1)), scenes[:, CELLS])
        slots = hidden[batch.ids == packer.image_id].view(len(rows), length + 1, CELLS, -1)[:, 1:]
        wanted = self.graded.status[rows[:, None], states[:, :-1], :CELLS].long()
        status = F.cross_entropy(self.status(slots).flatten(0, 2), wanted.flatten())
        metrics = {"answer": answer.item(), "cells": reading.item(), "status": status.item()}
        return answer + 0.5 * reading + 2 * status, metrics

    def split_parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """(matrices inside the blocks, for Muon; the rest)."""
        hidden: list[Tensor] = []
        rest: list[Tensor] = []
        for name, p in self.named_parameters():
            inside = "layers." in name or "blocks." in name or "merger" in name
            (hidden if inside and p.ndim == 2 else rest).append(p)
        return hidden, rest


def train_judge(
    model: Any,
    tokenizer: Any,
    graded: Graded,
    *,
    steps: int,
    checkpoint: Path,
    seed: int,
    batch: int = 48,
    save_every: int = 50,
    resume: bool = True,
    on_save: Callable[[int], None] | None = None,
) -> None:
    """Trains the judge on all turns, on single turns and on single turns with a thought; leaves averaged weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = JudgeLoss(model, tokenizer, graded)
    fit(
        "judge",
        module,
        muon_and_adamw(*module.split_parameters(), 2e-3, 2e-3),
        lambda step: module(batch, generator_for(seed, step)),
        steps=steps,
        schedule=lambda step: min((step + 1) / 20, 1.0, max(0.0, 2 * (1 - step / steps))),
        checkpoint=checkpoint,
        save_every=save_every,
        ema_decay=0.998,
        resume=resume,
        on_save=on_save,
    )
