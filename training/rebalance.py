"""Moving kept rows between ranks, so that all have nearly the same number to learn from."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mtedit_fast.training.distributed import gather_objects, group_for, process, share

Rows = dict[str, Tensor]
Part = tuple[Rows, list[Rows]]  # rows and the text of their prompts, a dict per turn


class _Layout(NamedTuple):
    """What a rank must know of another to read its messages."""

    device: str
    rows: dict[str, tuple[torch.dtype, torch.Size]]  # trailing shapes
    text: list[dict[str, tuple[torch.dtype, torch.Size]]]
    prompts: list[int]  # how many go to each rank


def rebalance(rows: Rows, text: list[Rows], *, whole_groups: bool = False) -> tuple[Rows, list[Rows]]:
    """Cut all ranks' rows, in rank order, into a near-equal contiguous part for each rank; move only what must move.

    Args:
        rows: {name: [R_r, ...]}, among them int64 `prompt` [R_r], a row of `text`. A rank without rows may pass {}.
        text: one dict per turn of {name: [P_r, ...]}, a row per prompt. A rank without rows may pass [].
        whole_groups: keep rows of the same int64 `group` [R_r], which must be adjacent, on one rank; parts are then
            equal to within the largest group.

    Returns:
        The rank's new rows and the text of exactly their prompts, `prompt` renumbered. The arguments themselves when
        no rank would get less to do. Where ranks padded a prompt's tokens (dim 1) to different lengths, the shorter
        are padded with zeros, which takes a mask among the turn's tensors.

    Raises:
        ValueError: names, dtypes or trailing shapes that differ between ranks; a group that is not adjacent.
    """
    rank, world = process()
    if world == 1:
        return rows, text
    count = len(rows["prompt"]) if rows else 0
    runs = _runs(rows["group"]) if whole_groups and count else [(0, count)] if count else []
    everyone = gather_objects(runs)
    counts = [sum(length for _, length in part) for part in everyone]
    cuts = _group_cuts(everyone, world) if whole_groups else [share(sum(counts), r, world).start for r in range(world)]
    starts, cuts = [0, *accumulate(counts)], [*cuts, sum(counts)]
    if max(counts) <= max(stop - start for start, stop in pairwise(cuts)):
        return rows, text

    def moved(source: int, target: int) -> slice:
        """The rows of `source` that go to `target`, counted from the source's first."""
        first, last = max(starts[source], cuts[target]), min(starts[source + 1], cuts[target + 1])
        return slice(first - starts[source], max(first, last) - starts[source])

    outgoing = [_part(rows, text, moved(rank, target)) for target in range(world)]
    layouts = gather_objects(_layout(outgoing))
    _check_layouts({r: layout for r, layout in enumerate(layouts) if counts[r]})
    sizes = [moved(source, rank) for source in range(world)]
    incoming = _exchange(outgoing, layouts, [size.stop - size.start for size in sizes])
    if not incoming:  # more ranks than rows: empty, but with everyone's names and shapes
        incoming = [_empty(next(layout for r, layout in enumerate(layouts) if counts[r]), 0, 0)]
    return _joined(incoming)


def _runs(group: Tensor) -> list[tuple[int, int]]:
    """(id, length) of each stretch of equal ids."""
    ids, lengths = torch.unique_consecutive(group, return_counts=True)
    return list(zip(ids.tolist(), lengths.tolist(), strict=True))


def _group_cuts(everyone: list[list[tuple[int, int]]], world: int) -> list[int]:
    """Where each rank's part starts: the group boundary nearest to an equal cut."""
    ids: list[int] = []
    ends: list[int] = [0]
    for group, length in (run for part in everyone for run in part):
        if ids and ids[-1] == group:
            ends[-1] += length  # split between neighbouring ranks
        else:
            ids.append(group)
            ends.append(ends[-1] + length)
    if len(set(ids)) < len(ids):
        twice = next(group for group in ids if ids.count(group) > 1)
        raise ValueError(
            f"group: expected adjacent rows for each group, got group {twice} in several places; sort them"
        )
    return [min(ends, key=lambda end: abs(end * world - ends[-1] * rank)) for rank in range(world)]


def _part(rows: Rows, text: list[Rows], which: slice) -> Part:
    """Some rows with the text of their prompts alone."""
    if which.start == which.stop:
        return {}, []
    part = {name: tensor[which] for name, tensor in rows.items()}
    used, part["prompt"] = part["prompt"].unique(return_inverse=True)
    return part, [{name: tensor.index_select(0, used) for name, tensor in turn.items()} for turn in text]


