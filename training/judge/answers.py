"""Questions and answers as tokens: what is written for a model to imitate, and what is found in what it wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtedit_fast.judge.prompts import JudgePrompt, parse_answer, write_answer
from mtedit_fast.judge.sequence import encode, score_token_ids
from mtedit_fast.qwen_vl import ImageSpec
from mtedit_fast.training.judge.data import JudgeExample


class Branch(NamedTuple):
    """An answer, or the beginning of one."""

    ids: tuple[int, ...]
    slots: tuple[tuple[int, int], ...]
    """(offset, turn) of every score token in it; the last may be one past its end, still to be predicted."""
    learned: tuple[int, ...] = ()
    """Offsets of the other tokens whose log-probability is wanted."""

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model has to see: all that comes before the last token that is predicted."""
        return self.ids[: max((*self.learned[-1:], *(offset for offset, _ in self.slots[-1:])), default=0)]


class Trunk(NamedTuple):
    """A question."""

    ids: tuple[int, ...]
    positions: Tensor
    """[3, L] int64 rotary positions."""
    openings: tuple[tuple[int, ...], ...]
    """[K] the beginning of an answer up to each turn's score."""


class Answers:
    """Tokens of one model's questions and answers; questions and written answers are encoded once and kept.

    load: an image file as [3, H, W], such as `JudgeData.image`.
    """

    def __init__(
        self, model: Any, tokenizer: Any, images: ImageSpec, prompt: JudgePrompt, load: Callable[[Path], Tensor]
    ) -> None:
        self.model, self.tokenizer, self.images, self.prompt, self.load = model, tokenizer, images, prompt, load
        self.image_id = model.config.image_token_id
        self.image_token = tokenizer.convert_ids_to_tokens(self.image_id)
        self.scale = prompt.answers
        self.score_ids = score_token_ids(tokenizer, self.scale, prompt.openings(1)[0])
        self._trunk = lru_cache(maxsize=65536)(self._encode_trunk)
        self._written = lru_cache(maxsize=65536)(self._encode_answer)
        self._size = cache(self._load_size)
        self.text = cache(self._piece)

    # ---- questions and answers

    def sizes(self, example: JudgeExample) -> tuple[tuple[int, int], ...]:
        """(height, width) of every image."""
        return tuple(map(self._size, example.files))

    def _load_size(self, file: Path) -> tuple[int, int]:
        height, width = self.load(file).shape[-2:]
        return height, width

    def trunk(self, example: JudgeExample) -> Trunk:
        return self._trunk(example.instructions, self.sizes(example))

    def _encode_trunk(self, instructions: tuple[str, ...], sizes: tuple[tuple[int, int], ...]) -> Trunk:
        ids, openings = encode(
            self.tokenizer,
            self.prompt,
            instructions,
            [self.images.tokens(*size) for size in sizes],
            image_token=self.image_token,
        )
        row = torch.tensor([ids])
        grid = torch.tensor([self.images.grid(*size) for size in sizes])
        types = (row == self.image_id).int()
        positions, _ = self.model.model.get_rope_index(row, mm_token_type_ids=types, image_grid_thw=grid)
        for opening in self.prompt.openings(len(instructions)):
            if score_token_ids(self.tokenizer, self.scale, opening) != self.score_ids:
                raise ValueError(f"tokenizer: scores after {opening!r} are other tokens than in a single-turn answer")
        return Trunk(tuple(ids), positions[:, 0], tuple(map(tuple, openings)))

    def slot_branches(self, example: JudgeExample) -> list[Branch]:
        """A branch per turn that ends right before its score and holds no other."""
        return [Branch(opening, ((len(opening), turn),)) for turn, opening in enumerate(self.trunk(example).openings)]

    def written_branch(self, example: JudgeExample, thought: str) -> Branch:
        """The whole answer with a thought and the true scores, and the end of the turn; all its tokens are learned.

        A score between two values is written as the nearer one, the lower on a tie.
        """
        return self._written(example.instructions, self.sizes(example), example.scores, thought)

    def _encode_answer(
        self,
        instructions: tuple[str, ...],
        sizes: tuple[tuple[int, int], ...],
        scores: tuple[float, ...],
        thought: str,
    ) -> Branch:
        texts = [self.scale.texts[self.nearest(score)] for score in scores]
        answer = write_answer(texts, thought)
        starts, begin = [], 0
        for opening in self.prompt.openings(len(scores)):
            begin = answer.index(opening, max(begin, len(thought))) + len(opening)  # a thought may mention the tag
            starts.append(answer[:begin])
        _, encoded = encode(
            self.tokenizer,
            self.prompt,
            instructions,
            [self.images.tokens(*size) for size in sizes],
            image_token=self.image_token,
            answers=[*starts, answer],
        )
        *heads, ids = encoded
        for head, start in zip(heads, starts, strict=True):
            if ids[: len(head)] != head:
                raise ValueError(f"tokenizer: a score changes the tokens of the answer before it, {start[-40:]!r}")
        slots = tuple((len(head), turn) for turn, head in enumerate(heads))
        ids = [*ids, self.tokenizer.eos_token_id]
        taken = {offset for offset, _ in slots}
        return Branch(tuple(ids), slots, tuple(i for i in range(len(ids)) if i not in taken))

    def nearest(self, score: float) -> int:
        """Index of the scale's value nearest to a score, the lower on a tie."""
        return min(
            range(len(self.scale.values)), key=lambda i: (abs(self.scale.values[i] - score), self.scale.values[i])
        )

    # ---- answers that were sampled

    def cut(self, ids: Sequence[int]) -> list[int]:
        """A sampled answer up to a token that stands for an image, included: no image could fill it."""
        images = (self.image_id, getattr(self.model.config, "video_token_id", None))
        end = next((index + 1 for index, token in enumerate(ids) if token in images), len(ids))
        return list(ids[:end])

    def _piece(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def parse(self, ids: Sequence[int], turns: int) -> list[float] | None:
        """The K scores of a sampled answer, or None (`judge.prompts.parse_answer`)."""
        return parse_answer("".join(map(self.text, ids)), turns, self.scale)

    def slots(self, ids: Sequence[int], turns: int) -> tuple[tuple[int, int], ...] | None:
        """(offset, turn) of the K scores in a sampled answer, each a single token of the scale between its tags, and in
        order; None where they are not there. The last of several counts."""
        pieces = list(map(self.text, ids))
        answer = "".join(pieces)
        starts = accumulate(map(len, pieces), initial=0)
        offsets = {start: index for index, start in zip(range(len(pieces)), starts, strict=False)}
        found: list[tuple[int, int]] = []
        for turn, opening in enumerate(self.prompt.openings(turns)):
            close = opening.replace("<", "</")
            # the last opening that is also closed: a thought may mention the tag, and so may a cut end
            end = answer.rfind(opening, 0, max(answer.rfind(close), 0))
            slot = offsets.get(end + len(opening)) if end >= 0 else None
            if slot is None or ids[slot] not in self.score_ids or (found and slot <= found[-1][0]):
                return None
            if not answer.startswith(close, end + len(opening) + len(pieces[slot])):
                return None
            found.append((slot, turn))
        return tuple(found)

    def forced_branch(self, example: JudgeExample, ids: Sequence[int]) -> Branch | None:
        """REAL's view of a sampled answer: the true scores in their slots (what was sampled where unknown), cut off
        before the last one, which is still predicted; learned are its other tokens. None for an answer without
        slots."""
        turns = len(example.edits)
        slots = self.slots(ids, turns)
        if slots is None:
            return None
        forced = list(ids)
        for offset, turn in slots:
            score = example.scores[turn]
            if score is not None:
                forced[offset] = self.score_ids[self.nearest(score)]
        end, taken = slots[-1][0], {offset for offset, _ in slots}
        return Branch(tuple(forced[:end]), slots, tuple(i for i in range(end) if i not in taken))
