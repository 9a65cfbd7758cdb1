"""Content consistency as a reward: against EdiVal's evaluation of the same chains, from a command's data to scores."""

import json
from dataclasses import replace

import pytest
import torch
from test_cli import run
from tiny_detector import tiny_detector, tiny_tokenizer

from mtedit_fast.edival.benchmark import read_benchmark
from mtedit_fast.edival.consistency import ContentConsistency
from mtedit_fast.edival.evaluate import EvaluationConfig, score_chains
from mtedit_fast.edival.grounding import GroundingDetector
from mtedit_fast.edival.images import save_image
from mtedit_fast.training import consistency_reward
from mtedit_fast.training.config import RewardConfig
from mtedit_fast.training.consistency_reward import content_consistency
from mtedit_fast.training.data import EditChains
from mtedit_fast.training.playground import oracle
from mtedit_fast.training.playground.data import split_chains
from mtedit_fast.training.playground.edival import PlaygroundOracle, signs_differ
from mtedit_fast.training.playground.models import WEIGHTS, load_dino
from mtedit_fast.training.playground.world import CELLS, render
from mtedit_fast.training.rewards import RewardBatch, check_rewards, score

DINO = str(WEIGHTS / "dino")
PATH = "mtedit_fast.training.consistency_reward:content_consistency"
SCENES, MEMBERS, TURNS = 6, 2, 3


class CountingOracle(PlaygroundOracle):
    """The playground's detector, which counts the images it was shown."""

    def __init__(self):
        self.seen = 0

    def detect(self, images, queries, **options):
        self.seen += len(images)
        return super().detect(images, queries, **options)


