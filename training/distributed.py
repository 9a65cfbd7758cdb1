"""What the trainer needs of several processes: shares, gathered rewards, summed gradients, a watch for dead ranks.

Every function is collective: all ranks call it in the same order. With one process, `torch.distributed` initialised or
not, each is its own identity. Start with `torchrun` or `accelerate launch`; gloo carries CPU tensors, NCCL the rest.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mtedit_fast.training.checkpoint import digest

T = TypeVar("T")


def process() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share(count: int, rank: int, world: int) -> range:
    """The part of 0 … `count` − 1 that `rank` of `world` takes: contiguous, near-equal, the first ranks one more.

    Empty for the last ranks when `count` < `world`.
    """
    if count < 0:
        raise ValueError(f"count: expected >= 0, got {count}")
    if not 0 <= rank < world:
        raise ValueError(f"rank: expected 0 <= rank < world ({world}), got {rank}")
    size, more = divmod(count, world)
    start = rank * size + min(rank, more)
    return range(start, start + size + (rank < more))


def gather_rows(tensors: dict[str, Tensor], *, everywhere: bool = True) -> dict[str, Tensor]:
    """Every rank's rows, on every rank: {name: [b_r, ...]} to {name: [Σ b_r, ...]} in rank order, on the CPU.

    For small tensors such as rewards: they are pickled. A rank without rows passes empty tensors or {}. With everywhere
    False the first rank alone gets them, for larger ones such as images; the others get {}.

    Raises:
        ValueError: ranks that have rows disagree on the names, dtypes or trailing shapes.
    """
    own = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    parts = gather_objects(own) if everywhere else _gather_on_first(own)
    if not parts:
        return {}
    filled = {rank: part for rank, part in enumerate(parts) if any(len(tensor) for tensor in part.values())}
    if not filled:
        return max(parts, key=len)  # nobody has rows; the names, if anybody knows them
    described = {rank: {n: (t.dtype, t.shape[1:]) for n, t in part.items()} for rank, part in filled.items()}
    first = next(iter(filled))
    for rank, description in described.items():
        if description != described[first]:
            raise ValueError(
                f"tensors: expected the same names, dtypes and trailing shapes on every rank, got {description} on "
                f"rank {rank} and {described[first]} on rank {first}; start every rank with the same configuration"
            )
    return {name: torch.cat([part[name] for part in filled.values()]) for name in filled[first]}


def sum_gradients(parameters: list[Tensor]) -> None:
    """Replace every `.grad` by its sum over all ranks; a missing one counts as zeros (and becomes zeros).

    One flat buffer is cut into a part per rank, each rank adds up its part of all buffers in rank order, and the sums
    go back to everyone. That is the traffic of a ring all-reduce, and for a given number of ranks the bits depend on
    the gradients alone. NCCL's own all-reduce gives all ranks the same bits, but chooses its algorithm by size
    and topology, and with NVLink SHARP its order of addition can change from call to call.

    Raises:
        ValueError: gradients of different dtypes or devices.
    """
    _, world = process()
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if world == 1 or not parameters:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    kinds = {(gradient.dtype, str(gradient.device)) for gradient in gradients}
    if len(kinds) > 1:
        raise ValueError(
            f"parameters: expected gradients of one dtype on one device, got {sorted(kinds, key=str)}; "
            "make all adapters fp32 on the same device"
        )
    count = sum(gradient.numel() for gradient in gradients)
    padding = gradients[0].new_zeros(-count % world)
    flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), padding])
    group, parts = group_for(flat.device), torch.empty_like(flat)
    with _naming_the_lost():
        dist.all_to_all_single(parts, flat, group=group)
        first, *others = parts.view(world, -1).unbind()
        for other in others:
            first += other
        dist.all_gather(list(flat.view(world, -1).unbind()), first, group=group)
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, total in zip(gradients, flat[:count].split(sizes), strict=True):
        gradient.copy_(total.view_as(gradient))


def largest(value: int) -> int:
    """The greatest `value` of any rank, such as the number of forwards that all must run when weights are sharded."""
    if process()[1] == 1:
        return value
    result = torch.tensor(value)
    with _naming_the_lost():
        dist.all_reduce(result, dist.ReduceOp.MAX, group=group_for(result.device))
    return int(result)


def agree(flag: bool) -> bool:
    """True if any rank says so, such as that it saw a NaN."""
    return largest(int(flag)) == 1


def assert_same(tensors: dict[str, Tensor]) -> None:
    """Check that named tensors are equal on all ranks, bit for bit, by their hashes: adapters at start and on resume.

    Raises:
        ValueError: naming the first rank that differs from rank 0, and the tensor.
    """
    if process()[1] == 1:
        return
    own = {name: digest({name: value.detach().cpu().contiguous()}) for name, value in tensors.items()}
    everyone = gather_objects(own)
    for rank, hashes in enumerate(everyone):
        names = sorted(everyone[0].keys() | hashes.keys())
        differing = [name for name in names if hashes.get(name) != everyone[0].get(name)]
        if differing:
            raise ValueError(
                f"rank {rank}: {differing[0]} differs from rank 0's ({len(differing)} of {len(names)} tensors do); "
                "every rank needs the same seed, configuration and weights, and the checkpoints where all can read them"
            )


def check_alive(iteration: int, timeout: float = 1800.0) -> None:
    """Meet the other ranks before a collective; when one does not come, say which.

    Each rank sends its iteration to every other over gloo. A dead process closes its connections and is seen at
    once; one that hangs, after `timeout` seconds, so that must exceed the longest difference between ranks: a rollout.

    Raises:
        RuntimeError: on every rank that is alive, naming those that are not and what to do.
    """
    rank, world = process()
    if world == 1:
        return
    lost = {}
    for other, answer in _meet(iteration, timeout, tag=1).items():
        if answer == "silent":
            lost[other] = f"did not reach iteration {iteration} within {timeout:g} s"
        elif answer != iteration:
            lost[other] = "is gone" if answer == "gone" else f"is at iteration {answer} and rank {rank} at {iteration}"
    if lost:
        raise _lost(lost)


def _meet(token: int, timeout: float, tag: int) -> dict[int, int | str]:
    """{other rank: its token, or "gone" or "silent"}."""
    rank, world = process()
    others = [other for other in range(world) if other != rank]
    group, own, deadline = group_for(torch.device("cpu")), torch.tensor([token]), time.monotonic() + timeout
    inbox = {other: torch.empty_like(own) for other in others}
    works: dict[int, list[Any]] = {other: [] for other in others}
    answers: dict[int, int | str] = {}
    for start in (dist.irecv, dist.isend):
        for other in others:
            try:
                works[other].append(start(inbox[other] if start is dist.irecv else own, other, group=group, tag=tag))
            except RuntimeError:
                answers[other] = "gone"
    for other in others:
        try:
            for work in works[other]:
                # Those behind one that hung have had their time: what has arrived is read at once.
                work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.1)))
        except RuntimeError:
            answers.setdefault(other, "silent" if time.monotonic() >= deadline else "gone")
        answers.setdefault(other, int(inbox[other]))
    return answers


def _lost(ranks: dict[int, str]) -> RuntimeError:
    return RuntimeError(
        "; ".join(f"rank {rank} {what}" for rank, what in sorted(ranks.items()))
        + ": see its log, then start all ranks again (the run resumes from its last checkpoint)"
    )


@contextmanager
def _naming_the_lost() -> Iterator[None]:
    """A collective that fails because a process is gone says which, where gloo gives an address at best.

    It may name ranks that have given up for the same reason, too; `check_alive` before the collective does not.
    """
    try:
        yield
    except RuntimeError as error:
        answers = _meet(0, 1.0, tag=2)
        if gone := {rank: "is gone" for rank, answer in answers.items() if answer == "gone"}:
            raise _lost(gone) from error
        raise


def gather_objects(value: T) -> list[T]:
    """Every rank's `value` (picklable), in rank order."""
    _, world = process()
    if world == 1:
        return [value]
    everyone: list[Any] = [None] * world
    with _naming_the_lost():
        dist.all_gather_object(everyone, value, group=group_for(torch.device("cpu")))
    return everyone


def _gather_on_first(value: T) -> list[T]:
    """Every rank's `value` on the first rank, nothing on the others."""
    rank, world = process()
    if world == 1:
        return [value]
    everyone: list[Any] | None = [None] * world if rank == 0 else None
    with _naming_the_lost():
        dist.gather_object(value, everyone, dst=0, group=group_for(torch.device("cpu")))
    return everyone or []


def group_for(device: torch.device) -> dist.ProcessGroup | None:
    """The process group that carries tensors of `device`: the default one (None), or gloo beside NCCL for the CPU."""
    if device.type != "cpu" or "cpu:" in dist.get_backend_config():
        return None
    return _gloo_beside(dist.group.WORLD)


@functools.cache
def _gloo_beside(world: dist.ProcessGroup | None) -> dist.ProcessGroup:
    # Made once per default group: `world` is the key.
    return dist.new_group(backend="gloo")
