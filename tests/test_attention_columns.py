"""`attention_columns` on every back end against fp64 and PyTorch, which form the matrix."""

import importlib
import math

import pytest
import torch
from op_backends import BACKENDS, COMPILED, DEVICES
from sde_truth import assert_as_good
from torch import Tensor

from mtedit_fast.ops import attention_columns
from mtedit_fast.training.memory import peak_bytes

module = importlib.import_module("mtedit_fast.ops.attention_columns")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture(params=[case for case in BACKENDS if case.values[0] != "cpp"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def inputs(*size: int, dtype: torch.dtype = FP32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key of size (B, H, Lq, Lk, D, C), and columns [B, C], the first of which comes up twice."""
    batch, heads, queries, keys, width, count = size
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(batch, heads, queries, width, generator=generator)
    key = torch.randn(batch, heads, keys, width, generator=generator)
    columns = torch.randint(keys, (batch, count), generator=generator)
    if count > 1:
        columns[:, -1] = columns[:, 0]
    return query.to(dtype), key.to(dtype), columns


def run(backend: str, query: Tensor, key: Tensor, columns: Tensor, mask: Tensor | None = None, **options) -> Tensor:
    """On the back end's device and back."""
    device = DEVICES[backend]
    mask = mask if mask is None else mask.to(device)
    query, key = query.to(device), key.to(device)
    return attention_columns(query, key, columns.to(device), mask=mask, backend=backend, **options).cpu()


def literal(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    reduce: str = "heads",
) -> Tensor:
    """The whole matrix, in the dtype of the arguments."""
    scale = query.shape[3] ** -0.5 if scale is None else scale
    logits = query @ key.mT * scale
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
    columns = columns.expand(len(query), columns.shape[-1])
    picked = logits.softmax(-1).gather(3, columns[:, None, None].expand(*logits.shape[:3], -1))
    return picked.mean(1) if reduce == "heads" else picked


def with_gradients(function, query: Tensor, key: Tensor, *rest, **options) -> list[Tensor]:
    query, key = (t.detach().clone().requires_grad_() for t in (query, key))
    found = function(query, key, *rest, **options)
    upstream = torch.linspace(-1, 2, found.numel()).reshape(found.shape).sin().to(found)
    return [found.detach(), *torch.autograd.grad((found * upstream).sum(), (query, key))]


def compared(backend: str, query: Tensor, key: Tensor, *rest, **options) -> list[Tensor]:
    """Ours, with gradients, after comparing it with fp64 and with PyTorch in fp32."""
    ours = with_gradients(lambda *x, **o: run(backend, *x, **o), query, key, *rest, **options)
    torchs = with_gradients(literal, query, key, *rest, **options)
    truth = with_gradients(literal, query.double(), key.double(), *rest, **options)
    for mine, peer, exact in zip(ours, torchs, truth, strict=True):
        assert mine.dtype == FP32
        assert mine.shape == exact.shape
        assert_as_good(mine, peer, exact)
    return ours


SIZES = [(1, 1, 1, 1, 1, 1), (1, 2, 63, 1, 8, 2), (1, 2, 1, 63, 72, 3), (2, 2, 18, 35, 20, 5), (1, 2, 17, 33, 128, 18)]


@pytest.mark.parametrize("reduce", ["heads", "none"])
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_against_fp64(backend: str, size, reduce: str) -> None:
    compared(backend, *inputs(*size), reduce=reduce)


@pytest.mark.parametrize("size", [(1, 1, 200, 5, 16, 3), (1, 1, 3, 4097, 16, 3)])
def test_long_sequences(backend: str, size) -> None:
    compared(backend, *inputs(*size))


@pytest.mark.parametrize("size", [(1, 1, 1000, 4097, 16, 4), (1, 1, 4097, 63, 16, 4)])
def test_longer_ones(size) -> None:
    compared("reference", *inputs(*size))


@pytest.mark.parametrize(
    ("shared", "masked", "scale", "reduce"),
    [
        (True, False, None, "heads"),
        (False, True, None, "heads"),
        (False, False, 0.7, "none"),
        (True, True, -0.7, "none"),
        (True, True, 1, "heads"),
    ],
)
def test_options_together(backend: str, shared: bool, masked: bool, scale: float | None, reduce: str) -> None:
    query, key, columns = inputs(2, 2, 18, 40, 12, 4)
    mask = None
    if masked:
        mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) > 0.4
        mask[:, 39] = True
        mask[torch.arange(2), columns[:, 1]] = False
    columns = columns[0] if shared else columns
    ours = compared(backend, query, key, columns, mask, scale=scale, reduce=reduce)
    if mask is not None:
        assert (ours[0][0, ..., 1] == 0).all()
        assert (ours[2].transpose(1, 2)[~mask] == 0).all()


@pytest.mark.parametrize("reduce", ["heads", "none"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_half_inputs_are_computed_in_fp32(backend: str, dtype: torch.dtype, reduce: str) -> None:
    query, key, columns = inputs(1, 2, 34, 133, 40, 5, dtype=dtype)
    ours = with_gradients(lambda *x: run(backend, *x, reduce=reduce), query, key, columns)
    truth = with_gradients(literal, query.double(), key.double(), columns, reduce=reduce)
    assert ours[0].dtype == FP32
    assert_as_good(ours[0], truth[0].float(), truth[0])
    torchs = with_gradients(literal, query, key, columns, reduce=reduce)
    for mine, peer, exact in zip(ours[1:], torchs[1:], truth[1:], strict=True):
        assert mine.dtype == dtype
        # Compiled for a GPU the kernels round ∂/∂logit as fused attention does.
        assert_as_good(mine, peer if backend == "triton" and COMPILED else exact.to(dtype), exact)


def test_double_inputs_stay_double() -> None:
    query, key, columns = inputs(2, 2, 7, 9, 5, 3, dtype=FP64)
    for reduce in ("heads", "none"):
        found = attention_columns(query, key, columns, reduce=reduce)
        assert found.dtype == FP64
        expected = literal(query, key, columns, reduce=reduce)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduce", ["heads", "none"])
def test_gradcheck(reduce: str, masked: bool) -> None:
    query, key, columns = inputs(2, 2, 4, 6, 3, 3, dtype=FP64)
    mask = torch.tensor([[True, True, False, True, True, True], [True] * 5 + [False]]) if masked else None
    inside = (query.requires_grad_(), key.requires_grad_())
    assert torch.autograd.gradcheck(lambda q, k: attention_columns(q, k, columns, mask=mask, reduce=reduce), inside)


def test_two_keys_are_a_sigmoid(backend: str) -> None:
    """Logits s·x and 0: p = 1/(1 + e^(−s·x)), whose derivative by x is s·p·(1 − p)."""
    x = torch.tensor([-30.0, -4, -0.1, 0, 2, 17])
    query, key = x[None, None, :, None].clone().requires_grad_(), torch.tensor([[[[1.0], [0.0]]]])
    found = run(backend, query, key, torch.tensor([0]), scale=1.5)[0, :, 0]
    p = torch.sigmoid(1.5 * x.double())
    assert_as_good(found.detach(), p.float(), p)
    (grad,) = torch.autograd.grad(found.sum(), query)
    slope = 1.5 * p * torch.sigmoid(-1.5 * x.double())
    assert_as_good(grad[0, 0, :, 0], slope.float(), slope)


def test_equal_keys_share_alike(backend: str) -> None:
    query, _, _ = inputs(1, 2, 17, 1, 8, 1)
    found = run(backend, query, torch.ones(1, 2, 77, 8), torch.tensor([0, 76]))
    torch.testing.assert_close(found, torch.full((1, 17, 2), 1 / 77), rtol=1e-5, atol=0)


def test_all_columns_are_the_whole_softmax(backend: str) -> None:
    query, key, _ = inputs(1, 2, 17, 35, 16, 1)
    ours = compared(backend, query, key, torch.arange(35), reduce="none")
    torch.testing.assert_close(ours[0].sum(-1), torch.ones(1, 2, 17), rtol=1e-5, atol=0)
    query.requires_grad_()
    (grad,) = torch.autograd.grad(run(backend, query, key, torch.arange(35)).sum(), query)  # of a constant
    assert grad.abs().max() < 1e-6


def test_huge_logits_neither_overflow_nor_exceed_one(backend: str) -> None:
    query, key, _ = inputs(1, 1, 9, 35, 16, 1)
    mask = torch.arange(35)[None] != 5
    for value in with_gradients(lambda *x: run(backend, *x, mask), 1e4 * query, key, torch.arange(35)):
        assert value.isfinite().all()
    for sign in (-1, 1):  # logits around ±10⁴
        found = run(backend, torch.full_like(query, sign * 1e3), key + 2.5, torch.arange(35), mask)
        assert found.max() <= 1
        torch.testing.assert_close(found.sum(-1), torch.ones(1, 9), rtol=1e-2, atol=0)


def test_a_column_that_takes_nearly_all(backend: str) -> None:
    """p → 1: its gradient is a small difference of large numbers unless 1 − p is kept apart."""
    query, key, _ = inputs(1, 1, 9, 40, 16, 1)
    key[..., 7, :] = query[0, 0, 3]
    ours = compared(backend, query, key, torch.tensor([7, 7, 9]))
    assert 0.999 < ours[0][0, 3, 0] <= 1


@pytest.mark.parametrize("junk", [math.nan, math.inf])
def test_masked_keys_may_hold_anything(backend: str, junk: float) -> None:
    query, key, columns = inputs(2, 2, 18, 40, 12, 4)
    short = with_gradients(lambda *x: run(backend, *x), query, key[:, :, :30], columns % 30)
    key[:, :, 30:] = junk
    mask = (torch.arange(40) < 30).expand(2, 40)
    ours = with_gradients(lambda *x: run(backend, *x, mask), query, key, columns % 30)
    for mine, expected in zip((ours[0], ours[1], ours[2][:, :, :30]), short, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
    assert (ours[2][:, :, 30:] == 0).all()


def test_where_no_key_counts_all_is_zero(backend: str) -> None:
    query, key, columns = inputs(2, 2, 18, 40, 12, 4)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1] = False
    for reduce in ("heads", "none"):
        ours = with_gradients(lambda *x, r=reduce: run(backend, *x, mask, reduce=r), query, key, columns)
        for value in ours:
            assert (value[1] == 0).all()
            assert (value[0] != 0).any()
            assert value.isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
def test_an_index_that_is_no_key_is_nan_without_gradient(backend: str, masked: bool) -> None:
    """What a GPU is not waited for to find out; the public function refuses it on a CPU."""
    query, key, _ = (t.to(DEVICES[backend]) for t in inputs(1, 2, 18, 40, 12, 4))
    mask = torch.ones(1, 40, dtype=torch.bool, device=query.device) if masked else None
    results = []
    for listed in ([3, 40, 9, -1, 10**12], [3, 9]):
        q, k = query.clone().requires_grad_(), key.clone().requires_grad_()
        columns = torch.tensor([listed], device=query.device)
        found = torch.ops.mtedit_fast.attention_columns(q, k, columns, mask, 0.3, True, backend)[0]
        results.append([found, *torch.autograd.grad(found.nansum(), (q, k))])
        assert found.isnan().all(1).tolist()[0] == [c not in (3, 9) for c in listed]
    assert torch.equal(results[0][0][..., [0, 2]], results[1][0])
    for one, other in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_nan_stays_in_its_item_and_query(backend: str) -> None:
    query, key, columns = inputs(2, 2, 18, 40, 12, 4)
    clean = run(backend, query, key, columns)
    query[0, 1, 11, 3] = torch.nan
    found = run(backend, query, key, columns)
    assert found[0, 11].isnan().all()
    assert found.isnan().sum() == 4
    assert torch.equal(found[1], clean[1])
    key[1, 0, 2, 2] = torch.nan
    assert run(backend, query, key, columns)[1].isnan().all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("reduce", ["heads", "none"])
def test_an_item_ignores_the_others_bit_for_bit(backend: str, dtype: torch.dtype, reduce: str) -> None:
    query, key, columns = inputs(2, 2, 18, 35, 24, 5, dtype=dtype)
    mask = torch.rand(2, 35, generator=torch.Generator().manual_seed(1)) > 0.2

    def gradients(part: slice) -> list[Tensor]:
        q, k = (t[part].clone().requires_grad_() for t in (query, key))
        found = run(backend, q, k, columns[part], mask[part], reduce=reduce)
        return [found.detach(), *torch.autograd.grad(found.square().sum(), (q, k))]

    together = gradients(slice(None))
    for i in range(2):
        for mine, expected in zip(together, gradients(slice(i, i + 1)), strict=True):
            assert torch.equal(mine[i : i + 1], expected)


def test_runs_repeat_bit_for_bit(backend: str) -> None:
    x = inputs(1, 1, 34, 35, 24, 20)
    first, second = (with_gradients(lambda *y: run(backend, *y), *x) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_views_equal_copies(backend: str) -> None:
    """Heads split off a projection, text and image in one sequence, a range of queries, every other element."""
    hidden = inputs(1, 40, 2, 1, 24, 1)[0]  # [B, L, H, D]
    columns = torch.tensor([2, 9])
    for part in (slice(10, 29), slice(3, 40, 3)):
        for width in (slice(1, 12), slice(0, 24, 2)):
            query, key = hidden.transpose(1, 2)[:, :, part, width], hidden.transpose(1, 2)[..., width]
            copies = with_gradients(lambda *x: run(backend, *x), query.contiguous(), key.contiguous(), columns)
            base = hidden.clone().requires_grad_()
            query, key = base.transpose(1, 2)[:, :, part, width], base.transpose(1, 2)[..., width]
            found = run(backend, query, key, columns)
            assert torch.equal(found, copies[0])
            upstream = torch.linspace(-1, 2, found.numel()).reshape(found.shape).sin()
            (grad,) = torch.autograd.grad((found * upstream).sum(), base)
            expected = torch.zeros_like(hidden)
            expected.transpose(1, 2)[..., width] += copies[2]
            expected.transpose(1, 2)[:, :, part, width] += copies[1]
            torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-7)


def test_a_range_of_queries_is_a_view(backend: str) -> None:
    query, key, columns = inputs(1, 2, 41, 35, 24, 5)
    whole = run(backend, query, key, columns)
    torch.testing.assert_close(run(backend, query[:, :, 21:40], key, columns), whole[:, 21:40], rtol=1e-6, atol=1e-7)


def test_only_one_side_may_need_a_gradient(backend: str) -> None:
    query, key, columns = inputs(2, 2, 18, 40, 12, 4)
    both = with_gradients(lambda *x: run(backend, *x), query, key, columns)
    for side in (0, 1):
        pair = [query.clone(), key.clone()]
        pair[side].requires_grad_()
        found = run(backend, *pair, columns)
        upstream = torch.linspace(-1, 2, found.numel()).reshape(found.shape).sin()
        assert torch.equal(torch.autograd.grad((found * upstream).sum(), pair[side])[0], both[1 + side])
        with torch.no_grad():
            assert torch.equal(run(backend, *pair, columns), both[0])


def test_autocast_changes_nothing(backend: str) -> None:
    x = inputs(1, 2, 18, 40, 12, 4)
    plain = with_gradients(lambda *y: run(backend, *y), *x)
    with torch.autocast(DEVICES[backend], BF16):
        cast = with_gradients(lambda *y: run(backend, *y), *x)
        with torch.no_grad():
            assert torch.equal(run(backend, *x), plain[0])
    for one, other in zip(cast, plain, strict=True):
        assert torch.equal(one, other)


def test_query_and_key_may_be_one(backend: str) -> None:
    query, _, columns = inputs(1, 2, 35, 35, 12, 4)
    own = query.clone().requires_grad_()
    (grad,) = torch.autograd.grad(run(backend, own, own, columns)[..., 0].sum(), own)
    exact = query.double().requires_grad_()
    (truth,) = torch.autograd.grad(literal(exact, exact, columns)[..., 0].sum(), exact)
    assert_as_good(grad, truth.float(), truth)


@pytest.mark.parametrize("reduce", ["heads", "none"])
@pytest.mark.parametrize("empty", ["batch", "queries", "columns"])
def test_nothing_to_do(backend: str, empty: str, reduce: str) -> None:
    query, key, columns = inputs(2, 2, 18, 40, 12, 4)
    if empty == "batch":
        query, key, columns = query[:0], key[:0], columns[:0]
    elif empty == "queries":
        query = query[:, :, :0]
    else:
        columns = columns[:, :0]
    ours = with_gradients(lambda *x: run(backend, *x, reduce=reduce), query, key, columns)
    assert ours[0].shape == literal(query, key, columns, reduce=reduce).shape
    for grad, like in zip(ours[1:], (query, key), strict=True):
        assert torch.equal(grad, torch.zeros_like(like))


def test_outputs_never_keep_what_was_in_memory(backend: str) -> None:
    """Every element is written: memory handed out next is filled with NaN first."""
    query, key, columns = inputs(1, 2, 34, 67, 24, 5)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        for value in with_gradients(lambda *x: run(backend, *x), query, key, columns):
            assert not value.isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("reduce", ["heads", "none"])
@pytest.mark.parametrize("chunk", [1, 20_000, 60_000])
def test_chunks_do_not_show(chunk: int, reduce: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows of a head, some rows, several heads of five."""
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", chunk)
    compared("reference", *inputs(2, 5, 67, 75, 12, 4), reduce=reduce)


@pytest.mark.parametrize("reduce", ["heads", "none"])
def test_memory_does_not_grow_with_the_square_of_the_length(reduce: str) -> None:
    """Peaks, counted: at most what the docstring says, twice as much for twice the length, a small part of a matrix."""
    heads, width, count = 2, 32, 4
    mean, peaks = reduce == "heads", {}
    for length in (512, 1024, 2048):
        query, key, columns = inputs(1, heads, length, length, width, count)
        grad = torch.ones(1, length, count) if mean else torch.ones(1, heads, length, count)
        rest = (query, key, columns, None)
        forward = peak_bytes(lambda r=rest: module.reference_forward(*r, 0.2, mean))
        backward = peak_bytes(lambda g=grad, r=rest: module.reference_backward(g, *r, None, 0.2, mean, (True, True)))
        chunks = 4 * max(module.CHUNK_BYTES["cpu"], 4 * module.MIN_ROWS * length)
        assert max(forward, backward) <= chunks + 4 * heads * 2 * length * 4 * (width + count)
        peaks[length] = max(forward, backward)
    assert peaks[2048] < 2.1 * peaks[1024] < 4.5 * peaks[512]

    def whole() -> None:
        with torch.enable_grad():
            with_gradients(literal, query, key, columns, reduce=reduce)

    assert peaks[2048] < peak_bytes(whole) / 5
