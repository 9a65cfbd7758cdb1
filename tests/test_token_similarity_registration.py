"""`token_similarity` as a registered operator: opcheck, torch.compile, and the kernels as compiled code."""

import pytest
import torch
from compiled import Row, assert_no_fp64_or_spills, assert_wide, compile_all
from op_backends import DEVICES
from test_token_similarity import BF16, FP32, PAIRS, backend, banks  # noqa: F401

from mtedit_fast.ops import token_similarity

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("weighted", [False, True])
def test_compiled_equals_eager(backend: str, weighted: bool) -> None:  # noqa: F811
    a, b = (t.to(DEVICES[backend]) for t in banks((3, 13, 20), (4, 13, 20)))
    pairs, weights = PAIRS.to(a.device), torch.rand(5, 13).to(a.device) if weighted else None

    def scores(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return token_similarity(x, y[:, :], pairs, weights=weights, normalize=weighted, backend=backend)

    torch._dynamo.reset()  # or each back end would count as a recompilation of the one before
    compiled = torch.compile(scores, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(a, b), scores(a, b))
    results = []
    for function in (compiled, scores):
        x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
        out = function(x, y)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), (x, y))])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(backend: str, weighted: bool, dtype: torch.dtype) -> None:  # noqa: F811
    a, b = (t.to(DEVICES[backend]).requires_grad_() for t in banks((3, 5, 7), (4, 5, 7), dtype=dtype))
    pairs, weights = PAIRS.to(a.device), torch.rand(5, 5).to(a.device) if weighted else None
    sides = (pairs[:, 0].contiguous(), pairs[:, 1].contiguous(), weights, weights)
    torch.library.opcheck(torch.ops.mtedit_fast.token_similarity.default, (a, b, *sides, weighted, True, backend))
    plain = (a.detach(), b.detach(), *sides, weighted, False, backend)
    torch.library.opcheck(torch.ops.mtedit_fast.token_similarity.default, plain)


@pytest.fixture(scope="module")
def compiled_kernels() -> list[Row]:
    """Every kernel and architecture, compiled without a GPU, in a process without the interpreter."""
    return compile_all("ptx_token_similarity.py")


def test_compiles_for_every_architecture_without_fp64_or_spills(compiled_kernels: list[Row]) -> None:
    assert_no_fp64_or_spills(compiled_kernels, {"pool", "cosine", "gradient"})
    assert_wide(compiled_kernels, "odd", "cosine 64")
    for row in compiled_kernels:
        if not row["kernel"].endswith("odd"):  # whose every element has an address of its own
            assert row["reg"] <= 128, row  # two blocks of 256 threads to a multiprocessor


@needs_gpu
def test_a_captured_graph_and_no_sync() -> None:
    a, b = (t.cuda() for t in banks((3, 300, 768), (40, 300, 768), dtype=BF16))
    pairs = torch.stack([torch.arange(40) % 3, torch.arange(40)], 1).cuda()
    weights = torch.rand(40, 300, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = token_similarity(a, b, pairs, weights=weights, normalize=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = token_similarity(a, b, pairs, weights=weights, normalize=True)
    graph.replay()
    assert torch.equal(captured, eager)


@needs_gpu
def test_an_index_outside_the_bank_is_nan() -> None:
    a, b = (t.cuda().requires_grad_() for t in banks((3, 5, 9), (4, 5, 9)))
    pairs = torch.tensor([[0, 0], [3, 1], [1, -1], [2, 3]], device="cuda")
    scores = token_similarity(a, b, pairs, normalize=True)
    assert scores.isnan().tolist() == [False, True, True, False]
    for grad in torch.autograd.grad(scores.nansum(), (a, b)):
        assert not grad.isnan().any()
