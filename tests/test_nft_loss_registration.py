"""`nft_loss` and `crd_loss` as registered operators, their compiled kernels, and what only a GPU can show."""

import pytest
import torch
from compiled import Row, assert_no_fp64_or_spills, assert_wide, compile_all
from op_backends import DEVICES
from test_crd_loss import GROUPS
from test_nft_loss import BF16, every_backend
from torch import Tensor
from velocity_truth import rows, velocities

from mtedit_fast.ops import crd_loss, nft_loss

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def on_device(backend: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor], Tensor]:
    device = DEVICES[backend]
    tensors = [tensor.to(device) for tensor in velocities(6, 3, 21, dtype=dtype)[:4]]
    return tensors, [row.to(device) for row in rows(6)], GROUPS.to(device)


@every_backend
@pytest.mark.parametrize("name", ["nft", "crd"])
def test_compiled_equals_eager(backend: str, name: str) -> None:
    (theta, old, target, ref), (t, r, weight), groups = on_device(backend)

    def step(leaf: Tensor) -> tuple[Tensor, ...]:
        options = {"v_ref": ref, "kl_weight": 0.1, "beta": 0.7, "weight": weight, "backend": backend}
        if name == "nft":
            out = nft_loss(leaf, old, target, t, r, **options)
        else:
            out = crd_loss(leaf, old, target, r, groups, **options)
        return tuple(out)

    def gradients(function) -> tuple[Tensor, ...]:
        leaf = theta.clone().requires_grad_()
        out = function(leaf)
        return *out, *torch.autograd.grad(out[0], leaf)

    torch._dynamo.reset()  # or each back end would count as a recompilation of the one before
    compiled = torch.compile(step, fullgraph=True)
    with torch.no_grad():
        plain = compiled(theta), step(theta)
    for a, b in (*zip(*plain, strict=True), *zip(gradients(compiled), gradients(step), strict=True)):
        assert torch.equal(a, b)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(backend: str, dtype: torch.dtype, full: bool) -> None:
    (theta, old, target, ref), (t, r, weight), groups = on_device(backend, dtype)
    theta.requires_grad_()
    given = (old, target, ref) if full else (None, target, None)
    nft = (theta, *given, t, r, weight if full else None, 0.7, 5.0, 0.1 if full else 0.0, backend)
    torch.library.opcheck(torch.ops.mtedit_fast.nft_loss.default, nft)
    centring = (groups, None) if full else (None, t)
    crd = (theta, *given, r, *centring, weight if full else None, 0.7, 5.0, full, 0.1, 0.05, backend)
    torch.library.opcheck(torch.ops.mtedit_fast.crd_loss.default, crd)
    backward = (theta.detach(), *given, torch.rand(3, 6, device=r.device), torch.ones((), device=r.device), backend)
    torch.library.opcheck(torch.ops.mtedit_fast.velocity_loss_backward.default, backward)


@pytest.fixture(scope="module")
def compiled_kernels() -> list[Row]:
    """Every kernel and architecture, compiled without a GPU, in a process without the interpreter."""
    return compile_all("ptx_velocity_loss.py")


def test_compiles_for_every_architecture_without_fp64_or_spills(compiled_kernels: list[Row]) -> None:
    assert_no_fp64_or_spills(compiled_kernels, {"nft", "crd", "backward"})
    assert_wide(compiled_kernels, "one element")
    for row in compiled_kernels:
        assert row["reg"] <= 168, row  # three programs of 128 threads to a multiprocessor
        assert row["fused"] == 0, row


@needs_gpu
@pytest.mark.parametrize("name", ["nft", "crd"])
def test_two_launches_no_sync_and_a_captured_graph(name: str) -> None:
    theta, old, target, ref = (tensor.cuda() for tensor in velocities(6, 300, 64, dtype=BF16)[:4])
    t, r, weight = (row.cuda() for row in rows(6))
    groups = GROUPS.cuda()

    def step(leaf: Tensor) -> tuple[Tensor, Tensor]:
        options = {"v_ref": ref, "kl_weight": 0.1, "weight": weight}
        if name == "nft":
            loss = nft_loss(leaf, old, target, t, r, **options).loss
        else:
            loss = crd_loss(leaf, old, target, r, groups, **options).loss
        return loss.detach(), torch.autograd.grad(loss, leaf, one)[0]

    one = torch.ones((), device="cuda")
    leaf = theta.requires_grad_()
    step(leaf)
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = step(leaf)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(leaf)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 2, kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(leaf)
    for _ in range(2):
        graph.replay()
        for a, b in zip(captured, eager, strict=True):
            assert torch.equal(a, b)


@needs_gpu
def test_more_elements_than_an_int32_counts() -> None:
    theta = torch.randn(513, 2**22, dtype=BF16, device="cuda")
    target = torch.zeros_like(theta)
    t, r = torch.full((2, 513), 0.75, device="cuda")
    weight = torch.full((513,), 1.0, device="cuda")
    leaf = theta.requires_grad_()
    out = nft_loss(leaf, None, target, t, r, weight=weight)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    last = leaf.detach()[-1:].requires_grad_()
    alone = nft_loss(last, None, target[-1:], t[-1:], r[-1:], weight=weight[-1:])
    assert torch.equal(alone.policy, out.policy[-1:])
    assert torch.equal(torch.autograd.grad(alone.loss, last)[0], grad[-1:])
