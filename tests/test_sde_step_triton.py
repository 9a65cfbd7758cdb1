"""The Triton kernels as compiled code, and what only a GPU can show. `test_sde_step.py` checks their numbers."""

import pytest
import torch
import triton
import triton.language as tl
from compiled import Row, assert_no_fp64_or_spills, assert_wide, compile_all
from op_backends import COMPILED, GPU

from mtedit_fast.kernels.seeded_noise import fast_sqrt
from mtedit_fast.ops import sde_coefficients, sde_step

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SIGMAS = [1.0, 0.84375, 0.625, 0.375, 0.125]


@pytest.fixture(scope="module")
def compiled() -> list[Row]:
    """Every kernel, specialisation and architecture, compiled without a GPU."""
    return compile_all("ptx_sde_step.py")


def test_compiles_for_every_architecture_without_fp64_or_spills(compiled: list[Row]) -> None:
    assert_no_fp64_or_spills(compiled, {"forward", "backward", "noise"})
    assert_wide(compiled, "one element")
    for row in compiled:
        assert row["reg"] <= 128, row  # two blocks of 256 threads to a multiprocessor


def test_nothing_else_fuses_multiply_adds(compiled: list[Row]) -> None:
    """Anything else fused would break the bit-equality with the other back ends.

    Two normals have four multiplications by powers of two or of few bits, whose result is exact, and the two of the
    square root that ptxas writes for `sqrt.rn`, too; a density has those of its logarithm.
    """
    gaussian = [row for row in compiled if row["kernel"].startswith("forward") and "squared" not in row["kernel"]]
    assert [row for row in compiled if row["drawn"]]
    assert all(row["fused"] == 3 * row["drawn"] for row in compiled if row not in gaussian)
    assert {row["fused"] - 3 * row["drawn"] for row in gaussian} == {gaussian[0]["fused"] - 3 * gaussian[0]["drawn"]}


@triton.jit
def _roots(x_ptr, out_ptr, count: tl.constexpr):
    at = tl.arange(0, count)
    tl.store(out_ptr + at, fast_sqrt(tl.load(x_ptr + at)))


def test_fast_square_roots() -> None:
    """Rounded as IEEE says where multiply-adds are fused, which the interpreter's are not; of −0, which comes of the
    largest random words."""
    x = torch.cat((torch.tensor([0.0, -0.0, 2.0**-23, 45.8]), 46 * torch.rand(2**16 - 4).clamp(min=1e-7))).to(GPU)
    found = torch.empty_like(x)
    _roots[(1,)](x, found, count=len(x), enable_fp_fusion=False)
    exact = x.double().sqrt().float()
    assert torch.equal(found[:2].signbit().cpu(), torch.tensor([False, True]))
    assert torch.equal(found[:2], exact[:2])
    ulps = (found.view(torch.int32) - exact.view(torch.int32)).abs().max()
    assert ulps == 0 if COMPILED else ulps <= 1


@needs_gpu
def test_one_launch_per_step() -> None:
    coefficients = sde_coefficients(SIGMAS, device="cuda")
    sample, velocity = torch.randn(2, 8, 4096, 16, device="cuda")
    seed = torch.arange(8, device="cuda")
    sde_step(sample, velocity, coefficients, 1, seed=seed)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        sde_step(sample, velocity, coefficients, 2, seed=seed)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, kernels


@needs_gpu
def test_cuda_graph_of_a_schedule_and_no_sync() -> None:
    coefficients = sde_coefficients(SIGMAS, device="cuda")
    start = torch.randn(4, 4096, 16, device="cuda")
    seed = torch.arange(4, device="cuda")

    def rollout(sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs = []
        for i in range(len(SIGMAS) - 1):
            sample, log_prob, _ = sde_step(sample, torch.sin(sample), coefficients, i, seed=seed)
            log_probs.append(log_prob)
        return sample, torch.stack(log_probs)

    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = rollout(start)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    buffer = torch.empty_like(start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rollout(buffer)
    buffer.copy_(start)
    for _ in range(2):
        graph.replay()
        for a, b in zip(captured, eager, strict=True):
            assert torch.equal(a, b)


@needs_gpu
def test_large_samples_and_large_batches() -> None:
    """More partial sums than one pass over them holds, and more elements than 2³¹."""
    coefficients = sde_coefficients(SIGMAS, device="cuda")
    noise = torch.randn(1, 2**24 + 5, device="cuda")
    log_prob = sde_step(noise, noise, coefficients, 1, noise=noise).log_prob
    c = coefficients.table[1, 2].double()
    truth = -noise.double().square().mean() / 2 - c.log() - 0.9189385332046727
    assert (log_prob.double() - truth).abs() <= 1e-5
    sample = torch.zeros(2**9 + 1, 2**22, dtype=torch.bfloat16, device="cuda")
    seed = torch.arange(sample.shape[0], device="cuda")
    out = sde_step(sample, sample, coefficients, 1, seed=seed, return_mean=False)
    last = sde_step(sample[-1:], sample[-1:], coefficients, 1, seed=seed[-1:], return_mean=False)
    assert torch.equal(out.prev_sample[-1:], last.prev_sample)
    assert torch.equal(out.log_prob[-1:], last.log_prob)
