"""Bad arguments of `nft_loss` and `crd_loss`: each error names the argument and what was expected."""

import math

import pytest
import torch
from velocity_truth import rows, velocities

from mtedit_fast.ops import crd_loss, nft_loss

V = velocities(2, 3, 4)
T, R, WEIGHT = rows(2)
INTEGERS = torch.ones(2, 3, 4, dtype=torch.int32)
META = torch.ones(2, 3, 4, device="meta")
NAN = V.theta.clone()
NAN[1, 2, 3] = math.nan
NFT = {"v_theta": V.theta, "v_old": V.old, "v_target": V.target, "t": T, "r": R, "v_ref": V.ref}
CRD = {"v_theta": V.theta, "v_old": V.old, "v_target": V.target, "r": R, "groups": torch.tensor([0, 0]), "v_ref": V.ref}
SHARED = [
    ({"v_theta": [1.0]}, TypeError, "v_theta must be a floating-point tensor, got list"),
    ({"v_old": INTEGERS}, TypeError, r"v_old must be a floating-point tensor, got torch\.int32"),
    ({"v_target": None}, TypeError, "v_target must be a floating-point tensor, got NoneType"),
    ({"v_ref": INTEGERS}, TypeError, r"v_ref must be a floating-point tensor, got torch\.int32"),
    ({"v_theta": torch.ones(4)}, ValueError, r"v_theta must be \[B, ...\] with elements in every sample, got \[4\]"),
    ({"v_theta": torch.ones(2, 0)}, ValueError, r"elements in every sample, got \[2, 0\]"),
    ({"v_old": torch.ones(2, 12)}, ValueError, r"v_old must have v_theta's shape \[2, 3, 4\], got \[2, 12\]"),
    ({"v_target": META}, ValueError, "v_target must be on v_theta's device cpu, got meta"),
    ({"v_ref": torch.ones(3, 3, 4)}, ValueError, r"v_ref must have v_theta's shape \[2, 3, 4\], got \[3, 3, 4\]"),
    ({"r": 0.5}, TypeError, "r must be a floating-point tensor, got float"),
    ({"r": torch.tensor([0, 1])}, TypeError, r"r must be a floating-point tensor, got torch\.int64"),
    ({"r": torch.tensor(0.5)}, ValueError, r"r must have shape \[B\] = \[2\], got \[\]"),
    ({"r": torch.ones(2, device="meta")}, ValueError, "r must be on v_theta's device cpu, got meta"),
    ({"weight": torch.ones(2, 1)}, ValueError, r"weight must have shape \[B\] = \[2\], got \[2, 1\]"),
    ({"weight": 0.5}, TypeError, "weight must be a floating-point tensor, got float"),
    ({"beta": 0.0}, ValueError, "beta must be finite and > 0, got 0.0"),
    ({"beta": -1.0}, ValueError, "beta must be finite and > 0, got -1.0"),
    ({"beta": math.nan}, ValueError, "beta must be finite and > 0, got nan"),
    ({"scale": -1.0}, ValueError, "scale must be finite and >= 0, got -1.0"),
    ({"scale": math.inf}, ValueError, "scale must be finite and >= 0, got inf"),
    ({"kl_weight": -1e-4}, ValueError, "kl_weight must be finite and >= 0, got -0.0001"),
    ({"kl_weight": 0.1, "v_ref": None}, ValueError, "kl_weight=0.1 needs v_ref=, .* or pass kl_weight=0"),
    ({"backend": "cuda"}, ValueError, "backend must be one of .* got 'cuda'"),
    *(
        (
            {"backend": name, "v_old": V.old.double()},
            ValueError,
            rf"backend='{name}' is not available: .* not torch\.float64",
        )
        for name in ("cpp", "triton")
    ),
    ({"check": True, "v_theta": NAN}, ValueError, r"v_theta is not finite in samples \[1\]"),
    ({"check": True, "v_old": NAN}, ValueError, r"v_old is not finite in samples \[1\]"),
    ({"check": True, "v_target": NAN}, ValueError, r"v_target is not finite in samples \[1\]"),
    ({"check": True, "v_ref": NAN, "kl_weight": 0.1}, ValueError, r"v_ref is not finite in samples \[1\]"),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *SHARED,
        ({"t": torch.ones(3)}, ValueError, r"t must have shape \[B\] = \[2\], got \[3\]"),
        ({"t": torch.tensor([0.5, 500.0])}, ValueError, r"t must be within \[0, 1\], got values from 0.5 to 500"),
        ({"r": torch.tensor([-0.1, 0.5])}, ValueError, r"r must be within \[0, 1\], got values from -0.1 to 0.5"),
        ({"r": torch.tensor([1.5, 0.5])}, ValueError, r"r must be within \[0, 1\], got values from 0.5 to 1.5"),
        ({"r": torch.tensor([math.nan, 0.5])}, ValueError, r"r must be within \[0, 1\], got values from nan to nan"),
    ],
)
def test_bad_arguments_of_nft_loss(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        nft_loss(**{**NFT, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *SHARED,
        ({"groups": None}, ValueError, "pass groups=, or centre= where groups are spread over calls; got neither"),
        ({"centre": R}, ValueError, "pass groups=, or centre= .* got both"),
        ({"groups": [0, 0]}, TypeError, "groups must be an int64 tensor, got list"),
        ({"groups": R}, TypeError, r"groups must be an int64 tensor, got torch\.float32"),
        ({"groups": torch.tensor([0])}, ValueError, r"groups must have shape \[B\] = \[2\], got \[1\]"),
        (
            {"groups": torch.ones(2, dtype=torch.int64, device="meta")},
            ValueError,
            "groups must be on v_theta's device cpu, got meta",
        ),
        ({"groups": None, "centre": torch.ones(3)}, ValueError, r"centre must have shape \[B\] = \[2\], got \[3\]"),
        ({"kl_floor": 0.1}, ValueError, r"kl_floor must be within \[0, kl_weight\] = \[0, 0.0\], got 0.1"),
        ({"kl_floor": -0.1, "kl_weight": 0.1}, ValueError, r"kl_floor must be within .* got -0.1"),
        ({"check": True, "r": torch.tensor([math.inf, 0.5])}, ValueError, r"r is not finite in samples \[0\]"),
    ],
)
def test_bad_arguments_of_crd_loss(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        crd_loss(**{**CRD, **changes})


def test_check_lets_good_values_pass() -> None:
    assert nft_loss(**NFT, kl_weight=0.1, check=True).loss.isfinite()
    assert crd_loss(**CRD, kl_weight=0.1, check=True).loss.isfinite()
    unread = {**NFT, "v_ref": NAN}
    assert nft_loss(**unread, check=True).loss.isfinite()


def test_an_explicit_back_end_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("mtedit_fast.kernels.seeded_noise")
    monkeypatch.setattr(triton, "INTERPRETED", False)
    for function, arguments in ((nft_loss, NFT), (crd_loss, CRD)):
        with pytest.raises(ValueError, match="'triton' is not available: it runs on CUDA and the tensors are on cpu"):
            function(**arguments, backend="triton")
