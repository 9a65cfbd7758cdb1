"""The trainer on several processes: the same batch as on one, unequal shares, sharded weights, another world size."""

from pathlib import Path

import pytest
import torch
import torch.distributed as distributed
from distributed_worker import run_ranks
from tiny_train import tiny_trainer

pytestmark = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="ranks need a GPU each, or none at all")
# Three groups of four: two on the first of two ranks, one on the second.
UNEQUAL = ("rollout.groups_per_iteration=3", "optimizer.lr=0.01", "run.iterations=2")
SETTINGS = {
    "grpo exact": (),
    "grpo compact": ("optimizer.forward_rows=5", "optimizer.updates_per_iteration=2"),
    "nft": (
        "objective.name=nft",
        "rollout.variant=ode",
        "objective.kl_weight=1e-3",
        "objective.old_decay=crd",
        "optimizer.forward_rows=3",
    ),
    "crd": ("objective.name=crd", "objective.old_decay=crd"),
}


def train(rank, runs):
    """[(adapter, averages, metrics per iteration, evaluation)] of each (folder, overrides)."""
    results = []
    for folder, overrides in runs:
        trainer = tiny_trainer(Path(folder), *overrides)
        history = list(trainer.fit())
        evaluation = trainer.evaluate()
        state = {name: value.cpu().numpy() for name, value in trainer.adapter().items()}
        average = [value.cpu().numpy() for value in trainer.adapters.averages]
        results.append((state, average, history, evaluation.rewards["brightness"].cpu().numpy()))
    return results


def close(first, second, tolerance=2e-2):
    """In the sum over all weights: Adam divides by the gradient's size, so where that is next to nothing the order of
    additions decides on the sign of a first step. Another batch differs by tens of per cent."""
    difference = sum(abs(first[name] - second[name]).sum() for name in second)
    return difference <= tolerance * sum(abs(value).sum() for value in second.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder whose data exists, so that ranks do not write it at once."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_trainer(folder)
    return folder


def runs_in(folder, name, settings):
    return [
        (str(folder), (*UNEQUAL, f"run.output_dir={folder / name / key.replace(' ', '_')}", *options))
        for key, options in settings.items()
    ]


@pytest.fixture(scope="module")
def one(folder):
    torch.set_num_threads(1)
    return train(0, runs_in(folder, "one", SETTINGS))


def test_two_processes_equal_one_on_the_same_global_batch(folder, one):
    ranks = run_ranks(2, train, runs_in(folder, "two", SETTINGS), backend=None)
    for setting, (state, _, history, rewards), (state2, average2, history2, rewards2), other in zip(
        SETTINGS, one, *ranks, strict=True
    ):
        assert all((state2[name] == other[0][name]).all() for name in state2), f"{setting}: ranks differ"
        assert all((a == b).all() for a, b in zip(average2, other[1], strict=True))
        assert close(state2, state), setting
        assert history2[0]["reward/brightness"] == pytest.approx(history[0]["reward/brightness"], abs=1e-6)
        assert history2[0]["advantage/kept"] == history[0]["advantage/kept"]
        assert history2[0]["grad_norm"] == pytest.approx(history[0]["grad_norm"], rel=1e-3)
        assert history2[1]["grad_norm"] == pytest.approx(history[1]["grad_norm"], rel=2e-2)
        assert rewards2.shape == rewards.shape == (6, 2)
        assert abs(rewards2 - rewards).max() < 5e-3
    lines = (folder / "two/nft/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2  # written by one of them


def test_saved_on_two_resumes_on_one_and_on_three(folder, one):
    base = (*UNEQUAL, "objective.name=nft", "objective.old_decay=crd", "optimizer.forward_rows=3")
    path = folder / "saved"
    (whole,) = train(0, [(str(folder), (*base, f"run.output_dir={folder / 'whole'}", "run.iterations=3"))])
    run_ranks(2, train, [(str(folder), (*base, f"run.output_dir={path}"))], backend=None)
    three = (*base, f"run.output_dir={path}", "run.iterations=3")
    copy = folder / "copy"
    (copy / "checkpoints").mkdir(parents=True)
    for file in (path / "checkpoints").glob("*.safetensors"):
        (copy / "checkpoints" / file.name).write_bytes(file.read_bytes())
    on_three = run_ranks(3, train, [(str(folder), three)], backend=None)
    (on_one,) = train(0, [(str(folder), (*base, f"run.output_dir={copy}", "run.iterations=3"))])
    assert [line["iteration"] for line in on_three[0][0][2]] == [2]  # it went on, and did not start over
    assert [line["iteration"] for line in on_one[2]] == [2]
    assert close(on_one[0], whole[0])
    assert close(on_three[0][0][0], whole[0])


def test_sharded_weights_train_alike(folder):
    """Compaction leaves the ranks different numbers of rows; padding keeps them in step."""
    options = ("rollout.groups_per_iteration=2", "optimizer.lr=0.01", "run.iterations=2")
    runs = [
        (
            str(folder),
            (*options, *SETTINGS[name], "run.sharding=fsdp2", f"run.output_dir={folder / 'sharded' / name[:3]}"),
        )
        for name in ("nft", "grpo compact")
    ]
    plain = [
        (str(folder), (*options, *SETTINGS[name], f"run.output_dir={folder / 'plain' / name[:3]}"))
        for name in ("nft", "grpo compact")
    ]
    ranks = run_ranks(2, train, runs, backend=None)
    for got, other, want in zip(*ranks, train(0, plain), strict=True):
        assert close(got[0], want[0])
        assert all((got[0][name] == other[0][name]).all() for name in got[0])


def refused(rank, folder, *overrides):
    with pytest.raises(ValueError, match=r"rollout\.groups_per_iteration: .*process") as error:
        tiny_trainer(Path(folder), *overrides)
    distributed.barrier()  # one that left now would reset the connection of one that is still joining
    return str(error.value)


def test_too_few_groups_are_named(folder):
    (message, _) = run_ranks(2, refused, str(folder), "rollout.groups_per_iteration=1", backend=None)
    assert "at least one group per process (2), got 1" in message
    (message, _) = run_ranks(
        2, refused, str(folder), "rollout.groups_per_iteration=3", "run.sharding=fsdp2", backend=None
    )
    assert "expected a multiple of the 2 processes, got 3" in message
