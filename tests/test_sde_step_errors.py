"""Bad arguments of `sde_step` and `sde_coefficients`: each error names the argument and what was expected."""

import math

import pytest
import torch
from test_sde_step import SIGMAS, inputs

from mtedit_fast.ops import SDECoefficients, _cpp, sde_coefficients, sde_step

GOOD = inputs(2, 3, 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sample": [1.0]}, TypeError, "sample must be a floating-point tensor, got list"),
        ({"velocity": torch.ones(2, 3, 4, dtype=torch.int32)}, TypeError, r"velocity must be .* got torch.int32"),
        (
            {"velocity": torch.ones(2, 3, 5)},
            ValueError,
            r"velocity must have sample's shape \[2, 3, 4\], got \[2, 3, 5\]",
        ),
        (
            {"velocity": torch.ones(2, 3, 4, device="meta")},
            ValueError,
            "velocity must be on sample's device cpu, got meta",
        ),
        ({"sample": torch.ones(4), "velocity": torch.ones(4)}, ValueError, r"sample must be \[B, ...\]"),
        ({"sample": torch.ones(2, 0), "velocity": torch.ones(2, 0)}, ValueError, "elements in every sample"),
        ({"coefficients": torch.ones(4, 4)}, TypeError, "must come from sde_coefficients, got Tensor"),
        ({"coefficients": sde_coefficients(SIGMAS, device="meta")}, ValueError, "pass device= to sde_coefficients"),
        (
            {"coefficients": SDECoefficients(torch.ones(4, 3), "none")},
            ValueError,
            r"must be \[T, 4\] float32",
        ),
        ({"step": 4}, ValueError, "step must be within the schedule's steps 0…3, got 4"),
        ({"step": -1}, ValueError, "got -1"),
        ({"step": torch.tensor([0, 4])}, ValueError, "steps 0…3, got 0…4"),
        ({"step": 1.0}, TypeError, "step must be an int or an int64 tensor, got float"),
        ({"step": torch.tensor(1.0)}, TypeError, "step must be an int or an int64 tensor, got torch.float32"),
        ({"step": torch.tensor([1])}, ValueError, r"step must have shape \[\] or \[B\] = \[2\], got \[1\]"),
        (
            {"step": torch.ones(2, dtype=torch.int64, device="meta")},
            ValueError,
            "step must be an int or on sample's dev",
        ),
        ({"noise": None}, ValueError, "a stochastic step needs noise=, seed= or prev_sample="),
        ({"seed": torch.tensor([1, 2])}, ValueError, "only one of noise, seed and prev_sample, got noise and seed"),
        ({"noise": torch.ones(2, 12)}, ValueError, r"noise must have sample's shape"),
        ({"noise": None, "seed": [1, 2]}, TypeError, "seed must be an int64 tensor .* got list"),
        (
            {"noise": None, "seed": torch.tensor([1.0, 2])},
            TypeError,
            "seed must be an int64 tensor .* got torch.float32",
        ),
        ({"noise": None, "seed": torch.tensor([1])}, ValueError, r"seed must have shape \[B\] = \[2\], got \[1\]"),
        ({"noise": None, "seed": torch.tensor([[1], [2]])}, ValueError, r"one per sample, got \[2, 1\]"),
        (
            {"noise": None, "seed": torch.ones(2, dtype=torch.int64, device="meta")},
            ValueError,
            "seed must be on sample's",
        ),
        ({"noise": None, "prev_sample": torch.ones(2, 12)}, ValueError, "prev_sample must have sample's shape"),
        ({"rounding": "first"}, ValueError, "rounding must be 'before' or 'after', got 'first'"),
        ({"out_dtype": torch.int8}, TypeError, "out_dtype must be a floating-point dtype, got torch.int8"),
        ({"backend": "cuda"}, ValueError, "backend must be one of .* got 'cuda'"),
        (
            {"backend": "cpp", "out_dtype": torch.float64},
            ValueError,
            "backend='cpp' is not available: .* not torch.float64",
        ),
    ],
)
def test_bad_arguments(changes: dict, error: type[Exception], message: str) -> None:
    sample, velocity, noise = GOOD
    arguments = {"sample": sample, "velocity": velocity, "coefficients": sde_coefficients(SIGMAS), "step": 1}
    with pytest.raises(error, match=message):
        sde_step(**{**arguments, "noise": noise, **changes})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "euler"}, "variant must be one of .* got 'euler'"),
        ({"eta": -0.1}, "eta, the noise level, must be finite and >= 0, got -0.1"),
        ({"eta": math.nan}, "eta, the noise level, must be finite"),
        ({"eta": 1.1, "variant": "ddim"}, r"eta must be in \[0, 1\] for variant='ddim', got 1.1"),
        ({"sigmas": [1.0]}, "sigmas must be 1-D with at least two values, got shape"),
        ({"sigmas": torch.ones(2, 2)}, "sigmas must be 1-D"),
        ({"sigmas": [1.0, 0.5, 0.5]}, "sigmas must decrease strictly within"),
        ({"sigmas": [1.1, 0.5]}, "sigmas must decrease strictly within"),
        ({"sigmas": [1.0, math.nan]}, "sigmas must decrease strictly within"),
        ({"sigma_max": 1.0}, r"sigma_max must be in \[0, 1\) for variant='sde'.* got 1.0"),
        ({"sigma_max": -0.1}, r"sigma_max must be in \[0, 1\)"),
        ({"sde_steps": [4]}, "sde_steps must be within the schedule's steps 0…3, got"),
    ],
)
def test_bad_schedules(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sde_coefficients(**{"sigmas": SIGMAS, **arguments})


def test_an_explicit_back_end_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sample, velocity, noise = GOOD
    coefficients = sde_coefficients(SIGMAS)
    monkeypatch.setattr(_cpp, "_reason", "the C++ extension is not built")
    with pytest.raises(ValueError, match=r"backend='cpp' is not available: the C.* extension is not built; use"):
        sde_step(sample, velocity, coefficients, 1, noise=noise, backend="cpp")
    automatic = sde_step(sample, velocity, coefficients, 1, noise=noise)
    reference = sde_step(sample, velocity, coefficients, 1, noise=noise, backend="reference")
    assert torch.equal(automatic.log_prob, reference.log_prob)
    triton = pytest.importorskip("mtedit_fast.kernels.seeded_noise")
    monkeypatch.setattr(triton, "INTERPRETED", False)
    with pytest.raises(ValueError, match="'triton' is not available: it runs on CUDA and the tensors are on cpu"):
        sde_step(sample, velocity, coefficients, 1, noise=noise, backend="triton")
