"""`token_similarity` on every back end against fp64 and PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from op_backends import BACKENDS, DEVICES
from sde_truth import assert_as_good
from torch import Tensor

from mtedit_fast.ops import token_similarity

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def banks(*shapes: tuple[int, int, int], dtype: torch.dtype = FP32, seed: int = 0) -> list[Tensor]:
    """Random tokens with a direction in common, so that cosines lie all over (-1, 1)."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shapes[0][2], generator=generator)
    return [(torch.randn(shape, generator=generator) + 0.5 * common).to(dtype) for shape in shapes]


def run(backend: str, a: Tensor, b: Tensor, pairs: Tensor | None = None, **options) -> Tensor:
    """On the back end's device and back."""
    device = DEVICES[backend]
    weights = options.pop("weights", None)
    if isinstance(weights, tuple):
        weights = tuple(side.to(device) for side in weights)
    elif weights is not None:
        weights = weights.to(device)
    pairs = pairs if pairs is None else pairs.to(device)
    return token_similarity(a.to(device), b.to(device), pairs, weights=weights, backend=backend, **options).cpu()


def literal(a: Tensor, b: Tensor, pairs: Tensor, weights: tuple[Tensor, Tensor] | None, normalize: bool) -> Tensor:
    """One pair at a time, in the dtype of the tokens."""
    scores = []
    for pair, (i, j) in enumerate(pairs.tolist()):
        means = []
        for side, tokens in enumerate((a[i], b[j])):
            if normalize:
                tokens = F.normalize(tokens, dim=-1)
            if weights is None:
                means.append(tokens.mean(0))
            else:
                weight = weights[side][pair].to(tokens)
                means.append((tokens * weight[:, None]).sum(0) / weight.sum())
        scores.append(F.cosine_similarity(*means, dim=0))
    return torch.stack(scores)


def with_gradients(function, a: Tensor, b: Tensor, *rest) -> list[Tensor]:
    a, b = (t.detach().clone().requires_grad_() for t in (a, b))
    scores = function(a, b, *rest)
    upstream = torch.linspace(-1, 2, len(scores)).to(scores)
    return [scores.detach(), *torch.autograd.grad((scores * upstream).sum(), (a, b))]


PAIRS = torch.tensor([[1, 0], [0, 3], [1, 2], [1, 3], [0, 0]])  # rows shared, rows in no pair, out of order


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weighting", ["none", "shared", "per side", "masks"])
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 1, 63), (5, 5, 8), (37, 37, 65), (70, 70, 129)])
def test_values_and_gradients_against_fp64(backend: str, size, weighting: str, normalize: bool) -> None:
    n, o, d = size
    if weighting in ("none", "per side") and n > 1:
        o = n + 3
    a, b = banks((3, n, d), (4, o, d))
    generator = torch.Generator().manual_seed(1)
    weights = given = None
    if weighting == "per side":
        weights = given = (torch.rand(5, n, generator=generator), torch.rand(5, o, generator=generator))
    elif weighting != "none":
        given = torch.rand(5, n, generator=generator) + 0.1
        if weighting == "masks":
            given = given > 0.6
            given[:, 0] = True
        weights = (given, given)
    ours = with_gradients(lambda x, y: run(backend, x, y, PAIRS, weights=given, normalize=normalize), a, b)
    torchs = with_gradients(literal, a, b, PAIRS, weights, normalize)
    truth = with_gradients(literal, a.double(), b.double(), PAIRS, weights, normalize)
    for mine, peer, exact in zip(ours, torchs, truth, strict=True):
        assert mine.dtype == FP32
        assert_as_good(mine, peer, exact)
    assert torch.equal(ours[1][2], torch.zeros(n, d))  # in no pair


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_half_inputs_are_computed_in_fp32(backend: str, dtype: torch.dtype, normalize: bool) -> None:
    a, b = banks((3, 19, 40), (4, 19, 40), dtype=dtype)
    weights = torch.rand(5, 19)
    ours = with_gradients(lambda x, y: run(backend, x, y, PAIRS, weights=weights.to(dtype), normalize=normalize), a, b)
    same = (weights.to(dtype), weights.to(dtype))
    truth = with_gradients(literal, a.double(), b.double(), PAIRS, same, normalize)
    assert ours[0].dtype == FP32
    assert_as_good(ours[0], truth[0].float(), truth[0])
    for mine, exact in zip(ours[1:], truth[1:], strict=True):
        assert mine.dtype == dtype
        assert_as_good(mine, exact.to(dtype), exact)


