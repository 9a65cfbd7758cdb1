"""What every bench shares: rotating inputs, timing, memory, and the measured copy ceiling.

Timing. On a GPU below 100 µs per call a launch costs as much as a kernel, so calls are timed inside a CUDA graph
("graph"), and again as plain launches ("stream"), which is what an uncaptured loop pays. On a CPU each call is timed
("call"). Inputs are random and rotate through more memory than the last cache holds; outputs, too, inside a graph.
"""

import ctypes
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

import torch
from torch import Tensor

Call = Callable[[], object]
LONG = 1e-3  # seconds of a call on a GPU, from which on few samples of few calls say enough
FEW = 5


class Timing(NamedTuple):
    """Microseconds per call; of `summary`, what it was given."""

    median: float
    p20: float
    p80: float


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(text[:-1]) * units[text[-1]] for text in (path.read_text().strip() for path in sizes)), default=0)


def rotations(bytes_per_call: int, device: torch.device) -> int:
    """How many input sets to go round, so that each is out of the cache at its turn; 1 GiB of them (GPU: 8) at most."""
    limit = (8 if device.type == "cuda" else 1) << 30
    wanted = min(2 * cache_bytes(device), limit)
    return min(max(2, -(-wanted // max(bytes_per_call, 1))), 1000)


def summary(values: Sequence[float]) -> Timing:
    if len(values) == 1:
        return Timing(values[0], values[0], values[0])
    cuts = quantiles(values, n=10, method="inclusive")
    return Timing(cuts[4], cuts[1], cuts[7])


@cache
def settle_allocator() -> None:
    """The CPU's allocator as a process has it that has run for a while.

    glibc hands freed blocks back to the kernel, which clears the pages of the next ones, unless they are smaller than
    the largest one freed so far; beyond 32 MiB always. What ran before then decides, in whole runs, whether a call
    takes one time or two or three times as long.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 64 << 20)


def _microseconds(seconds: Sequence[float]) -> Timing:
    return Timing(*(round(1e6 * each, 3) for each in summary(seconds)))


def measure(
    peers: Mapping[str, Sequence[Call]],
    device: torch.device,
    *,
    graph: bool = False,
    min_seconds: float = 0.5,
    samples: int = 20,
) -> dict[str, Timing]:
    """Times each peer's calls, going round, after one round to warm up.

    Peers take turns call by call, so that whatever else the machine does falls on all of them alike. It goes on for
    `min_seconds` per peer, and `samples` times at least: `FEW` times where a call of one of them is long on a GPU.
    """
    settle_allocator()
    for calls in peers.values():
        for call in calls:
            call()
    timers: dict[str, Callable[[], float]]
    if device.type == "cpu":
        timers = {name: _cpu_timer(calls) for name, calls in peers.items()}
    else:
        once = {name: _once(calls[0]) for name, calls in peers.items()}
        timers = {name: _gpu_timer(calls, graph, once[name] > LONG) for name, calls in peers.items()}
        samples = min(samples, FEW) if max(once.values()) > LONG else samples
    found: dict[str, list[float]] = {name: [] for name in peers}
    until = time.perf_counter() + min_seconds * len(peers)
    for count in itertools.count():
        if count >= samples and time.perf_counter() >= until:
            return {name: _microseconds(seconds) for name, seconds in found.items()}
        for name, timer in timers.items():
            found[name].append(timer())
    raise AssertionError


def _cpu_timer(calls: Sequence[Call]) -> Callable[[], float]:
    turn = itertools.cycle(calls)

    def seconds() -> float:
        call = next(turn)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return seconds


def host_samples(device: torch.device) -> int:
    """Of whole paths that end on the host, timed as on a CPU: those of full size, on a GPU, take long."""
    return FEW if device.type == "cuda" else 20


def _once(call: Call) -> float:
    """Seconds of a warm call on a GPU, waited for; the quickest of three."""

    def seconds() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    return min(seconds() for _ in range(3))


def _gpu_timer(calls: Sequence[Call], graph: bool, long: bool) -> Callable[[], float]:
    """Seconds per call, over one round of the inputs and, unless calls are long, at least 20 calls."""
    batch = list(itertools.islice(itertools.cycle(calls), len(calls) if long else max(20, len(calls))))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run() -> None:
        for call in batch:
            call()

    replay = run
    if graph:
        captured = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(captured):
            outputs = [call() for call in batch]  # freed at once, all would be one block, which stays in the cache
        del outputs
        replay = captured.replay
        replay()

    def seconds() -> float:
        begin.record()
        replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(batch)

    return seconds


@cache
def copy_bandwidth(device: torch.device, *, min_seconds: float = 0.5) -> float:
    """GB/s, read plus written, that the fastest way to copy a large random array reaches on this device (its p20)."""
    size = 1 << (30 if device.type == "cuda" else 28)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies: dict[str, Sequence[Call]] = {"torch": [lambda: target.copy_(source)]}
    if device.type == "cuda":
        from mtedit_fast.ops import _cpp

        if _cpp.unavailable_reason() is None and _cpp._C.cuda_archs:
            copies["csrc"] = [lambda: _device_copy(_cpp._C.device_copy, target, source)]
    times = measure(copies, device, graph=device.type == "cuda", min_seconds=min_seconds)
    best = min(timing.p20 for timing in times.values())
    assert torch.equal(source, target)
    return 2 * size / best / 1e3


def _device_copy(launch: Callable[..., None], target: Tensor, source: Tensor) -> None:
    stream = torch.cuda.current_stream(source.device).cuda_stream
    launch(target.data_ptr(), source.data_ptr(), source.numel(), stream, source.device.index)


def extra_bytes(call: Call, device: torch.device) -> int:
    """Most memory in use during the call, less what was in use before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

    ctypes.CDLL(None).malloc_trim(0)  # what is free but kept would be used first, unseen
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = resident("VmRSS:")
    call()
    return max(resident("VmHWM:") - before, 0)
