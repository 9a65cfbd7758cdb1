"""Equal tensors recognised by what is in them, so that nobody has to keep track of where they came from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def content_keys(tensors: Tensor) -> list[tuple[int, int]]:
    """A 128-bit key per row of `tensors` [n, ...], of its bits and their places; one read from the device.

    Each 64-bit word, salted with its place, goes through splitmix64's finalizer (Steele et al. 2014); the two halves
    are the sum of the results, and the sum of these finalized once more.
    """
    rows = len(tensors)
    if tensors.is_meta:  # shapes without content: each row differs from the others
        return [(row, 0) for row in range(rows)]
    bits = tensors.detach().reshape(rows, -1).contiguous().view(torch.uint8)
    words = F.pad(bits, (0, -bits.shape[1] % 8)).view(torch.int64)
    place = torch.arange(1, words.shape[1] + 1, device=words.device)
    mixed = _finalize(words ^ _finalize(place * _signed(0x9E3779B97F4A7C15)))
    first, second = torch.stack([mixed.sum(1), _finalize(mixed).sum(1)]).tolist()
    return list(zip(first, second, strict=True))


def _finalize(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; that of int64 is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
