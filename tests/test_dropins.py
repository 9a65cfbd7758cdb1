"""Drop-ins against the formulas of their projects, written out here in fp64."""

import inspect
import math
import subprocess
import sys

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

import mtedit_fast
from mtedit_fast.dropins import diffusion_nft, flow_grpo, mixgrpo

STEPS = 28
SHAPES = [(3, 63, 5), (2, 3, 7, 9)]
LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def make_scheduler(steps: int = STEPS) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=0.83)  # as Kontext does
    return scheduler


def formula(variant, x, v, sigmas, i, eta, prev):
    """Mean, noise scale c, 4th return of flow_grpo and log-prob of ``prev``, in the inputs' dtype."""
    s, n, first = sigmas[i].to(x.dtype), sigmas[i + 1].to(x.dtype), sigmas[1].to(x.dtype)
    dt = n - s
    if variant == "cps":
        std = n * math.sin(eta * math.pi / 2)
        mean = (x - s * v) * (1 - n) + (x + (1 - s) * v) * (n**2 - std**2).sqrt()
        return mean, std, std, -((prev - mean) ** 2).flatten(1).mean(1)
    std = eta * (s / (1 - (first if s == 1 else s))).sqrt() if variant == "sde" else torch.as_tensor(eta, dtype=x.dtype)
    score = -(x + (1 - s) * v) / s
    mean = x + (v - std**2 / 2 * score) * dt
    c = std * (-dt).sqrt()
    log_prob = (-((prev - mean) ** 2) / (2 * c**2)).flatten(1).mean(1)
    return mean, c, std, log_prob if variant == "dance" else log_prob - c.log() - LOG_SQRT_2PI


def no_worse(ours, truth, eager):
    """The tolerance convention: our distance from the fp64 truth is at most that of eager PyTorch, plus 1e-5."""
    assert ours.shape == truth.shape
    error, allowed = (ours.double() - truth).abs().max(), (eager.double() - truth).abs().max() + 1e-5
    assert error <= allowed, f"error {error:.3g}, eager PyTorch {allowed:.3g}"