def _layout(outgoing: list[Part]) -> _Layout:
    prompts = [len(next(iter(text[0].values()))) if text else 0 for _, text in outgoing]
    rows, text = next((part for part in outgoing if part[0]), ({}, []))

    def kinds(tensors: Rows) -> dict[str, tuple[torch.dtype, torch.Size]]:
        return {name: (tensor.dtype, tensor.shape[1:]) for name, tensor in tensors.items()}

    device = rows["prompt"].device.type if rows else ""
    return _Layout(device, kinds(rows), [kinds(turn) for turn in text], prompts)


def _check_layouts(layouts: dict[int, _Layout]) -> None:
    """ValueError, the same on every rank, where what the ranks hold cannot be joined."""
    first = next(iter(layouts))
    want = layouts[first]
    for rank, layout in layouts.items():
        dtypes = [[{name: kind[0] for name, kind in turn.items()} for turn in each.text] for each in (layout, want)]
        if layout.rows != want.rows or dtypes[0] != dtypes[1]:
            raise ValueError(
                "rows, text: expected the same names, dtypes and trailing shapes on every rank, got "
                f"{layout.rows}, {layout.text} on rank {rank} and {want.rows}, {want.text} on rank {first}; "
                "start every rank with the same configuration"
            )
        for turn, other in zip(layout.text, want.text, strict=True):
            masked = any("mask" in name for name in turn)
            for name in turn:
                shape, wanted = turn[name][1], other[name][1]
                if shape != wanted and (not masked or shape[1:] != wanted[1:]):
                    raise ValueError(
                        f"text: expected {name} of one length on every rank, or a mask beside it, got {list(shape)} on "
                        f"rank {rank} and {list(wanted)} on rank {first}; pad prompts to max_sequence_length"
                    )


def _exchange(outgoing: list[Part], layouts: list[_Layout], sizes: list[int]) -> list[Part]:
    """One message of bytes per pair of ranks; the parts for this rank, in rank order."""
    rank, _ = process()
    device = torch.device(next(layout.device for layout in layouts if layout.device))
    group = group_for(device)
    incoming = {
        source: outgoing[rank] if source == rank else _empty(layouts[source], size, layouts[source].prompts[rank])
        for source, size in enumerate(sizes)
        if size
    }
    buffers = {source: _bytes(part) for source, part in incoming.items() if source != rank}
    messages = {target: _bytes(part) for target, part in enumerate(outgoing) if part[0] and target != rank}
    operations = [dist.P2POp(dist.irecv, buffer, source, group) for source, buffer in buffers.items()]
    operations += [dist.P2POp(dist.isend, message, target, group) for target, message in messages.items()]
    if device.type != "cpu":  # NCCL makes its communicator in a call that all ranks take part in
        dist.all_reduce(torch.zeros(1, device=device), group=group)
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
    for source, buffer in buffers.items():
        _unpack(buffer, incoming[source])
    return list(incoming.values())


def _tensors(part: Part) -> Iterator[Tensor]:
    for tensors in (part[0], *part[1]):
        yield from tensors.values()


def _bytes(part: Part) -> Tensor:
    return torch.cat([tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in _tensors(part)])


def _unpack(buffer: Tensor, part: Part) -> None:
    sizes = [tensor.numel() * tensor.element_size() for tensor in _tensors(part)]
    for tensor, content in zip(_tensors(part), buffer.split(sizes), strict=True):
        tensor.view(-1).view(torch.uint8).copy_(content)


def _empty(layout: _Layout, rows: int, prompts: int) -> Part:
    device = layout.device
    return (
        {name: torch.empty(rows, *shape, dtype=dtype, device=device) for name, (dtype, shape) in layout.rows.items()},
        [
            {name: torch.empty(prompts, *shape, dtype=dtype, device=device) for name, (dtype, shape) in turn.items()}
            for turn in layout.text
        ],
    )


def _joined(parts: list[Part]) -> Part:
    """Parts one after another, `prompt` counted through."""
    before = 0
    for rows, text in parts:
        rows["prompt"] = rows["prompt"] + before
        before += len(next(iter(text[0].values()))) if text else 0
    rows = {name: torch.cat([part[name] for part, _ in parts]) for name in parts[0][0]}
    turns = range(len(parts[0][1]))
    return rows, [_joined_text([text[turn] for _, text in parts]) for turn in turns]


def _joined_text(parts: list[Rows]) -> Rows:
    """Rows of one turn, tokens (dim 1) padded with zeros to the longest."""
    result = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if len({tensor.shape[1:] for tensor in tensors}) > 1:
            longest = max(tensor.shape[1] for tensor in tensors)
            padded = [tensor.new_zeros(len(tensor), longest, *tensor.shape[2:]) for tensor in tensors]
            for target, tensor in zip(padded, tensors, strict=True):
                target[:, : tensor.shape[1]] = tensor
            tensors = padded
        result[name] = torch.cat(tensors)
    return result
