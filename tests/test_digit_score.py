"""`digit_score` on every back end against the whole softmax in fp64."""

from typing import Any, NamedTuple

import pytest
import torch
from op_backends import BACKENDS, DEVICES, exact_products
from sde_truth import assert_as_good
from torch import Tensor

from mtedit_fast.ops import DigitScore, digit_score, token_log_probs
from mtedit_fast.ops._backend import unavailable_reason

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
IDS, VALUES = [7, 2, 19, 0, 11], [3.0, -1.0, 0.5, 3.0, 8.0]  # out of order, one value twice
INTERPRETED = not torch.cuda.is_available()
TRITON_REASON = unavailable_reason("triton", torch.device(DEVICES["triton"]), ())
DIFFERENTIABLE = {"set": ("score", "target_log_prob"), "vocab": ("score", "mass", "target_log_prob")}


@pytest.fixture(params=[case for case in BACKENDS if case.values[0] != "cpp"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Inputs(NamedTuple):
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor  # [V]
    target: Tensor  # [N], a third unknown


def inputs(n: int, h: int, v: int, dtype: torch.dtype = FP32, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, h, generator=generator) / h**0.5, torch.randn(v, h, generator=generator)
    target = torch.randint(-2, len(IDS), (n,), generator=generator).clamp(min=-1)
    return Inputs(hidden.to(dtype), 2 * weight.to(dtype), torch.randn(v, generator=generator).to(dtype), target)


def run(backend: str, x: Inputs, ids=IDS, values=VALUES, *, bias: bool = True, target: bool = True, **options: Any):
    """On the back end's device and back."""
    moved = [tensor.to(DEVICES[backend]) for tensor in x]
    given = {"bias": moved[2] if bias else None, "target": moved[3] if target else None}
    out = digit_score(moved[0], moved[1], ids, values, **given, backend=backend, **options)
    return DigitScore(*(field if field is None else field.cpu() for field in out))


def literal(x: Inputs, ids=IDS, values=VALUES, *, normalize="set", temperature=1.0, bias=True, vocab_size=None):
    """All logits and their softmax, in the dtype of the inputs; statistics in fp32 at least."""
    vocab_size = vocab_size or len(x.weight)
    logits = x.hidden @ x.weight[:vocab_size].T
    if bias:
        logits = logits + x.bias[:vocab_size]
    logits = logits.to(torch.promote_types(logits.dtype, FP32)) / temperature
    k = torch.tensor(values, dtype=logits.dtype)
    q, p = logits[:, ids].softmax(1), logits.softmax(1)[:, ids]
    log_p = (logits[:, ids] if normalize == "set" else logits).log_softmax(1)
    log_p = log_p if normalize == "set" else log_p[:, ids]
    mean = (q * k).sum(1)
    medians = []
    for row in q.detach().tolist():
        below = 0.0
        for value, probability in sorted(zip(values, row, strict=True)):
            below += probability
            if below >= 0.5:
                medians.append(value)
                break
    known = x.target >= 0
    picked = log_p.gather(1, x.target.clamp(min=0)[:, None])[:, 0]
    return DigitScore(
        mean if normalize == "set" else (p * k).sum(1),
        (q * (k - mean[:, None]) ** 2).sum(1).detach(),
        torch.special.entr(q).sum(1).detach(),
        torch.tensor(medians, dtype=logits.dtype),
        None if normalize == "set" else p.sum(1),
        torch.where(known, picked, torch.nan),
    )


def exact(x: Inputs) -> Inputs:
    return Inputs(x.hidden.double(), x.weight.double(), x.bias.double(), x.target)


def assert_fields_as_good(ours: DigitScore, torchs: DigitScore, truth: DigitScore) -> None:
    for name, mine, peer, true in zip(DigitScore._fields, ours, torchs, truth, strict=True):
        assert (mine is None) == (true is None), name
        if mine is not None and mine.numel():
            assert mine.dtype == FP32
            assert mine.isnan().equal(true.isnan()), name
            assert_as_good(mine.nan_to_num(), peer.nan_to_num(), true.detach().nan_to_num())


def gradients(function, x: Inputs, names: tuple[str, ...], *, bias: bool) -> list[Tensor]:
    """With respect to hidden, weight and bias of several fields at once, each with its own upstream gradient."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in x[: 2 + bias]]
    out = function(Inputs(*leaves, *x[2 + bias :]))
    total = 0.0
    for i, name in enumerate(names):
        field = getattr(out, name)
        total = total + (field * torch.linspace(-1 - i, 2, len(field)).to(field)).nansum()
    return list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("normalize", ["set", "vocab"])
@pytest.mark.parametrize("size", [(0, 8, 20), (1, 1, 20), (3, 63, 21), (64, 64, 129), (4097, 5, 33)])
@pytest.mark.parametrize(("bias", "temperature", "padding"), [(False, 1.0, 0), (True, 0.7, 5)])
def test_values_against_fp64(backend: str, size, normalize: str, bias: bool, temperature: float, padding: int) -> None:
    n, h, v = size
    if backend == "triton" and INTERPRETED:
        n = min(n, 5)  # a row takes the interpreter some 20 ms
    x = inputs(n, h, v + padding)
    x.weight[v:], x.bias[v:] = torch.nan, torch.nan
    options = {"normalize": normalize, "temperature": temperature, "bias": bias, "vocab_size": v}
    ours = run(backend, x, **options)
    assert all(field.shape == (n,) for field in ours if field is not None)
    assert_fields_as_good(ours, literal(x, **options), literal(exact(x), **options))


def test_the_vocabulary_of_a_real_model(backend: str) -> None:
    x = inputs(3, 4, 5193 if backend == "triton" and INTERPRETED else 151_936)
    ids = [15 + i for i in range(5)]
    ours = run(backend, x, ids, normalize="vocab")
    torchs, truth = (literal(y, ids, normalize="vocab") for y in (x, exact(x)))
    assert_fields_as_good(ours, torchs, truth)


@pytest.mark.parametrize("normalize", ["set", "vocab"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_half_inputs_are_computed_in_fp32(backend: str, dtype: torch.dtype, normalize: str) -> None:
    x = inputs(5, 40, 300, dtype)
    truth = literal(exact(x), normalize=normalize)
    fp32 = DigitScore(*(field if field is None else field.float() for field in truth))
    assert_fields_as_good(run(backend, x, normalize=normalize), fp32, truth)


@pytest.mark.parametrize("normalize", ["set", "vocab"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(("bias", "temperature"), [(False, 1.0), (True, 0.7)])
def test_gradients_against_fp64(backend: str, normalize: str, dtype: torch.dtype, bias: bool, temperature) -> None:
    x = inputs(4, 33, 75, dtype)
    options = {"normalize": normalize, "temperature": temperature, "bias": bias, "vocab_size": 70}
    names = DIFFERENTIABLE[normalize]
    for chosen in (names, *((name,) for name in names if backend == "reference")):  # the backward is the same
        ours = gradients(lambda y: run(backend, y, **options), x, chosen, bias=bias)
        torchs = gradients(lambda y: literal(y, **options), x, chosen, bias=bias)
        truth = gradients(lambda y: literal(y, **options), exact(x), chosen, bias=bias)
        for mine, peer, true in zip(ours, torchs, truth, strict=True):
            assert mine.dtype == dtype
            assert_as_good(mine, peer, true)
        assert all((grad[70:] == 0).all() for grad in ours[1:])  # padding
    if normalize == "set":
        rest = [token for token in range(75) if token not in IDS]
        assert all((grad[rest] == 0).all() for grad in ours[1:])


@pytest.mark.parametrize("normalize", ["set", "vocab"])
def test_gradcheck(normalize: str) -> None:
    x = inputs(4, 3, 23, FP64)

    def fields(*tensors: Tensor) -> list[Tensor]:
        options = {"normalize": normalize, "bias": tensors[2], "target": x.target, "temperature": 1.3}
        out = digit_score(tensors[0], tensors[1], IDS, VALUES, vocab_size=20, **options)
        return [getattr(out, name).nan_to_num() for name in DIFFERENTIABLE[normalize]]

    assert torch.autograd.gradcheck(fields, [tensor.requires_grad_() for tensor in x[:3]])


def test_the_gradient_is_the_formula() -> None:
    """dŷ/dz_k = p_k(k·[k is a score token] − ŷ) and p_k(k − ŷ): an identity as weight makes the logits hidden."""
    z = torch.randn(3, 20, dtype=FP64, requires_grad=True)
    k, chosen = torch.zeros(20, dtype=FP64), torch.zeros(20, dtype=torch.bool)
    k[IDS], chosen[IDS] = torch.tensor(VALUES, dtype=FP64), True
    for normalize in ("set", "vocab"):
        score = digit_score(z, torch.eye(20, dtype=FP64), IDS, VALUES, normalize=normalize).score
        (grad,) = torch.autograd.grad(score.sum(), z)
        p = (z.masked_fill(~chosen, -torch.inf) if normalize == "set" else z).softmax(1)
        torch.testing.assert_close(grad, (p * (k - score[:, None])).detach(), rtol=1e-12, atol=1e-12)


def test_only_what_is_asked_for_gets_a_gradient(backend: str) -> None:
    x = inputs(3, 9, 30)
    for normalize in ("set", "vocab"):
        whole = gradients(lambda y, o=normalize: run(backend, y, normalize=o), x, ("score",), bias=True)
        upstream = torch.linspace(-1, 2, 3)
        for i in range(3):
            given = [tensor.clone() for tensor in x]
            given[i].requires_grad_()
            out = run(backend, Inputs(*given), normalize=normalize)
            (grad,) = torch.autograd.grad((out.score * upstream).sum(), given[i])
            torch.testing.assert_close(grad, whole[i], rtol=1e-6, atol=1e-6)
            assert not any(field.requires_grad for field in (out.variance, out.entropy, out.median))
    assert not run(backend, x).score.requires_grad


def test_double_inputs_stay_double() -> None:
    x = exact(inputs(6, 7, 40))
    for normalize in ("set", "vocab"):
        out = digit_score(x.hidden, x.weight, IDS, VALUES, normalize=normalize, bias=x.bias, target=x.target)
        torch.testing.assert_close(tuple(out), tuple(literal(x, normalize=normalize)), equal_nan=True)


def test_two_tokens_are_a_sigmoid(backend: str) -> None:
    """RewardDance's yes and no."""
    x = inputs(6, 8, 30)
    score = run(backend, x, [4, 9], [1.0, 0.0], target=False).score
    difference = x.hidden.double() @ (x.weight[4] - x.weight[9]).double() + (x.bias[4] - x.bias[9]).double()
    assert_as_good(score, difference.sigmoid().float(), difference.sigmoid())
    one = run(backend, x, [4], [2.5], target=False)
    assert (one.score == 2.5).all()
    assert (one.variance == 0).all()
    assert (one.median == 2.5).all()


def test_median_of_known_distributions(backend: str) -> None:
    """Logits are the bias, log p. At exactly a half, as among equally likely tokens, it is the smaller value."""
    for probabilities, values, median in (
        ([0.2, 0.2, 0.6], [1, 2, 3], 3),
        ([0.2, 0.4, 0.4], [3, 1, 2], 2),
        ([0.25, 0.25, 0.25, 0.25], [4, 3, 2, 1], 2),
        ([0.4, 0.3, 0.3], [5, 1, 1], 1),
        ([0.5, 0.5], [1, 0], 0),
        ([1.0, 0.0], [-3, 7], -3),
    ):
        bias = torch.tensor(probabilities).log().to(DEVICES[backend])
        hidden, weight = torch.zeros(1, 2).to(bias), torch.ones(len(bias), 2).to(bias)
        out = digit_score(hidden, weight, range(len(bias)), values, bias=bias, backend=backend)
        assert out.median.item() == median, probabilities
        mean = sum(p * value for p, value in zip(probabilities, values, strict=True))
        assert out.score.item() == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("normalize", ["set", "vocab"])
def test_extreme_logits(backend: str, normalize: str) -> None:
    hidden, weight = torch.tensor([[1e4], [-1e4], [0.0]]), torch.arange(300.0)[:, None] / 300
    x = Inputs(hidden, weight, torch.zeros(300), torch.tensor([0, 1, -1]))
    out = run(backend, x, [299, 0, 150], [5.0, 1.0, 3.0], normalize=normalize)
    certain = 1.0 if normalize == "set" else 1 / 300
    expected = torch.tensor([5.0, 1.0, 9 / 3 if normalize == "set" else 9 * certain])
    torch.testing.assert_close(out.score, expected)
    assert out.median.tolist() == [5, 1, 3]
    torch.testing.assert_close(out.target_log_prob[:2], torch.zeros(2))
    far = run(backend, x, [0, 150], [5.0, 1.0], normalize="vocab", target=False)  # nowhere near the likely token
    assert far.score[0] == far.mass[0] == 0
    assert far.variance.isfinite().all()
    options = {"normalize": normalize, "target": False}
    for grad in gradients(lambda y: run(backend, y, [0, 150], [5.0, 1.0], **options), x, ("score",), bias=True):
        assert grad.isfinite().all()


@pytest.mark.parametrize("normalize", ["set", "vocab"])
def test_a_shift_of_all_logits_changes_nothing(backend: str, normalize: str) -> None:
    """Whole numbers, so that nothing is rounded before the shift cancels."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randint(-2, 3, shape, generator=generator).float() for shape in ((5, 6), (150, 6)))
    x = Inputs(hidden, weight, torch.zeros(150), torch.tensor([0, 1, 2, 3, 4]))
    shifted = x._replace(bias=torch.full((150,), 4096.0))
    before, after = (run(backend, y, normalize=normalize) for y in (x, shifted))
    for one, other in zip(before, after, strict=True):
        if normalize == "set":
            assert one is None or torch.equal(one, other)
        else:  # lse = 4096 + … is rounded to 2⁻¹²
            torch.testing.assert_close(other, one, rtol=2**-11, atol=2**-11)


def test_tokens_masked_by_an_infinite_bias(backend: str) -> None:
    x = inputs(4, 8, 150)
    x.bias[:140] = -torch.inf
    x.bias[[2, 7]] = 0.5
    for normalize in ("set", "vocab"):
        ours = run(backend, x, normalize=normalize, target=False)
        torchs, truth = (literal(y, normalize=normalize) for y in (x, exact(x)))
        assert_fields_as_good(ours, *(field._replace(target_log_prob=None) for field in (torchs, truth)))
        for grad in gradients(lambda y, o=normalize: run(backend, y, normalize=o), x, ("score",), bias=False):
            assert grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's NumPy
def test_nan_stays_in_its_row(backend: str) -> None:
    x = inputs(5, 9, 30)
    clean = run(backend, x, normalize="vocab", target=False)
    x.hidden[2, 4] = torch.nan
    out = run(backend, x, normalize="vocab", target=False)
    for mine, before in zip(out[:5], clean[:5], strict=True):
        assert mine.isnan().tolist() == [False, False, True, False, False]
        torch.testing.assert_close(mine[3:], before[3:])


def test_unknown_targets_have_no_gradient(backend: str) -> None:
    x = inputs(4, 6, 30)._replace(target=torch.tensor([-1, 2, -1, 0]))
    for normalize in ("set", "vocab"):
        hidden = x.hidden.clone().requires_grad_()
        out = run(backend, x._replace(hidden=hidden), normalize=normalize)
        assert out.target_log_prob.isnan().tolist() == [True, False, True, False]
        (grad,) = torch.autograd.grad(out.target_log_prob.nanmean(), hidden)
        assert (grad[[0, 2]] == 0).all()
        assert (grad[[1, 3]] != 0).any(1).all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("normalize", ["set", "vocab"])
def test_the_kernel_does_a_row_alone_as_in_a_batch_bit_for_bit(dtype: torch.dtype, normalize: str) -> None:
    if TRITON_REASON:
        pytest.skip(TRITON_REASON)
    n = 7 if INTERPRETED else 300
    x = inputs(n, 77, 300, dtype)
    if INTERPRETED:
        x = x._replace(hidden=exact_products(x.hidden), weight=exact_products(x.weight))
    together = run("triton", x, normalize=normalize)
    for rows in (slice(0, 1), slice(n - 1, n), slice(2, 5)):
        alone = run("triton", Inputs(x.hidden[rows], x.weight, x.bias, x.target[rows]), normalize=normalize)
        for one, other in zip(alone, together, strict=True):
            assert one is None or torch.equal(one.nan_to_num(7), other[rows].nan_to_num(7))


def test_views_equal_copies(backend: str) -> None:
    x = inputs(2, 12, 60)
    x = x._replace(hidden=exact_products(x.hidden), weight=exact_products(x.weight))
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 3, 24), (60, 20), (120, 12)
    tokens, *rows = (exact_products(torch.randn(shape, generator=generator)) for shape in shapes)
    for hidden, weight in (
        (tokens[:, -1, ::2], x.weight),
        (tokens[:, 1, 5:17], x.weight.T.contiguous().T),
        (x.hidden, rows[0][:, 3:15]),
        (x.hidden, rows[1][::2]),
    ):
        for normalize in ("set", "vocab"):
            y = x._replace(hidden=hidden, weight=weight)
            copies = x._replace(hidden=hidden.contiguous(), weight=weight.contiguous())
            options = {"normalize": normalize, "vocab_size": 55}
            for one, other in zip(run(backend, y, **options), run(backend, copies, **options), strict=True):
                assert one is None or torch.allclose(one, other, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_rows_of_the_score_tokens_are_enough_for_the_set(backend: str) -> None:
    x = inputs(6, 10, 40)
    few = x._replace(weight=x.weight[IDS], bias=x.bias[IDS])
    for one, other in zip(run(backend, x), run(backend, few, range(5)), strict=True):
        assert one is None or torch.equal(one.nan_to_num(7), other.nan_to_num(7))
    poisoned = x._replace(weight=torch.full_like(x.weight, torch.nan).index_copy(0, torch.tensor(IDS), few.weight))
    assert run(backend, poisoned).score.isfinite().all()  # never looks at other rows


def test_outputs_never_keep_what_was_in_memory(backend: str) -> None:
    """Every element is written: memory handed out next is filled with NaN first."""
    x = inputs(3, 9, 140)._replace(target=torch.tensor([4, 0, 1]))
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        for normalize in ("set", "vocab"):
            out = run(backend, x, normalize=normalize)
            assert all(field is None or not field.isnan().any() for field in out)
            for grad in gradients(lambda y, o=normalize: run(backend, y, normalize=o), x, ("score",), bias=True):
                assert not grad.isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


def test_training_after_scoring_in_inference_mode() -> None:
    """What is kept from one call for the next must not be an inference tensor."""
    x, ids = inputs(3, 6, 50), [41, 42, 43]
    with torch.inference_mode():
        before = digit_score(x.hidden, x.weight, ids, [1, 2, 3], normalize="vocab").score
    hidden = x.hidden.requires_grad_()
    score = digit_score(hidden, x.weight, ids, [1, 2, 3], normalize="vocab").score
    score.sum().backward()
    assert hidden.grad is not None
    assert torch.equal(score.detach(), before)


@pytest.mark.parametrize("normalize", ["set", "vocab"])
def test_autocast_does_not_round_the_head(normalize: str) -> None:
    hidden = torch.randn(5, 32, requires_grad=True)
    weight = torch.randn(300, 32, requires_grad=True)
    target = torch.tensor([0, 1, 2, 1, -1])

    def run() -> list[Tensor]:
        out = digit_score(hidden, weight, [3, 5, 8], [1.0, 2.0, 3.0], normalize=normalize, target=target)
        total = out.score.sum() + out.target_log_prob.nansum() + token_log_probs(hidden, weight, target + 1).sum()
        return [out.score.detach(), *torch.autograd.grad(total, (hidden, weight))]

    with torch.autocast("cpu", torch.bfloat16):
        inside = run()
    for mine, plain in zip(inside, run(), strict=True):
        assert torch.equal(mine, plain)
