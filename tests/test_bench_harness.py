"""The harness on a GPU, here with clocks for events: how often it calls, and what a captured batch writes to."""

import contextlib
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_digit_score
import bench_sde_step
import command
import harness
import op_bench
import record

CUDA = torch.device("cuda", 0)


class Clock:
    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "Clock") -> float:
        return 1e3 * (other.time - self.time)


class Graph:
    """Remembers nothing: replayed, it does nothing."""

    def replay(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.parametrize(("seconds", "samples", "batch"), [(2e-3, harness.FEW, 3), (0.0, 20, 20)])
def test_long_calls_are_timed_less_often(seconds, samples, batch):
    seen = []

    def call() -> None:
        seen.append(1)
        time.sleep(seconds)

    times = harness.measure({"ours": [call] * 3}, CUDA, min_seconds=0.0)
    assert len(seen) == 3 + 3 + samples * batch  # to warm up, to see how long one takes
    assert times["ours"].median >= 1e6 * seconds


def test_short_calls_beside_a_long_one_are_still_timed_twenty_at_a_time():
    seen = []
    peers = {"ours": [lambda: seen.append(1)] * 3, "eager": [lambda: time.sleep(2e-3)] * 3}
    harness.measure(peers, CUDA, min_seconds=0.0)
    assert len(seen) == 3 + 3 + harness.FEW * 20


def test_captured_calls_write_to_memory_of_their_own():
    alive: set[int] = set()
    shared = []

    class Output:
        def __init__(self) -> None:
            alive.add(id(self))
            shared.append(len(alive))

        def __del__(self) -> None:
            alive.discard(id(self))

    harness.measure({"ours": [Output] * 3}, CUDA, graph=True, min_seconds=0.0)
    assert max(shared) == 20
    assert not alive


def jobs(ops: op_bench.OpBench, *options: str) -> list[tuple[str, str]]:
    """(shape, dtype) of the rows, in their order."""
    args = command.parser(None, ops.name, ops.options).parse_args([*options])
    found = [job.columns for job in replace(ops, backend=lambda case: "triton").jobs(args)]
    return list(dict.fromkeys((columns["shape"], columns["dtype"]) for columns in found))


def test_bf16_comes_first_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    shapes = ("--shape", "2x3x4", "--shape", "5x6x7")
    on_cpu, on_gpu = (jobs(bench_sde_step.BENCH, "--device", name, *shapes) for name in ("cpu", "cuda"))
    assert on_cpu == [("2x3x4", "fp32"), ("5x6x7", "fp32"), ("2x3x4", "bf16"), ("5x6x7", "bf16")]
    assert on_gpu == on_cpu[2:] + on_cpu[:2]


def test_large_fp32_heads_are_measured_where_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    options = ("--device", "cuda", "--shape", "1024x8x50", "--shape", "256x8x50")
    assert jobs(bench_digit_score.BENCH, *options) == [
        ("1024x8x50", "bf16"), ("256x8x50", "bf16"), ("256x8x50", "fp32"),
    ]  # fmt: skip
    assert jobs(bench_digit_score.BENCH, *options, "--dtype", "fp32") == [("1024x8x50", "fp32"), ("256x8x50", "fp32")]


def test_processors_that_are_named_alike_are_told_apart():
    milan, turin = (
        ["processor\t: 0", f"cpu family\t: {family}", f"model\t\t: {model}", "model name\t: AMD EPYC", "stepping\t: 1"]
        for family, model in ((25, 1), (26, 2))
    )
    second = ["", "processor\t: 1", "cpu family\t: 6", "model name\t: another"]
    assert record.processor_name(milan + second) == "AMD EPYC (family 25, model 1)"
    assert record.processor_name(turin) == "AMD EPYC (family 26, model 2)"
    assert record.processor_name(["model name\t: Cortex"]) == "Cortex"
    assert record.processor_name(["processor\t: 0", "CPU implementer\t: 0x41"]) is None
    assert record.device_name(torch.device("cpu"))
