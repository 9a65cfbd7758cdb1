"""`token_log_probs` on every back end against the whole log-softmax in fp64."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_backends import BACKENDS, DEVICES, exact_products
from sde_truth import assert_as_good
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtedit_fast.ops import _linear_softmax, token_log_probs
from mtedit_fast.ops._backend import unavailable_reason

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INTERPRETED = not torch.cuda.is_available()
TRITON_REASON = unavailable_reason("triton", torch.device(DEVICES["triton"]), ())
IGNORED = -100


@pytest.fixture(params=[case for case in BACKENDS if case.values[0] != "cpp"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def inputs(shape: tuple[int, ...], h: int, v: int, dtype: torch.dtype = FP32, seed: int = 0) -> list[Tensor]:
    """hidden, weight, bias and targets, some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(*shape, h, generator=generator) / h**0.5, torch.randn(v, h, generator=generator)
    targets = torch.randint(v, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < 0.2] = IGNORED
    return [hidden.to(dtype), 2 * weight.to(dtype), torch.randn(v, generator=generator).to(dtype), targets]


def run(backend: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, **options: Any) -> Any:
    """On the back end's device and back."""
    device = DEVICES[backend]
    given = {"bias": bias if bias is None else bias.to(device), "backend": backend, **options}
    out = token_log_probs(hidden.to(device), weight.to(device), targets.to(device), **given)
    return tuple(field.cpu() for field in out) if isinstance(out, tuple) else out.cpu()


def literal(hidden, weight, bias, targets, *, temperature=1.0, vocab_size=None, return_entropy=False):
    """All logits, in the dtype of the inputs; their log-softmax in fp32 at least."""
    logits = F.linear(hidden, weight, bias)[..., :vocab_size]
    log_p = (logits.to(torch.promote_types(logits.dtype, FP32)) / temperature).log_softmax(-1)
    ignored = targets == IGNORED
    picked = log_p.gather(-1, targets.masked_fill(ignored, 0)[..., None])[..., 0].masked_fill(ignored, 0)
    entropy = -(log_p.exp() * log_p.clamp(min=-1e6)).sum(-1).masked_fill(ignored, 0)
    return (picked, entropy) if return_entropy else picked


def with_gradients(function, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """The outputs, and their gradient with respect to hidden, weight and bias."""
    leaves = [tensor if tensor is None else tensor.detach().clone().requires_grad_() for tensor in tensors[:3]]
    out = function(*leaves, tensors[3], **options)
    out = out if isinstance(out, tuple) else (out,)
    total = 0.0
    for i, field in enumerate(out):
        total = total + (field.flatten() * torch.linspace(-1 - i, 2, field.numel()).to(field)).sum()
    grads = torch.autograd.grad(total, [leaf for leaf in leaves if leaf is not None])
    return [*(field.detach() for field in out), *grads]


def double(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor if tensor is None or tensor is tensors[3] else tensor.double() for tensor in tensors]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "vocab_size": 120},
    {"return_entropy": True},
    {"return_entropy": True, "temperature": 1.7, "vocab_size": 120},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("biased", [False, True])
def test_values_and_gradients_against_fp64(backend: str, biased: bool, dtype: torch.dtype, options) -> None:
    tensors = inputs((2, 1, 5), 33, 150, dtype)
    tensors[3] = torch.where(tensors[3] >= 120, 7, tensors[3])
    if not biased:
        tensors[2] = None
    ours = with_gradients(lambda *x, **o: run(backend, *x, **o), tensors, **options)
    torchs = with_gradients(literal, tensors, **options)
    truth = with_gradients(literal, double(tensors), **options)
    fields = 1 + bool(options.get("return_entropy"))
    for i, (mine, peer, true) in enumerate(zip(ours, torchs, truth, strict=True)):
        assert mine.dtype == (FP32 if i < fields else dtype)
        assert_as_good(mine, peer, true)
    assert (ours[0][tensors[3] == IGNORED] == 0).all()
    assert (ours[fields][tensors[3] == IGNORED] == 0).all()
    assert "vocab_size" not in options or (ours[fields + 1][120:] == 0).all()


