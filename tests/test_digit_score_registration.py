"""`digit_score` and `token_log_probs` as registered operators: opcheck, torch.compile, and their compiled kernels."""

from typing import Any

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
from test_digit_score import BF16, FP32, IDS, VALUES, backend, inputs  # noqa: F401

from mtedit_fast.ops import digit_score, token_log_probs

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def assert_compiled_equals_eager(function, tensors, **options: Any) -> None:
    compiled = torch.compile(function, fullgraph=True, **options)
    with torch.no_grad():
        for one, other in zip(compiled(*tensors), function(*tensors), strict=True):
            assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))
    results = []
    for run in (compiled, function):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out = run(*leaves)
        loss = sum(field.nan_to_num().square().sum() for field in out if field.requires_grad)
        results.append([*(field.detach().nan_to_num(7) for field in out), *torch.autograd.grad(loss, leaves)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("normalize", "compiler"), [("set", "aot_eager"), ("vocab", "inductor")])
def test_compiled_scores_equal_eager(backend: str, normalize: str, compiler: str) -> None:  # noqa: F811
    x = [tensor.to(DEVICES[backend]) for tensor in inputs(4, 9, 40)]
    options = {"normalize": normalize, "target": x[3], "temperature": 0.7, "vocab_size": 35, "backend": backend}

    def scores(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = digit_score(hidden, weight, IDS, VALUES, bias=bias, **options)
        return tuple(field for field in out if field is not None)

    assert_compiled_equals_eager(scores, x[:3], backend=compiler)


@pytest.mark.parametrize(("compiler", "chosen"), [("aot_eager", "auto"), ("inductor", "")])
def test_compiled_log_probs_equal_eager(backend: str, compiler: str, chosen: str) -> None:  # noqa: F811
    x = [tensor.to(DEVICES[backend]) for tensor in inputs(4, 9, 40)]
    targets = x[3].clamp(min=0)
    targets[1] = -100

    def log_probs(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        options = {"bias": bias, "backend": chosen or backend}
        return token_log_probs(hidden, weight, targets, return_entropy=True, temperature=0.7, **options)

    assert_compiled_equals_eager(log_probs, x[:3], backend=compiler)


@pytest.mark.parametrize(("full", "dtype"), [(False, FP32), (True, BF16)])
def test_opcheck(backend: str, full: bool, dtype: torch.dtype) -> None:  # noqa: F811
    hidden, weight, bias, _ = (tensor.to(DEVICES[backend]) for tensor in inputs(2, 9, 40, dtype))
    target = torch.tensor([0, 3], device=hidden.device)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    operators = torch.ops.mtedit_fast
    more = (bias, target) if full else (None, None)
    score = (*leaves[:2], *more, IDS, VALUES, 1.5, 35, full, backend)
    torch.library.opcheck(operators.digit_score.default, score)
    log_prob = (*leaves[:2], more[0], target, 1.5, 35, full, backend)
    torch.library.opcheck(operators.token_log_probs.default, log_prob)

    plain = [tensor.detach() for tensor in leaves[:2]] + [bias.detach() if full else None]
    needs = [True, full, full]
    fields = [tensor.detach() for tensor in operators.digit_score(*score)]
    given = (torch.ones_like(fields[0]), *fields, *plain, more[1], *score[4:9], needs)
    torch.library.opcheck(operators.digit_score_backward.default, given)
    fields = [tensor.detach() for tensor in operators.token_log_probs(*log_prob)]
    given = (torch.ones_like(fields[0]), torch.ones_like(fields[1]), *fields[1:], *plain, *log_prob[3:7], needs)
    torch.library.opcheck(operators.token_log_probs_backward.default, given)


@pytest.fixture(scope="module")
def compiled_kernels() -> list[Row]:
    """Every kernel and architecture, compiled without a GPU, in a process without the interpreter."""
    return compile_all("ptx_digit_score.py")


def test_compiles_for_every_architecture_without_fp64_or_spills(compiled_kernels: list[Row]) -> None:
    assert_no_fp64_or_spills(compiled_kernels, {"partial", "score", "merge"})
    for row in compiled_kernels:
        assert row["shared"] <= SHARED[row["arch"]], row
        assert row["reg"] <= (255 if row["kernel"].startswith("partial") else 160), row


def test_compiled_for_the_widest_loads_and_tensor_cores(compiled_kernels: list[Row]) -> None:
    assert_wide(compiled_kernels, "ones", "merge")
    half = [row for row in compiled_kernels if row["kernel"] in ("partial", "partial targets", "partial fp16")]
    assert_half_products_on_tensor_cores(half)
    assert not any(row["mma"] for row in compiled_kernels if not row["kernel"].startswith("partial"))


@needs_gpu
@pytest.mark.parametrize("normalize", ["set", "vocab"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_captured_graph_and_no_sync(backend: str, normalize: str) -> None:  # noqa: F811
    hidden, weight, bias, target = (tensor.cuda() for tensor in inputs(40, 256, 5000, BF16))
    options = {"normalize": normalize, "bias": bias, "target": target, "backend": backend}
    digit_score(hidden, weight, IDS, VALUES, **options)  # copies the tokens to the device, once
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = digit_score(hidden, weight, IDS, VALUES, **options)
        log_p = token_log_probs(hidden, weight, target.clamp(min=0), backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = digit_score(hidden, weight, IDS, VALUES, **options)
        captured_log_p = token_log_probs(hidden, weight, target.clamp(min=0), backend=backend)
    graph.replay()
    assert torch.equal(captured.score, eager.score)
    assert torch.equal(captured_log_p, log_p)


@needs_gpu
def test_a_target_outside_the_vocabulary_is_nan() -> None:
    hidden, weight = (tensor.cuda() for tensor in inputs(4, 64, 300)[:2])
    hidden.requires_grad_()
    for name in ("reference", "triton"):
        log_p = token_log_probs(hidden, weight, torch.tensor([0, 300, -1, 299], device="cuda"), backend=name)
        assert log_p.isnan().tolist() == [False, True, True, False]
        (grad,) = torch.autograd.grad(log_p.nansum(), hidden)
        assert (grad[1:3] == 0).all()
