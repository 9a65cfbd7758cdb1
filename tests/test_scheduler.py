"""FlowMatchSDEScheduler inside stock pipelines."""

import json
import math

import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit as qwen_pipeline
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from stock_pipelines import BATCH, PIPELINES, STEPS, Editor, klein

import mtedit_fast
from mtedit_fast.ops import seeded_noise
from mtedit_fast.sampling import FlowMatchSDEScheduler, sde_window

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=PIPELINES, ids=lambda build: build.__name__)
def build(request, monkeypatch):
    # its references would be 1024²
    monkeypatch.setattr(qwen_pipeline, "calculate_dimensions", lambda area, ratio: (32, 32, None))
    return request.param


@pytest.fixture(params=DTYPES, ids=["fp32", "bf16"])
def editor(request, build):
    return Editor(build, request.param)


def truth(variant, x, v, sigmas, i, eta, prev):
    """fp64 mean, c and log-prob of ``prev``, from the definition of each sampler."""
    x, v, prev, sigmas = x.double(), v.double(), prev.double(), sigmas.double()
    s, n = sigmas[i], sigmas[i + 1]
    x0, x1 = x - s * v, x + (1 - s) * v
    if variant in ("cps", "ddim"):
        ratio = n * (1 - s) / (s * (1 - n))
        c = n * math.sin(eta * math.pi / 2) if variant == "cps" else eta * n * (1 - ratio**2).sqrt()
        mean = (1 - n) * x0 + (n**2 - c**2).sqrt() * x1
    else:
        std = {
            "sde": eta * (s / (1 - (sigmas[1] if s == 1 else s))).sqrt(),
            "dance": torch.tensor(eta).double(),
            "wan": sigmas[-1] + (sigmas[1] - sigmas[-1]) * s,
        }[variant]
        mean, c = x + (v + std**2 / 2 * x1 / s) * (n - s), std * (s - n).sqrt()
    squared = -((prev - mean) ** 2).flatten(1).mean(1)
    if variant == "cps":
        return mean, c, squared
    return mean, c, squared / (2 * c**2) - c.log() - 0.5 * math.log(2 * math.pi)


def test_without_noise_is_the_stock_scheduler(editor):
    stock = editor.pipe.scheduler
    expected = editor()
    ours = FlowMatchSDEScheduler.from_config(stock.config, eta=0.0)
    editor.use(ours)
    ours.start_recording()
    got = editor()
    assert got.dtype == expected.dtype
    assert torch.equal(ours.timesteps, stock.timesteps)
    assert torch.equal(ours.sigmas, stock.sigmas)
    if got.dtype == torch.float32:
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    # bf16 runs drift apart by rounding, so there the steps are compared one by one
    stock.set_begin_index(0)
    stock._step_index = None
    for step, v in zip(ours.trajectory, editor.velocities, strict=True):
        theirs = stock.step(v, ours.timesteps[step.step], step.sample, return_dict=False)[0]
        exact = step.sample.double() + (ours.sigmas[step.step + 1] - ours.sigmas[step.step]).double() * v.double()
        error, stock_error = ((out.double() - exact).abs().max() for out in (step.prev_sample, theirs))
        assert error <= stock_error + 1e-7
        assert step.log_prob is None