@pytest.mark.parametrize(("n", "v"), [(0, 33), (1, 1), (1, 33), (3, 129), (16, 128), (4097, 65)])
def test_sizes(backend: str, n: int, v: int) -> None:
    n = min(n, 67) if backend == "triton" and INTERPRETED else n
    tensors = inputs((n,), 7, v)
    for mine, peer, true in zip(
        run(backend, *tensors, return_entropy=True),
        literal(*tensors, return_entropy=True),
        literal(*double(tensors), return_entropy=True),
        strict=True,
    ):
        assert mine.shape == (n,)
        if n:
            assert_as_good(mine, peer, true)


def test_the_vocabulary_of_a_real_model(backend: str) -> None:
    tensors = inputs((3,), 4, 5193 if backend == "triton" and INTERPRETED else 151_936)
    assert_as_good(run(backend, *tensors), literal(*tensors), literal(*double(tensors)))


def test_gradcheck() -> None:
    hidden, weight, bias, targets = inputs((2, 3), 4, 21, FP64)
    targets = targets.clamp(max=18)
    options = {"temperature": 1.3, "vocab_size": 19, "return_entropy": True}
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(lambda h, w, b: token_log_probs(h, w, targets, bias=b, **options), leaves)


def test_double_inputs_stay_double() -> None:
    tensors = inputs((5,), 6, 40, FP64)
    torch.testing.assert_close(run("reference", *tensors), literal(*tensors), rtol=1e-12, atol=1e-12)


def test_it_is_minus_cross_entropy(backend: str) -> None:
    hidden, weight, bias, _ = inputs((2, 9), 12, 50)
    targets = torch.arange(18).reshape(2, 9) % 7
    log_p = run(backend, hidden, weight, bias, targets, ignore_index=3)
    loss = F.cross_entropy(
        F.linear(hidden, weight, bias).flatten(0, 1), targets.flatten(), reduction="none", ignore_index=3
    )
    torch.testing.assert_close(log_p.flatten(), -loss, rtol=1e-5, atol=1e-5)
    assert (log_p[targets == 3] == 0).all()


def test_a_single_position(backend: str) -> None:
    hidden, weight, bias, _ = inputs((), 12, 50)
    log_p = run(backend, hidden, weight, bias, torch.tensor(4))
    assert log_p.shape == ()
    torch.testing.assert_close(log_p, F.linear(hidden, weight, bias).log_softmax(0)[4], rtol=1e-5, atol=1e-5)


def test_padding_may_hold_anything(backend: str) -> None:
    """Positions that are ignored, and rows of the weight past vocab_size."""
    tensors = inputs((12,), 9, 40, seed=1)
    ignored = tensors[3] == IGNORED
    assert ignored.any()
    tensors[3] = torch.where(ignored, IGNORED, tensors[3] % 35)
    poisoned = [tensor.clone() for tensor in tensors]
    poisoned[0][ignored], poisoned[1][35:], poisoned[2][35:] = torch.nan, torch.nan, torch.nan
    options = {"vocab_size": 35, "return_entropy": True}
    clean, found = (with_gradients(lambda *x, **o: run(backend, *x, **o), x, **options) for x in (tensors, poisoned))
    for one, other in zip(clean, found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's NumPy
def test_nan_stays_in_its_row(backend: str) -> None:
    tensors = inputs((5,), 9, 40)
    tensors[3] = tensors[3].clamp(min=0)
    tensors[0][2, 3] = torch.nan
    for field in run(backend, *tensors, return_entropy=True):
        assert field.isnan().tolist() == [False, False, True, False, False]


def test_extreme_logits(backend: str) -> None:
    hidden, weight = torch.tensor([[1e4], [-1e4], [0.0]]), torch.arange(300.0)[:, None] / 300
    log_p, entropy = run(backend, hidden, weight, None, torch.tensor([299, 299, 5]), return_entropy=True)
    expected = F.linear(hidden.double(), weight.double()).log_softmax(-1)
    torch.testing.assert_close(log_p, expected[range(3), [299, 299, 5]].float())
    assert (log_p <= 0).all()
    assert_as_good(entropy, entropy, torch.special.entr(expected.exp()).sum(-1))


def test_tokens_masked_by_an_infinite_bias(backend: str) -> None:
    hidden, weight, bias, _ = inputs((4,), 9, 300)
    bias[:260] = -torch.inf  # whole tiles
    tensors = [hidden, weight, bias, torch.tensor([299, 270, 260, 261])]
    ours = with_gradients(
        lambda *x, **o: run(backend, *x, **o), [hidden, weight, bias, tensors[3]], return_entropy=True
    )
    kept = [hidden, weight[260:], bias[260:], tensors[3] - 260]
    truth = with_gradients(literal, double(kept), return_entropy=True)
    for mine, true in zip(ours[:3], truth[:3], strict=True):
        assert_as_good(mine, true.float(), true)
    for mine, true in zip(ours[3:], truth[3:], strict=True):
        assert (mine[:260] == 0).all()
        assert_as_good(mine[260:], true.float(), true)


@pytest.mark.parametrize(("rows", "chunk_bytes"), [(4096, 4 * 70 * 16), (16, 4 * 16 * 16), (7, 1)])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_chunks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, rows: int, chunk_bytes: int, dtype: torch.dtype
) -> None:
    tensors = inputs((35, 2), 8, 103, dtype)
    truth = with_gradients(literal, double(tensors), return_entropy=True)
    monkeypatch.setattr(_linear_softmax, "MAX_ROWS", rows)
    monkeypatch.setitem(_linear_softmax.CHUNK_BYTES, "cpu", chunk_bytes)
    found = with_gradients(lambda *x, **o: run("reference", *x, **o), tensors, return_entropy=True)
    for mine, true in zip(found, truth, strict=True):
        assert_as_good(mine, true.to(mine.dtype), true)


