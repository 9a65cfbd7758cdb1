"""`nft_loss` on every back end against fp64 and against the form with three velocities and x̂±."""

import itertools
import math

import pytest
import torch
from op_backends import BACKENDS, DEVICES
from sde_truth import assert_as_good
from torch import Tensor
from velocity_truth import gradient, rows, textbook_nft, velocities

from mtedit_fast.ops import advantage_to_reward, nft_loss

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def assert_gradient_as_good(ours: Tensor, torchs: Tensor, truth: Tensor) -> None:
    """Gradients are small: errors are compared at the size of the largest."""
    size = truth.abs().max()
    assert_as_good(ours.double() / size, torchs.double() / size, truth / size)


@every_backend
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.1},
        {"beta": 1.7, "scale": 2.0},
        {"kl_weight": 0.3},
        {"weight": rows(4)[2]},
        {"weight": rows(4)[2], "kl_weight": 0.01, "beta": 0.5, "scale": 1.0},
        {"old_is_theta": True},
        {"old_is_theta": True, "beta": 0.1, "kl_weight": 1.0, "weight": rows(4)[2]},
    ],
)
def test_value_and_gradient_against_fp64(backend: str, options: dict) -> None:
    v, (t, r, _) = velocities(4, 31, 33), rows(4)
    truth, torchs = (textbook_nft(v, t, r, dtype, **options) for dtype in (FP64, FP32))
    given = {key: value for key, value in options.items() if key != "old_is_theta"}
    old = None if "old_is_theta" in options else v.old
    reference = v.ref if "kl_weight" in options else None
    out, grad = gradient(nft_loss, v.theta, backend, old, v.target, t, r, v_ref=reference, **given)
    assert out.loss.dtype == out.policy.dtype == FP32
    assert_as_good(out.loss, torchs[0], truth[0])
    assert_gradient_as_good(grad, torchs[1], truth[1])
    assert_as_good(out.policy, torchs[2], truth[2])
    if reference is None:
        assert out.kl is None
    else:
        assert_as_good(out.kl, torchs[3], truth[3])