@pytest.mark.parametrize("variant", ["sde", "cps"])
def test_records_what_the_pipeline_did(editor, variant):
    eta = 0.8
    scheduler = editor.use(FlowMatchSDEScheduler.from_config(editor.pipe.scheduler.config, variant=variant, eta=eta))
    scheduler.set_noise_source(torch.tensor([5, 2**40 + 1]))
    scheduler.start_recording()
    latents = editor()
    scheduler.raise_if_nan()
    dtype = latents.dtype
    assert dtype == editor.pipe.transformer.dtype
    assert [step.step for step in scheduler.trajectory] == list(range(STEPS))
    assert torch.equal(scheduler.trajectory[-1].prev_sample, latents)
    for before, after in zip(scheduler.trajectory, scheduler.trajectory[1:], strict=False):
        assert torch.equal(before.prev_sample, after.sample)
    for (i, x, prev, log_prob), v in zip(scheduler.trajectory, editor.velocities, strict=True):
        assert prev.dtype == x.dtype == dtype
        if i == STEPS - 1:
            assert log_prob is None
            continue
        mean, c, expected = truth(variant, x, v, scheduler.sigmas, i, eta, prev)
        assert log_prob.dtype == torch.float32
        assert log_prob.shape == (BATCH,)
        torch.testing.assert_close(log_prob.double(), expected, rtol=0, atol=1e-5)
        noise = seeded_noise(torch.tensor([5, 2**40 + 1]), x.shape[1:], i + 1)
        stored = (mean + c * noise.double()).to(dtype)
        torch.testing.assert_close(prev, stored, rtol=torch.finfo(dtype).eps, atol=1e-6)
        # the same velocity replays to the same bits, alone and with every step of the run in one batch
        assert torch.equal(scheduler.replay(v, i, x, prev).log_prob, log_prob)
        index = torch.full((BATCH,), i)
        assert torch.equal(scheduler.replay(v, index, x, prev).log_prob, log_prob)
    assert torch.equal(editor(), latents)  # seeds, not a stream: a second call repeats the first
    assert len(scheduler.trajectory) == STEPS


def test_replay_has_the_gradient():
    scheduler = FlowMatchSDEScheduler(eta=0.8)
    scheduler.set_timesteps(6)
    generator = torch.Generator().manual_seed(0)
    x, v, prev = (torch.randn(3, 17, 5, generator=generator) for _ in range(3))
    leaf, leaf64 = v.clone().requires_grad_(), v.double().requires_grad_()
    scheduler.replay(leaf, 2, x, prev).log_prob.sum().backward()
    truth("sde", x, leaf64, scheduler.sigmas, 2, 0.8, prev)[2].sum().backward()
    torch.testing.assert_close(leaf.grad.double(), leaf64.grad, rtol=1e-5, atol=1e-7)
    assert scheduler.step_index is None


@pytest.mark.parametrize("variant", ["sde", "cps", "dance", "ddim", "wan"])
@pytest.mark.parametrize("schedule", ["dynamic", "static"])
def test_every_variant_over_28_steps(variant, schedule):
    config = {"use_dynamic_shifting": True} if schedule == "dynamic" else {"shift": 3.0}
    scheduler = FlowMatchSDEScheduler(variant=variant, eta=0.6, **config)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 28, 28), mu=0.83 if schedule == "dynamic" else None)
    scheduler.set_noise_source([torch.Generator().manual_seed(i) for i in range(3)])
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    x = torch.randn(3, 4, 5, 7, generator=torch.Generator().manual_seed(9))
    for i, t in enumerate(scheduler.timesteps):
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        out = scheduler.step(v, t, x)
        if i < 27:
            noise = torch.cat([torch.randn(1, *x.shape[1:], generator=g) for g in generators])
            mean, c, expected = truth(variant, x, v, scheduler.sigmas, i, 0.6, out.prev_sample)
            torch.testing.assert_close(out.prev_sample.double(), mean + c * noise.double(), rtol=1e-6, atol=1e-5)
            torch.testing.assert_close(out.mean.double(), mean, rtol=1e-6, atol=1e-5)
            torch.testing.assert_close(out.log_prob.double(), expected, rtol=1e-5, atol=1e-5)
        else:
            assert out.log_prob is None
            torch.testing.assert_close(out.prev_sample, x - scheduler.sigmas[i] * v, rtol=1e-6, atol=1e-6)
        x = out.prev_sample


