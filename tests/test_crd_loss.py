"""`crd_loss` on every back end against fp64 and against the form that autograd differentiates through the centring."""

import itertools
import math

import pytest
import torch
from op_backends import DEVICES
from sde_truth import assert_as_good
from test_nft_loss import BF16, FP16, FP32, FP64, assert_gradient_as_good, every_backend
from torch import Tensor
from velocity_truth import gradient, rows, textbook_crd, velocities

from mtedit_fast.ops import crd_loss

GROUPS = torch.tensor([7, -3, 7, 7, -3, 2**40])  # not contiguous, one of a single sample


@every_backend
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.2},
        {"beta": 3.0, "scale": 1.0},
        {"adaptive": False},
        {"kl_weight": 0.3},
        {"kl_weight": 0.3, "kl_floor": 0.05},
        {"weight": torch.tensor([0.3, 0.7, 0.3, 0.3, 0.7, 2.0])},  # equal within a group
        {"weight": rows(6)[2], "through_centre": False},
        {"weight": rows(6)[2], "through_centre": False, "kl_weight": 0.1, "kl_floor": 0.0, "beta": 0.5, "scale": 2.0},
        {"old_is_theta": True},
        {"old_is_theta": True, "adaptive": False, "beta": 0.4, "kl_weight": 0.1},
    ],
)
def test_value_and_gradient_against_fp64(backend: str, options: dict) -> None:
    v, (_, r, _) = velocities(6, 31, 33), rows(6)
    truth, torchs = (textbook_crd(v, r, GROUPS, dtype, **options) for dtype in (FP64, FP32))
    given = {key: value for key, value in options.items() if key not in ("old_is_theta", "through_centre")}
    old = None if "old_is_theta" in options else v.old
    reference = v.ref if "kl_weight" in options else None
    out, grad = gradient(crd_loss, v.theta, backend, old, v.target, r, GROUPS, v_ref=reference, **given)
    assert out.loss.dtype == out.policy.dtype == FP32
    assert_as_good(out.loss, torchs[0], truth[0])
    assert_gradient_as_good(grad, torchs[1], truth[1])
    assert_as_good(out.policy, torchs[2], truth[2])
    assert_as_good(out.implicit_reward, torchs[3], truth[3])
    if reference is None:
        assert out.kl is None
    else:
        assert_as_good(out.kl, torchs[4], truth[4])


