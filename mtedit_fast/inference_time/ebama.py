"""EBAMA's energies: how well the attention maps of objects and of the words that describe them agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtedit_fast.inference_time.phrases import LocatedPhrase, PromptToken, Span

__all__ = ["DISTANCES", "Targets", "alignment_energy", "ebama_loss", "make_targets", "object_intensity"]

DISTANCES = ("cosine", "symmetric_kl", "total_variation")
SHARPNESS = 100.0  # of the maps in the softmax over tokens
KERNEL_SIGMA = 0.5  # of the 3×3 Gaussian


class Targets(NamedTuple):
    """Which of T attention maps stand for what, of P phrases with up to M modifiers in each of B prompts.

    A row of weights averages the maps of a word's tokens. Where a prompt has fewer phrases or modifiers, its first noun
    or the noun itself stands in, and does not count.
    """

    columns: Tensor  # [B, T] int64: the text tokens whose maps are wanted
    tokens: Tensor  # [B, T] bool: those that compete in the softmax over tokens; others only fill the row
    nouns: Tensor  # [B, P, T] fp32
    counts: Tensor  # [B, P] bool
    modifiers: Tensor  # [B, P, M, T] fp32
    describes: Tensor  # [B, P, M] bool
    others: Tensor  # [B, P, T] bool: tokens of the prompt outside the phrase

    def to(self, device: torch.device | str) -> Targets:
        return Targets(*(tensor.to(device) for tensor in self))


def make_targets(
    tokens: Sequence[Sequence[PromptToken]],
    phrases: Sequence[Sequence[LocatedPhrase]],
    competing: Sequence[int] = (),
) -> Targets:
    """Targets on the CPU, of every prompt's tokens and phrases.

    Args:
        competing: text tokens besides the prompt's own, the same in all prompts, that take part in the softmax.

    Raises:
        ValueError: a word of a phrase has no token.
    """
    batch = len(tokens)
    rows = [list(dict.fromkeys([*(token.place for token in own), *competing])) for own in tokens]
    width, most = max(map(len, rows)), max(map(len, phrases))
    words = max((len(phrase.modifiers) for own in phrases for phrase in own), default=0)
    columns = torch.tensor([row + [row[0]] * (width - len(row)) for row in rows])
    competes = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    nouns, modifiers = torch.zeros(batch, most, width), torch.zeros(batch, most, words, width)
    counts = torch.zeros(batch, most, dtype=torch.bool)
    describes, others = (torch.zeros(batch, most, size, dtype=torch.bool) for size in (words, width))
    for i, (own, located) in enumerate(zip(tokens, phrases, strict=True)):
        for p, phrase in enumerate(located):
            nouns[i, p], counts[i, p] = _average(own, phrase.noun, width), True
            modifiers[i, p] = nouns[i, p]
            within = nouns[i, p] > 0
            for m, span in enumerate(phrase.modifiers):
                modifiers[i, p, m], describes[i, p, m] = _average(own, span, width), True
                within |= modifiers[i, p, m] > 0
            others[i, p, : len(own)] = ~within[: len(own)]
        nouns[i, len(located) :] = nouns[i, 0]
        modifiers[i, len(located) :] = nouns[i, 0]
    return Targets(columns, competes, nouns, counts, modifiers, describes, others)


def _average(tokens: Sequence[PromptToken], word: Span, width: int) -> Tensor:
    """[T] weights, equal over the tokens that hold the word's characters."""
    found = [place for place, token in enumerate(tokens) if max(token.span[0], word[0]) < min(token.span[1], word[1])]
    if not found:
        raise ValueError(f"phrases: expected words that the tokenizer keeps, characters {word} of a prompt are dropped")
    weights = torch.zeros(width)
    weights[found] = 1 / len(found)
    return weights