def test_window_steps_are_stochastic_and_the_others_are_euler():
    window = sde_window(6, 2, seed=0)
    scheduler = FlowMatchSDEScheduler(eta=0.8, sde_steps=list(window))
    scheduler.set_timesteps(6)
    scheduler.start_recording()
    x = torch.randn(2, 17, 5)
    for i, t in enumerate(scheduler.timesteps):
        v = torch.randn_like(x)
        out = scheduler.step(v, t, x, generator=torch.Generator().manual_seed(1))
        assert (out.log_prob is not None) == (i in window)
        euler = x + (scheduler.sigmas[i + 1] - scheduler.sigmas[i]) * v
        assert torch.allclose(out.prev_sample, euler, atol=1e-6) == (i not in window)
        x = out.prev_sample
    assert [step.step for step in scheduler.trajectory if step.log_prob is not None] == list(window)


def test_noise_sources():
    """Seeds do not depend on the batch; a generator in ``step`` goes before the source; None is torch's own."""
    x, v = torch.randn(4, 17, 5), torch.randn(4, 17, 5)
    seeds = torch.tensor([3, 1, 4, 1])

    def first(source=None, rows=slice(None), **kwargs):
        scheduler = FlowMatchSDEScheduler(eta=0.8)
        scheduler.set_timesteps(6)
        scheduler.set_noise_source(source)
        return scheduler.step(v[rows], scheduler.timesteps[0], x[rows], return_dict=False, **kwargs)

    whole = first(seeds)
    assert isinstance(whole, tuple)
    for rows in (slice(0, 1), slice(1, 4)):
        part = first(seeds[rows], rows)
        assert all(torch.equal(a[rows], b) for a, b in zip(whole, part, strict=True))
    torch.manual_seed(6)
    default = first()[0]
    from_source = first(torch.Generator().manual_seed(6))[0]
    from_argument = first(seeds, generator=torch.Generator().manual_seed(6))[0]
    assert torch.equal(default, from_source)
    assert torch.equal(default, from_argument)


def test_starts_in_the_middle():
    scheduler = FlowMatchSDEScheduler(eta=0.8)
    scheduler.set_timesteps(6)
    x, v = torch.randn(2, 17, 5), torch.randn(2, 17, 5)
    scheduler.step(v, scheduler.timesteps[2], x)
    assert scheduler.step_index == 3
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(4)
    scheduler.step(v, scheduler.timesteps[0], x)
    assert scheduler.step_index == 5


def test_config_round_trips(tmp_path):
    stock = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.4, shift_terminal=0.02)
    ours = FlowMatchSDEScheduler.from_config(stock.config, variant="cps", eta=0.9, sde_steps=[1, 2], check=True)
    ours.save_pretrained(tmp_path)
    loaded = FlowMatchSDEScheduler.from_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == "FlowMatchSDEScheduler"
    for name, value in {"variant": "cps", "eta": 0.9, "sde_steps": [1, 2], "check": True}.items():
        assert loaded.config[name] == ours.config[name] == value
    for name, value in stock.config.items():
        if not name.startswith("_"):
            assert loaded.config[name] == value
    ours.set_timesteps(5, mu=0.7)
    loaded.set_timesteps(5, mu=0.7)
    assert torch.equal(ours.coefficients.table, loaded.coefficients.table)
    back = FlowMatchEulerDiscreteScheduler.from_config(loaded.config)
    back.set_timesteps(5, mu=0.7)
    assert torch.equal(back.sigmas, ours.sigmas)
    assert mtedit_fast.FlowMatchSDEScheduler is FlowMatchSDEScheduler


def test_saved_with_its_pipeline(tmp_path):
    editor = Editor(klein, torch.float32)
    editor.pipe.scheduler = FlowMatchSDEScheduler.from_config(editor.pipe.scheduler.config, eta=0.9)
    editor.pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    assert type(loaded.scheduler) is FlowMatchSDEScheduler
    assert loaded.scheduler.config.eta == 0.9


def run(scheduler, bad_step=None, steps=4, bad=float("nan")):
    scheduler.set_timesteps(steps)
    x = torch.zeros(3, 17, 5)
    for i, t in enumerate(scheduler.timesteps):
        v = torch.randn_like(x)
        if i == bad_step:
            v[1, 3, 2] = bad
        x = scheduler.step(v, t, x, return_dict=False)[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("bad_step", "named"), [(1, "step 1: .*step 2: .*step 3: "), (3, "at step 3: ")])