def test_double_inputs_stay_double() -> None:
    a, b = banks((3, 7, 5), (4, 7, 5), dtype=FP64)
    weights = torch.rand(5, 7, dtype=FP64)
    for normalize in (False, True):
        scores = token_similarity(a, b, PAIRS, weights=weights, normalize=normalize)
        assert scores.dtype == FP64
        torch.testing.assert_close(scores, literal(a, b, PAIRS, (weights, weights), normalize), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(normalize: bool) -> None:
    a, b = (t.requires_grad_() for t in banks((2, 4, 3), (3, 4, 3), dtype=FP64))
    pairs, weights = torch.tensor([[0, 2], [1, 2], [1, 0]]), torch.rand(3, 4, dtype=FP64)
    for given in (None, weights, (weights, weights.flip(1))):
        assert torch.autograd.gradcheck(
            lambda x, y, w=given: token_similarity(x, y, pairs, weights=w, normalize=normalize), (a, b)
        )


def test_known_angles(backend: str) -> None:
    """Tokens e₀ and e₁ of weights 1 and w make an angle of atan w with e₀, whatever their lengths once normalised."""
    a = torch.tensor([[[2.0, 0, 0], [0, 2.0, 0]]])
    b = torch.tensor([[[1.0, 0, 0], [0.5, 0, 0]]])
    w = torch.tensor([0.0, 0.3, 1.0, 7.0])
    weights = torch.stack([torch.ones(4), w], 1)
    expected = torch.cos(torch.atan(w.double()))
    assert_as_good(run(backend, a, b, torch.zeros(4, 2, dtype=torch.int64), weights=weights), expected, expected)
    a[0, 1] *= 50
    scores = run(backend, a, b, torch.zeros(4, 2, dtype=torch.int64), weights=weights, normalize=True)
    assert_as_good(scores, expected, expected)


def test_row_i_with_row_i_by_default(backend: str) -> None:
    a, b = banks((3, 4, 9), (3, 5, 9))
    rows = torch.arange(3)
    assert torch.equal(run(backend, a, b), run(backend, a, b, torch.stack([rows, rows], 1)))


def test_weights_take_no_part_in_the_scale_of_the_result(backend: str) -> None:
    a, b = banks((3, 6, 9), (4, 6, 9))
    weights = torch.rand(5, 6)
    plain, scaled = (run(backend, a, b, PAIRS, weights=w) for w in (weights, 4 * weights))
    torch.testing.assert_close(plain, scaled, rtol=1e-6, atol=1e-6)
    ones = run(backend, a, b, PAIRS, weights=torch.ones(5, 6))
    assert torch.equal(ones, run(backend, a, b, PAIRS))


@pytest.mark.parametrize("normalize", [False, True])
def test_undefined_pairs_are_nan_and_leave_no_gradient(backend: str, normalize: bool) -> None:
    a, b = banks((3, 5, 7), (4, 5, 7))
    a[2] = 0
    weights = torch.rand(4, 5)
    weights[1] = 0
    pairs = torch.tensor([[0, 0], [0, 1], [2, 2], [1, 3]])
    a.requires_grad_(), b.requires_grad_()
    scores = run(backend, a, b, pairs, weights=weights, normalize=normalize)
    assert scores.isnan().tolist() == [False, True, True, False]
    grads = torch.autograd.grad(scores.nansum(), (a, b))
    alone = torch.autograd.grad(
        run(backend, a, b, pairs[[0, 3]], weights=weights[[0, 3]], normalize=normalize).sum(), (a, b)
    )
    for grad, expected in zip(grads, alone, strict=True):
        assert torch.equal(grad, expected)
    assert (grads[0][2] == 0).all()
    assert (grads[1][1:3] == 0).all()
    for grad in torch.autograd.grad(run(backend, a, b, pairs, weights=weights).sum(), (a, b)):
        assert not grad.isnan().any()
    # unit vectors that cancel
    opposite = torch.stack([a[0, 0], -a[0, 0]])[None].detach()
    assert run(backend, opposite, opposite, normalize=normalize).isnan().all()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_tokens_of_weight_zero_may_hold_anything(backend: str, junk: float, normalize: bool) -> None:
    a, b = banks((2, 6, 9), (2, 6, 9))
    weights = torch.ones(2, 6)
    weights[:, 4:] = 0
    short = with_gradients(lambda x, y: run(backend, x, y, normalize=normalize), a[:, :4], b[:, :4])
    a[:, 4:], b[:, 5] = junk, junk
    ours = with_gradients(lambda x, y: run(backend, x, y, weights=weights, normalize=normalize), a, b)
    torch.testing.assert_close(ours[0], short[0], rtol=1e-6, atol=1e-6)
    for mine, expected in zip(ours[1:], short[1:], strict=True):
        torch.testing.assert_close(mine[:, :4], expected, rtol=1e-5, atol=1e-6)
        assert (mine[:, 4:] == 0).all()


def test_a_token_of_norm_zero_adds_nothing(backend: str) -> None:
    a, b = banks((2, 3, 9), (2, 3, 9))
    a[:, 1] = 0
    ours = with_gradients(lambda x, y: run(backend, x, y, normalize=True), a, b)
    expected = run(backend, a[:, ::2], b, normalize=True)
    torch.testing.assert_close(ours[0], expected, rtol=1e-6, atol=1e-6)
    assert (ours[1][:, 1] == 0).all()


def test_nan_stays_in_its_pairs(backend: str) -> None:
    a, b = banks((3, 4, 9), (4, 4, 9))
    clean = run(backend, a, b, PAIRS)
    a[0, 2, 3] = torch.nan
    scores = run(backend, a, b, PAIRS)
    assert scores.isnan().tolist() == (PAIRS[:, 0] == 0).tolist()
    assert torch.equal(scores[~scores.isnan()], clean[~scores.isnan()])


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_pair_ignores_the_others_bit_for_bit(backend: str, dtype: torch.dtype, normalize: bool) -> None:
    a, b = banks((5, 50, 130), (5, 50, 130), dtype=dtype)
    weights = torch.rand(5, 50)
    together = with_gradients(lambda x, y: run(backend, x, y, weights=weights, normalize=normalize), a, b)
    upstream = torch.linspace(-1, 2, 5)
    for i in range(5):
        one = slice(i, i + 1)
        x, y = (t[one].detach().clone().requires_grad_() for t in (a, b))
        score = run(backend, x, y, weights=weights[one], normalize=normalize)
        alone = [score.detach(), *torch.autograd.grad((score * upstream[one]).sum(), (x, y))]
        for mine, expected in zip(together, alone, strict=True):
            assert torch.equal(mine[one], expected)


def test_runs_repeat_bit_for_bit_with_shared_rows(backend: str) -> None:
    a, b = banks((2, 33, 70), (9, 33, 70))
    pairs = torch.stack([torch.arange(9) % 2, torch.arange(9)], 1)
    first, second = (with_gradients(lambda x, y: run(backend, x, y, pairs, normalize=True), a, b) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    # a row's gradient only sees its own pairs
    even = with_gradients(lambda x, y: run(backend, x, y, pairs, normalize=True)[::2], a, b)[1]
    assert (even[1] == 0).all()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_the_thread_count_changes_nothing(backend: str) -> None:
    a, b = banks((2, 37, 300), (3, 37, 300))
    weights, threads, found = torch.rand(5, 37), torch.get_num_threads(), []
    options = {"weights": weights, "normalize": True}
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(with_gradients(lambda x, y: run(backend, x, y, PAIRS % 2, **options), a, b))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("normalize", [False, True])
def test_views_equal_copies(backend: str, normalize: bool) -> None:
    hidden = banks((4, 12, 10))[0]
    for view in (hidden[:, 5:], hidden[:, :1], hidden[::2, 1:9:3], hidden[..., ::2], hidden.mT):
        rows = torch.tensor([[0, 1], [1, 1]])
        weights = torch.rand(2, view.shape[1])
        options = {"weights": weights, "normalize": normalize}
        ours = with_gradients(lambda x, y, r=rows, o=options: run(backend, x, y, r, **o), view, view)
        base = hidden.clone().requires_grad_()
        assert torch.equal(ours[0], run(backend, view, view, rows, **options))
        score = run(backend, base[:, 5:], base[:, 5:], rows, normalize=normalize)
        (grad,) = torch.autograd.grad(score.sum(), base)
        assert (grad[:, :5] == 0).all()
        assert (grad[:2, 5:] != 0).any()


def test_only_one_side_may_need_a_gradient(backend: str) -> None:
    a, b = banks((3, 6, 9), (4, 6, 9))
    both = with_gradients(lambda x, y: run(backend, x, y, PAIRS, normalize=True), a, b)
    upstream = torch.linspace(-1, 2, 5)
    for side in (0, 1):
        inputs = [a.clone(), b.clone()]
        inputs[side].requires_grad_()
        scores = run(backend, *inputs, PAIRS, normalize=True)
        assert torch.equal(torch.autograd.grad((scores * upstream).sum(), inputs[side])[0], both[1 + side])


def test_the_same_bank_on_both_sides(backend: str) -> None:
    hidden = banks((4, 6, 9))[0].requires_grad_()
    pairs = torch.tensor([[0, 1], [2, 1], [3, 3]])
    scores = run(backend, hidden, hidden, pairs, normalize=True)
    assert abs(scores[2].item() - 1) < 1e-6
    (grad,) = torch.autograd.grad(scores.sum(), hidden)
    exact = hidden.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(literal(exact, exact, pairs, None, True).sum(), exact)
    assert_as_good(grad, truth.float(), truth)


def test_no_pairs(backend: str) -> None:
    a, b = banks((3, 6, 9), (4, 6, 9))
    for x, y in ((a, b), (a[:0], b), (a[:0], b[:0])):
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        scores = run(backend, x, y, torch.empty(0, 2, dtype=torch.int64), weights=torch.empty(0, 6))
        assert scores.shape == (0,)
        for grad in torch.autograd.grad(scores.sum(), (x, y)):
            assert (grad == 0).all()


def test_outputs_never_keep_what_was_in_memory(backend: str) -> None:
    """Every element is written: memory handed out next is filled with NaN first."""
    a, b = banks((3, 37, 65), (4, 37, 65))
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        for value in with_gradients(lambda x, y: run(backend, x, y, PAIRS, normalize=True), a, b):
            assert not value.isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)
