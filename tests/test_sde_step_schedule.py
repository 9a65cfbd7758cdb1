"""`sde_step` over a whole schedule of a real diffusers scheduler, dynamic shifting included."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from sde_truth import VARIANTS, assert_as_good, literal_step
from test_sde_step import FP32, inputs, run

from mtedit_fast.ops import sde_coefficients, sde_step


def flux_scheduler(steps: int = 28) -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1's schedule for 4096 image tokens, shifted as its pipelines do."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=1.15)
    return scheduler


def test_ode_follows_the_diffusers_scheduler(backend: str) -> None:
    scheduler = flux_scheduler()
    coefficients = sde_coefficients(scheduler.sigmas, variant="ode")
    ours, _, _ = inputs(2, 63, 4)
    theirs = ours.clone()
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = torch.sin(3 * ours + i)
        theirs = scheduler.step(velocity, timestep, theirs).prev_sample
        ours = run(backend, ours, velocity, "ode", i, coefficients=coefficients).prev_sample
        assert_as_good(ours, theirs, theirs.double())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_step_of_a_shifted_schedule(variant: str) -> None:
    sigmas = flux_scheduler().sigmas
    coefficients = sde_coefficients(sigmas, variant=variant, eta=0.7)
    steps = [i for i in range(28) if coefficients.stochastic[i]]
    assert len(steps) == 28 - (variant in ("cps", "ddim"))
    sample, velocity, noise = inputs(len(steps), 4, 63)
    out = sde_step(sample, velocity, coefficients, torch.tensor(steps), noise=noise)
    literal = {
        dtype: literal_step(variant, sample.to(dtype), velocity.to(dtype), sigmas.tolist(), steps, 0.7, noise.to(dtype))
        for dtype in (FP32, torch.float64)
    }
    for mine, torchs, truth in zip(out, literal[FP32], literal[torch.float64], strict=False):
        assert_as_good(mine, torchs, truth)
