"""FlowMatchSDEScheduler inside stock pipelines, and the SDE windows."""

import json
import math

import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit as qwen_pipeline
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageTransformer2DModel,
)
from PIL import Image

import mtedit_fast
from mtedit_fast.ops import seeded_noise
from mtedit_fast.sampling import FlowMatchSDEScheduler, progressive_window, sde_window

STEPS = 4
BATCH = 2
DTYPES = [torch.float32, torch.bfloat16]


def stock_scheduler():
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


def kontext():
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        latent_channels=4,
        norm_num_groups=2,
        shift_factor=0.0,
    )
    modules = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxKontextPipeline(scheduler=stock_scheduler(), vae=vae, transformer=transformer, **modules)
    embeds = {"prompt_embeds": torch.randn(BATCH, 5, 16), "pooled_prompt_embeds": torch.randn(BATCH, 16)}
    extra = {"height": 24, "width": 24, "max_area": 24 * 24, "_auto_resize": False}
    return pipe, embeds, extra


def qwen_edit():
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    modules = dict.fromkeys(("text_encoder", "tokenizer", "processor"))
    pipe = QwenImageEditPipeline(scheduler=stock_scheduler(), vae=vae, transformer=transformer, **modules)
    embeds = {"prompt_embeds": torch.randn(BATCH, 5, 16), "negative_prompt_embeds": torch.randn(BATCH, 5, 16)}
    extra = {"true_cfg_scale": 3.0, "height": 32, "width": 32}
    extra |= {f"{name}_mask": torch.ones(BATCH, 5, dtype=torch.int64) for name in embeds}
    return pipe, embeds, extra


def klein():
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        latent_channels=4,
        norm_num_groups=2,
    )
    modules = dict.fromkeys(("text_encoder", "tokenizer"))
    pipe = Flux2KleinPipeline(
        scheduler=stock_scheduler(), vae=vae, transformer=transformer, is_distilled=True, **modules
    )
    return pipe, {"prompt_embeds": torch.randn(BATCH, 5, 16)}, {"height": 24, "width": 24}


PIPELINES = [kontext, qwen_edit, klein]


class Editor:
    """A tiny stock pipeline in one dtype, whose velocities are kept as the scheduler saw them."""

    def __init__(self, build, dtype):
        torch.manual_seed(0)
        self.pipe, embeds, self.extra = build()
        self.pipe.to(dtype=dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.embeds = {name: value.to(dtype) for name, value in embeds.items()}
        pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        self.image = Image.fromarray(pixels)
        self.velocities = []

    def use(self, scheduler):
        step = scheduler.step

        def keep(model_output, *args, **kwargs):
            self.velocities.append(model_output)
            return step(model_output, *args, **kwargs)

        scheduler.step = keep
        self.pipe.scheduler = scheduler
        return scheduler

    def __call__(self):
        """Runs the pipeline; the packed latents after its last step."""
        self.velocities.clear()
        after = []
        self.pipe(
            image=self.image,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
            callback_on_step_end=lambda pipe, i, t, tensors: after.append(tensors["latents"]) or {},
            **self.embeds,
            **self.extra,
        )
        return after[-1]


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


def test_sde_window():
    starts = {sde_window(10, 3, 1, 8, seed=seed).start for seed in range(200)}
    assert starts == {1, 2, 3, 4, 5}  # uniform in [lo, hi - size]
    assert all(len(sde_window(10, 3, 1, 8, seed=seed)) == 3 for seed in range(20))
    assert sde_window(10, 3, 1, 8, seed=4) == sde_window(10, 3, 1, 8, seed=4)
    assert sde_window(5, 4, seed=0) == range(4)  # all but the last step
    generator = torch.Generator().manual_seed(0)
    assert len({sde_window(50, 2, seed=generator).start for _ in range(30)}) > 10
    counts = np.bincount([sde_window(6, 2, seed=seed).start for seed in range(2000)], minlength=4)
    assert ((counts - 500) ** 2 / 500).sum() < 16.3  # χ², 3 degrees of freedom, p = 0.001


def test_progressive_window():
    windows = [progressive_window(i, 25, 4, iterations_per_window=25) for i in range(25 * 30)]
    assert windows[:25] == [range(4)] * 25
    assert windows[25] == range(1, 5)  # MixGRPO's overlap: one step further
    assert windows[-1] == range(20, 24)  # held at the last full window before the ODE step
    assert [w.start for w in windows] == sorted(w.start for w in windows)
    assert progressive_window(3, 25, 4, iterations_per_window=1, stride=4, lo=2, hi=20) == range(14, 18)
    assert progressive_window(99, 25, 4, iterations_per_window=1, stride=4, lo=2, hi=20) == range(16, 20)


@pytest.mark.parametrize("window", [lambda *a: sde_window(*a, seed=0), lambda *a: progressive_window(0, *a)])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 1), "num_steps must be at least 2"),
        ((10, 0), "size must be between 1 and hi - lo = 9, got 0"),
        ((10, 10), "size must be between 1 and hi - lo = 9, got 10"),
    ],
)
def test_window_errors(window, arguments, message):
    with pytest.raises(ValueError, match=message):
        window(*arguments)


def test_window_range_errors():
    with pytest.raises(ValueError, match=r"hi <= num_steps - 1 = 9 .*got lo=0, hi=10"):
        sde_window(10, 2, 0, 10, seed=0)
    with pytest.raises(ValueError, match=r"0 <= lo < hi .*got lo=5, hi=5"):
        progressive_window(0, 10, 2, lo=5, hi=5)
    with pytest.raises(ValueError, match="iteration must be 0 or more, got -1"):
        progressive_window(-1, 10, 2)
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 1"):
        progressive_window(0, 10, 2, iterations_per_window=0)
