"""EdiVal on the playground: the oracle as detector and VLM, and evaluation against the oracle's own reading."""

import math
import random
from collections import Counter

import pytest
import torch

from mtedit_fast.edival import checks
from mtedit_fast.edival.backends import Question
from mtedit_fast.edival.benchmark import BenchmarkRow, read_benchmark
from mtedit_fast.edival.checks import CheckConfig, Turn, check_turns
from mtedit_fast.edival.consistency import ContentConsistency
from mtedit_fast.edival.decompose import decompose
from mtedit_fast.edival.evaluate import EvaluationConfig, evaluate
from mtedit_fast.edival.images import ImageFolder
from mtedit_fast.edival.instructions import TYPES, instruct
from mtedit_fast.edival.pools import Pools
from mtedit_fast.edival.report import read_scores
from mtedit_fast.training.playground import oracle
from mtedit_fast.training.playground.data import split_chains
from mtedit_fast.training.playground.edival import (
    PlaygroundOracle,
    classes_named,
    instruct_scene,
    signs_differ,
    to_edit,
)
from mtedit_fast.training.playground.edival_demo import run_edival
from mtedit_fast.training.playground.instructions import apply, is_satisfied, parse, phrase
from mtedit_fast.training.playground.models import load_dino
from mtedit_fast.training.playground.world import (
    BACKGROUND_NAMES,
    CELL,
    CELLS,
    CLASS_OF,
    CLASSES,
    GRID,
    OBJECTS,
    random_scenes,
    render,
)

JUDGE = PlaygroundOracle()


def draw(states):
    states = torch.tensor(states)
    return (render(states[:, :CELLS], states[:, CELLS]) * 255).round() / 255


def scenes(n, seed=0):
    return [s for s in split_chains(2 * n, seed, "heldout").scenes[:, 0].tolist() if signs_differ(s)][:n]


def named(name):
    """Classes of a full name, or of a sign by its colour."""
    color, _, shape = name.partition(" ")
    if shape == "sign":
        return {i for i, o in enumerate(OBJECTS, 1) if (o.shape, o.color) == ("sign", color)}
    return {CLASS_OF[name]}


def follows(before, after, edit):
    """The nine checks, said over cells: what the generic checks must come to when detector and VLM are exact."""
    where = lambda state, name: [i for i in range(CELLS) if state[i] in named(name)]  # noqa: E731
    row = lambda i: divmod(i, GRID)  # noqa: E731
    beyond = {
        "left": lambda i, j: row(j)[1] < row(i)[1],
        "right": lambda i, j: row(j)[1] > row(i)[1],
        "above": lambda i, j: row(j)[0] < row(i)[0],
        "below": lambda i, j: row(j)[0] > row(i)[0],
    }
    match edit.type:
        case "subject_add":
            new, old = where(after, edit.value), where(before, edit.value)
            placed = edit.reference is None or any(
                beyond[edit.position](i, j) for i in where(before, edit.reference) for j in new
            )
            return len(new) > len(old) and placed
        case "subject_remove":
            was, is_ = where(before, edit.target), where(after, edit.target)
            return bool(was) and (not is_ or is_[0] != was[0])
        case "subject_replace":
            was, new = where(before, edit.target), where(after, edit.value)
            fewer = len(where(after, edit.target)) < len(was)
            return fewer and len(new) > len(where(before, edit.value)) and bool(set(was) & set(new))
        case "color_alter" | "material_alter":
            was = where(before, edit.target)
            part = "color" if edit.type == "color_alter" else "detail"
            return (
                bool(was) and after[was[0]] == CLASS_OF[str(OBJECTS[before[was[0]] - 1]._replace(**{part: edit.value}))]
            )
        case "text_change":
            was = where(before, edit.target)
            shown = OBJECTS[after[was[0]] - 1] if was and after[was[0]] > 0 else None
            return bool(where(after, edit.target)) and (shown and shown[::2]) == ("sign", edit.value)
        case "position_change":
            kept = all(len(where(before, n)) == len(where(after, n)) for n in (edit.target, edit.reference))
            target, reference = where(after, edit.target), where(after, edit.reference)
            return kept and bool(target and reference) and beyond[edit.position](reference[0], target[0])
        case "count_change":
            return bool(where(before, edit.target)) and len(where(after, edit.target)) == int(edit.value)
        case "background_change":
            kept = all(where(after, name) for name in edit.remain)
            return kept and BACKGROUND_NAMES[after[CELLS]] == edit.value
    raise AssertionError(edit.type)


