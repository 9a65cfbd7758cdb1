"""Training of the playground's judge on edits graded by the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mtedit_fast.judge.attention import batch_vision_attention, branch_mask
from mtedit_fast.judge.prompts import JudgePrompt, write_answer
from mtedit_fast.judge.sequence import encode, split_question
from mtedit_fast.qwen_vl import encode_images, hidden_states, prepare_images

from .fit import fit, generator_for, muon_and_adamw
from .judge_data import Graded, thought
from .judge_model import IMAGES, PLAYGROUND_PROMPT
from .world import BACKGROUNDS, CELLS, CLASSES

IGNORE = -100


class Example(NamedTuple):
    """One sequence: a question with all its answers, each of which sees the question and itself only."""

    ids: Tensor  # [L]
    branch: Tensor  # [L] 0 in the question, 1.. in the answers
    labels: Tensor  # [L] the next token where an answer is to be learned, else IGNORE


def branch_positions(model: Any, ids: Tensor, branch: Tensor, grid: Tensor) -> Tensor:
    """[3, B, L] positions of Qwen3-VL; every answer begins where the question ends."""
    types = (ids == model.config.image_token_id).int()
    positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=grid)
    first = torch.cat([torch.ones_like(branch[:, :1], dtype=torch.bool), branch.diff(dim=1) != 0], 1)
    index = torch.arange(branch.shape[1]).expand_as(branch)
    start = torch.where(first, index, 0).cummax(1).values  # of the own answer
    question = (branch == 0).sum(1, keepdim=True)
    return positions - torch.where(branch > 0, start - question, 0)


class JudgeLoss(nn.Module):
    """The judge with the losses of one step.

    Cross-entropy of the answers, and two helpers that are thrown away afterwards: a visual token tells the class of
    its cell and the background, and an edited image's token in the language model tells whether its cell was meant to
    change and whether it is right. Without these the answers alone teach a tiny model nothing for many minutes.
    """

    def __init__(self, model: Any, tokenizer: Any, graded: Graded) -> None:
        super().__init__()
        self.model, self.tokenizer, self.graded = model, tokenizer, graded
        width = model.config.text_config.hidden_size
        self.cell = nn.Linear(width, CLASSES)
        self.background = nn.Linear(width, len(BACKGROUNDS))
        self.status = nn.Linear(width, 4)
        self.image_token = "<|image_pad|>"
        batch_vision_attention(model.model.visual)

    def example(self, row: int, turns: range, thinking: bool) -> Example:
        """The question about some turns of a chain, with their grades as answers."""
        texts = [self.graded.instructions[row][k] for k in turns]
        prompt = JudgePrompt(PLAYGROUND_PROMPT.scale, thinking, PLAYGROUND_PROMPT.rubric)
        grades = [str(int(self.graded.grades[row, k])) for k in turns]
        tokens = [CELLS] * (len(texts) + 1)
        if thinking:
            said = thought(self.graded.status[row, turns[0]].tolist())
            answers = [write_answer(grades, said) + self.tokenizer.eos_token]
            question, encoded = encode(
                self.tokenizer, prompt, texts, tokens, image_token=self.image_token, answers=answers
            )
            learned = [len(encoded[0])]
        else:
            split = split_question(self.tokenizer, prompt, texts, tokens, image_token=self.image_token)
            question = split.prefix + split.tail
            encoded = [
                [*branch, self.tokenizer.convert_tokens_to_ids(grade)]
                for branch, grade in zip(split.branches, grades, strict=True)
            ]
            learned = [1] * len(encoded)
        ids, branch, labels = list(question), [0] * len(question), [IGNORE] * len(question)
        for i, (answer, count) in enumerate(zip(encoded, learned, strict=True), 1):
            if len(answer) == count:  # the question's own last token predicts the first of the answer
                labels[len(question) - 1] = answer[0]
            inputs = answer[:-1]
            targets = [IGNORE] * (len(answer) - count) + answer[len(answer) - count :]
            ids += inputs
            branch += [i] * len(inputs)
            labels += targets[1:]
        return Example(*(torch.tensor(x) for x in (ids, branch, labels)))

    def forward(self, batch: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        n, turns = self.graded.grades.shape
        kind = int(torch.randint(4, (), generator=generator))  # half the steps: all turns; else one, half with thought
        one_turn = kind >= 2
        rows = torch.randint(n, (batch * (2 if one_turn else 1),), generator=generator)
        first = torch.randint(turns, rows.shape, generator=generator) if one_turn else torch.zeros_like(rows)
        length = 1 if one_turn else turns
        examples = [
            self.example(int(row), range(int(k), int(k) + length), kind == 3)
            for row, k in zip(rows, first, strict=True)
        ]
        return self.losses(examples, rows, first, length)

    def losses(
        self, examples: list[Example], rows: Tensor, first: Tensor, length: int
    ) -> tuple[Tensor, dict[str, float]]:
        """Of examples about `length` turns of chains `rows` [B], from turns `first` [B] on."""
        states = first[:, None] + torch.arange(length + 1)
        ids, branch, labels = (
            pad_sequence([e[i] for e in examples], batch_first=True, padding_value=value)
            for i, value in ((0, self.tokenizer.pad_token_id), (1, -1), (2, IGNORE))
        )
        pixels, grid = prepare_images(self.graded.images[rows[:, None], states].flatten(0, 1), IMAGES)
        features = encode_images(self.model, pixels, grid)
        positions = branch_positions(self.model, ids, branch, grid)
        mask = branch_mask(branch, torch.zeros(len(branch), dtype=torch.int64), 0)
        hidden = hidden_states(self.model, ids, features, positions, mask)
        at = labels != IGNORE
        logits = self.model.lm_head(hidden[at])
        answer = F.cross_entropy(logits, labels[at])
        scenes = self.graded.scenes[rows[:, None], states].long().flatten(0, 1)
        seen = torch.stack([image[0] for image in features])  # [images, 16, hidden]
        cells = scenes[:, :CELLS].flatten()
        reading = F.cross_entropy(self.cell(seen).flatten(0, 1), cells, ignore_index=-1)
        reading = reading + F.cross_entropy(self.background(seen.mean(1)), scenes[:, CELLS])
        slots = hidden[ids == self.model.config.image_token_id].view(len(rows), length + 1, CELLS, -1)[:, 1:]
        wanted = self.graded.status[rows[:, None], states[:, :-1], :CELLS].long()
        status = F.cross_entropy(self.status(slots).flatten(0, 2), wanted.flatten())
        right = (logits.argmax(1) == labels[at]).float().mean().item()
        metrics = {"answer": answer.item(), "right": right, "cells": reading.item(), "status": status.item()}
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