def test_nan_is_named_after_the_loop(bad_step, named, bad):
    scheduler = FlowMatchSDEScheduler()
    run(scheduler, bad_step, bad=bad)
    with pytest.raises(ValueError, match=named + r"samples \[1\]"):
        scheduler.raise_if_nan()
    run(scheduler)
    scheduler.raise_if_nan()


@pytest.mark.parametrize("bad_step", [1, 3])
def test_nan_with_check_is_raised_at_the_step(bad_step):
    scheduler = FlowMatchSDEScheduler(check=True)
    with pytest.raises(ValueError, match=rf"at step {bad_step}: samples \[1\]"):
        run(scheduler, bad_step)
    assert scheduler.step_index == bad_step


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eta": -0.5}, "eta.*-0.5"),
        ({"variant": "euler"}, "variant must be one of .*'euler'"),
        ({"invert_sigmas": True}, "invert_sigmas=True"),
        ({"stochastic_sampling": True}, "stochastic_sampling=True"),
    ],
)
def test_config_errors(config, message):
    with pytest.raises(ValueError, match=message):
        FlowMatchSDEScheduler(**config)


def test_schedule_errors():
    with pytest.raises(ValueError, match="sde_steps must not hold the last step, 3"):
        FlowMatchSDEScheduler(sde_steps=[3]).set_timesteps(4)
    with pytest.raises(ValueError, match="sde_steps must be within the schedule"):
        FlowMatchSDEScheduler(sde_steps=[7]).set_timesteps(4)
    with pytest.raises(ValueError, match="sigmas must decrease strictly"):
        FlowMatchSDEScheduler().set_timesteps(sigmas=[0.2, 0.9])


def test_step_errors():
    x = torch.zeros(2, 17, 5)
    scheduler = FlowMatchSDEScheduler()
    with pytest.raises(ValueError, match=r"call scheduler.set_timesteps\(...\) first"):
        scheduler.step(x, 1000.0, x)
    with pytest.raises(RuntimeError, match=r"call scheduler.start_recording\(\)"):
        _ = scheduler.trajectory
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match=r"timestep 777 is not in the schedule of 2 timesteps \(nearest: "):
        scheduler.step(x, 777.0, x)
    for integer in (0, torch.tensor(3)):
        with pytest.raises(TypeError, match="not an integer index"):
            scheduler.step(x, integer, x)
    with pytest.raises(ValueError, match="velocity must have sample's shape"):
        scheduler.step(x[:, :3], scheduler.timesteps[0], x)
    with pytest.raises(TypeError, match=r"seeds must be an int64 tensor \[B\], got torch.float32"):
        scheduler.set_noise_source(torch.zeros(2))
    scheduler.set_noise_source(torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"seed must have shape \[B\] = \[2\], got \[5\]"):
        scheduler.step(x, scheduler.timesteps[0], x)
    scheduler.set_noise_source(None)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    with pytest.raises(ValueError, match="all 2 steps of the schedule are done"):
        scheduler.step(x, scheduler.timesteps[0], x)


def test_no_host_sync_and_one_schedule_on_cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    scheduler, host = FlowMatchSDEScheduler(eta=0.8), FlowMatchSDEScheduler(eta=0.8)
    host.set_timesteps(4)
    scheduler.set_timesteps(4, device="cuda")
    scheduler.set_begin_index(0)
    scheduler.set_noise_source(torch.tensor([1, 2]).cuda())
    scheduler.start_recording()
    x, v = torch.randn(2, 17, 5).cuda(), torch.randn(2, 17, 5).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in scheduler.timesteps:
            x = scheduler.step(v, t, x, return_dict=False)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for i, before, after, log_prob in scheduler.trajectory[:-1]:
        out = host.replay(v.cpu(), i, before.cpu(), after.cpu())
        torch.testing.assert_close(out.log_prob, log_prob.cpu(), rtol=0, atol=1e-5)
