"""The playground's world, instructions, oracle, rewards and data."""

import itertools
import json
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from mtedit_fast.training.playground import data, instructions, oracle, rewards, world
from mtedit_fast.training.playground.instructions import TYPES, Edit, apply, is_satisfied, parse, phrase, sample_chains
from mtedit_fast.training.playground.world import BACKGROUND_NAMES, CELLS, CLASS_OF, CLASSES, OBJECTS, read, render
from mtedit_fast.training.rewards import RewardBatch

EMPTY = [0] * CELLS


@pytest.fixture(scope="module")
def chains():
    return sample_chains(Random("test"), 300)


def draw(scenes: torch.Tensor) -> torch.Tensor:
    flat = scenes.reshape(-1, CELLS + 1)
    return render(flat[:, :CELLS], flat[:, CELLS]).view(*scenes.shape[:-1], 3, 64, 64)


# --- world


def test_every_class_on_every_background_and_cell_is_read_back():
    cells = torch.arange(CLASSES)[:, None].repeat(len(BACKGROUND_NAMES), CELLS)
    background = torch.arange(len(BACKGROUND_NAMES)).repeat_interleave(CLASSES)
    images = (render(cells, background) * 255).round() / 255
    assert images.min() >= 0
    assert images.max() <= 1
    scenes = read(images)
    assert torch.equal(scenes.background, background)
    assert torch.equal(scenes.cells, cells)
    assert scenes.error.max() < 1e-5


def test_reading_a_mixed_scene_matches_a_plain_search_in_fp64():
    generator = torch.Generator().manual_seed(1)
    cells, background = world.random_scenes(5, generator)
    images = render(cells, background) + 0.05 * torch.randn(5, 3, 64, 64, generator=generator)
    scenes = read(images)
    table = world.templates().double()
    for n in range(5):
        assert scenes.background[n] == background[n]
        for cell in range(CELLS):
            r, c = divmod(cell, 4)
            patch = images[n, :, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16].double()
            error = (table[background[n], cell] - patch).square().mean((1, 2, 3))
            assert scenes.cells[n, cell] == error.argmin()
            assert abs(scenes.error[n, cell].item() - error.min().item()) < 1e-5


def test_templates_are_far_enough_apart_to_survive_the_vae():
    for table in world.templates().double().flatten(0, 1).flatten(2):
        distance = torch.cdist(table, table).square() / table.shape[-1]
        assert distance[~torch.eye(CLASSES, dtype=torch.bool)].min() > 0.005


@pytest.mark.parametrize("fill", [0.5, float("nan")])
def test_what_is_no_object_is_unreadable(fill):
    image = draw(torch.tensor([[*EMPTY, 2]]))
    image[:, :, 16:32, 32:48] = fill if fill != 0.5 else torch.rand(3, 16, 16)
    cells = read(image).cells[0]
    assert cells[6] == world.UNREADABLE
    assert (cells == 0).sum() == 15 or fill != fill  # a NaN makes every background's error NaN