def edited(references):
    """[B, K, 3, 64, 64]: some cells become others, so that scores differ; no two members alike."""
    rng = torch.Generator().manual_seed(3)
    states = torch.tensor(oracle.read_states(references))
    chains = []
    for _ in range(TURNS):
        where = torch.randint(0, CELLS, (len(states), 1), generator=rng)
        states = states.scatter(1, where, torch.randint(0, 9, where.shape, generator=rng))
        chains.append(render(states[:, :CELLS], states[:, CELLS]))
    return torch.stack(chains, 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Objects, instructions and training data of scenes, all by the commands: (chains.jsonl, the benchmark's rows)."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    scenes = [s for s in split_chains(20, 5).scenes[:, 0].tolist() if signs_differ(s)][:SCENES]
    states = torch.tensor(scenes)
    for i, image in enumerate(render(states[:, :CELLS], states[:, CELLS])):
        save_image(image, folder / "images" / f"{i}_0.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(patch, "edival", "decompose", "images", "--playground", "--output", "objects.jsonl") == 0
        for output in ("bench.csv", "data/chains.jsonl"):
            assert run(patch, "edival", "instruct", "objects.jsonl", "--playground", "--output", output) == 0
    rows, errors = read_benchmark(folder / "bench.csv")
    assert not errors
    assert len(rows) == SCENES
    return folder / "data" / "chains.jsonl", rows


@pytest.fixture(scope="module")
def batch(data):
    """Two trajectories of every chain."""
    chains = EditChains(data[0], turns=TURNS, resolution=64)
    records = [chains[i] for i in range(SCENES) for _ in range(MEMBERS)]
    references = torch.stack([record.image for record in records])
    edits = edited(references)
    return RewardBatch(references, edits, [r.instructions for r in records], [r.fields() for r in records])


def by_evaluation(batch, rows, detector, threshold=0.35):
    """The same trajectories as chains of EdiVal's evaluation, [B, K]."""
    images = torch.cat([batch.references[:, None], batch.edits], 1)
    chains = [(rows[i // MEMBERS], chain) for i, chain in enumerate(images)]
    config = EvaluationConfig(object_threshold=threshold)
    scores = score_chains(chains, detector, PlaygroundOracle(), ContentConsistency(load_dino()), config=config)
    nan = float("nan")
    return torch.tensor([[nan if c is None else c for c in one.consistency] for one in scores]).clamp(0, 1)


def test_lines_hold_what_the_benchmark_holds(data):
    path, rows = data
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line, row in zip(lines, rows, strict=True):
        assert (line["id"], line["instructions"]) == (row.image_index, row.raw_instructions)
        assert line["types"] == [instruction.type for instruction in row.instructions]
        assert (path.parent / line["image"]).is_file()
        assert (line["unchanged_objects"], line["all_objects"]) == (row.unchanged, row.all_objects)
        assert line["bg_consistency"] == row.background_consistent


def test_scores_are_those_of_the_evaluation(batch, data, monkeypatch):
    detector = CountingOracle()
    monkeypatch.setattr(consistency_reward, "load_detector", lambda path, device: detector)
    given = content_consistency(batch, dino=DINO, dtype="fp32")
    assert given.shape == (SCENES * MEMBERS, TURNS)
    assert given.dtype == torch.float32
    seen = detector.seen
    expected = by_evaluation(batch, data[1], detector)
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-6, equal_nan=True)
    defined = given[~given.isnan()]
    assert len(defined) > len(given)
    assert defined.std() > 0.01
    assert given.isnan().any()  # the background was to change
    # objects of a reference are asked for once for all members, those of an edit once
    queries = sum(len({*map(tuple, r["unchanged_objects"]), *map(tuple, r["all_objects"])} - {()})
                  for r in batch.records[::MEMBERS])  # fmt: skip
    assert seen == queries + SCENES * MEMBERS * TURNS


def test_a_checkpoint_finds_the_objects(batch, data, tmp_path):
    """Grounding DINO from a folder, named in the configuration; names that its vocabulary has."""
    detector = GroundingDetector(tiny_detector("grounding-dino"), tiny_tokenizer())
    detector.model.save_pretrained(tmp_path)
    detector.tokenizer.save_pretrained(tmp_path)
    two = slice(0, 2 * MEMBERS)
    names = {"unchanged_objects": [["red circle"], [], ["sign"]], "all_objects": [["red circle", "sign"]] * 3}
    records = [record | names | {"bg_consistency": [True] * 3} for record in batch.records[two]]
    small = RewardBatch(batch.references[two], batch.edits[two], batch.instructions[two], records)
    options = {"detector": str(tmp_path), "dino": DINO, "dtype": "fp32", "threshold": 0.6, "detector_batch": 5}
    given = score([RewardConfig(name="kept", path=PATH, options=options)], small)["kept"]
    row = {"unchanged": names["unchanged_objects"], "all_objects": names["all_objects"]}
    rows = [replace(one, **row, background_consistent=[True] * 3) for one in data[1][:2]]
    torch.testing.assert_close(given, by_evaluation(small, rows, detector, 0.6), rtol=0, atol=1e-5, equal_nan=True)
    assert given[:, 1].isnan().all()  # nothing was left unchanged
    assert not given[:, [0, 2]].isnan().all()
    half = content_consistency(small, **{**options, "dtype": "bf16"})
    assert (half - given).abs()[~given.isnan()].max() < 0.02


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("unchanged_objects", None, r"record '0': unchanged_objects: expected a list of names for each of 3 turns"),
        ("all_objects", [["a"]] * 2, r"all_objects: expected a list of names for each of 3 turns, got \[\['a'\]"),
        ("bg_consistency", ["yes"] * 3, r"bg_consistency: expected true or false for each of 3 turns"),
    ],
)
def test_a_record_without_objects(batch, key, value, message):
    records = [batch.records[0] | {key: value}, *batch.records[1:]]
    with pytest.raises(ValueError, match=message):
        content_consistency(RewardBatch(batch.references, batch.edits, batch.instructions, records))
    with pytest.raises(ValueError, match=r"record 0: unchanged_objects: .*mtedit-fast edival instruct"):
        content_consistency(RewardBatch(batch.references, batch.edits, batch.instructions))


def test_options_are_checked(batch, monkeypatch):
    monkeypatch.setattr(consistency_reward, "load_detector", lambda path, device: PlaygroundOracle())
    with pytest.raises(ValueError, match=r"options.dtype: expected one of fp32, bf16, got 'int8'"):
        content_consistency(batch, dino=DINO, dtype="int8")
    check_rewards([RewardConfig(name="kept", path=PATH, options={"dino": DINO})])
    with pytest.raises(
        ValueError, match=r"reward 'kept' .*options: got an unexpected keyword argument 'dinno'; it tak"
    ):
        check_rewards([RewardConfig(name="kept", path=PATH, options={"dinno": DINO})])
