"""Sums over a row that several programs share: each stores its tile's, the last one to arrive adds them up in order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTS = 4  # sums that a tile leaves
_PARTS = tl.constexpr(PARTS)
FINAL = tl.constexpr(256)  # of them at a time when they are added up
COLUMNS = 8  # of sums, for those who need more than one
ROWS = tl.constexpr(32)  # rows at a time when their losses are added up


@triton.jit
def tree_sum(values, LEVELS: tl.constexpr):
    """Sums over the last of two dimensions, 2**LEVELS wide: pairwise, one bit of the index at a time, so that the order
    of additions does not depend on the layout, which changes with the alignment of the inputs."""
    for _ in tl.static_range(LEVELS):
        values = tl.sum(tl.reshape(values, (values.shape[0], values.shape[1] // 2, 2)), axis=2)
    return tl.reshape(values, (values.shape[0],))


@triton.jit
def load_tile(pointer, index, mask):
    return tl.load(pointer + index, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_sum(partial_ptr, row, tile, tiles, column: tl.constexpr, values, BLOCK: tl.constexpr):
    """The tile's sums, into a column of the partial sums; values past the end are 0.

    The four quarters of the tile are in the same thread's registers, the 256 elements of a sum in one warp's where
    eight at a time are loaded: no barrier then. What is left is added up by the last program of the row.
    """
    tl.static_assert(BLOCK == 4096)
    for _ in tl.static_range(2):
        values = tl.sum(tl.reshape(values, (2, values.shape[0] // 2)), axis=0)
    values = tree_sum(tl.reshape(values, (_PARTS, BLOCK // 4 // _PARTS)), 8)
    base = partial_ptr + _PARTS * (column * tl.num_programs(0).to(tl.int64) + row * tiles + tile)
    tl.store(base + tl.arange(0, _PARTS), values)


@triton.jit
def store_moments(partial_ptr, row, tile, tiles, column: tl.constexpr, values, BLOCK: tl.constexpr):
    """Sums of |x| and x², into two columns."""
    store_sum(partial_ptr, row, tile, tiles, column, tl.abs(values), BLOCK)
    store_sum(partial_ptr, row, tile, tiles, column + 1, values * values, BLOCK)


@triton.jit
def add_up(partial_ptr, row, tiles, COLUMNS: tl.constexpr, STORED: tl.constexpr):
    """The row's sums, [COLUMNS], in the order of the tiles, loaded side by side; of columns whose bit STORED has."""
    column = tl.arange(0, COLUMNS)[:, None]
    stored = ((STORED >> column) & 1) != 0
    base = partial_ptr + _PARTS * (column * tl.num_programs(0).to(tl.int64) + row * tiles)
    sums = tl.zeros((COLUMNS, FINAL), tl.float32)
    for start in range(0, tiles, FINAL // _PARTS):
        part = start * _PARTS + tl.arange(0, FINAL)[None, :]
        sums += tl.load(base + part, mask=stored & (part < _PARTS * tiles), other=0.0, cache_modifier=".cg")
    return tree_sum(sums, 8)


@triton.jit
def pick(values, column: tl.constexpr):
    """One of the columns' sums, a scalar."""
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) == column, values, 0.0), axis=0)


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
