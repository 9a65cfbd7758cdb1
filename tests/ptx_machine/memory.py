"""Memory of a launch: the host's, of which only what was handed over may be touched, and that of each block.

What hardware would let pass, or punish at random, is an error here: an address outside, or not aligned, and what one
warp reads or writes of shared memory that another has written or read with no barrier between the two.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
Lanes = NDArray[np.intp]
GRAIN = 2  # bytes of shared memory that are told apart


class BadAccess(RuntimeError):
    """What a kernel did to memory that it must not."""


class GlobalMemory:
    """The host's memory at the addresses of the buffers that a launch was given."""

    def __init__(self, buffers: list[tuple[int, int]]):
        """`buffers`: address and bytes of each; the same may come twice."""
        unique = sorted({(address, size) for address, size in buffers if size})
        self.starts = np.array([address for address, _ in unique], np.uint64)
        self.ends = np.array([address + size for address, size in unique], np.uint64)
        self.bytes = [
            np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8) for address, size in unique
        ]

    def _split(self, address: Array, size: int, what: str) -> list[tuple[NDArray[np.uint8], Array, slice | Lanes]]:
        """Which buffer, where in it, and which of the addresses."""
        if len(address) == 0:
            return []
        if (address & np.uint64(size - 1)).any():
            raise BadAccess(f"{what} of {size} bytes at an address that is no multiple of it")
        which = np.searchsorted(self.starts, address, side="right") - 1
        if (which < 0).any() or (address + np.uint64(size) > self.ends[which]).any():
            raise BadAccess(f"{what} of {size} bytes outside of every tensor")
        if (which == which[0]).all():
            return [(self.bytes[which[0]], (address - self.starts[which[0]]).astype(np.intp), slice(None))]
        return [
            (self.bytes[i], (address[lanes] - self.starts[i]).astype(np.intp), lanes)
            for i in np.unique(which)
            for lanes in [np.flatnonzero(which == i)]
        ]

    def read(self, address: Array, size: int) -> NDArray[np.uint8]:
        """[lanes, size]"""
        out = np.empty((len(address), size), np.uint8)
        for buffer, offset, lanes in self._split(address, size, "a load"):
            out[lanes] = buffer[offset[:, None] + np.arange(size)]
        return out

    def write(self, address: Array, data: NDArray[np.uint8]) -> None:
        for buffer, offset, lanes in self._split(address, data.shape[1], "a store"):
            buffer[offset[:, None] + np.arange(data.shape[1])] = data[lanes]


class SharedMemory:
    """Of all blocks, one after the other; full of NaN at first."""

    def __init__(self, blocks: int, size: int, threads: int):
        self.size = -(-max(size, 16) // 16) * 16
        self.bytes = np.full(blocks * self.size, 0xFF, np.uint8)
        self.threads = threads
        self.era = np.zeros(blocks, np.int32)  # barriers passed
        grains = len(self.bytes) // GRAIN
        self.written, self.seen = (np.full(grains, -1, np.int32) for _ in range(2))  # in which era
        self.writers, self.readers = (np.zeros(grains, np.uint32) for _ in range(2))  # bits: which warps of the block

    def _cells(self, lanes: Lanes, address: Array, size: int, what: str) -> tuple[NDArray[np.intp], Lanes]:
        address = address.astype(np.intp)
        if (address & (size - 1)).any():
            raise BadAccess(f"{what} of {size} bytes of shared memory at an address that is no multiple of it")
        if (address + size > self.size).any():
            raise BadAccess(f"{what} of shared memory past its end")
        block = lanes // self.threads
        return block * self.size + address, block

    def read(self, lanes: Lanes, address: Array, size: int) -> NDArray[np.uint8]:
        """[lanes, size]"""
        at, block = self._cells(lanes, address, size, "a load")
        cells, warp, era = self._grains(lanes, block, at, size)
        if ((self.written[cells] == era) & (self.writers[cells] & warp == 0)).any():
            raise BadAccess("shared memory is read that another warp wrote, with no barrier between the two")
        self._note(self.seen, self.readers, cells, warp, era)
        return self.bytes[at[:, None] + np.arange(size)]

    def write(self, lanes: Lanes, address: Array, data: NDArray[np.uint8]) -> None:
        at, block = self._cells(lanes, address, data.shape[1], "a store")
        cells, warp, era = self._grains(lanes, block, at, data.shape[1])
        where = at[:, None] + np.arange(data.shape[1])
        wrote = (self.written[cells] == era) & (self.writers[cells] & ~warp != 0)
        read = (self.seen[cells] == era) & (self.readers[cells] & ~warp != 0)
        if (wrote | read).any() and (self.bytes[where] != data).any():  # the same again does no harm
            raise BadAccess("shared memory is written that another warp uses, with no barrier between the two")
        self._note(self.written, self.writers, cells, warp, era)
        self.bytes[where] = data
        if (self.bytes[where] != data).any():
            raise BadAccess("shared memory is written twice at once")

    def _grains(
        self, lanes: Lanes, block: Lanes, at: NDArray[np.intp], size: int
    ) -> tuple[NDArray[np.intp], NDArray[np.uint32], NDArray[np.int32]]:
        """Cells, the bit of the warp and its block's era."""
        count = max(size // GRAIN, 1)
        cells = (at[:, None] // GRAIN + np.arange(count)).ravel()
        warp = np.uint32(1) << (lanes % self.threads // 32).astype(np.uint32)
        return cells, np.repeat(warp, count), np.repeat(self.era[block], count)

    @staticmethod
    def _note(
        eras: NDArray[np.int32], warps: NDArray[np.uint32], cells: NDArray[np.intp], warp: Array, era: Array
    ) -> None:
        warps[cells] = np.where(eras[cells] == era, warps[cells], 0)
        eras[cells] = era
        np.bitwise_or.at(warps, cells, warp)


class Releases:
    """Stores that a block hands to another one by an atomic: which warp last stored, and which last acquired, by era.

    An atomic that releases stands for its own warp's stores, and for other warps' before a barrier; what another block
    has stored may be loaded by a warp that has acquired, and by others past a barrier.
    """

    def __init__(self, shared: SharedMemory):
        self.shared, self.each = shared, shared.threads // 32
        warps = len(shared.era) * self.each
        self.stored, self.acquired = np.full(warps, -1, np.int32), np.full(warps, -1, np.int32)

    def store(self, lanes: Lanes) -> None:
        warps = np.unique(lanes // 32)
        self.stored[warps] = self.shared.era[warps // self.each]

    def atomic(self, lanes: Lanes) -> None:
        warps = np.unique(lanes // 32)
        if self._by_others(warps, self.stored):
            raise BadAccess("an atomic releases what another warp stored, with no barrier between the two")
        self.acquired[warps] = self.shared.era[warps // self.each]

    def load(self, lanes: Lanes) -> None:
        if self._by_others(np.unique(lanes // 32), self.acquired):
            raise BadAccess("another block's stores are loaded that another warp acquired, with no barrier since")

    def _by_others(self, warps: Lanes, eras: NDArray[np.int32]) -> bool:
        """Whether for one of the warps that of another in its block is the era that is."""
        now = (eras.reshape(-1, self.each) == self.shared.era[:, None]).astype(int)
        return bool((now.sum(axis=1)[warps // self.each] > now.ravel()[warps]).any())
