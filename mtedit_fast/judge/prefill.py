"""One prefill per group, then the edits and the answer branches of all its members over it, in few large forwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from mtedit_fast.qwen_vl import ImageSpec, encode_images, hidden_states, prepare_images

from .attention import SharedPrefix, additive, batch_vision_attention, branch_mask, pad, repeat_cache
from .scores import Rows
from .sequence import Question

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@dataclass(frozen=True)
class Group:
    """Rows of edits that share everything before their first edited image."""

    prefix: list[int]
    tail: list[int]
    """The edited images and the rest of the question, then every answer branch, one after the other."""
    segments: list[int]
    """Of the tail's tokens: 0 in the question, k + 1 in branch k."""
    ends: list[int]
    """Of each answer: which token of the tail predicts what comes next."""
    positions: Tensor
    """[3, prefix + tail] rotary positions; every branch begins where the question ends."""
    reference: int
    rows: tuple[int, ...]

    def alone(self, row: int) -> Group:
        """One row of it, whose prefix is part of the tail."""
        shift = len(self.prefix)
        return replace(
            self,
            prefix=[],
            tail=self.prefix + self.tail,
            segments=[0] * shift + self.segments,
            ends=[end + shift for end in self.ends],
            rows=(row,),
        )


class Answers(NamedTuple):
    """Of one forward."""

    rows: list[int]
    hidden: Tensor
    """[rows, answers, H], at the last token of each answer."""
    cache: DynamicCache | None
    """Keys and values of prefix and tail; None unless asked for."""
    mask: Tensor
    """[rows, L] bool, which of these are tokens."""
    position: Tensor
    """[rows], of the token after the tail."""


def new_group(
    model: Any, question: Question, grids: Sequence[tuple[int, int, int]], reference: int, rows: Sequence[int]
) -> Group:
    """grids: (frames, rows, columns) of patches of the reference and of a row's edits, the same for all rows."""
    trunk = question.prefix + question.tail
    ids = torch.tensor([trunk])
    types = (ids == model.config.image_token_id).int()
    positions = model.model.get_rope_index(ids, types, image_grid_thw=torch.tensor(grids))[0][:, 0]
    start = positions.max() + 1
    tail, segments, ends = list(question.tail), [0] * len(question.tail), []
    for number, branch in enumerate(question.branches, 1):
        steps = start + torch.arange(len(branch))
        positions = torch.cat([positions, steps.expand(3, -1)], 1)
        tail += branch
        segments += [number] * len(branch)
        ends.append(len(tail) - 1 if branch else len(question.tail) - 1)
    return Group(question.prefix, tail, segments, ends or [len(tail) - 1], positions, reference, tuple(rows))