@every_backend
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*itertools.product([(1, 1), (3, 63), (2, 4097), (2, 4, 33, 65)], [FP32, BF16, FP16]), ((35, 2), FP32)],
)
def test_sizes_and_dtypes(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    v, (_, r, _) = velocities(*shape, dtype=dtype), rows(shape[0])
    groups = torch.arange(shape[0]) % 3  # 35 samples: more than the kernel's last pass takes at a time
    options = {"beta": 0.6, "kl_weight": 0.1}
    truth, torchs = (textbook_crd(v, r, groups, kind, **options) for kind in (FP64, FP32))
    out, grad = gradient(crd_loss, v.theta, backend, v.old, v.target, r, groups, v_ref=v.ref, **options)
    assert grad.dtype == dtype
    assert_as_good(out.loss, torchs[0], truth[0])
    assert_gradient_as_good(grad, torchs[1].to(dtype), truth[1])


@every_backend
def test_where_old_equals_theta_the_gradient_is_along_the_error(backend: str) -> None:
    """(r − r̄) times 4·scale/(B·D·mean |v_θ − v*|) times (v_θ − v*), whether old is given or left out."""
    v, (_, r, _) = velocities(6, 7, 11), rows(6)
    error = v.theta.double() - v.target.double()
    centred = torch.stack([r[i].double() - r[GROUPS[i] == GROUPS].double().mean() for i in range(6)])
    truth = (20 * centred / (6 * 77 * error.abs().mean((1, 2))))[:, None, None] * error
    for old in (None, v.theta):
        out, grad = gradient(crd_loss, v.theta, backend, old, v.target, r, GROUPS)
        assert not out.implicit_reward.any()
        assert_gradient_as_good(grad, truth.float(), truth)


@every_backend
def test_the_normaliser_of_a_group_cancels(backend: str) -> None:
    """A constant added to the rewards of one group changes nothing."""
    v, (_, r, _) = velocities(6, 65), rows(6)
    out, grad = gradient(crd_loss, v.theta, backend, v.old, v.target, r, GROUPS)
    shifted = r + torch.where(GROUPS == 7, 0.5, 0.0)
    moved, expected = gradient(crd_loss, v.theta, backend, v.old, v.target, shifted, GROUPS)
    torch.testing.assert_close(out.loss, moved.loss, rtol=1e-5, atol=1e-6)
    assert_gradient_as_good(grad, expected, expected.double())
    alone = out.policy[GROUPS == 2**40]
    assert not alone.any()  # it is its own mean


@every_backend
def test_a_group_spread_over_calls(backend: str) -> None:
    """Centres from a first pass without gradient: the parts add up to the whole."""
    v, (_, r, _) = velocities(6, 129), rows(6)
    whole, grad = gradient(crd_loss, v.theta, backend, v.old, v.target, r, GROUPS, beta=0.7)
    residual = 0.7 * whole.implicit_reward - r
    centre = torch.stack([residual[group == GROUPS].mean() for group in GROUPS])
    total, parts = torch.zeros(()), []
    for part in (slice(0, 4), slice(4, 6)):
        options = {"centre": centre[part], "weight": torch.full((part.stop - part.start,), 1 / 6), "beta": 0.7}
        others = (v.old[part], v.target[part], r[part])
        out, own = gradient(crd_loss, v.theta[part], backend, *others, **options)
        total, parts = total + out.loss, [*parts, own]
    torch.testing.assert_close(total, whole.loss, rtol=1e-6, atol=1e-7)
    assert_gradient_as_good(torch.cat(parts), grad, grad.double())


def test_gradcheck_in_fp64() -> None:
    """Without adaptive widths nothing is a constant but the centre, whose share of the gradient vanishes."""
    v, (_, r, _) = velocities(6, 3, 5, dtype=FP64), rows(6)

    def loss(theta: Tensor) -> Tensor:
        options = {"adaptive": False, "beta": 0.4, "v_ref": v.ref, "kl_weight": 2.0, "kl_floor": 0.5}
        out = crd_loss(theta, v.old, v.target, r, GROUPS, **options).loss
        assert out.dtype == FP64
        return 3 * out

    torch.autograd.gradcheck(loss, (v.theta.requires_grad_(),))


@every_backend
@pytest.mark.parametrize("numel", [1, 1023, 8200])
def test_a_group_does_not_depend_on_the_batch(backend: str, numel: int) -> None:
    v, (_, r, weight) = velocities(6, numel), rows(6)

    def run(part: Tensor):
        options = {"weight": weight[part], "v_ref": v.ref[part], "kl_weight": 0.1, "kl_floor": 0.01}
        others = (v.old[part], v.target[part], r[part], GROUPS[part])
        return gradient(crd_loss, v.theta[part], backend, *others, **options)

    whole, grad = run(torch.arange(6))
    for part in (torch.tensor([0, 2, 3]), torch.tensor([1, 4]), torch.tensor([5]), torch.tensor([5, 1, 0, 4, 2, 3])):
        out, own = run(part)
        for ours, expected in zip(out[1:], whole[1:], strict=True):
            assert torch.equal(ours, expected[part])
        assert torch.equal(own, grad[part])


@every_backend
def test_no_kl_weight_does_not_read_the_reference(backend: str) -> None:
    v, (_, r, _) = velocities(6, 65), rows(6)
    poisoned = torch.full_like(v.ref, math.nan)
    out, grad = gradient(crd_loss, v.theta, backend, v.old, v.target, r, GROUPS, v_ref=poisoned)
    plain, expected = gradient(crd_loss, v.theta, backend, v.old, v.target, r, GROUPS)
    assert out.kl is None
    assert torch.equal(out.loss, plain.loss)
    assert torch.equal(grad, expected)


@every_backend
def test_strided_views(backend: str) -> None:
    theta, old, target, ref = (tensor.transpose(1, 2)[::2, :, 1::3] for tensor in velocities(12, 12, 10)[:4])
    r, weight = (row[::2] for row in rows(12)[1:])
    groups = GROUPS.repeat_interleave(2)[::2]
    packed = [tensor.contiguous() for tensor in (theta, old, target, r, groups, ref, weight)]
    options = {"v_ref": ref, "weight": weight, "kl_weight": 0.2}
    out, grad = gradient(crd_loss, theta, backend, old, target, r, groups, **options)
    options = {"v_ref": packed[5], "weight": packed[6], "kl_weight": 0.2}
    expected = gradient(crd_loss, packed[0], backend, *packed[1:5], **options)
    assert torch.equal(out.loss, expected[0].loss)
    assert torch.equal(grad, expected[1])


@every_backend
def test_empty_batch(backend: str) -> None:
    v, (_, r, weight) = velocities(0, 7, 3), rows(0)
    for options in ({"groups": GROUPS[:0]}, {"centre": r, "weight": weight}):
        out, grad = gradient(crd_loss, v.theta, backend, v.old, v.target, r, **options)
        assert out.loss == 0
        assert out.policy.shape == out.implicit_reward.shape == (0,)
        assert grad.shape == (0, 7, 3)


@every_backend
def test_every_output_is_written(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` gives NaN in deterministic mode."""
    v, (_, r, weight) = velocities(6, 5000), rows(6)
    options = {"weight": weight, "v_ref": v.ref, "kl_weight": 0.1}
    plain, expected = gradient(crd_loss, v.theta, backend, v.old, v.target, r, GROUPS, **options)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        out, grad = gradient(crd_loss, v.theta, backend, v.old, v.target, r, GROUPS, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(out, plain, strict=True))
    assert torch.equal(grad, expected)


@every_backend
def test_nan_stays_in_its_group(backend: str) -> None:
    v, (_, r, _) = velocities(6, 70), rows(6)
    v.theta[1, 69] = math.nan
    out, grad = gradient(crd_loss, v.theta, backend, v.old, v.target, r, GROUPS)
    assert out.loss.isnan()
    assert torch.equal(out.policy.isnan(), GROUPS == -3)
    assert torch.equal(grad.isnan().any(1), GROUPS == -3)
    assert out.implicit_reward.isnan().nonzero().tolist() == [[1]]


@every_backend
def test_only_theta_gets_a_gradient(backend: str) -> None:
    v, (_, r, _) = velocities(6, 65), rows(6)
    device = DEVICES[backend]
    leaves = [tensor.to(device).requires_grad_() for tensor in v[:4]]
    theta, old, target, ref = leaves
    arguments = (old, target, r.to(device), GROUPS.to(device))
    options = {"v_ref": ref, "kl_weight": 1.0, "backend": backend}
    crd_loss(theta, *arguments, **options).loss.backward()
    assert leaves[0].grad is not None
    assert all(leaf.grad is None for leaf in leaves[1:])
    assert not any(value.requires_grad for value in crd_loss(theta.detach(), *arguments, **options))
