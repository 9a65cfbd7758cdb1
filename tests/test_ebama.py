"""The energies against loops over words, written from the formulas alone."""

import math

import pytest
import torch

from mtedit_fast.inference_time.ebama import (
    DISTANCES,
    Targets,
    alignment_energy,
    ebama_loss,
    make_targets,
    object_intensity,
)
from mtedit_fast.inference_time.phrases import Phrase, PromptToken, locate

PROMPTS = ["a big red car beside a blue bench", "the dog", "red apple, green pear and ripe plum"]
PHRASES = [
    [Phrase("car", ("big", "red")), Phrase("bench", ("blue",))],
    [Phrase("dog")],
    [Phrase("pear", ("green",)), Phrase("apple", ("red",)), Phrase("plum", ("ripe",))],
]
SPLIT = "bench", "apple"  # words of two tokens


def tokens_of(prompt, first=1):
    """A token per word or two, whole words being numbered from `first`."""
    tokens = []
    for word in prompt.replace(",", " ,").split():
        start = prompt.index(word, tokens[-1].span[1] if tokens else 0)
        half = start + 2 if word in SPLIT else start
        for span in [(start, half), (half, start + len(word))]:
            if span[0] < span[1]:
                tokens.append(PromptToken(first + len(tokens), span))
    return tokens


def targets_of(rows=range(3), competing=()):
    located = [locate(PROMPTS[row], PHRASES[row]) for row in rows]
    return make_targets([tokens_of(PROMPTS[row]) for row in rows], located, competing)