def verdicts(befores, afters, instructions, **config):
    images = [*draw(befores), *draw(afters)]
    turns = [Turn(i, len(befores) + i, instruction) for i, instruction in enumerate(instructions)]
    return [v.value for v in check_turns(images, turns, JUDGE, JUDGE, CheckConfig(**config))]


def drawn_edits(n, seed):
    """(before, instruction, edit, exact result) of n scenes' first turns."""
    listed = []
    for i, state in enumerate(scenes(n, seed)):
        objects = decompose(draw([state]), JUDGE, JUDGE).scenes[0]
        (instruction, _), edit = (part[0] for part in instruct_scene(state, objects, turns=1, seed=i))
        listed.append((state, instruction, edit, apply(state, edit)))
    return listed


EDITS = drawn_edits(150, 1)


def test_names():
    assert classes_named("Rubber RED circle") == {CLASS_OF["rubber red circle"]}
    assert len(classes_named("red circle")) == 3
    assert classes_named("red sign") == {CLASS_OF[f"red sign {letter}"] for letter in "ALTX"}
    assert classes_named("red sign t") == {CLASS_OF["red sign T"]}
    for unknown in ("red", "dog", "", "red dog", "pink circle"):
        assert classes_named(unknown) == frozenset()


def test_detector_finds_cells():
    cells, background = random_scenes(40, torch.Generator().manual_seed(0))
    images = render(cells, background)
    queries = [str(OBJECTS[i % len(OBJECTS)]) for i in range(20)] + ["red circle. blue sign"] * 20
    for state, query, found in zip(cells.tolist(), queries, JUDGE.detect(images, queries), strict=True):
        wanted = set().union(*(classes_named(name) for name in query.split(". ")))
        hits = [i for i in range(CELLS) if state[i] in wanted]
        boxes = [[(i % 4) / 4 + 0.125, (i // 4) / 4 + 0.125, 0.25, 0.25] for i in hits]
        assert found.boxes.tolist() == boxes
        assert found.scores.tolist() == [1.0] * len(hits)
        for i, name in zip(hits, found.phrases, strict=True):
            assert state[i] in classes_named(name)
    assert not len(JUDGE.detect(images[:1], ["red circle"], box_threshold=1.0)[0].boxes)
    with pytest.raises(ValueError, match=r"queries must have one entry per image \(2\), got 1"):
        JUDGE.detect(images[:2], ["red circle"])


def test_decompose_reads_the_scene():
    states = scenes(60)
    result = decompose(draw(states), JUDGE, JUDGE)
    assert result.failures == []
    for state, objects in zip(states, result.scenes, strict=True):
        assert {to_name(o): o.count for o in objects.values()} == Counter(
            str(OBJECTS[c - 1]) for c in state[:CELLS] if c
        )
        assert all(len(o.boxes) == o.count for o in objects.values())


def to_name(one):
    return f"{one.color} sign {one.text}" if one.object == "sign" else one.key


def test_questions_the_oracle_has_no_answer_to():
    image = draw(scenes(1))[0]
    for images, text in (
        ([image], "How many people are there?"),
        ([], "List the objects as JSON"),
        ([image[:, :20, :20]], checks.READ),
        ([image, image], "List the objects as JSON"),
        ([image[:, :CELL, :CELL]], checks.BACKGROUND.format(background="white")),
        ([image, image], checks.ALTERED.format(instruction="Turn it upside down")),
    ):
        assert JUDGE.ask([Question(images, text)]) == ["I cannot tell."]


def test_a_cell_reads_as_it_does_in_its_image():
    cells, background = random_scenes(60, torch.Generator().manual_seed(3))
    images = render(cells, background) + 0.05 * torch.randn(60, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    whole = torch.tensor(oracle.read_states(images))[:, :CELLS]
    crops = images.unfold(2, CELL, CELL).unfold(3, CELL, CELL).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, CELL, CELL)
    letters = JUDGE.ask([Question([crop], checks.READ) for crop in crops])
    expected = [OBJECTS[c - 1].detail if c > 0 and OBJECTS[c - 1].shape == "sign" else "" for c in whole.flatten()]
    assert letters == expected
    assert len(set(letters)) == 5


def test_chains_can_be_carried_out_and_use_all_types():
    kinds = Counter()
    for i, state in enumerate(scenes(120, 5)):
        chain, edits = instruct_scene(state, decompose(draw([state]), JUDGE, JUDGE).scenes[0], seed=i)
        for edit in edits:
            assert parse(phrase(edit)) == edit  # in the editor's grammar
            after = apply(state, edit)
            assert after not in (None, state)
            state = after
        assert len({instruction.type for instruction, _ in chain} - {"subject_add"}) >= 1
        kinds.update(instruction.type for instruction, _ in chain)
    assert set(kinds) == set(TYPES)


def test_scenes_whose_names_are_ambiguous_are_refused():
    state = [CLASS_OF["red sign A"], CLASS_OF["red sign T"], *[0] * 14, 0]
    assert not signs_differ(state)
    objects = decompose(draw([state]), JUDGE, JUDGE).scenes[0]
    with pytest.raises(ValueError, match=r"at most one sign of a colour, got \['red sign'\]"):
        instruct_scene(state, objects)
    other = decompose(draw(scenes(1)), JUDGE, JUDGE).scenes[0]
    with pytest.raises(ValueError, match="objects must be the scene's"):
        instruct_scene([0] * 17, other)


def test_what_the_world_cannot_do_has_no_edit():
    state = [CLASS_OF["wood red circle"], CLASS_OF["blue sign A"], *[0] * 14, 0]
    pools = Pools.start(decompose(draw([state]), JUDGE, JUDGE).scenes[0])
    impossible = [
        instruct("subject_add", value="dog"),
        instruct("subject_replace", target="blue sign", value="dog"),
        instruct("color_alter", target="blue sign", value="pink"),
        instruct("material_alter", target="blue sign", value="wood"),
        instruct("text_change", target="wood red circle", value="A", old_text="B"),
        instruct("text_change", value="A"),
        instruct("count_change", target="blue sign", value="9"),
        instruct("background_change", value="kitchen"),
    ]
    assert [to_edit(instruction, pools) for instruction in impossible] == [None] * len(impossible)
    replaced = pools.apply(instruct("subject_replace", target="blue sign", value="wood green square"))
    recolored = instruct("color_alter", target="wood green square", value="blue")
    assert to_edit(recolored, replaced) is None  # EdiVal would then call it by a name this world has not


@pytest.mark.parametrize("kind", TYPES)
def test_exact_edits_succeed(kind):
    listed = [(b, i, a) for b, i, _, a in EDITS if i.type == kind]
    assert len(listed) >= 5
    befores, instructions, afters = zip(*listed, strict=True)
    for config in ({}, {"replace": "paper"}, {"attributes": "whole"}):
        assert all(verdicts(befores, afters, instructions, **config))
    untouched = verdicts(befores, befores, instructions)
    # a position that holds already counts as done, by EdiVal's definition
    holds = [follows(b, b, i) for b, i in zip(befores, instructions, strict=True)]
    assert untouched == holds
    assert any(holds) == (kind == "position_change")


@pytest.mark.parametrize("kind", TYPES)
def test_agreement_with_the_oracle_on_spoiled_edits(kind):
    """Verdicts equal the symbolic reading everywhere; the oracle's success implies them, and needs more."""
    rng = random.Random(kind)
    befores, afters, listed = [], [], []
    for before, instruction, edit, exact in EDITS:
        if instruction.type != kind:
            continue
        for _ in range(12):
            after = list(rng.choice([before, exact, exact]))
            for _ in range(rng.choice([0, 0, 1, 2, 4])):
                # cells change to what the edit is about more often than to anything else
                about = [0, edit.target, edit.new, edit.reference, rng.randrange(CLASSES)]
                after[rng.randrange(CELLS)] = rng.choice(about)
            if rng.random() < 0.1:
                after[CELLS] = rng.randrange(len(BACKGROUND_NAMES))
            befores.append(before)
            afters.append(after)
            listed.append((instruction, edit))
    given = verdicts(befores, afters, [instruction for instruction, _ in listed])
    expected = [follows(b, a, i) for b, a, (i, _) in zip(befores, afters, listed, strict=True)]
    assert given == expected
    strict = [is_satisfied(b, e, a) for b, a, (_, e) in zip(befores, afters, listed, strict=True)]
    assert not any(s and not v for s, v in zip(strict, given, strict=True))
    outcomes = Counter(zip(given, strict, strict=True))
    assert all(outcomes[pair] for pair in ((True, True), (True, False), (False, False))), outcomes


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edival")
    return folder, run_edival(folder, chains=30, seed=4)


def test_agreement_on_rollouts(demo):
    """On images of the playground's editor: every verdict, image success, and the oracle beside them."""
    folder, report = demo
    rows, errors = read_benchmark(folder / "bench.csv")
    assert errors == []
    images = ImageFolder(folder / "images", size=None)
    success = []
    for row, scores in zip(rows, read_scores(folder / "verdicts.jsonl"), strict=True):
        states = oracle.read_states(images[row.image_index])
        own = [follows(b, a, i) for b, a, i in zip(states[:-1], states[1:], row.instructions, strict=True)]
        assert scores.verdicts == own, (row, scores.reasons)
        success.append([all(own[: t + 1]) for t in range(3)])
    shares = torch.tensor(success).float().mean(0).tolist()
    given = [line["instruction_following"]["mean"] for line in report["per_turn"]]
    assert given == pytest.approx(shares, abs=1e-6)
    assert all(strict <= share + 1e-6 for strict, share in zip(report["oracle"], given, strict=True))
    assert 0 < given[2] < given[0] <= 1
    for line in report["per_turn"]:
        cc = line["consistency"]["mean"]
        assert line["overall"]["mean"] == pytest.approx(math.sqrt(line["instruction_following"]["mean"] * cc), abs=1e-9)
        assert line["consistency"]["low"] <= cc <= line["consistency"]["high"]


def test_exact_chains_score_full_marks():
    rows, images = [], {}
    for i, state in enumerate(scenes(6, 9)):
        chain, edits = instruct_scene(state, decompose(draw([state]), JUDGE, JUDGE).scenes[0], seed=i)
        states = [state]
        for edit in edits:
            states.append(apply(states[-1], edit))
        rows.append(BenchmarkRow.of(str(i), chain))
        images[str(i)] = draw(states)
    report = evaluate(
        rows,
        images,
        detector=JUDGE,
        vlm=JUDGE,
        consistency=ContentConsistency(load_dino()),
        config=EvaluationConfig(chains_per_step=4),
    )
    for line in report["per_turn"]:
        assert line["instruction_following"]["mean"] == line["marginal"]["mean"] == 1
        assert line["object"]["mean"] == pytest.approx(1, abs=1e-5)  # the same pixels in both crops
    assert report["undefined"]["verdicts"] == 0
