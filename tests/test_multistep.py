"""DPM-Solver++ 2M: coefficients against diffusers' solver and against its order of convergence."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from mtedit_fast.sampling.multistep import dpm2m_coefficients, dpm2m_step


def sample(sigmas, velocity, x):
    previous = None
    for sigma, coefficients in zip(sigmas, dpm2m_coefficients(sigmas), strict=False):
        v = velocity(x, sigma)
        x, previous = dpm2m_step(x, v, previous, coefficients), x.float() - sigma * v.float()
    return x


@pytest.mark.parametrize("steps", [2, 5, 11])
def test_equals_diffusers(steps):
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.tolist()
    x = start = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    for timestep, sigma in zip(scheduler.timesteps, sigmas, strict=False):
        x = scheduler.step(torch.sin(3 * x) + sigma * x, timestep, x).prev_sample
    ours = sample(sigmas, lambda x, sigma: torch.sin(3 * x) + sigma * x, start)
    assert (ours - x).abs().max() <= 1e-4 * x.abs().max()


def test_second_order_on_a_gaussian_whose_flow_is_known():
    """x₀ ~ N(0, s²): the velocity is linear, and the flow scales x with the marginal's deviation."""
    s = 0.5

    def velocity(x, sigma):
        return x * (sigma - (1 - sigma) * s**2) / (sigma**2 + (1 - sigma) ** 2 * s**2)

    def deviation(sigma):
        return (sigma**2 + (1 - sigma) ** 2 * s**2) ** 0.5

    x, errors = torch.ones(1, 1), []
    for steps in (5, 10, 20):
        sigmas = [0.9 - 0.7 * i / steps for i in range(steps + 1)]
        exact = deviation(sigmas[-1]) / deviation(sigmas[0])
        errors.append(abs(sample(sigmas, velocity, x).item() - exact))
    assert errors[0] / errors[1] > 3.2
    assert errors[1] / errors[2] > 3.2


def test_first_step_and_last_step_are_eulers():
    sigmas = [1.0, 0.7, 0.4, 0.0]
    rows = dpm2m_coefficients(sigmas)
    for i in (0, 1, 2):
        a, b, c = rows[i]
        first_order = i in (0, 2) or sigmas[i - 1] == 1  # λ = −∞ at σ = 1: nothing to extrapolate from
        if first_order:
            assert (a, b, c) == pytest.approx((1.0, sigmas[i + 1] - sigmas[i], 0.0))
    assert dpm2m_coefficients([0.9, 0.7, 0.4, 0.0])[1][2] != 0


def test_bf16_state_is_stepped_in_fp32():
    x, v, previous = (torch.randn(2, 3).bfloat16() for _ in range(3))
    out = dpm2m_step(x, v, previous.float(), (0.5, -0.25, 0.125))
    expected = 0.5 * x.double() - 0.25 * v.double() + 0.125 * previous.double()
    assert out.dtype == torch.float32
    assert (out - expected).abs().max() < 1e-6


@pytest.mark.parametrize("sigmas", [[1.0], [0.5, 0.5, 0.0], [1.2, 0.5], [0.5, -0.1]])
def test_bad_schedules_are_named(sigmas):
    with pytest.raises(ValueError, match="sigmas: expected at least 2, falling strictly"):
        dpm2m_coefficients(torch.tensor(sigmas))
