"""What every bench shares: rotating inputs, timing, the measured copy ceiling, and rows appended to a CSV.

Timing. On a GPU below 100 µs per call a launch costs as much as a kernel, so calls are timed inside a CUDA graph
("graph"), and again as plain launches ("stream"), which is what an uncaptured loop pays. On a CPU each call is timed
("call"). Inputs are random and rotate through more memory than the last cache holds.
"""

import csv
import ctypes
import itertools
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
Call = Callable[[], object]


class Timing(NamedTuple):
    """Microseconds per call."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Line:
    """How every line of a results file begins: where, and what, was measured."""

    date: str
    commit: str
    device: str
    threads: int
    python: str
    torch: str
    triton: str
    op: str
    variant: str
    shape: str
    dtype: str
    backend: str
    timing: str


@dataclass(frozen=True)
class Measured(Line):
    """How every line of an op's results file begins. Times are microseconds per call."""

    median_us: float
    p20_us: float
    p80_us: float
    bytes: int
    flops: int
    gb_per_s: float
    gflop_per_s: float
    copy_gb_per_s: float
    percent_of_copy: float


@dataclass(frozen=True)
class Row(Measured):
    """Beside the eager form and `torch.compile`; an empty peer was not measured."""

    eager_us: float | None
    compile_us: float | None
    speedup_eager: float | None
    speedup_compile: float | None
    error: float
    """Largest error against fp64, as a fraction of what the check allows."""


def compared(
    columns: Mapping[str, Any],
    times: Mapping[str, Timing],
    *,
    bytes: int,
    flops: int,
    copy_gb_per_s: float,
    error: float,
    own: str = "ours",
    eager: str = "eager",
) -> Row:
    """The row of `own`, beside its peers `eager` and, where it was measured, "compile"."""
    time, peer = times[own], times.get("compile")
    gb_per_s = bytes / time.median / 1e3
    return Row(
        **columns,
        median_us=time.median,
        p20_us=time.p20,
        p80_us=time.p80,
        bytes=bytes,
        flops=flops,
        gb_per_s=round(gb_per_s, 3),
        gflop_per_s=round(flops / time.median / 1e3, 3),
        copy_gb_per_s=round(copy_gb_per_s, 3),
        percent_of_copy=round(100 * gb_per_s / copy_gb_per_s, 1),
        eager_us=times[eager].median,
        compile_us=peer.median if peer else None,
        speedup_eager=round(times[eager].median / time.median, 2),
        speedup_compile=round(peer.median / time.median, 2) if peer else None,
        error=round(error, 4),
    )


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


def _summary(seconds: Sequence[float]) -> Timing:
    cuts = quantiles(seconds, n=10, method="inclusive")
    return Timing(*(round(1e6 * cuts[i], 3) for i in (4, 1, 7)))


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
    `min_seconds` per peer, and `samples` times at least.
    """
    for calls in peers.values():
        for call in calls:
            call()
    timers = {name: (_cpu_timer if device.type == "cpu" else _gpu_timer)(calls, graph) for name, calls in peers.items()}
    found: dict[str, list[float]] = {name: [] for name in peers}
    until = time.perf_counter() + min_seconds * len(peers)
    for count in itertools.count():
        if count >= samples and time.perf_counter() >= until:
            return {name: _summary(seconds) for name, seconds in found.items()}
        for name, timer in timers.items():
            found[name].append(timer())
    raise AssertionError


def _cpu_timer(calls: Sequence[Call], _: bool) -> Callable[[], float]:
    turn = itertools.cycle(calls)

    def seconds() -> float:
        call = next(turn)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return seconds


def _gpu_timer(calls: Sequence[Call], graph: bool) -> Callable[[], float]:
    """Seconds per call, over one round of the inputs and at least 20 calls."""
    batch = list(itertools.islice(itertools.cycle(calls), max(20, len(calls))))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run() -> None:
        for call in batch:
            call()

    replay = run
    if graph:
        captured = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(captured):
            run()
        replay = captured.replay
        replay()

    def seconds() -> float:
        begin.record()
        replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(batch)

    return seconds


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


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, marked where tracked files differ from it; `COMMIT` where there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "unknown")


def environment(device: torch.device) -> dict[str, str | int]:
    """The columns that say where and when a row was measured."""
    try:
        import triton
    except ImportError:
        triton = None
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": commit(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else "",
    }


def append(path: Path, row: Any) -> None:
    """Adds a row, a `Row` or another dataclass, and the header to a new file.

    Raises:
        ValueError: the file has other columns.
    """
    names = [field.name for field in fields(row)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        with path.open(newline="") as file:
            found = next(csv.reader(file))
        if found != names:
            raise ValueError(f"{path} has other columns than this version writes: move it away ({found})")
        fresh = False
    else:
        fresh = True
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(asdict(row))


def measured(path: Path) -> Iterator[tuple[str, ...]]:
    """What a results file already holds, so that a session can be resumed: what identifies each row."""
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                yield tuple(row[name] for name in IDENTITY)


IDENTITY = ("commit", "device", "threads", "torch", "op", "variant", "shape", "dtype", "backend", "timing")


def identity(row_or_columns: dict[str, object]) -> tuple[str, ...]:
    return tuple(str(row_or_columns[name]) for name in IDENTITY)


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
