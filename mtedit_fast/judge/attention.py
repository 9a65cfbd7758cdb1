"""Attention of judges: images batched in the vision tower, answer branches over one prefix in the language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, Cache, DynamicCache, DynamicLayer

__all__ = ["VARLEN", "SharedPrefix", "additive", "batch_vision_attention", "branch_mask", "pad", "repeat_cache"]

VARLEN = "sdpa_varlen_as_flash"


def sdpa_varlen(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each of many packed sequences, as flash attention's variable-length form, by PyTorch's SDPA.

    query, key, value: [1, heads, tokens, D]; cu_seq_lens_q: [sequences + 1], where they begin and end; max_length_q:
    the longest. Returns [1, tokens, heads, D]. Sequences of one length are a batch, so one call serves all images of
    one size, and no value is waited for; others are batched length by length.
    """
    tokens, count = query.shape[2], len(cu_seq_lens_q) - 1
    if tokens == count * max_length_q:
        q, k, v = (t[0].unflatten(1, (count, max_length_q)).transpose(0, 1) for t in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        return out.transpose(1, 2).flatten(0, 1)[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    pieces = [t[0].split(lengths, 1) for t in (query, key, value)]
    results: list[Tensor] = [query] * count
    for length in dict.fromkeys(lengths):
        index = [i for i, other in enumerate(lengths) if other == length]
        q, k, v = (torch.stack([piece[i] for i in index]) for piece in pieces)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling).transpose(1, 2)
        for i, own in zip(index, out, strict=True):
            results[i] = own
    return torch.cat(results)[None], None


# Vision towers of transformers hand all images to an implementation in one call if its name says flash, and call any
# other one image at a time.
AttentionInterface.register(VARLEN, sdpa_varlen)


def batch_vision_attention(vision: Any) -> None:
    """Has a vision tower that runs on "sdpa" attend to all images of a call at once. Others are left as they are."""
    if vision.config._attn_implementation == "sdpa":
        vision.config._attn_implementation = VARLEN


def branch_mask(segments: Tensor, prefix: Tensor, length: int) -> Tensor:
    """[B, 1, Q, length + Q] bool, who sees whom: the own prefix and, of what came before, the trunk and the own branch.

    segments: [B, Q], 0 in the trunk, 1 … in the branches, −1 in the padding. prefix: [B] tokens of the row's prefix,
    padded to `length` on the right.
    """
    tokens = segments.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=segments.device).tril()
    own = causal & ((segments[:, None] == 0) | (segments[:, None] == segments[:, :, None]))
    before = torch.arange(length, device=prefix.device) < prefix[:, None]
    return torch.cat([before[:, None].expand(-1, tokens, -1), own], 2)[:, None]


class SharedPrefixLayer(DynamicLayer):
    """Keys and values of prefixes, given to the rows that begin with them; those of the rows are not kept."""

    def __init__(self, keys: Tensor, values: Tensor, index: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.index = keys, values, index
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        pairs = ((self.keys, key_states), (self.values, value_states))
        keys, values = (torch.cat([_rows(old, self.index), new], 2) for old, new in pairs)
        return keys, values


class SharedPrefix(Cache):
    """A cache for one forward of rows over the prefixes in `cache`; index: [rows] int64, the prefix of each.

    A layer's keys and values are repeated when it is reached, so that repeated ones are in memory for one layer only.
    """

    def __init__(self, cache: Cache, index: Tensor) -> None:
        super().__init__(layers=[SharedPrefixLayer(layer.keys, layer.values, index) for layer in cache.layers])


def repeat_cache(cache: Cache, index: Tensor) -> DynamicCache:
    """A cache of its own for each row: index [rows] int64, the prefix of each in `cache`."""
    repeated = DynamicCache()
    for number, layer in enumerate(cache.layers):
        repeated.update(_rows(layer.keys, index).contiguous(), _rows(layer.values, index).contiguous(), number)
    return repeated


def _rows(states: Tensor, index: Tensor) -> Tensor:
    return states.expand(len(index), -1, -1, -1) if len(states) == 1 else states[index]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask for eager attention, which adds it to the logits."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def pad(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> Tensor:
    """[B, longest] int64, padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], device=device).view(-1, longest)