def make_inputs(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, v, noise = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    return x, v, (x + 0.05 * noise).to(dtype)


def another_policys(variant, x, v, sigmas, i, eta):
    """A next sample as far from the mean as those of a policy close by."""
    mean, c, *_ = formula(variant, x.double(), v.double(), sigmas.double(), i, eta, x.double())
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
    return (mean + 1.2 * c.clamp(min=0.01) * noise).to(torch.promote_types(x.dtype, v.dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_flow_grpo_over_a_schedule(sde_type, dtype, shape):
    scheduler = make_scheduler()
    assert scheduler.sigmas[0] == 1  # the σ = 1 case is met
    x, v, _ = make_inputs(shape, dtype)
    for i, t in enumerate(scheduler.timesteps):
        timestep = t.repeat(shape[0] if i % 2 else 1)
        rows = (len(timestep), *[1] * (len(shape) - 1))
        prev = another_policys(sde_type, x, v, scheduler.sigmas, i, 0.9)
        generator = torch.Generator().manual_seed(7)
        sampled = flow_grpo.sde_step_with_logprob(
            scheduler, v, timestep, x, 0.9, generator=generator, sde_type=sde_type, return_sqrt_dt=True
        )
        mean, c, std, _ = formula(sde_type, x.double(), v.double(), scheduler.sigmas.double(), i, 0.9, prev.double())
        mean32, c32, std32, _ = formula(sde_type, x.float(), v.float(), scheduler.sigmas, i, 0.9, prev.float())
        noise = randn_tensor(shape, generator=torch.Generator().manual_seed(7))
        no_worse(sampled[0], mean + c * noise.double(), mean32 + c32 * noise)
        no_worse(sampled[2], mean, mean32)
        no_worse(sampled[3], std.expand(rows), std32.expand(rows))
        sqrt_dt = (scheduler.sigmas[i] - scheduler.sigmas[i + 1]).sqrt()
        no_worse(sampled[4], sqrt_dt.double().expand(rows), sqrt_dt.expand(rows))
        # log-probs: of the sample just drawn, and of a stored one
        truth = formula(sde_type, x.double(), v.double(), scheduler.sigmas.double(), i, 0.9, sampled[0].double())[3]
        eager = formula(sde_type, x.float(), v.float(), scheduler.sigmas, i, 0.9, sampled[0])[3]
        no_worse(sampled[1], truth, eager)
        replayed = flow_grpo.sde_step_with_logprob(
            scheduler, v, timestep, x, noise_level=0.9, prev_sample=prev, sde_type=sde_type
        )
        assert len(replayed) == 4
        assert torch.equal(replayed[0], prev.float())
        truth = formula(sde_type, x.double(), v.double(), scheduler.sigmas.double(), i, 0.9, prev.double())[3]
        eager = formula(sde_type, x.float(), v.float(), scheduler.sigmas, i, 0.9, prev.float())[3]
        no_worse(replayed[1], truth, eager)
        assert all(out.dtype == torch.float32 for out in (*sampled, *replayed))


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_flow_grpo_replay_is_exact_and_has_the_gradient(sde_type):
    scheduler = make_scheduler()
    x, v, _ = make_inputs((3, 63, 5))
    for i in (0, 13, 26, 27):
        prev = another_policys(sde_type, x, v, scheduler.sigmas, i, 0.7)
        t = scheduler.timesteps[i : i + 1]
        drawn, old, *_ = flow_grpo.sde_step_with_logprob(scheduler, v, t, x, sde_type=sde_type)
        new = flow_grpo.sde_step_with_logprob(scheduler, v, t, x, prev_sample=drawn, sde_type=sde_type)[1]
        assert torch.equal(old, new)
        grads = []
        for dtype in (torch.float64, torch.float32):
            leaf = v.to(dtype, copy=True).requires_grad_()
            formula(sde_type, x.to(dtype), leaf, scheduler.sigmas.to(dtype), i, 0.7, prev.to(dtype))[3].sum().backward()
            grads.append(leaf.grad)
        leaf = v.clone().requires_grad_()
        out = flow_grpo.sde_step_with_logprob(scheduler, leaf, t, x, prev_sample=prev, sde_type=sde_type)
        out[1].sum().backward()
        no_worse(leaf.grad, *grads)


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_flow_grpo_mixed_timesteps(sde_type):
    """Several steps of the schedule in one batch, the last one among them, equal the steps one by one."""
    scheduler = make_scheduler(6)
    x, v, prev = make_inputs((3, 17, 4))
    order = [0, 5, 2]
    together = flow_grpo.sde_step_with_logprob(
        scheduler, v, scheduler.timesteps[order], x, prev_sample=prev, sde_type=sde_type, return_sqrt_dt=True
    )
    for row, i in enumerate(order):
        one = slice(row, row + 1)
        alone = flow_grpo.sde_step_with_logprob(
            scheduler,
            v[one],
            [float(scheduler.timesteps[i])],
            x[one],
            prev_sample=prev[one],
            sde_type=sde_type,
            return_sqrt_dt=True,
        )
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a, b[one], rtol=0, atol=1e-6)


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_flow_grpo_without_noise_is_euler_and_advances_the_generator(sde_type):
    scheduler = make_scheduler(5)
    x, v, _ = make_inputs((2, 17, 4))
    generator, other = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    for i, t in enumerate(scheduler.timesteps):
        out, log_prob, mean, std = flow_grpo.sde_step_with_logprob(
            scheduler, v, t[None], x, noise_level=0, generator=generator, sde_type=sde_type
        )
        dt = (scheduler.sigmas[i + 1] - scheduler.sigmas[i]).double()
        no_worse(out, x.double() + dt * v.double(), x + dt.float() * v)
        assert torch.equal(out, mean)
        assert torch.equal(log_prob, torch.zeros(2))
        assert torch.equal(std, torch.zeros(1, 1, 1))
        randn_tensor(x.shape, generator=other)
    assert torch.equal(generator.get_state(), other.get_state())


def test_flow_grpo_generator_per_sample():
    scheduler = make_scheduler(5)
    x, v, _ = make_inputs((3, 17, 4))
    t = scheduler.timesteps[1].repeat(3)
    both = flow_grpo.sde_step_with_logprob(
        scheduler, v, t, x, generator=[torch.Generator().manual_seed(s) for s in (4, 5, 6)]
    )
    for row, seed in enumerate((4, 5, 6)):
        one = slice(row, row + 1)
        alone = flow_grpo.sde_step_with_logprob(
            scheduler, v[one], t[one], x[one], generator=torch.Generator().manual_seed(seed)
        )
        for a, b in zip(alone, both, strict=True):
            assert torch.equal(a, b[one])


def test_device_lookup():
    """The look-up that device timesteps take; a value outside the schedule becomes NaN, not a neighbour."""
    scheduler = make_scheduler(5)
    schedule = scheduler.timesteps
    wanted = torch.tensor([schedule[3], 12.5, schedule[0], schedule[4] + 1e-3])
    assert flow_grpo.device_index(wanted, schedule).tolist() == [3, 5, 0, 5]
    assert flow_grpo._at(schedule, torch.tensor([5])).isnan().all()


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("replay", [False, True])
def test_flow_grpo_on_cuda(sde_type, replay):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x, v, prev = make_inputs((3, 63, 5))
    host, device = make_scheduler(6), FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    device.set_timesteps(sigmas=torch.linspace(1, 1 / 6, 6).tolist(), device="cuda", mu=0.83)
    kwargs = {"sde_type": sde_type, "return_sqrt_dt": True}
    for i in range(6):
        source = {"prev_sample": prev} if replay else {"generator": torch.Generator().manual_seed(2)}
        expected = flow_grpo.sde_step_with_logprob(host, v, host.timesteps[i].repeat(3), x, **source, **kwargs)
        source = {"generator": torch.Generator().manual_seed(2)}
        if replay:
            source = {"prev_sample": prev.cuda()}
        timestep, on_device = device.timesteps[i].repeat(3), (v.cuda(), x.cuda())
        torch.cuda.set_sync_debug_mode("error" if replay else "default")
        try:
            got = flow_grpo.sde_step_with_logprob(device, on_device[0], timestep, on_device[1], **source, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(a, b.cpu(), rtol=1e-5, atol=1e-5)
    wrong = flow_grpo.sde_step_with_logprob(device, v.cuda(), timestep + 1, x.cuda(), **kwargs)
    assert all(out.isnan().all() for out in wrong)


def test_tables_made_in_inference_mode_serve_training():
    x, v, _ = make_inputs((2, 17, 4))
    with torch.inference_mode():
        scheduler = make_scheduler(9)
        drawn = flow_grpo.sde_step_with_logprob(scheduler, v, scheduler.timesteps[:1], x)[0]
    leaf = v.clone().requires_grad_()
    flow_grpo.sde_step_with_logprob(scheduler, leaf, scheduler.timesteps[:1], x, prev_sample=drawn.clone())[
        1
    ].sum().backward()
    assert leaf.grad.isfinite().all()


def test_a_changed_schedule_is_seen():
    scheduler = make_scheduler(5)
    x, v, _ = make_inputs((2, 17, 4))
    before = flow_grpo.sde_step_with_logprob(scheduler, v, scheduler.timesteps[2:3], x)[3]
    scheduler.sigmas.mul_(0.9)
    after = flow_grpo.sde_step_with_logprob(scheduler, v, scheduler.timesteps[2:3], x)[3]
    sigma = scheduler.sigmas[2].double()
    torch.testing.assert_close(after.double(), 0.7 * (sigma / (1 - sigma)).sqrt().expand(1, 1, 1), rtol=1e-6, atol=0)
    assert not torch.equal(before, after)


SIGNATURES = {
    flow_grpo.sde_step_with_logprob: "self model_output timestep sample noise_level=0.7 prev_sample=None "
    "generator=None sde_type='sde' return_sqrt_dt=False",
    diffusion_nft.flow_grpo_step: "model_output latents eta sigmas index prev_sample generator=None",
    diffusion_nft.dance_grpo_step: "model_output latents eta sigmas index prev_sample",
    mixgrpo.flow_grpo_step: "model_output latents eta sigmas index prev_sample generator=None determistic=False",
    mixgrpo.dance_grpo_step: "model_output latents eta sigmas index prev_sample grpo sde_solver",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f"{f.__module__.split('.')[-1]}.{f.__name__}")
def test_signatures(function):
    parameters = inspect.signature(function).parameters.values()
    shown = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    assert " ".join(shown) == SIGNATURES[function]


def test_top_level_name_is_lazy():
    assert mtedit_fast.sde_step_with_logprob is flow_grpo.sde_step_with_logprob
    code = "import sys, mtedit_fast; assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'sde_stepp'"):
        _ = mtedit_fast.sde_stepp


def flow_grpo_call(**changes):
    scheduler = make_scheduler(5)
    x, v, prev = make_inputs((3, 17, 4))
    arguments = {
        "self": scheduler,
        "model_output": v,
        "timestep": scheduler.timesteps[:1],
        "sample": x,
        "prev_sample": prev,
    }
    return flow_grpo.sde_step_with_logprob(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"timestep": torch.tensor([500.0])}, ValueError, r"timestep 500 is not in the schedule of 5 .*nearest: \d"),
        ({"timestep": [1000.0, 1.0, 1000.0]}, ValueError, "timestep 1 is not in the schedule"),
        ({"timestep": torch.ones(2)}, ValueError, "timestep must have length 1 or the batch size 3, got 2"),
        ({"noise_level": -0.1}, ValueError, "noise_level must be 0 or more, got -0.1"),
        ({"noise_level": math.nan}, ValueError, "noise_level must be 0 or more, got nan"),
        ({"sde_type": "ode"}, ValueError, "sde_type must be 'sde' or 'cps', got 'ode'"),
        ({"generator": torch.Generator()}, ValueError, "generator and prev_sample were both given"),
        ({"sample": torch.zeros(3, 17, 5)}, ValueError, "shape"),
        ({"prev_sample": torch.zeros(3, 17, 5)}, ValueError, "prev_sample must have sample's shape"),
        ({"sample": torch.zeros(3, 17, 4, device="meta")}, ValueError, "device"),
        ({"sample": torch.zeros(3, 17, 4, dtype=torch.int64)}, TypeError, "floating-point"),
        ({"self": FlowMatchEulerDiscreteScheduler()}, ValueError, "call scheduler.set_timesteps"),
    ],
)
def test_flow_grpo_errors(changes, error, message):
    with pytest.raises(error, match=message):
        flow_grpo_call(**changes)
