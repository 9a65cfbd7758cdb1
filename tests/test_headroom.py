"""Micro-batches that fit: chosen by the estimate, halved once when memory runs out in the first iteration."""

import weakref

import pytest
import torch
from tiny_train import tiny_config, tiny_trainer

from mtedit_fast.training.headroom import WITHOUT_GPU, FirstIteration, choose_micro_batch, settle_micro_batch
from mtedit_fast.training.memory import estimate

OPEN = ("rollout.micro_batch=null",)


def exhaust(trainer, limit):
    """A device that holds `limit` samples per forward."""
    sizes = []

    def refuse(_, args, kwargs):
        sizes.append(len(kwargs["hidden_states"]))
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.model.register_forward_pre_hook(refuse, with_kwargs=True)
    return sizes


def test_the_largest_halving_of_the_batch_whose_estimate_fits(tmp_path):
    config = tiny_config(tmp_path, [*OPEN, "rollout.groups_per_iteration=6", "rollout.group_size=4"])
    sizes = [24, 12, 6, 3, 1]
    needs = {
        size: estimate(config.model_copy(update={"rollout": config.rollout.model_copy(update={"micro_batch": size})}))
        for size in sizes
    }
    totals = [needs[size].total for size in sizes]
    assert totals == sorted(totals, reverse=True)
    for size, total in zip(sizes, totals, strict=True):
        assert choose_micro_batch(config, total) == size
    assert choose_micro_batch(config, totals[0] - 1) == 12
    assert choose_micro_batch(config, totals[0], gpus=2) == 12  # a GPU's share
    with pytest.raises(ValueError, match=r"rollout.micro_batch: expected a sample to fit 0.0 GiB.*checkpointing"):
        choose_micro_batch(config, totals[-1] // 2)


def test_an_open_micro_batch_is_settled_by_the_trainer(tmp_path):
    config = tiny_config(tmp_path, [*OPEN])
    assert settle_micro_batch(config, torch.device("cpu")).rollout.micro_batch == WITHOUT_GPU
    assert config.rollout.micro_batch is None
    closed = tiny_config(tmp_path, ["rollout.micro_batch=5"])
    assert settle_micro_batch(closed, torch.device("cpu")) is closed
    settled = tiny_trainer(tmp_path, *OPEN).config.rollout.micro_batch
    assert settled == WITHOUT_GPU or torch.cuda.is_available()


@pytest.mark.parametrize("options", [(), ("objective.name=nft", "optimizer.forward_rows=8")])
def test_out_of_memory_in_the_first_iteration_halves_the_batch_once(tmp_path, options):
    common = ("rollout.micro_batch=8", "run.iterations=2", *options)
    trainer = tiny_trainer(tmp_path, *common, f"run.output_dir={tmp_path / 'halved'}")
    sizes = exhaust(trainer, 4)
    with pytest.warns(UserWarning, match="out of memory in the first iteration: rollout.micro_batch is now 4 instead"):
        metrics = list(trainer.fit())
    assert (sizes[0], max(sizes[1:])) == (8, 4)
    fewer = [option.replace("=8", "=4") for option in common]
    expected = list(tiny_trainer(tmp_path, *fewer, f"run.output_dir={tmp_path / 'four'}").fit())
    for each, other in zip(metrics, expected, strict=True):
        same = {name: value for name, value in each.items() if not name.startswith(("seconds/", "memory/"))}
        assert same == {name: other[name] for name in same}


def test_the_second_attempt_begins_without_what_the_first_one_held(tmp_path):
    trainer = tiny_trainer(tmp_path, "rollout.micro_batch=8", "run.iterations=1")
    held = []

    def step():
        mine = torch.zeros(1)
        if not held:
            held.append(weakref.ref(mine))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"held": float(held[0]() is not None), "micro_batch": float(trainer.config.rollout.micro_batch)}

    with pytest.warns(UserWarning, match="is now 4 instead of 8"):
        metrics = FirstIteration(trainer, gpus=1)(step)
    assert (metrics["held"], metrics["micro_batch"]) == (0, 4)


def test_out_of_memory_that_halving_does_not_help_names_the_need(tmp_path):
    trainer = tiny_trainer(tmp_path, "rollout.micro_batch=8", "run.iterations=1")
    exhaust(trainer, 3)
    expected = r"with rollout.micro_batch 4 after halving it; estimated need [\d.]+ GiB .*Lower.*CUDA out of memory"
    with pytest.warns(UserWarning, match="is now 4"), pytest.raises(torch.OutOfMemoryError, match=expected):
        list(trainer.fit())
    alone = tiny_trainer(tmp_path, "rollout.micro_batch=1", "run.iterations=1")
    exhaust(alone, 0)
    with pytest.raises(torch.OutOfMemoryError, match=r"with rollout.micro_batch 1; estimated need"):
        list(alone.fit())


def test_a_model_of_unknown_sizes_trains_and_its_need_is_unknown(tmp_path):
    """Somebody's own checkpoint on the hub: there is nothing to estimate from."""
    trainer = tiny_trainer(tmp_path, "rollout.micro_batch=1", "run.iterations=1")
    trainer.config.model.path = "somebody/their-kontext"
    if torch.cuda.is_available():
        (metrics,) = trainer.fit()
        assert metrics["memory/peak_gib"] > 0
        assert "memory/estimated_gib" not in metrics
    exhaust(trainer, 0)
    first = FirstIteration(trainer, gpus=1)
    with pytest.raises(torch.OutOfMemoryError, match=r"with rollout.micro_batch 1; estimated need unknown. Lower"):
        first(trainer.step)


def test_out_of_memory_later_is_not_hidden(tmp_path):
    trainer = tiny_trainer(tmp_path, "rollout.micro_batch=8", "run.iterations=2")
    steps = trainer.fit()
    next(steps)
    exhaust(trainer, 4)
    with pytest.raises(torch.OutOfMemoryError, match=r"with rollout.micro_batch 8; estimated need"):
        next(steps)