class Largest(TorchDispatchMode):
    """The largest tensor that an operator returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("n", [60, 300])
def test_no_chunk_is_larger_than_allowed(monkeypatch: pytest.MonkeyPatch, n: int, dtype: torch.dtype) -> None:
    """Neither logits nor weights in another dtype, forward and backward; [N, V] would be up to 22 times as large."""
    monkeypatch.setitem(_linear_softmax.CHUNK_BYTES, "cpu", 4 * 40_000)
    hidden, weight, _, targets = inputs((n,), 30, 3001, dtype)
    with Largest() as forward:
        lse, _, entropy = _linear_softmax.log_sum_exp(hidden, weight, None, targets, 1.0, 3000, True)
    assert 20_000 < forward.numel <= 40_000
    one = torch.ones(n)
    arguments = (hidden, weight, None, lse, entropy, one, one, targets[:, None], one[:, None], 1.0, 3000)
    with Largest() as backward:
        _linear_softmax.softmax_backward(*arguments, (True, False, False))
    assert 20_000 < backward.numel <= 40_000
    with Largest() as backward:
        _linear_softmax.softmax_backward(*arguments, (True, True, True))
    assert backward.numel == weight.numel()  # its gradient


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_kernel_does_a_row_alone_as_in_a_batch_bit_for_bit(dtype: torch.dtype) -> None:
    if TRITON_REASON:
        pytest.skip(TRITON_REASON)
    n = 70 if INTERPRETED else 300
    tensors = inputs((n,), 77, 300, dtype)
    if INTERPRETED:
        tensors[:2] = map(exact_products, tensors[:2])
    together = run("triton", *tensors, return_entropy=True)
    for rows in (slice(0, 1), slice(n - 1, n), slice(60, 66)):
        alone = run("triton", tensors[0][rows], *tensors[1:3], tensors[3][rows], return_entropy=True)
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one, other[rows])


def test_slabs_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    if TRITON_REASON:
        pytest.skip(TRITON_REASON)
    from mtedit_fast.kernels import linear_logsumexp

    tensors = inputs((65,), 9, 70)
    whole = run("triton", *tensors, return_entropy=True)
    monkeypatch.setattr(linear_logsumexp, "PARTIAL_BYTES", 1)
    assert len(list(linear_logsumexp.slabs(tensors[0], 70, 3))) == 2
    for one, other in zip(run("triton", *tensors, return_entropy=True), whole, strict=True):
        assert torch.equal(one, other)


def test_views_equal_copies(backend: str) -> None:
    _, weight, bias, targets = inputs((3, 4), 12, 60)
    wide = torch.randn(3, 5, 24)
    for hidden, matrix in (
        (wide[:, :-1, ::2], weight),
        (wide[:, 1:, 5:17], weight.T.contiguous().T),
        (wide.transpose(0, 1)[:3, :, :12].new_ones(3, 4, 12), torch.randn(60, 20)[:, 3:15]),
    ):
        views = run(backend, hidden, matrix, bias, targets.T.contiguous().T)
        torch.testing.assert_close(views, run(backend, hidden.contiguous(), matrix.contiguous(), bias, targets))


def test_outputs_never_keep_what_was_in_memory(backend: str) -> None:
    """Every element is written: memory handed out next is filled with NaN first."""
    tensors = inputs((3, 3), 9, 140)
    tensors[3] = tensors[3].clamp(max=129)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            with_gradients(lambda *x, **o: run(backend, *x, **o), tensors, vocab_size=130, return_entropy=True)
            for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(first, second, strict=True):
        assert not one.isnan().any()
        assert torch.equal(one, other)


def test_only_what_is_asked_for_gets_a_gradient(backend: str) -> None:
    tensors = inputs((6,), 9, 30)
    whole = with_gradients(lambda *x: run(backend, *x), tensors)[1:]
    for i in range(3):
        given = [tensor.clone() for tensor in tensors]
        given[i].requires_grad_()
        log_p = run(backend, *given)
        (grad,) = torch.autograd.grad((log_p * torch.linspace(-1, 2, 6)).sum(), given[i])
        torch.testing.assert_close(grad, whole[i], rtol=1e-6, atol=1e-6)


H, W, B, T = inputs((3, 4), 8, 20)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "hidden must be a floating-point tensor, got list", {"hidden": [1.0]}),
        (TypeError, "weight must be a floating-point tensor, got torch.int64", {"weight": torch.ones(20, 8).long()}),
        (TypeError, "bias must have hidden's dtype torch.float32, got torch.bfloat16; cast", {"bias": B.bfloat16()}),
        (ValueError, "weight must be on hidden's device cpu, got meta", {"weight": W.to("meta")}),
        (ValueError, "weight must be [vocabulary, H] with at least one row and column, got [8]", {"weight": W[0]}),
        (ValueError, "hidden must end in weight's H = 8, got [3, 4, 7]", {"hidden": H[..., :7]}),
        (ValueError, "bias must be [vocabulary] = [20], got [19]", {"bias": B[:19]}),
        (ValueError, "temperature must be finite and > 0, got 0", {"temperature": 0}),
        (ValueError, "temperature must be finite and > 0, got nan", {"temperature": float("nan")}),
        (ValueError, "vocab_size must be an integer in 1…20, the rows of weight, got 21", {"vocab_size": 21}),
        (TypeError, "targets must be an int64 tensor, got list", {"targets": [[1]]}),
        (TypeError, "targets must be an int64 tensor, got torch.int32", {"targets": T.int()}),
        (ValueError, "targets must be [3, 4] as hidden is, got [3]", {"targets": T[:, 0]}),
        (ValueError, "targets must be on hidden's device cpu, got meta", {"targets": T.to("meta")}),
        (ValueError, "targets must lie in 0…19 or be ignore_index = -100, got 20", {"targets": torch.full((3, 4), 20)}),
        (ValueError, "or be ignore_index = -1, got -100", {"targets": torch.full((3, 4), -100), "ignore_index": -1}),
        (ValueError, "backend must be one of ('auto', 'reference', ", {"backend": "cpp"}),
    ],
)
def test_bad_arguments_are_named(error, message, change) -> None:
    arguments = {"hidden": H, "weight": W, "targets": T} | change
    with pytest.raises(error, match=re.escape(message)):
        token_log_probs(**arguments)


def test_an_asked_backend_never_falls_back() -> None:
    with pytest.raises(ValueError, match=r"backend='triton' is not available: it computes in fp32 and takes"):
        token_log_probs(H.double(), W.double(), T, backend="triton")
