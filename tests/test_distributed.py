"""Shares, gathered rows, rebalancing, summed gradients and dead ranks, in two and three real processes."""

import os
import time

import pytest
import torch
from distributed_worker import run_ranks

from mtedit_fast.training.checkpoint import latest, load_checkpoint, save_checkpoint
from mtedit_fast.training.distributed import (
    agree,
    assert_same,
    check_alive,
    gather_objects,
    gather_rows,
    largest,
    share,
    sum_gradients,
)
from mtedit_fast.training.rebalance import rebalance


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 6, 7, 20])
def test_shares_are_contiguous_and_near_equal(count, world):
    shares = [share(count, rank, world) for rank in range(world)]
    assert [index for part in shares for index in part] == list(range(count))
    sizes = [len(part) for part in shares]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_bad_shares():
    with pytest.raises(ValueError, match="count: expected >= 0, got -1"):
        share(-1, 0, 1)
    with pytest.raises(ValueError, match=r"rank: expected 0 <= rank < world \(2\), got 2"):
        share(3, 2, 2)


def test_one_process_is_its_own_identity():
    rows, text = {"prompt": torch.tensor([0, 0])}, [{"e": torch.ones(1, 2)}]
    assert rebalance(rows, text)[0] is rows
    assert rebalance(rows, text, whole_groups=True)[1] is text
    values = {"a": torch.rand(3, 2)}
    assert gather_rows(values)["a"].equal(values["a"])
    assert gather_rows(values, everywhere=False)["a"].equal(values["a"])
    assert gather_objects(5) == [5]
    weight, unused = (torch.ones(2, requires_grad=True) for _ in range(2))
    (weight * 3).sum().backward()
    sum_gradients([weight, unused])
    assert weight.grad.tolist() == [3, 3]
    assert unused.grad.tolist() == [0, 0]
    assert (largest(4), agree(True), agree(False)) == (4, True, False)
    assert_same(values)
    check_alive(0)


# ---- gathering


def gathers(rank):
    counts = [3, 0, 2]
    rewards = torch.arange(5.0)[:, None] + torch.arange(2) / 10
    names = torch.tensor([True, False, True, True, False])
    start, stop = sum(counts[:rank]), sum(counts[: rank + 1])
    own = {"judge": rewards[start:stop], "valid": names[start:stop], "half": rewards[start:stop].bfloat16()}
    for mine in (own, own if counts[rank] else {}):  # a rank without rows may know no names
        everything = gather_rows(mine)
        assert everything["judge"].equal(rewards)
        assert everything["valid"].equal(names)
        assert everything["half"].equal(rewards.bfloat16())
        first = gather_rows(mine, everywhere=False)
        assert first == {} if rank else first["judge"].equal(rewards)
    assert gather_rows({"judge": torch.empty(0, 2)})["judge"].shape == (0, 2)
    assert gather_rows({}) == {}
    with pytest.raises(ValueError, match=r"same names, dtypes.*on rank 2 .* on rank 0; start every rank"):
        gather_rows({"judge": torch.zeros(1, 3 if rank == 2 else 2)})
    assert largest(10 - rank) == 10
    assert largest(2**40 * rank) == 2**41
    assert agree(rank == 1)
    assert not agree(False)
    assert gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    weights = {"a": torch.arange(4.0), "b": torch.ones(2, 3).T}
    assert_same(weights)
    if rank == 2:
        weights["b"] = weights["b"].clone()
        weights["b"][1, 0] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    with pytest.raises(
        ValueError, match=r"rank 2: b differs from rank 0's \(1 of 2 tensors do\); every rank needs the same"
    ):
        assert_same(weights)
    with pytest.raises(ValueError, match="rank 1: c differs"):
        assert_same({"c": torch.zeros(1)} if rank == 1 else {})


def test_gathering():
    run_ranks(3, gathers)


def test_cpu_tensors_travel_beside_a_group_that_takes_none():
    """As NCCL: the default group has no CPU backend."""
    run_ranks(2, without_cpu_backend, backend="cuda:gloo")


def without_cpu_backend(rank):
    assert gather_rows({"a": torch.tensor([rank])})["a"].tolist() == [0, 1]
    assert largest(rank) == 1
    check_alive(3, 100)
    weight = torch.zeros(3, requires_grad=True)
    weight.grad = torch.full((3,), rank + 1.0)
    sum_gradients([weight])
    assert weight.grad.tolist() == [3, 3, 3]
    rows, _ = rebalance({"prompt": torch.zeros(4 * rank, dtype=torch.int64)}, [{"e": torch.zeros(1, 1)}])
    assert len(rows["prompt"]) == 2


# ---- gradients


def loss(weights, x, y):
    hidden = torch.tanh(x @ weights[0])
    return ((hidden @ weights[1])[:, 0] - y).square().sum()


def problem(dtype):
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(size, generator=generator, dtype=torch.float64) for size in ((5, 7), (7, 1), (3,))]
    x, y = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((11, 5), (11,)))
    return [w.to(dtype).requires_grad_() for w in weights], x.to(dtype), y.to(dtype)


