"""The benches of what scores: their models are built once, and on a GPU, where calls are long, they are few."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_consistency
import bench_judge
import harness
from peers.consistency_loop import ConsistencyLoop
from transformers import BitImageProcessorPil

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Measured(Exception):
    """With how many samples."""


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("bench", [bench_judge, bench_consistency])
def test_full_sizes_are_timed_a_few_times(bench, device, monkeypatch):
    def measure(peers, timed_on, *, min_seconds, samples):
        assert timed_on == CPU  # calls end on the host
        raise Measured(samples)

    monkeypatch.setattr(harness, "measure", measure)
    monkeypatch.setattr(harness, "host_samples", lambda own, right=harness.host_samples: right(device))
    expected = {CPU: 20, CUDA: harness.FEW}[device]
    with pytest.raises(Measured, match=f"^{expected}$"):
        bench.bench(bench.Case(False, CPU, 2, 1), 0.0)


def test_cases_share_a_judge():
    one = bench_judge.Case(False, CPU, 2, 1)
    assert replace(one, turns=3).parts[0] is one.parts[0]


def test_the_full_judge_has_its_own_dtype_and_leaves_the_default(monkeypatch):
    built = []

    def small(config):
        built.append((config, torch.get_default_dtype(), torch.get_default_device()))
        return torch.nn.Linear(2, 2)

    monkeypatch.setattr(bench_judge, "Qwen3VLForConditionalGeneration", small)
    bench_judge.parts.cache_clear()
    model, _ = bench_judge.parts(True, CPU, torch.bfloat16)
    bench_judge.parts.cache_clear()
    ((config, *found),) = built
    assert found == [torch.bfloat16, CPU]
    assert model.weight.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
    assert config.text_config.vocab_size == 151_936


def test_the_loop_scales_with_pil():
    """Not with torchvision where that is installed."""
    assert type(ConsistencyLoop(bench_consistency.Case(False, CPU).model).processor) is BitImageProcessorPil