def test_render_and_read_name_the_wrong_argument():
    with pytest.raises(ValueError, match=r"cells and background must be \[N, 16\] and \[N\]"):
        render(torch.zeros(2, 15, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"cells must hold classes in \[0, 79\), got -1..0"):
        render(torch.tensor([[-1] + [0] * 15]), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"background must hold classes in \[0, 6\)"):
        render(torch.zeros(1, 16, dtype=torch.long), torch.tensor([6]))
    with pytest.raises(ValueError, match=r"images must be \[N, 3, 64, 64\]"):
        read(torch.zeros(1, 3, 32, 32))


def test_empty_batches():
    scenes = read(render(torch.zeros(0, 16, dtype=torch.long), torch.zeros(0, dtype=torch.long)))
    assert scenes.cells.shape == (0, 16)
    assert scenes.background.shape == (0,)


# --- instructions


def fulfilling(before: list[int], text: str) -> set[tuple[int, ...]]:
    """Every scene that fulfils an instruction, enumerated from its words; independent of the code under test."""
    at = {i: str(OBJECTS[c - 1]) for i, c in enumerate(before[:CELLS]) if c > 0}
    free = [i for i in range(CELLS) if before[i] == 0]
    words = text.split()

    def scene(positions: dict[int, str], background: int = before[CELLS]) -> tuple[int, ...]:
        kept = {i: -1 for i in range(CELLS) if before[i] < 0}
        named = {i: CLASS_OF[name] for i, name in positions.items()}
        return (*[{**kept, **named}.get(i, 0) for i in range(CELLS)], background)

    def beside(reference: str, side: str) -> list[int]:
        anchors = [i for i, name in at.items() if name == reference]
        if len(anchors) != 1:
            return []
        y, x = divmod(anchors[0], 4)
        dy, dx = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}[side]
        return [(y + dy) * 4 + x + dx] if 0 <= y + dy < 4 and 0 <= x + dx < 4 else []

    if words[0] == "Add":
        new, rest = " ".join(words[1:4]), words[4:]
        spots = free if not rest else [i for i in beside(" ".join(rest[-3:]), rest[0]) if i in free]
        return {scene({**at, i: new}) for i in spots}
    if "background" in words:
        return {scene(at, BACKGROUND_NAMES.index(words[-1]))}
    start = 1 if words[0] in ("Remove", "Replace") else 4
    target = " ".join(words[start : start + 3])
    where = [i for i, name in at.items() if name == target]
    others = {i: name for i, name in at.items() if name != target}
    if not where:
        return set()
    if words[0] == "Remove":
        return {scene(others)}
    if words[0] == "Replace":
        return {scene({**others, **dict.fromkeys(where, " ".join(words[5:8]))})}
    if "count" in words:
        n = int(words[-1])
        if n <= len(where):
            sets = itertools.combinations(where, n)
        else:
            sets = ((*where, *extra) for extra in itertools.combinations(free, n - len(where)))
        return {scene({**others, **dict.fromkeys(chosen, target)}) for chosen in sets}
    if "position" in words:
        spots = beside(" ".join(words[-3:]), words[8]) if len(where) == 1 else []
        return {scene({**others, i: target}) for i in spots if i in free or [i] == where}
    old = target.split()
    swap = {"material": 0, "text": 2, "color": 0 if "sign" in old else 1}[words[2]]
    return {scene({**others, **dict.fromkeys(where, " ".join([*old[:swap], words[-1], *old[swap + 1 :]]))})}


def test_chains_cover_all_types_and_lead_where_their_instructions_say(chains):
    seen = set()
    for scenes, texts, kinds in zip(chains.scenes.tolist(), chains.instructions, chains.types, strict=True):
        for before, after, text, kind in zip(scenes, scenes[1:], texts, kinds, strict=False):
            edit = parse(text)
            assert phrase(edit) == text
            assert edit.type == kind
            assert len(text.split()) < 16
            assert tuple(after) in fulfilling(before, text)
            assert after != before
            seen.add(kind)
        fallbacks = kinds.count("subject_add")
        assert len(set(kinds)) >= len(kinds) - max(fallbacks - 1, 0)
    assert seen == set(TYPES)


def test_success_agrees_with_enumeration_on_right_and_wrong_outcomes(chains):
    rng, checked = Random(3), {True: 0, False: 0}
    for scenes, texts in zip(chains.scenes.tolist(), chains.instructions, strict=True):
        for before, after, text in zip(scenes, scenes[1:], texts, strict=False):
            allowed = fulfilling(before, text)
            shuffled = apply(before, parse(text), rng.sample(range(CELLS), CELLS))
            wrong = list(after)
            wrong[rng.randrange(CELLS)] = rng.randrange(-1, CLASSES)
            swapped = list(after)
            i, j = rng.sample(range(CELLS), 2)
            swapped[i], swapped[j] = swapped[j], swapped[i]
            other = rng.choice(sorted(allowed))
            recolored = [*after[:CELLS], (after[CELLS] + 1) % 6]
            for outcome in (after, before, shuffled, wrong, swapped, list(other), recolored):
                expected = tuple(outcome) in allowed and min(outcome) >= 0
                assert is_satisfied(before, parse(text), outcome) == expected, (text, before, outcome)
                checked[expected] += 1
    assert min(checked.values()) > 500


def test_success_on_scenes_that_earlier_mistakes_made(chains):
    """Instructions of one chain put to the scenes of another: mostly impossible, sometimes not."""
    rng = Random(4)
    scenes = chains.scenes.flatten(0, 1).tolist()
    texts = [text for row in chains.instructions for text in row]
    possible = 0
    for _ in range(2000):
        before, text = list(rng.choice(scenes)), rng.choice(texts)
        if rng.random() < 0.5:  # make sure that the objects named are there, sometimes twice
            for c in {parse(text).target, parse(text).reference} - {0}:
                for cell in rng.sample(range(CELLS), rng.randint(1, 2)):
                    before[cell] = c
        allowed, after = fulfilling(before, text), apply(before, parse(text))
        assert (after is None) == (not allowed), (text, before)
        if after is not None:
            possible += 1
            assert tuple(after) in allowed
            assert is_satisfied(before, parse(text), after)
        assert is_satisfied(before, parse(text), before) == (tuple(before) in allowed)
    assert 100 < possible < 1900