@every_backend
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*itertools.product([(1, 1), (3, 63), (2, 1000), (2, 4097), (2, 4, 33, 65)], [FP32, BF16, FP16]), ((35, 2), FP32)],
)
def test_sizes_and_dtypes(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The textbook form on halves computes in fp32, and rounds its gradient to the velocity's dtype, as ours does."""
    v, (t, r, _) = velocities(*shape, dtype=dtype), rows(shape[0])
    v = v._replace(clean=torch.zeros_like(v.clean, dtype=FP64), noise=v.target.double())
    options = {"beta": 0.6, "kl_weight": 0.1}
    truth, torchs = (textbook_nft(v, t, r, dtype, **options) for dtype in (FP64, FP32))
    out, grad = gradient(nft_loss, v.theta, backend, v.old, v.target, t, r, v_ref=v.ref, **options)
    assert grad.dtype == dtype
    assert_as_good(out.loss, torchs[0], truth[0])
    assert_gradient_as_good(grad, torchs[1].to(dtype), truth[1])


@every_backend
def test_dtypes_may_differ(backend: str) -> None:
    v, (t, r, _) = velocities(2, 65), rows(2)
    v = v._replace(theta=v.theta.to(BF16), ref=v.ref.to(FP16))
    truth, torchs = (textbook_nft(v, t, r, dtype, kl_weight=0.1) for dtype in (FP64, FP32))
    out, grad = gradient(nft_loss, v.theta, backend, v.old, v.target, t, r, v_ref=v.ref, kl_weight=0.1)
    assert_as_good(out.loss, torchs[0], truth[0])
    assert_gradient_as_good(grad, torchs[1].to(BF16), truth[1])


@every_backend
def test_where_old_equals_theta_the_gradient_is_along_the_error(backend: str) -> None:
    """(2r−1)(v_old − v*) times 2·scale·t/(B·D·mean |v_old − v*|), whether old is given or left out."""
    v, (t, r, _) = velocities(5, 7, 11), rows(5)
    r[0], r[1], r[2] = 0.5, 0.0, 1.0
    error = v.theta.double() - v.target.double()
    factor = (2 * r.double() - 1) * 10 * t.double() / (5 * 77 * error.abs().mean((1, 2)))
    truth = factor[:, None, None] * error
    for old in (None, v.theta):
        _, grad = gradient(nft_loss, v.theta, backend, old, v.target, t, r)
        assert_gradient_as_good(grad, truth.float(), truth)
        assert not grad[0].any()
    given, left_out = (gradient(nft_loss, v.theta, backend, old, v.target, t, r) for old in (v.theta, None))
    assert torch.equal(given[0].policy, left_out[0].policy)


@every_backend
@pytest.mark.parametrize("r", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("t", [0.0, 1e-30, 1e-7, 1e-5, 0.999, 1.0])
def test_extremes_of_reward_and_time(backend: str, t: float, r: float) -> None:
    v, times, rewards = velocities(2, 65), torch.full((2,), t), torch.full((2,), r)
    truth, torchs = (textbook_nft(v, times, rewards, dtype, beta=0.3) for dtype in (FP64, FP32))
    out, grad = gradient(nft_loss, v.theta, backend, v.old, v.target, times, rewards, beta=0.3)
    assert_as_good(out.loss, torchs[0], truth[0])
    assert grad.isfinite().all()
    if truth[1].abs().max() < 1e-30:
        assert not grad.any()
    else:
        # x̂± − x₀ by subtraction loses a small t altogether, so there PyTorch's own error is no measure.
        assert_gradient_as_good(grad, truth[1], truth[1])


@every_backend
def test_no_error_at_all_is_no_loss(backend: str) -> None:
    v, (t, r, _) = velocities(2, 65), rows(2)
    out, grad = gradient(nft_loss, v.target, backend, v.target, v.target, t, r)
    assert out.loss == 0
    assert not grad.any()


def test_gradcheck_in_fp64() -> None:
    """Where w± stays at its floor it is a constant for finite differences too."""
    v = velocities(2, 3, 5, dtype=FP64)
    t, r, weight = torch.tensor([3e-6, 2e-6]), torch.tensor([0.2, 0.9]), torch.tensor([0.7, 1.3])

    def loss(theta: Tensor) -> Tensor:
        options = {"beta": 0.4, "scale": 1e6, "weight": weight}
        first = nft_loss(theta, v.old, v.target, t, r, v_ref=v.ref, kl_weight=2.0, **options).loss
        assert first.dtype == FP64
        return 3 * first

    torch.autograd.gradcheck(loss, (v.theta.requires_grad_(),))


def test_fp64_is_computed_in_fp64() -> None:
    v, (t, r, _) = velocities(3, 50, dtype=FP64), rows(3)
    truth = textbook_nft(v, t, r, FP64, beta=0.6)
    out, grad = gradient(nft_loss, v.theta, "reference", v.old, v.target, t, r, beta=0.6)
    torch.testing.assert_close(out.loss, truth[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, truth[1], rtol=1e-11, atol=1e-15)


@every_backend
@pytest.mark.parametrize("numel", [1, 1023, 8200])
def test_batch_invariance(backend: str, numel: int) -> None:
    v, (t, r, weight) = velocities(5, numel), rows(5)

    def run(part: slice):
        options = {"weight": weight[part], "v_ref": v.ref[part], "kl_weight": 0.1}
        return gradient(nft_loss, v.theta[part], backend, v.old[part], v.target[part], t[part], r[part], **options)

    whole, grad = run(slice(None))
    for part in (slice(0, 1), slice(1, 2), slice(2, 5)):
        out, own = run(part)
        assert torch.equal(out.policy, whole.policy[part])
        assert torch.equal(out.kl, whole.kl[part])
        assert torch.equal(own, grad[part])
    again, repeated = run(slice(None))
    assert torch.equal(again.loss, whole.loss)
    assert torch.equal(repeated, grad)


@pytest.mark.parametrize("backend", [name for name, device in DEVICES.items() if device == "cpu" and name != "triton"])
def test_the_thread_count_changes_nothing(backend: str) -> None:
    v, (t, r, _) = velocities(1, 200_003), rows(1)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(gradient(nft_loss, v.theta, backend, v.old, v.target, t, r))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0].loss, results[1][0].loss)
    assert torch.equal(results[0][1], results[1][1])


@every_backend
def test_weights_make_parts_add_up_to_the_mean(backend: str) -> None:
    v, (t, r, _) = velocities(6, 129), rows(6)
    whole, grad = gradient(nft_loss, v.theta, backend, v.old, v.target, t, r)
    total = torch.zeros(())
    for part in (slice(0, 4), slice(4, 6)):
        weight = torch.full((part.stop - part.start,), 1 / 6)
        others = (v.old[part], v.target[part], t[part], r[part])
        out, own = gradient(nft_loss, v.theta[part], backend, *others, weight=weight)
        assert torch.equal(own, grad[part])
        total += out.loss
    torch.testing.assert_close(total, whole.loss, rtol=1e-6, atol=0)


@every_backend
def test_weight_zero_leaves_a_sample_out(backend: str) -> None:
    v, (t, r, _) = velocities(3, 65), rows(3)
    weight = torch.tensor([0.5, 0.0, 0.5])
    out, grad = gradient(nft_loss, v.theta, backend, v.old, v.target, t, r, weight=weight)
    assert not grad[1].any()
    torch.testing.assert_close(out.loss, out.policy[[0, 2]].mean(), rtol=1e-6, atol=0)


@every_backend
def test_no_kl_weight_does_not_read_the_reference(backend: str) -> None:
    v, (t, r, _) = velocities(2, 65), rows(2)
    poisoned = torch.full_like(v.ref, math.nan)
    out, grad = gradient(nft_loss, v.theta, backend, v.old, v.target, t, r, v_ref=poisoned)
    plain, expected = gradient(nft_loss, v.theta, backend, v.old, v.target, t, r)
    assert out.kl is None
    assert torch.equal(out.loss, plain.loss)
    assert torch.equal(grad, expected)


@every_backend
def test_only_theta_gets_a_gradient(backend: str) -> None:
    v, (t, r, _) = velocities(2, 65), rows(2)
    device = DEVICES[backend]
    leaves = [tensor.to(device).requires_grad_() for tensor in v[:4]]
    theta, old, target, ref = leaves
    options = {"v_ref": ref, "kl_weight": 1.0, "backend": backend}
    nft_loss(theta, old, target, t.to(device), r.to(device), **options).loss.backward()
    assert leaves[0].grad is not None
    assert all(leaf.grad is None for leaf in leaves[1:])
    frozen = nft_loss(theta.detach(), old, target, t.to(device), r.to(device), **options)
    assert not any(value.requires_grad for value in frozen)


@every_backend
def test_the_gradient_scales_with_what_comes_in(backend: str) -> None:
    v, (t, r, _) = velocities(2, 65), rows(2)
    _, grad = gradient(nft_loss, v.theta, backend, v.old, v.target, t, r)
    leaf = v.theta.to(DEVICES[backend]).requires_grad_()
    others = (tensor.to(leaf.device) for tensor in (v.old, v.target, t, r))
    (4 * nft_loss(leaf, *others, backend=backend).loss).backward()
    assert torch.equal(leaf.grad.cpu(), 4 * grad)


@every_backend
def test_strided_views(backend: str) -> None:
    theta, old, target, ref = (tensor.transpose(1, 2)[::2, :, 1::3] for tensor in velocities(4, 12, 10)[:4])
    t, r, weight = (row[::2] for row in rows(4))
    packed = [tensor.contiguous() for tensor in (theta, old, target, ref, t, r, weight)]
    out, grad = gradient(nft_loss, theta, backend, old, target, t, r, weight=weight, v_ref=ref, kl_weight=0.2)
    options = {"weight": packed[6], "v_ref": packed[3], "kl_weight": 0.2}
    expected = gradient(nft_loss, packed[0], backend, packed[1], packed[2], packed[4], packed[5], **options)
    assert torch.equal(out.loss, expected[0].loss)
    assert torch.equal(grad, expected[1])


@every_backend
def test_empty_batch(backend: str) -> None:
    v, (t, r, weight) = velocities(0, 7, 3), rows(0)
    for given in (None, weight):
        out, grad = gradient(nft_loss, v.theta, backend, v.old, v.target, t, r, weight=given)
        assert out.loss == 0
        assert out.policy.shape == (0,)
        assert grad.shape == (0, 7, 3)


@every_backend
def test_every_output_is_written(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` gives NaN in deterministic mode."""
    v, (t, r, weight) = velocities(3, 5000), rows(3)
    options = {"weight": weight, "v_ref": v.ref, "kl_weight": 0.1}
    plain, expected = gradient(nft_loss, v.theta, backend, v.old, v.target, t, r, **options)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        out, grad = gradient(nft_loss, v.theta, backend, v.old, v.target, t, r, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(out, plain, strict=True))
    assert torch.equal(grad, expected)


@every_backend
def test_nan_stays_in_its_sample(backend: str) -> None:
    v, (t, r, _) = velocities(3, 70), rows(3)
    for name in ("theta", "old", "target", "ref"):
        broken = v._replace(**{name: getattr(v, name).clone()})
        getattr(broken, name)[1, 69] = math.nan
        options = {"v_ref": broken.ref, "kl_weight": 1.0}
        out, grad = gradient(nft_loss, broken.theta, backend, broken.old, broken.target, t, r, **options)
        assert out.loss.isnan()
        assert (out.kl if name == "ref" else out.policy).isnan().tolist() == [False, True, False]
        assert grad.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("all", [0.0, 0.0, 0.3, 0.5, 0.6, 1.0, 1.0]),
        ("positive_only", [0.5, 0.5, 0.5, 0.5, 0.6, 1.0, 1.0]),
        ("negative_only", [0.0, 0.0, 0.3, 0.5, 0.5, 0.5, 0.5]),
        ("one_only", [0.5, 0.5, 0.5, 0.5, 0.6, 0.6, 0.6]),
        ("binary", [0.4, 0.4, 0.4, 0.5, 0.6, 0.6, 0.6]),
    ],
)
def test_advantage_to_reward(mode: str, expected: list[float]) -> None:
    advantage = torch.tensor([-7.0, -5.0, -2.0, 0.0, 1.0, 5.0, 100.0])
    torch.testing.assert_close(advantage_to_reward(advantage, mode=mode), torch.tensor(expected))
    halved = advantage_to_reward(advantage / 2, mode=mode, clip=2.5)
    if mode in ("all", "positive_only", "negative_only"):
        torch.testing.assert_close(halved, torch.tensor(expected))
    else:
        torch.testing.assert_close(halved, 2 * torch.tensor(expected) - 0.5)
    nan = advantage_to_reward(torch.tensor([[math.nan, 1.0]]), mode=mode)
    assert nan.isnan().tolist() == [[True, False]]


def test_bad_advantages() -> None:
    with pytest.raises(TypeError, match=r"advantage must be a floating-point tensor, got torch\.int64"):
        advantage_to_reward(torch.tensor([1]))
    with pytest.raises(TypeError, match="advantage must be a floating-point tensor, got list"):
        advantage_to_reward([1.0])
    with pytest.raises(ValueError, match=r"mode must be one of \('all', .* got 'both'"):
        advantage_to_reward(torch.ones(1), mode="both")
    for clip in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="clip must be finite and > 0, got"):
            advantage_to_reward(torch.ones(1), clip=clip)