class Prefill:
    """Hidden states at the ends of answers, for models of the Qwen2-VL, Qwen2.5-VL and Qwen3-VL families.

    model: a ForConditionalGeneration. max_tokens: of one forward of the language model, padding included, and of one
    of the vision tower, after merging; a longer row goes alone. counts: of "images" encoded, "prefixes" prefilled,
    "rows" and "forwards" of the language model and "vision_forwards", added to.
    """

    def __init__(self, model: Any, images: ImageSpec, max_tokens: int, counts: Counter[str]) -> None:
        self.model, self.images, self.max_tokens, self.counts = model, images, max_tokens, counts
        config = model.config
        text = config.text_config
        layers = set(getattr(text, "layer_types", None) or ["full_attention"])
        if config.model_type not in FAMILIES or layers != {"full_attention"}:
            raise ValueError(
                f"model: expected one of {FAMILIES} with full attention, got {config.model_type!r} with {layers}; "
                "other families are judged through their processor: pass it as images="
            )
        if text._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(
                "model: answer branches need masks, which attn_implementation 'sdpa' and 'eager' take, got "
                f"{text._attn_implementation!r}; the vision tower may keep it: "
                f"attn_implementation={{'text_config': 'sdpa', 'vision_config': {text._attn_implementation!r}}}"
            )
        vision = config.vision_config
        expected = (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
        got = (images.patch_size, images.temporal_patch_size, images.merge_size)
        if got != expected:
            raise ValueError(
                f"images: expected the model's patch, temporal patch and merge size {expected}, got {got}; "
                "use ImageSpec.from_pretrained with the model's folder"
            )
        self.eager = text._attn_implementation == "eager"
        batch_vision_attention(model.model.visual)

    def answers(self, rows: Rows, groups: Sequence[Group], *, keep: bool = False, copies: int = 1) -> Iterator[Answers]:
        """Of every row of `groups`, in as few forwards as the budget allows. keep: with keys and values, of which
        `copies` are to fit into the budget as well."""
        uses = Counter(group.reference for group in groups)
        encoded: dict[int, list[Tensor]] = {}
        ordered = sorted(groups, key=lambda group: (bool(group.prefix), len(group.prefix), len(group.tail)))
        while ordered:
            batch = self._take(ordered)
            new = [r for r in dict.fromkeys(group.reference for group in batch) if r not in encoded]
            encoded |= dict(zip(new, self._encode([rows.references[r] for r in new]), strict=True))
            cache = self._prefix(batch, encoded) if batch[0].prefix else None
            members = [(i, row) for i, group in enumerate(batch) for row in group.rows]
            length = max(len(group.tail) + (len(group.prefix) if keep else 0) for group in batch) * copies
            step = max(1, self.max_tokens // length)
            for start in range(0, len(members), step):
                yield self._tails(rows, batch, members[start : start + step], encoded, cache, keep)
            uses.subtract(group.reference for group in batch)
            encoded = {r: features for r, features in encoded.items() if uses[r]}

    def _take(self, groups: list[Group]) -> list[Group]:
        """The groups of the next batch, taken off the list: those whose prefixes and whose tails fit into a forward."""
        batch: list[Group] = []
        while groups and (not batch or bool(groups[0].prefix) == bool(batch[0].prefix)):
            grown = [*batch, groups[0]]
            prefixes = len(grown) * max(len(group.prefix) for group in grown)
            tails = sum(len(group.rows) for group in grown) * max(len(group.tail) for group in grown)
            if batch and max(prefixes, tails) > self.max_tokens:
                break
            batch.append(groups.pop(0))
        return batch

    def _encode(self, images: Sequence[Tensor]) -> list[list[Tensor]]:
        """Of each image [3, H, W], [tokens, H] of what stands for it and of every deepstack layer."""
        features: list[list[Tensor]] = [[]] * len(images)
        sizes = [self.images.size(*image.shape[-2:]) for image in images]
        for size in dict.fromkeys(sizes):
            index = [i for i, other in enumerate(sizes) if other == size]
            step = max(1, self.max_tokens // self.images.tokens(*size))
            for start in range(0, len(index), step):
                part = index[start : start + step]
                pixels, grid = prepare_images([images[i] for i in part], self.images, dtype=self.model.dtype)
                for i, own in zip(part, encode_images(self.model, pixels, grid), strict=True):
                    features[i] = own
                self.counts.update(images=len(part), vision_forwards=1)
        return features

    def _forward(
        self,
        tokens: Sequence[Sequence[int]],
        positions: Sequence[Tensor],
        features: Sequence[list[Tensor]],
        mask: Tensor | None,
        cache: Any,
    ) -> Tensor:
        """last_hidden_state [B, L, H] of B rows, padded on the right; features: of their images, in order."""
        device = self.model.device
        ids = pad(tokens, self._padding, device)
        longest = ids.shape[1]
        places = torch.stack([torch.nn.functional.pad(p, (0, longest - p.shape[1])) for p in positions], 1)
        self.counts.update(forwards=1)
        if mask is not None and self.eager:
            mask = additive(mask, self.model.dtype)
        return hidden_states(self.model, ids, features, places.to(device), mask, cache)

    @property
    def _padding(self) -> int:
        """Any token that is no image: padding comes last, and nothing looks back at it."""
        return 0 if self.model.config.image_token_id else 1

    def _prefix(self, groups: list[Group], encoded: dict[int, list[Tensor]]) -> DynamicCache:
        cache = DynamicCache()
        self._forward(
            [group.prefix for group in groups],
            [group.positions[:, : len(group.prefix)] for group in groups],
            [encoded[group.reference] for group in groups],
            None,  # causal: what is right of a token, padding included, is not seen
            cache,
        )
        self.counts.update(prefixes=len(groups))
        return cache

    def _tails(
        self,
        rows: Rows,
        groups: list[Group],
        members: list[tuple[int, int]],
        encoded: dict[int, list[Tensor]],
        prefixes: DynamicCache | None,
        keep: bool,
    ) -> Answers:
        device = self.model.device
        own = [groups[i] for i, _ in members]
        index = torch.tensor([i for i, _ in members], device=device)
        lengths = torch.tensor([len(group.prefix) for group in own], device=device)
        segments = pad([group.segments for group in own], -1, device)
        past = max(len(group.prefix) for group in groups)
        edits = iter(self._encode([image for _, row in members for image in rows.edits[row]]))
        features = []
        for group in own:
            features += ([] if group.prefix else [encoded[group.reference]]) + [next(edits) for _ in range(rows.turns)]
        linear = prefixes is None and all(max(group.segments) <= 1 for group in own)
        cache: Any = DynamicCache() if keep else None
        if prefixes is not None:
            cache = repeat_cache(prefixes, index) if keep else SharedPrefix(prefixes, index)
        hidden = self._forward(
            [group.tail for group in own],
            [group.positions[:, len(group.prefix) :] for group in own],
            features,
            None if linear else branch_mask(segments, lengths, past),
            cache,
        )
        self.counts.update(rows=len(members))
        ends = torch.tensor([group.ends for group in own], device=device)
        return Answers(
            [row for _, row in members],
            hidden[torch.arange(len(members), device=device)[:, None], ends],
            cache if keep else None,
            torch.cat([torch.arange(past, device=device) < lengths[:, None], segments >= 0], 1),
            torch.tensor([int(group.positions.max()) + 1 for group in own], device=device),
        )