def test_unreadable_cells_are_never_success():
    before = [0] * 15 + [-1, 0]
    edit = Edit("background_change", background=3)
    assert not is_satisfied(before, edit, [0] * 15 + [-1, 3])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Remove",
        "Remove rubber red hexagon",
        "Add rubber red circle near rubber blue circle",
        "Change the background to pink",
        "Change the count of rubber red circle to 9",
        "Change the material of red sign A to wood",
        "Change the text of rubber red circle to A",
        "Change the color of rubber red circle to pink",
        "remove rubber red circle",
    ],
)
def test_text_outside_the_grammar_is_refused_by_name(text):
    with pytest.raises(ValueError, match="playground's"):
        parse(text)


def test_refused_arguments_of_chains_and_phrases():
    with pytest.raises(ValueError, match=r"turns must be in 1\.\.9"):
        sample_chains(Random(0), 1, turns=10)
    with pytest.raises(ValueError, match=r"edit\.type must be one of"):
        phrase(Edit("paint"))


def test_chains_of_other_lengths_and_densities():
    longest = sample_chains(Random(0), 20, turns=9, objects=(1, 1))
    assert longest.scenes.shape == (20, 10, 17)
    assert ((longest.scenes[:, 0, :CELLS] > 0).sum(1) == 1).all()
    again = sample_chains(Random(0), 20, turns=9, objects=(1, 1))
    assert torch.equal(longest.scenes, again.scenes)
    assert longest.instructions == again.instructions


def test_background_change_takes_added_objects_off_the_list():
    pools = instructions._Pools([1, 2] + [0] * 14 + [0])
    pools.update(Edit("subject_add", new=5))
    pools.update(Edit("color_alter", target=1, new=7))
    assert set(pools.available) == {2, 5, 7}
    pools.update(Edit("background_change", background=2))
    assert set(pools.available) == {2, 7}
    pools.update(Edit("subject_remove", target=2))
    assert set(pools.available) == {7}


# --- oracle


def test_oracle_on_perfect_chains_and_on_a_broken_turn(chains):
    scenes, texts = chains.scenes[:40], chains.instructions[:40]
    images = draw(scenes)
    result = oracle.evaluate(images[:, 0], images[:, 1:], texts)
    assert result.marginal.all()
    assert result.image.all()
    assert (result.cell_accuracy == 1).all()
    assert result.types == chains.types[:40]
    broken = images.clone()
    broken[:, 2] = broken[:, 1]  # turn 2 does nothing
    result = oracle.evaluate(broken[:, 0], broken[:, 1:], texts)
    assert result.marginal[:, 0].all()
    assert not result.marginal[:, 1].any()
    assert not result.image[:, 1:].any()
    # doing nothing keeps all that should stay, and gets nothing of what should change
    assert torch.allclose(result.cell_accuracy[:, 1], torch.tensor(0.5))


def test_cell_accuracy_by_hand():
    before = [CLASS_OF["rubber red circle"], *[0] * 15, 1]
    text = "Change the count of rubber red circle to 3"
    a = before[0]
    assert oracle.cell_accuracy(before, text, [a, a, *[0] * 14, 1]) == pytest.approx(0.5 * 1 / 2 + 0.5)
    assert oracle.cell_accuracy(before, text, [a, a, a, a, *[0] * 12, 1]) == pytest.approx(0.5 + 0.5 * 14 / 15)
    assert oracle.cell_accuracy(before, "Remove wood red circle", before) == pytest.approx(0.5)
    assert oracle.cell_accuracy(before, "Remove wood red circle", [0] * 16 + [1]) == pytest.approx(0.5 * 16 / 17)
    assert oracle.cell_accuracy(before, "Change the background to sunset", [*before[:16], 3]) == 1


def test_oracle_refuses_batches_that_do_not_fit():
    images = torch.zeros(2, 3, 64, 64)
    with pytest.raises(ValueError, match="references and edits must be"):
        oracle.evaluate(images, images, [["Remove red sign A"]] * 2)
    with pytest.raises(ValueError, match="instructions must hold 1 texts for each of 2 chains"):
        oracle.evaluate(images, images[:, None], [["Remove red sign A"]])