def maps_of(targets, size=(5, 4), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return 0.02 + torch.rand(*targets.columns.shape, *size, generator=generator, dtype=dtype) ** 2 / 4


def distance_of(first, second, kind):
    p, q = [x / sum(first) for x in first], [x / sum(second) for x in second]
    pairs = list(zip(p, q, strict=True))
    if kind == "cosine":
        norms = math.sqrt(sum(x * x for x in p)) * math.sqrt(sum(x * x for x in q))
        return 1 - sum(x * y for x, y in pairs) / norms
    if kind == "symmetric_kl":
        return sum(x * math.log(x / y) + y * math.log(y / x) for x, y in pairs) / 2
    return sum(abs(x - y) for x, y in pairs) / 2


def direct_loss(maps, prompt, phrases, kind, intensity, competing=0):
    """L_s + intensity·L_t of one image, in plain Python; maps [tokens of the prompt + competing, h, w]."""
    tokens, (height, width) = tokens_of(prompt), maps.shape[1:]
    grids = maps.tolist()
    flat = [[value for row in grid for value in row] for grid in grids]

    def places(word):
        start = prompt.index(word)
        inside = range(start, start + len(word))
        return [i for i, token in enumerate(tokens) if token.span[0] in inside]

    def word_map(word):
        own = [[x / sum(flat[i]) for x in flat[i]] for i in places(word)]
        return [sum(column) / len(own) for column in zip(*own, strict=True)]

    energy, total = 0.0, 0.0
    for phrase in phrases:
        noun = word_map(phrase.noun)
        energy += sum(distance_of(word_map(modifier), noun, kind) for modifier in phrase.modifiers)
        subtree = [i for word in (phrase.noun, *phrase.modifiers) for i in places(word)]
        outside = [i for i in range(len(tokens)) if i not in subtree]
        if outside:
            energy -= sum(distance_of(noun, flat[i], kind) for i in outside) / len(outside)

        def probability(y, x, phrase=phrase):
            y, x = (abs(i) if i < size else 2 * size - 2 - i for i, size in ((y, height), (x, width)))
            raised = [math.exp(100 * grids[i][y][x]) for i in range(len(tokens) + competing)]
            own = places(phrase.noun)
            return sum(raised[i] for i in own) / len(own) / sum(raised)

        offsets = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        weights = [math.exp(-(dy * dy + dx * dx) / (2 * 0.5**2)) for dy, dx in offsets]
        total -= max(
            sum(w * probability(y + dy, x + dx) for w, (dy, dx) in zip(weights, offsets, strict=True)) / sum(weights)
            for y in range(height)
            for x in range(width)
        )
    return energy + intensity * total


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("intensity", [0.0, 0.5, 2.0])
def test_the_loss_of_each_image_is_that_of_the_direct_loops(kind, intensity):
    targets = targets_of()
    maps = maps_of(targets)
    losses = ebama_loss(maps, targets, distance=kind, intensity=intensity)
    for row, (prompt, phrases) in enumerate(zip(PROMPTS, PHRASES, strict=True)):
        own = maps[row, : len(tokens_of(prompt))]
        expected = direct_loss(own, prompt, phrases, kind, intensity)
        assert losses[row].item() == pytest.approx(expected, abs=1e-12)


def test_the_defaults_are_cosine_and_one_half():
    targets = targets_of()
    maps = maps_of(targets)
    expected = ebama_loss(maps, targets, distance="cosine", intensity=0.5)
    assert torch.equal(ebama_loss(maps, targets), expected)
    torch.testing.assert_close(expected, alignment_energy(maps, targets) + 0.5 * object_intensity(maps, targets))


@pytest.mark.parametrize("kind", DISTANCES)
def test_the_gradient_is_that_of_the_direct_loops(kind):
    """Central differences of the loops, at every element of one image's maps."""
    targets = targets_of([0])
    maps = maps_of(targets, size=(2, 3)).requires_grad_()
    (gradient,) = torch.autograd.grad(ebama_loss(maps, targets, distance=kind).sum(), maps)
    step, flat = 1e-6, maps.detach().flatten()
    for element in range(0, flat.numel(), 3):
        values = []
        for sign in (1, -1):
            moved = flat.clone()
            moved[element] += sign * step
            values.append(direct_loss(moved.view_as(maps)[0], PROMPTS[0], PHRASES[0], kind, 0.5))
        expected = (values[0] - values[1]) / (2 * step)
        assert gradient.flatten()[element].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("kind", DISTANCES)
def test_gradcheck(kind):
    targets = targets_of()
    maps = maps_of(targets, size=(2, 2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ebama_loss(x, targets, distance=kind), maps)


@pytest.mark.parametrize("kind", DISTANCES)
def test_a_batch_is_its_images_one_by_one(kind):
    """Rows have other numbers of tokens, phrases and modifiers than the batch they are in."""
    together = targets_of()
    maps = maps_of(together, dtype=torch.float32).requires_grad_()
    losses = ebama_loss(maps, together, distance=kind)
    (gradient,) = torch.autograd.grad(losses.sum(), maps)
    for row, prompt in enumerate(PROMPTS):
        alone, count = targets_of([row]), len(tokens_of(prompt))
        own = maps[row : row + 1, :count].detach().requires_grad_()
        loss = ebama_loss(own, alone, distance=kind)
        torch.testing.assert_close(losses[row : row + 1], loss, rtol=1e-6, atol=1e-6)
        (expected,) = torch.autograd.grad(loss.sum(), own)
        torch.testing.assert_close(gradient[row : row + 1, :count], expected, rtol=1e-5, atol=1e-6)
        assert not gradient[row, count:].any()


def test_tokens_besides_the_prompts_take_part_in_the_softmax_alone():
    competing = range(1, 20)
    targets = targets_of([0], competing)
    count = len(tokens_of(PROMPTS[0]))
    assert targets.columns[0].tolist() == list(competing)
    maps = maps_of(targets)
    expected = direct_loss(maps[0], PROMPTS[0], PHRASES[0], "cosine", 0.5, competing=19 - count)
    assert ebama_loss(maps, targets).item() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(alignment_energy(maps, targets), alignment_energy(maps[:, :count], targets_of([0])))


def test_maps_that_agree_cost_nothing_and_pull_nowhere():
    """A noun with its modifier alone has no negatives."""
    tokens = [PromptToken(0, (0, 3)), PromptToken(1, (4, 7))]
    targets = make_targets([tokens], [locate("red car", [Phrase("car", ("red",))])])
    maps = maps_of(targets)[:, :1].repeat(1, 2, 1, 1).requires_grad_()
    for kind in DISTANCES:
        energy = alignment_energy(maps, targets, distance=kind)
        (gradient,) = torch.autograd.grad(energy.sum(), maps)
        torch.testing.assert_close(energy, torch.zeros(1, dtype=torch.float64), rtol=0, atol=1e-15)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", DISTANCES)
def test_empty_maps_stay_finite(kind):
    targets = targets_of([0])
    maps = torch.zeros(*targets.columns.shape, 3, 3, requires_grad=True)
    loss = ebama_loss(maps, targets, distance=kind)
    (gradient,) = torch.autograd.grad(loss.sum(), maps)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


def test_half_precision_maps_are_computed_in_fp32():
    targets = targets_of()
    maps = maps_of(targets).bfloat16()
    loss = ebama_loss(maps, targets)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, ebama_loss(maps.float(), targets))


def test_targets_move_together():
    targets = targets_of().to("meta")
    assert isinstance(targets, Targets)
    assert {tensor.device.type for tensor in targets} == {"meta"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distance": "euclid"}, r"distance: expected one of cosine, symmetric_kl, total_variation, got 'euclid'"),
        ({"intensity": -1.0}, r"intensity: expected a weight >= 0, got -1.0"),
        ({"intensity": math.nan}, r"intensity: expected a weight >= 0, got nan"),
        ({"size": (1, 4)}, r"maps: expected \[B, T, h, w\] = \[3, \d+, h, w\] with h, w >= 2, got \[3, \d+, 1, 4\]"),
        ({"rows": [0]}, r"maps: expected \[B, T, h, w\] = \[1, 9, h, w\] .*, got \[3,"),
    ],
)
def test_bad_arguments(change, message):
    maps = maps_of(targets_of(), change.pop("size", (5, 4)))
    targets = targets_of(change.pop("rows", range(3)))
    with pytest.raises(ValueError, match=message):
        ebama_loss(maps, targets, **change)


def test_a_word_the_tokenizer_drops():
    located = [locate("red car", [Phrase("car", ("red",))])]
    with pytest.raises(ValueError, match=r"phrases: expected words that the tokenizer keeps, characters \(0, 3\)"):
        make_targets([[PromptToken(0, (4, 7))]], located)
