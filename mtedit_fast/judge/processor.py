"""Judging with any chat model that takes images, through its own processor: batched, without sharing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .prompts import JudgePrompt
from .scores import Rows


class Processed:
    """Inputs of whole questions, as a processor of transformers makes them.

    Images go through the host and 8 bits, and every row pays for its whole question, in each of its turns.
    """

    def __init__(self, model: Any, processor: Any, prompt: JudgePrompt, max_tokens: int, counts: Counter[str]) -> None:
        self.model, self.processor, self.prompt = model, processor, prompt
        self.max_tokens, self.counts = max_tokens, counts

    def questions(
        self, rows: Rows, openings: Sequence[str], *, copies: int = 1
    ) -> Iterator[tuple[list[tuple[int, int]], dict[str, Any]]]:
        """([(row, opening)], model inputs) of every usable row's question with each of the beginnings of an answer, a
        batch at a time."""
        jobs = [(row, number) for row in rows.usable for number in range(len(openings))]
        step = 1
        while jobs:
            part, jobs = jobs[:step], jobs[step:]
            inputs = self._inputs(rows, [(row, openings[number]) for row, number in part])
            step = max(1, self.max_tokens // (inputs["input_ids"].shape[1] * copies))  # as long as the first
            yield part, inputs

    def hidden(self, rows: Rows, openings: Sequence[str]) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
        """([(row, turn)], [n, H]) at the last token of each question and opening."""
        for part, inputs in self.questions(rows, openings):
            states = self.model.model(**inputs, use_cache=False).last_hidden_state
            mask = inputs["attention_mask"]
            last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
            self.counts.update(forwards=1, rows=len(part), images=len(part) * (rows.turns + 1))
            yield part, states[torch.arange(len(part), device=last.device), last]

    def _inputs(self, rows: Rows, jobs: Sequence[tuple[int, str]]) -> dict[str, Any]:
        texts = [self._render(rows.instructions[row]) + opening for row, opening in jobs]
        images = [[_array(image) for image in (rows.references[rows.owner[row]], *rows.edits[row])] for row, _ in jobs]
        begin = getattr(self.processor.tokenizer, "bos_token", None)
        inputs = self.processor(
            text=texts,
            images=images,
            padding=True,
            return_tensors="pt",
            # Most templates write the first token themselves.
            add_special_tokens=not (begin and texts[0].startswith(begin)),
        )
        moved = {name: value.to(self.model.device) for name, value in inputs.items()}
        floats = {name: value.to(self.model.dtype) for name, value in moved.items() if value.is_floating_point()}
        return {**moved, **floats}

    def _render(self, instructions: Sequence[str]) -> str:
        messages = self.prompt.messages(instructions)
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _array(image: Tensor) -> np.ndarray:
    """[H, W, 3] uint8, as a file would hold it."""
    levels = image if image.dtype == torch.uint8 else (image.float() * 255).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(1, 2, 0).cpu().numpy()