def ebama_loss(maps: Tensor, targets: Targets, *, distance: str = "cosine", intensity: float = 0.5) -> Tensor:
    """L_s + intensity·L_t of every image (EBAMA, arXiv 2404.07389).

    L_s draws the map of each noun towards those of its modifiers and away from those of all other words: the gradient
    of the log-likelihood of attributes given objects under an energy-based model, with the other words as negative
    samples. L_t keeps the objects themselves visible.

    Images do not depend on each other: the gradient of the sum is that of each. Arithmetic is fp32 (fp64 for fp64).

    Args:
        maps: [B, T, h, w], attention of every image token to the text tokens `targets.columns`, averaged over layers
            and heads; h, w ≥ 2.
        distance: of two maps p, q that sum to 1. "cosine": 1 − p·q/(‖p‖‖q‖); "symmetric_kl": ½Σ(p − q)(ln p − ln q);
            "total_variation": ½Σ|p − q|.
        intensity: weight of L_t, ≥ 0; 0.5 in the paper.

    Returns:
        [B].

    Raises:
        ValueError: an unknown distance, maps of another shape, or a negative weight.
    """
    if not intensity >= 0:
        raise ValueError(f"intensity: expected a weight >= 0, got {intensity}; 0 leaves L_t out")
    energy = alignment_energy(maps, targets, distance=distance)
    return energy + intensity * object_intensity(maps, targets) if intensity else energy


def alignment_energy(maps: Tensor, targets: Targets, *, distance: str = "cosine") -> Tensor:
    """L_s = Σ_nouns [Σ_modifiers d(A_m, A_n) − mean over the other words' tokens o of d(A_n, A_o)], [B].

    The public code subtracts a noun's negatives once per modifier, and so leaves nouns without modifiers out; here each
    noun has them once. Maps of a word's tokens are averaged, where the public code takes the largest distance.
    """
    maps, targets = _checked(maps, targets)
    flat = maps.flatten(2)
    flat = flat / flat.sum(-1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    nouns = targets.nouns @ flat  # [B, P, h·w]
    modifiers = torch.einsum("bpmt,btx->bpmx", targets.modifiers, flat)
    closeness = (_distance(modifiers, nouns[:, :, None], distance) * targets.describes).sum((1, 2))
    apart = _distance(nouns[:, :, None], flat[:, None], distance)  # [B, P, T]
    negatives = (apart * targets.others).sum(-1) / targets.others.sum(-1).clamp_min(1)
    return closeness - (negatives * targets.counts).sum(1)


def object_intensity(maps: Tensor, targets: Targets) -> Tensor:
    """L_t = −Σ_nouns max over pixels of a 3×3 Gaussian, σ = 0.5, of softmax over tokens of 100·maps, [B].

    As in Attend-and-Excite (arXiv 2301.13826), reflected at the borders; its code divides the exponent by 4σ², not 2σ².
    """
    maps, targets = _checked(maps, targets)
    logits = (SHARPNESS * maps).masked_fill(~targets.tokens[:, :, None, None], -torch.inf)
    nouns = torch.einsum("bpt,bthw->bphw", targets.nouns, logits.softmax(1))
    height, width = nouns.shape[-2:]
    offsets = torch.arange(-1, 2, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-(offsets**2) / (2 * KERNEL_SIGMA**2))
    kernel = torch.outer(kernel, kernel)
    padded = F.pad(nouns, (1, 1, 1, 1), mode="reflect").view(-1, 1, height + 2, width + 2)
    smooth = F.conv2d(padded, (kernel / kernel.sum())[None, None]).view_as(nouns)
    return -(smooth.amax((2, 3)) * targets.counts).sum(1)


def _checked(maps: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
    """In the dtype of the arithmetic."""
    expected = tuple(targets.columns.shape)
    if maps.ndim != 4 or maps.shape[:2] != expected or min(maps.shape[2:]) < 2:
        raise ValueError(
            f"maps: expected [B, T, h, w] = [{expected[0]}, {expected[1]}, h, w] with h, w >= 2, got {list(maps.shape)}"
        )
    dtype = torch.promote_types(maps.dtype, torch.float32)
    nouns, modifiers = targets.nouns.to(dtype), targets.modifiers.to(dtype)
    return maps.to(dtype), targets._replace(nouns=nouns, modifiers=modifiers)


def _distance(p: Tensor, q: Tensor, kind: str) -> Tensor:
    """Of distributions over the last dimension."""
    if kind == "cosine":
        tiny = torch.finfo(p.dtype).tiny
        return 1 - (F.normalize(p, dim=-1, eps=tiny) * F.normalize(q, dim=-1, eps=tiny)).sum(-1)
    if kind == "symmetric_kl":
        least = torch.finfo(p.dtype).eps  # as torch.distributions.Categorical
        return (p - q).mul(p.clamp_min(least).log() - q.clamp_min(least).log()).sum(-1) / 2
    if kind == "total_variation":
        return (p - q).abs().sum(-1) / 2
    raise ValueError(f"distance: expected one of {', '.join(DISTANCES)}, got {kind!r}")
