"""Sums over a row that several programs share: each stores its tile's, the last one to arrive adds them up in order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

FINAL = tl.constexpr(32)  # partial sums, or rows, at a time when they are added up


@triton.jit
def tree_sum(values, LEVELS: tl.constexpr):
    """Pairwise, one bit of the index at a time, so that the order of additions does not depend on the layout, which
    changes with the alignment of the inputs. 2**LEVELS values."""
    for _ in tl.static_range(LEVELS):
        values = tl.sum(tl.reshape(values, (values.shape[0] // 2, 2)), axis=1)
    return tl.sum(values, axis=0)


@triton.jit
def load_tile(pointer, index, mask):
    return tl.load(pointer + index, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_sum(partial_ptr, row, tile, tiles, column: tl.constexpr, values, BLOCK: tl.constexpr):
    """The tile's sum, into a column of the partial sums; values past the end are 0."""
    tl.static_assert(BLOCK == 4096)
    base = partial_ptr + column * tl.num_programs(0).to(tl.int64)
    tl.store(base + row * tiles + tile, tree_sum(values, 12))


@triton.jit
def store_moments(partial_ptr, row, tile, tiles, column: tl.constexpr, values, BLOCK: tl.constexpr):
    """Sums of |x| and x², into two columns."""
    store_sum(partial_ptr, row, tile, tiles, column, tl.abs(values), BLOCK)
    store_sum(partial_ptr, row, tile, tiles, column + 1, values * values, BLOCK)


@triton.jit
def add_up(partial_ptr, row, tiles, column: tl.constexpr):
    """The row's sum of a column of partial sums, in the order of the tiles."""
    base = partial_ptr + column * tl.num_programs(0).to(tl.int64) + row * tiles
    sums = tl.zeros((FINAL,), tl.float32)
    for start in range(0, tiles, FINAL):
        tile = start + tl.arange(0, FINAL)
        sums += tl.load(base + tile, mask=tile < tiles, other=0.0, cache_modifier=".cg")
    return tree_sum(sums, 5)


@triton.jit
def last_to_arrive(counter_ptr, count):
    """Whether all others of `count` were here before; what they stored is then visible. Leaves the counter at 0."""
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


_arrived: dict[tuple[torch.device, int], Tensor] = {}


def counters(count: int, device: torch.device) -> Tensor:
    """`count` int32 zeros or more. Every launch leaves them zero, and those on one stream take turns with them."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():  # a graph is replayed on any stream: its own
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _arrived or _arrived[key].numel() < count:
        _arrived[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return _arrived[key]
