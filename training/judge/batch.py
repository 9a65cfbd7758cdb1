"""Questions and their answers as one batch of a vision-language model: every question once, its answers as branches.

A row is a tree: the question with its images is the trunk, and each answer a branch that sees the trunk and itself, by
a 4-D attention mask. So n thoughts about one question, or the K score slots of one trajectory, cost one pass over the
question, forward and backward, and no key-value cache, which gradient checkpointing would forbid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from mtedit_fast.judge.attention import additive, batch_vision_attention, branch_mask
from mtedit_fast.judge.prompts import JudgePrompt
from mtedit_fast.ops import digit_score, token_log_probs
from mtedit_fast.qwen_vl import ImageSpec, encode_images, hidden_states, prepare_images
from mtedit_fast.training.judge.answers import Answers, Branch
from mtedit_fast.training.judge.data import JudgeExample
from mtedit_fast.training.judge.objectives import score_weights


class Row(NamedTuple):
    example: JudgeExample
    branches: list[Branch]


class Batch(NamedTuple):
    """B rows, padded on the right to S tokens, and where in them to look."""

    ids: Tensor
    """[B, S]"""
    positions: Tensor
    """[3, B, S] rotary."""
    mask: Tensor | None
    """[B, 1, S, S], who sees whom, as the attention implementation takes it; None for causal."""
    files: list[Path]
    """Of the images in ids, row by row."""
    tokens: Tensor
    """[T] flat index into [B·S] of the position that predicts each learned token."""
    targets: Tensor
    """[T] the learned tokens."""
    token_branch: Tensor
    """[T] which branch each is in, counted over the batch."""
    slots: Tensor
    """[M] flat index of the position that predicts each score."""
    slot_branch: Tensor
    slot_turn: Tensor


class Prediction(NamedTuple):
    log_prob: Tensor
    """[T] of the learned tokens."""
    score: Tensor
    """[M] expected score, full-vocabulary softmax."""
    mass: Tensor
    """[M] probability of all score tokens together."""
    true_log_prob: Tensor
    """[M] log p(y) by `objectives.score_weights`; NaN where y is unknown."""
    among: Tensor
    """[M, number of values] softmax over the score tokens alone, detached."""


class Packer(Answers):
    """Rows of examples as inputs of one model, on its device.

    model: a Qwen2-VL, Qwen2.5-VL or Qwen3-VL for conditional generation, with attention "sdpa" or "eager" in its
    language model; its vision tower is set to attend to all images of a call at once where it is on "sdpa".
    """

    def __init__(
        self, model: Any, tokenizer: Any, images: ImageSpec, prompt: JudgePrompt, load: Callable[[Path], Tensor]
    ) -> None:
        super().__init__(model, tokenizer, images, prompt, load)
        self.attention = model.config.text_config._attn_implementation
        if self.attention not in ("sdpa", "eager"):
            raise ValueError(
                "model.attention: answers are branches of their question, for which expected sdpa or eager, got "
                f"{self.attention}"
            )
        batch_vision_attention(model.model.visual)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @contextmanager
    def loading(self, load: Callable[[Path], Tensor]) -> Iterator[None]:
        """Other data's images, for a while."""
        before, self.load = self.load, load
        try:
            yield
        finally:
            self.load = before

    def length(self, row: Row) -> int:
        return len(self.trunk(row.example).ids) + sum(len(branch.inputs) for branch in row.branches)

    def pack(self, rows: Sequence[Row]) -> Batch:
        """[B] rows as one batch."""
        width = -(-max(map(self.length, rows)) // 8) * 8  # the alignment that masked attention kernels want
        count = len(rows)
        ids = np.full((count, width), 0 if self.image_id else 1, dtype=np.int64)  # what pads is never seen
        segment = np.full((count, width), -1, dtype=np.int64)
        positions = torch.zeros(3, count, width, dtype=torch.int64)
        tokens, targets, token_branch, slots, slot_branch, slot_turn = ([] for _ in range(6))
        branch_number = 0
        for index, row in enumerate(rows):
            trunk = self.trunk(row.example)
            at = len(trunk.ids)
            ids[index, :at] = trunk.ids
            segment[index, :at] = 0
            positions[:, index, :at] = trunk.positions
            after, base = int(trunk.positions.max()) + 1, index * width
            root = base + at - 1  # predicts the first token of every branch
            for number, branch in enumerate(row.branches, 1):
                seen = branch.inputs
                end = at + len(seen)
                ids[index, at:end] = seen
                segment[index, at:end] = number
                positions[:, index, at:end] = torch.arange(after, after + len(seen))
                start = base + at - 1
                tokens += [start + offset if offset else root for offset in branch.learned]
                targets += [branch.ids[offset] for offset in branch.learned]
                token_branch += [branch_number] * len(branch.learned)
                for offset, turn in branch.slots:
                    slots.append(start + offset if offset else root)
                    slot_branch.append(branch_number)
                    slot_turn.append(turn)
                branch_number, at = branch_number + 1, end
        device = self.device
        lists = (tokens, targets, token_branch, slots, slot_branch, slot_turn)
        return Batch(
            torch.from_numpy(ids).to(device),
            positions.to(device),
            self._mask(torch.from_numpy(segment).to(device)),
            [file for row in rows for file in row.example.files],
            *(torch.tensor(values, dtype=torch.int64, device=device) for values in lists),
        )

    def _mask(self, segment: Tensor) -> Tensor | None:
        """[B, 1, S, S]: a token sees the trunk and its own branch up to itself; None where that is plainly causal."""
        if segment.max() <= 1:
            return None
        mask = branch_mask(segment, segment.new_zeros(len(segment)), 0)
        return mask if self.attention == "sdpa" else additive(mask, self.model.dtype)

    # ---- the model

    def features(self, files: Sequence[Path]) -> list[list[Tensor]]:
        """`qwen_vl.encode_images` of files, each of which goes through the vision tower once however often it comes."""
        unique = list(dict.fromkeys(files))
        images = [self.load(file).to(self.device) for file in unique]
        encoded = encode_images(self.model, *prepare_images(images, self.images, dtype=self.model.dtype))
        feature = dict(zip(unique, encoded, strict=True))
        return [feature[file] for file in files]

    def states(self, batch: Batch, features: Sequence[list[Tensor]], cache: DynamicCache | None = None) -> Tensor:
        """The last hidden states [B, S, H]. features: of batch.files. cache: as of `qwen_vl.hidden_states`."""
        return hidden_states(self.model, batch.ids, features, batch.positions, batch.mask, cache)

    def prefill(self, examples: Sequence[JudgeExample]) -> tuple[Tensor, DynamicCache, Tensor, Tensor]:
        """Questions without answers: hidden, cache, mask and position of `judge.sampling.continue_answers`."""
        batch, cache = self.pack([Row(example, []) for example in examples]), DynamicCache()
        states = self.states(batch, self.features(batch.files), cache)
        rows, width = (torch.arange(size, device=self.device) for size in batch.ids.shape)
        lengths = torch.tensor([len(self.trunk(example).ids) for example in examples], device=self.device)
        return states[rows, lengths - 1], cache, width < lengths[:, None], batch.positions.amax((0, 2)) + 1

    def predict(self, batch: Batch, truth: Tensor | None = None) -> Prediction:
        """What the model gives the learned tokens and the scores, with gradient where it is enabled.

        truth: [M] true score of every slot, NaN where unknown.
        """
        return self.read(self.states(batch, self.features(batch.files)), batch, truth)

    def read(self, states: Tensor, batch: Batch, truth: Tensor | None = None) -> Prediction:
        """`predict` from the batch's last hidden states [B, S, H]."""
        with torch.autocast(states.device.type, enabled=False):  # which would round the head's logits
            return self._head(states.flatten(0, 1), batch, truth)

    def _head(self, hidden: Tensor, batch: Batch, truth: Tensor | None) -> Prediction:
        head = self.model.get_output_embeddings()
        weight, bias = head.weight, getattr(head, "bias", None)
        hidden = hidden.to(weight.dtype)
        log_prob = hidden.new_zeros(0, dtype=torch.float32)
        if len(batch.tokens):
            log_prob = token_log_probs(hidden[batch.tokens], weight, batch.targets, bias=bias)
        if not len(batch.slots):
            nothing = log_prob.new_zeros(0)
            return Prediction(log_prob, nothing, nothing, nothing, log_prob.new_zeros(0, len(self.score_ids)))
        at_scores = hidden[batch.slots]
        score, mass, true_log_prob = self._scores(at_scores, weight, bias, truth)
        return Prediction(log_prob, score, mass, true_log_prob, self._among(at_scores.detach(), weight, bias))

    @torch.no_grad()
    def _among(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ids = list(self.score_ids)
        logits = hidden.float() @ weight[ids].float().T
        return (logits if bias is None else logits + bias[ids].float()).softmax(-1)

    def _scores(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, truth: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Expected score, mass and log p(y) [M] of the hidden states [M, H] before the scores."""
        ids, values = self.score_ids, self.scale.values
        if truth is None:
            result = digit_score(hidden, weight, ids, values, normalize="vocab", bias=bias)
            assert result.mass is not None
            return result.score, result.mass, torch.full_like(result.score, torch.nan)
        known = ~truth.isnan()
        shares = score_weights(truth.nan_to_num(values[0]), values)
        share, nearest = shares.max(1)
        target = torch.where(known, nearest, -1)
        result = digit_score(hidden, weight, ids, values, normalize="vocab", bias=bias, target=target)
        assert result.mass is not None
        assert result.target_log_prob is not None
        log_prob = result.target_log_prob
        between = (known & (share < 1)).nonzero().flatten()
        if len(between):
            rest = shares[between].scatter(1, nearest[between, None], 0)
            other = torch.tensor(ids, device=hidden.device)[rest.argmax(1)]
            second = token_log_probs(hidden[between], weight, other, bias=bias)
            mixed = share[between] * log_prob[between] + (1 - share[between]) * second
            log_prob = log_prob.index_put((between,), mixed)
        return result.score, result.mass, log_prob
