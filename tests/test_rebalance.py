"""Kept rows move between two and three real processes, with their text and in whole groups."""

import pytest
import torch
import torch.distributed as dist
from distributed_worker import run_ranks

from mtedit_fast.training.distributed import gather_objects, share
from mtedit_fast.training.rebalance import rebalance


def kept_rows(counts, group_size=2):
    """The global kept list: row i belongs to group i // group_size; prompts are shared by two groups."""
    total = sum(counts)
    row = torch.arange(total)
    generator = torch.Generator().manual_seed(0)
    rows = {
        "latents": torch.randn(total, 2, 3, 5, generator=generator).bfloat16(),
        "advantages": torch.randn(total, 2, generator=generator),
        "valid": row % 3 == 0,
        "seeds": row * 2**40,
        "odd": row.to(torch.uint8),  # one byte a row: what follows is not aligned
        "group": row // group_size + 100,
        "prompt": row // (2 * group_size),
    }
    prompts = total // (2 * group_size) + 1
    text = [
        {
            "embeds": torch.randn(prompts, length, 4, generator=generator),
            "pooled": torch.arange(prompts)[:, None] + turn,
        }
        for turn, length in enumerate((3, 5))
    ]
    return rows, text


def local_part(counts, rank):
    """This rank's rows with a text of its own, in another order and with a prompt nobody uses."""
    rows, text = kept_rows(counts)
    start = sum(counts[:rank])
    own = {name: tensor[start : start + counts[rank]] for name, tensor in rows.items()}
    used = own["prompt"].unique().flip(0)
    table = torch.cat([torch.zeros(1, dtype=torch.int64), used])  # row 0 is unused
    own["prompt"] = torch.tensor([1 + used.tolist().index(p) for p in own["prompt"].tolist()], dtype=torch.int64)
    return own, [{name: tensor[table] for name, tensor in turn.items()} for turn in text]


def assert_parts(counts, got, expected_sizes, rank):
    """The rank's rows are its slice of the global list, each with its own prompt's text."""
    rows, text = kept_rows(counts)
    start, stop = sum(expected_sizes[:rank]), sum(expected_sizes[: rank + 1])
    new, new_text = got
    assert new.keys() == rows.keys()
    for name in rows:
        assert new[name].dtype == rows[name].dtype
        if name != "prompt":
            assert new[name].equal(rows[name][start:stop]), name
    for turn, new_turn in zip(text, new_text, strict=True):
        for name in turn:
            assert new_turn[name].dtype == turn[name].dtype
            assert new_turn[name][new["prompt"]].equal(turn[name][rows["prompt"][start:stop]]), name
            assert new_turn[name].shape[1:] == turn[name].shape[1:]


def rebalances(rank):
    world = dist.get_world_size()
    for counts in ([7, 0, 1], [0, 0, 20], [1, 9, 2], [0, 1, 0], [12, 3, 0], [5, 4, 0])[:: 1 if world == 3 else 2]:
        counts = counts[-world:]
        own, text = local_part(counts, rank)
        before = {name: tensor.clone() for name, tensor in own.items()}
        sizes = [len(share(sum(counts), r, world)) for r in range(world)]
        for arguments in ((own, text), (own, text) if counts[rank] else ({}, [])):
            got = rebalance(*arguments)
            if max(counts) > max(sizes):
                assert_parts(counts, got, sizes, rank)
                assert len(got[1][0]["embeds"]) == len(got[0]["prompt"].unique()) or sizes[rank] == 0
            else:
                assert got[0] is arguments[0]
        assert all(own[name].equal(before[name]) for name in own)  # the arguments are left alone
    # nothing to gain: the very objects, although a strict cut would be 3, 2, 2
    counts = [2, 3, 2][:world]
    own, text = local_part(counts, rank)
    got = rebalance(own, text)
    assert got[0] is own
    assert got[1] is text
    assert rebalance({}, []) == ({}, [])


@pytest.mark.parametrize("world", [2, 3])
def test_rows_move_with_their_text(world):
    run_ranks(world, rebalances)


def whole_groups(rank):
    for counts, sizes in (
        ([8, 0, 0], [2, 4, 2]),  # groups of 2: cuts at 8/3 and 16/3, the nearest boundaries are 2 and 6
        ([8, 1, 3], [4, 4, 4]),
        ([3, 9, 2], [4, 6, 4]),  # the second group lies on two ranks and comes together
        ([2, 0, 0], None),
    ):
        own, text = local_part(counts, rank)
        got = rebalance(own, text, whole_groups=True)
        if sizes is None:
            assert got[0] is own
        else:
            assert_parts(counts, got, sizes, rank)
            groups = gather_objects(set(got[0]["group"].tolist()))
            assert not groups[0] & groups[1]
            assert not groups[1] & groups[2]
    rows = {"group": torch.tensor([4, 5, 4]), "prompt": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match="adjacent rows for each group, got group 4 in several places; sort them"):
        rebalance(rows if rank == 0 else {}, [{"e": torch.zeros(1, 2)}], whole_groups=True)


def test_groups_stay_whole():
    run_ranks(3, whole_groups)


def text_lengths(rank):
    """Ranks that padded to their own longest prompt."""
    length = 4 - rank
    rows = {"prompt": torch.zeros(4 if rank == 0 else 1, dtype=torch.int64)}
    text = [{"embeds": torch.full((1, length, 2), rank + 1.0), "mask": torch.ones(1, length, dtype=torch.int64)}]
    rows, text = rebalance(rows, text)
    if rank == 1:
        assert len(rows["prompt"]) == 2
        assert text[0]["mask"][rows["prompt"]].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
        assert text[0]["embeds"][rows["prompt"], :, 0].tolist() == [[1, 1, 1, 1], [2, 2, 2, 0]]
    rows = {"prompt": torch.zeros(4 if rank == 0 else 1, dtype=torch.int64)}
    with pytest.raises(ValueError, match="text: expected embeds of one length on every rank, or a mask beside it"):
        rebalance(rows, [{"embeds": torch.ones(1, length, 2)}])
    rows["x"] = torch.zeros(len(rows["prompt"]), 2 + rank)
    with pytest.raises(ValueError, match=r"same names, dtypes and trailing shapes on every rank.* start every rank"):
        rebalance(rows, [])


def test_text_of_different_lengths():
    run_ranks(2, text_lengths)