def gradients(rank, world):
    weights, x, y = problem(torch.float64)
    expected = torch.autograd.grad(loss(weights, x, y), weights[:2])
    rows = share(9, rank, world)  # the last two on rank 0 as well: unequal work
    rows = [*rows, 9, 10] if rank == 0 else [*rows]
    loss(weights, x[rows], y[rows]).backward()
    sum_gradients(weights)
    for weight, want in zip(weights, expected, strict=False):
        assert (weight.grad - want).abs().max() <= 1e-14 * want.abs().max()
    assert weights[2].grad.tolist() == [0, 0, 0]  # used by nobody

    # added in rank order, whatever the algorithm below: the bits of a plain loop
    own = torch.randn(1001, generator=torch.Generator().manual_seed(rank))
    everyone = [torch.randn(1001, generator=torch.Generator().manual_seed(r)) for r in range(world)]
    total = everyone[0]
    for other in everyone[1:]:
        total = total + other
    parts = [torch.zeros(1, 13, requires_grad=True), torch.zeros(76, 13).T.requires_grad_()]
    parts[0].grad, parts[1].grad = own[:13].view(1, 13).clone(), own[13:].view(13, 76).clone()
    sum_gradients(parts)
    assert torch.cat([part.grad.flatten() for part in parts]).equal(total)

    only_here = torch.zeros(3, requires_grad=True)
    if rank == world - 1:
        only_here.grad = torch.tensor([1.0, -2.0, 0.5])
    sum_gradients([only_here])
    assert only_here.grad.tolist() == [1, -2, 0.5]
    sum_gradients([])
    mixed = [torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True, dtype=torch.bfloat16)]
    with pytest.raises(
        ValueError, match=r"gradients of one dtype on one device, got .*bfloat16.*make all adapters fp32"
    ):
        sum_gradients(mixed)


@pytest.mark.parametrize("world", [2, 3])
def test_summed_gradients_are_those_of_one_process(world):
    run_ranks(world, gradients, world)


# ---- training over ranks, and resuming on another number of them


def train(rank, folder, start, stop):
    """Adam on a global batch of which rank 0 holds all kept rows until they are rebalanced."""
    weights, _, _ = problem(torch.float64)
    optimizer = torch.optim.AdamW(weights, lr=0.01)
    if start:
        tensors, state = load_checkpoint(latest(folder), "test")
        for index, weight in enumerate(weights):
            weight.data.copy_(tensors[str(index)])
        optimizer.load_state_dict(state["optimizer"])
        assert state["iteration"] == start
    assert_same({str(index): weight for index, weight in enumerate(weights)})
    for iteration in range(start, stop):
        check_alive(iteration, 100)
        generator = torch.Generator().manual_seed(iteration)
        x, y = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((7, 5), (7,)))
        rows = range(7 if rank == 0 else 0)  # the filters dropped every other rank's
        batch = {"x": x[rows], "y": y[rows], "prompt": torch.zeros(len(rows), dtype=torch.int64)}
        batch, _ = rebalance(batch, [{"e": torch.zeros(1, 1)}])
        (loss(weights, batch["x"], batch["y"]) / 7).backward()
        sum_gradients(weights)
        optimizer.step()
        optimizer.zero_grad()
    tensors = {str(index): weight.detach() for index, weight in enumerate(weights)}
    assert_same(tensors)
    if rank == 0:
        save_checkpoint(folder, stop, tensors, {"iteration": stop, "optimizer": optimizer.state_dict()}, "test")
    return [tensor.clone() for tensor in tensors.values()] if rank == 0 else None


def test_a_checkpoint_of_two_ranks_resumes_on_one_and_three(tmp_path):
    whole, *_ = run_ranks(2, train, tmp_path / "whole", 0, 6)
    for world in (1, 2, 3):
        folder = tmp_path / str(world)
        run_ranks(2, train, folder, 0, 3)
        resumed, *_ = run_ranks(world, train, folder, 3, 6)
        for got, want in zip(resumed, whole, strict=True):
            assert (got - want).abs().max() <= 1e-13
            assert world != 2 or got.equal(want)


# ---- dead ranks


def dies(rank, how, folder):
    check_alive(6, 100)
    if rank == 1 and how == "exit":
        os._exit(1)
    if rank == 1:
        while len(list(folder.iterdir())) < 2:  # hangs until both have said so
            time.sleep(0.05)
        return None
    start = time.monotonic()
    try:
        check_alive(7, 100 if how == "exit" else 1.5)
    except RuntimeError as error:
        (folder / str(rank)).touch()
        return str(error), time.monotonic() - start
    return None


@pytest.mark.parametrize("how", ["exit", "hang"])
def test_every_survivor_names_the_lost_rank(how, tmp_path):
    first, _, third = run_ranks(3, dies, how, tmp_path)
    what = "is gone" if how == "exit" else "did not reach iteration 7 within 1.5 s"
    for message, seconds in (first, third):
        assert (
            message
            == f"rank 1 {what}: see its log, then start all ranks again (the run resumes from its last checkpoint)"
        )
        assert seconds < 50  # a closed connection is seen at once, not after the timeout


def dies_in_a_collective(rank, name):
    weight = torch.ones(5, requires_grad=True)
    sum_gradients([weight])
    if rank == 1:
        os._exit(1)
    time.sleep(0.5 * rank)  # the other survivor comes later
    collectives = {"sum": lambda: sum_gradients([weight]), "gather": lambda: gather_rows({}), "max": lambda: largest(1)}
    with pytest.raises(RuntimeError) as failure:
        collectives[name]()
    return str(failure.value)


@pytest.mark.parametrize("collective", ["sum", "gather", "max"])
def test_a_collective_that_loses_a_rank_names_it(collective):
    first, _, third = run_ranks(3, dies_in_a_collective, collective)
    for message in (first, third):  # which may name the other as well, once that has given up
        assert "rank 1 is gone" in message
        assert message.endswith(": see its log, then start all ranks again (the run resumes from its last checkpoint)")


def out_of_step(rank):
    with pytest.raises(
        RuntimeError, match=rf"rank {1 - rank} is at iteration {6 - rank} and rank {rank} at {5 + rank}: "
    ):
        check_alive(5 + rank, 100)


def test_ranks_out_of_step_say_so():
    run_ranks(2, out_of_step)
