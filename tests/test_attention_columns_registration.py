"""`attention_columns` as a registered operator: opcheck, torch.compile, and the kernels as compiled code."""

import pytest
import torch
from compiled import (
    SHARED,
    Row,
    assert_half_products_on_tensor_cores,
    assert_no_fp64_or_spills,
    assert_wide,
    compile_all,
)
from op_backends import DEVICES
from test_attention_columns import BF16, FP32, backend, inputs  # noqa: F401

from mtedit_fast.ops import attention_columns
from mtedit_fast.ops._backend import unavailable_reason
from mtedit_fast.ops.attention_columns import MOST_WIDTH

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("masked", [False, True])
def test_compiled_equals_eager(backend: str, masked: bool) -> None:  # noqa: F811
    query, key, columns = (t.to(DEVICES[backend]) for t in inputs(2, 2, 18, 40, 12, 4))
    mask = (torch.arange(40) < 33).expand(2, 40).to(query.device) if masked else None

    def maps(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        options = {"mask": mask, "reduce": "none" if masked else "heads", "backend": backend}
        return attention_columns(q[:, :, 3:], k, columns % 33, **options)

    compiled = torch.compile(maps, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(query, key), maps(query, key))
    results = []
    for function in (compiled, maps):
        q, k = query.clone().requires_grad_(), key.clone().requires_grad_()
        found = function(q, k)
        results.append([found.detach(), *torch.autograd.grad(found.square().sum(), (q, k))])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("masked", "dtype"), [(False, FP32), (True, BF16)])
def test_opcheck(backend: str, masked: bool, dtype: torch.dtype) -> None:  # noqa: F811
    query, key, columns = (t.to(DEVICES[backend]) for t in inputs(1, 1, 5, 7, 4, 3, dtype=dtype))
    mask = torch.rand(1, 7).to(query.device) > 0.3 if masked else None
    for needs in ((True, True), (False, False)):
        q, k = (t.clone().requires_grad_(need) for t, need in zip((query, key), needs, strict=True))
        torch.library.opcheck(
            torch.ops.mtedit_fast.attention_columns.default, (q, k, columns, mask, 0.5, not masked, backend)
        )


def test_wide_heads_are_left_to_the_reference() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    query, key, columns = (t.to(device) for t in inputs(1, 1, 3, 5, MOST_WIDTH + 1, 2))
    auto, asked = (attention_columns(query, key, columns, backend=name) for name in ("auto", "reference"))
    assert torch.equal(auto, asked)
    if unavailable_reason("triton", device, (FP32,)) is None:
        with pytest.raises(
            ValueError, match=f"it takes D up to {MOST_WIDTH}, not {MOST_WIDTH + 1}; use backend='auto'"
        ):
            attention_columns(query, key, columns, backend="triton")


@pytest.fixture(scope="module")
def compiled_kernels() -> list[Row]:
    """Every kernel and architecture, compiled without a GPU, in a process without the interpreter."""
    return compile_all("ptx_attention_columns.py")


def test_compiles_for_every_architecture_without_fp64_or_spills(compiled_kernels: list[Row]) -> None:
    assert_no_fp64_or_spills(compiled_kernels, {"lse", "columns", "slopes", "grad_query", "grad_key"})
    for row in compiled_kernels:
        assert row["shared"] <= SHARED[row["arch"]], row


def test_compiled_for_the_widest_loads_and_tensor_cores(compiled_kernels: list[Row]) -> None:
    assert_wide(compiled_kernels, " 72", "odd")
    half = [row for row in compiled_kernels if "*fp32" not in row["kernel"]]
    tiled = [row for row in half if row["kernel"].split()[0] in ("lse", "grad_query", "grad_key")]
    assert_half_products_on_tensor_cores(tiled)
    assert all(row["mma"] for row in half)
    assert not any(row["mma"] for row in compiled_kernels if row not in half)  # fp32 is fp32


@needs_gpu
def test_a_captured_graph_and_no_sync() -> None:
    query, key, columns = (t.cuda() for t in inputs(2, 4, 300, 500, 64, 5, dtype=BF16))
    query.requires_grad_(), key.requires_grad_()
    mask = (torch.arange(500, device="cuda") < 450).expand(2, 500)

    def maps() -> list[torch.Tensor]:
        found = attention_columns(query, key, columns, mask=mask)
        return [found, *torch.autograd.grad(found.square().sum(), (query, key))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        maps()
        torch.cuda.set_sync_debug_mode("error")
        try:
            eager = maps()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = maps()
    graph.replay()
    for one, other in zip(captured, eager, strict=True):
        assert torch.equal(one, other)


@needs_gpu
def test_no_matrix_is_formed() -> None:
    heads, length = 4, 8192
    query, key, columns = (t.cuda() for t in inputs(1, heads, length, length, 64, 5, dtype=BF16))
    query.requires_grad_(), key.requires_grad_()
    torch.autograd.grad(attention_columns(query, key, columns).sum(), (query, key))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(attention_columns(query, key, columns).sum(), (query, key))
    assert torch.cuda.max_memory_allocated() - before < 4 * heads * 2 * length * (64 + 5)