# --- rewards


def batch_of(images: torch.Tensor, texts: list[list[str]]) -> RewardBatch:
    return RewardBatch(images[:, 0], images[:, 1:], texts, [{} for _ in texts])


def test_oracle_score_is_its_formula_and_bounded(chains):
    images = draw(chains.scenes[:30])
    noisy = images.clone()
    noisy[::2, 1:] = torch.rand(15, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    batch = batch_of(noisy, chains.instructions[:30])
    result = oracle.evaluate(batch.references, batch.edits, batch.instructions)
    score = rewards.oracle_score(batch)
    assert score.shape == (30, 3)
    assert torch.allclose(score, 1 + 4 * (0.7 * result.marginal + 0.3 * result.cell_accuracy))
    assert torch.equal(rewards.exact_success(batch), result.marginal)
    assert (score[1::2] == 5).all()
    assert (score[::2] < 5).all()
    first, second = (rewards.oracle_score(batch, noise=1.0, seed=s) for s in (1, 2))
    assert not torch.equal(first, second)
    assert torch.equal(first, rewards.oracle_score(batch, noise=1.0, seed=1))
    assert first.min() >= 1
    assert first.max() <= 5
    with pytest.raises(ValueError, match="noise must be >= 0"):
        rewards.oracle_score(batch, noise=-1.0)


def test_content_consistency_of_kept_changed_and_undefined_content(chains):
    texts = [
        ["Remove rubber red circle", "Change the color of wood blue square to red", "Change the background to gray"]
    ]
    red, blue, sign = (CLASS_OF[n] for n in ("rubber red circle", "wood blue square", "green sign X"))
    start = [red, 0, blue, 0, 0, sign, *[0] * 10, 0]
    scenes = [start]
    for text in texts[0]:
        scenes.append(apply(scenes[-1], parse(text)))
    kept = draw(torch.tensor([scenes]))
    lost = kept.clone()
    lost[:, 1:, :, 16:32, 16:32] = kept[:, :1, :, 48:, 48:]  # the sign nobody asked to touch is gone
    both = torch.cat([kept, lost])
    score = rewards.content_consistency(batch_of(both, texts * 2))
    assert score.shape == (2, 3)
    assert ((score[:, :2] >= 0) & (score[:, :2] <= 1)).all()
    assert torch.isnan(score[:, 2]).all()  # the background was changed
    assert (score[0, :2] > 0.98).all()
    assert (score[1, :2] < score[0, :2] - 0.05).all()
    # every object named: no unchanged object is left
    lonely = draw(torch.tensor([[[red, *[0] * 15, 0], [0] * 17]]))
    assert torch.isnan(rewards.content_consistency(batch_of(lonely, [["Remove rubber red circle"]]))).all()


def test_group_members_share_a_reference(chains):
    """A group scored together equals its members scored alone."""
    images = draw(chains.scenes[:2])
    group = torch.cat([images[:1], images[:1], images[1:2]])
    group[1, 1:] = group[1, 1:].flip(-1)
    texts = [chains.instructions[0]] * 2 + [chains.instructions[1]]
    together = rewards.content_consistency(batch_of(group, texts))
    alone = torch.cat([rewards.content_consistency(batch_of(group[i : i + 1], texts[i : i + 1])) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5, equal_nan=True)


# --- data


def test_dataset_on_disk_is_the_split_and_splits_differ(tmp_path):
    path = data.write_dataset(tmp_path, 30, seed=2, split="heldout", turns=2)
    assert path == tmp_path / "heldout.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    expected = data.split_chains(30, 2, "heldout", 2)
    assert [r["instructions"] for r in records] == expected.instructions
    assert [r["types"] for r in records] == expected.types
    assert len({r["id"] for r in records}) == 30
    pixels = np.stack([np.asarray(Image.open(tmp_path / r["image"])) for r in records])
    scenes = read(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
    assert torch.equal(scenes.cells, expected.scenes[:, 0, :CELLS])
    starts = {tuple(s) for split, seed in (("train", 0), ("train", 1)) for s in split_starts(split, seed)}
    assert not starts & set(split_starts("heldout", 0))
    with pytest.raises(ValueError, match="split must be one of train, heldout, got 'build'"):
        data.write_dataset(tmp_path, 1, split="build")


def split_starts(split: str, seed: int) -> list[tuple[int, ...]]:
    return [tuple(s) for s in data.split_chains(200, seed, split).scenes[:, 0].tolist()]
