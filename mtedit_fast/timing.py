"""Wall-clock time per named phase, without synchronising the device inside the loop."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """`with timer("denoise"): ...`, then `timer.seconds()`.

    On CUDA each phase is bracketed by events on the current stream, read only in `seconds()`.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.cuda = torch.device(device).type == "cuda"
        self._host: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if not self.cuda:
            start = time.perf_counter()
            yield
            self._host[phase] += time.perf_counter() - start
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._events.append((phase, begin, end))

    def seconds(self) -> dict[str, float]:
        """Seconds per phase since the last call (synchronises once on CUDA)."""
        totals = self._host
        if self._events:
            torch.cuda.synchronize()
            for phase, begin, end in self._events:
                totals[phase] += begin.elapsed_time(end) / 1000
        self._host, self._events = defaultdict(float), []
        return dict(totals)
