"""`sde_step` on every back end against fp64 and PyTorch."""

import math

import pytest
import torch
from op_backends import DEVICES, GPU
from sde_truth import VARIANTS, assert_as_good, literal_step
from torch import Tensor

from mtedit_fast.ops import SDECoefficients, sde_coefficients, sde_step, seeded_noise
from mtedit_fast.ops._backend import unavailable_reason
from mtedit_fast.ops.sde_step import SDEStepOutput

SIGMAS = [1.0, 0.84375, 0.625, 0.375, 0.125]  # exact in fp32; not down to 0, so that ddim and cps stay stochastic
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def inputs(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sample, velocity, noise = (torch.randn(shape, generator=generator) for _ in range(3))
    return sample.to(dtype), velocity.to(dtype), noise


def run(backend: str, sample: Tensor, velocity: Tensor, variant: str, step: int | Tensor, **options) -> SDEStepOutput:
    """On the back end's device and back."""
    device = DEVICES[backend]
    coefficients = options.pop("coefficients", None)
    if coefficients is None:
        coefficients = sde_coefficients(SIGMAS, variant=variant, eta=options.pop("eta", 0.7))
    coefficients = coefficients._replace(table=coefficients.table.to(device))
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in options.items()}
    step = step.to(device) if isinstance(step, Tensor) else step
    out = sde_step(sample.to(device), velocity.to(device), coefficients, step, backend=backend, **moved)
    return SDEStepOutput(*(None if value is None else value.cpu() for value in out))


def loss_of(prev: Tensor, log_prob: Tensor, mean: Tensor, weights: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return sum(
        (value * weight.to(value.dtype)).sum() for value, weight in zip((prev, log_prob, mean), weights, strict=True)
    )


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients_against_fp64(backend: str, variant: str, replay: bool) -> None:
    steps, eta = [0, 2, 3], 0.6
    sample, velocity, noise = inputs(3, 7, 9)
    stored = (sample + 0.3 * noise) if replay else None
    weights = (torch.randn(3, 7, 9), torch.randn(3), torch.randn(3, 7, 9))

    def literal(dtype: torch.dtype) -> list[Tensor]:
        x, v = (t.to(dtype).requires_grad_() for t in (sample, velocity))
        prev, log_prob, mean, _ = literal_step(
            variant, x, v, SIGMAS, steps, eta, noise.to(dtype), None if stored is None else stored.to(dtype)
        )
        return [prev, log_prob, mean, *torch.autograd.grad(loss_of(prev, log_prob, mean, weights), (x, v))]

    x, v = (t.clone().requires_grad_() for t in (sample, velocity))
    source = {"noise": noise} if stored is None else {"prev_sample": stored}
    out = run(backend, x, v, variant, torch.tensor(steps), eta=eta, **source)
    ours = [*out, *torch.autograd.grad(loss_of(*out, weights), (x, v))]
    for mine, torchs, truth in zip(ours, literal(FP32), literal(torch.float64), strict=True):
        assert_as_good(mine, torchs, truth)


@pytest.mark.parametrize("variant", VARIANTS)
def test_noise_level_is_flow_grpos_fourth_return(variant: str) -> None:
    sample, velocity, noise = (t.double() for t in inputs(4, 1))
    level = literal_step(variant, sample, velocity, SIGMAS, range(4), 0.9, noise)[3].flatten()
    assert_as_good(sde_coefficients(SIGMAS, variant=variant, eta=0.9).table[:, 3], level.float(), level)


@pytest.mark.parametrize("variant", [*VARIANTS, "ode"])
def test_eta_zero_is_euler(backend: str, variant: str) -> None:
    sample, velocity, _ = inputs(2, 5, 8)
    out = run(backend, sample, velocity, variant, 1, eta=0.0)
    euler = sample + (torch.tensor(SIGMAS[2]) - torch.tensor(SIGMAS[1])) * velocity
    assert torch.equal(out.prev_sample, euler)
    assert torch.equal(out.mean, euler)
    assert out.log_prob is None


def test_sigma_of_one_uses_sigma_max() -> None:
    second, given = (
        sde_coefficients([1.0, 0.8, 0.0], eta=0.5),
        sde_coefficients([1.0, 0.8, 0.0], eta=0.5, sigma_max=0.9),
    )
    assert second.table[0, 3].item() == pytest.approx(0.5 * math.sqrt(1 / (1 - 0.8)), rel=1e-6)
    assert given.table[0, 3].item() == pytest.approx(0.5 * math.sqrt(1 / (1 - 0.9)), rel=1e-6)
    assert torch.equal(second.table[1], given.table[1])
    wan = sde_coefficients([1.0, 0.8, 0.0], variant="wan", sigma_max=0.9, sigma_min=0.1)
    assert wan.table[0, 3].item() == pytest.approx(0.9 * math.sqrt(0.2), rel=1e-6)
    assert wan.table[1, 3].item() == pytest.approx((0.1 + 0.8 * 0.8) * math.sqrt(0.8), rel=1e-6)


def test_steps_outside_sde_steps_are_deterministic(backend: str) -> None:
    coefficients = sde_coefficients(SIGMAS, sde_steps=[1, 2])
    assert coefficients.stochastic == (False, True, True, False)
    sample, velocity, noise = inputs(4, 33)
    assert run(backend, sample, velocity, "", 0, coefficients=coefficients).log_prob is None
    x = velocity.clone().requires_grad_()
    out = run(backend, sample, x, "", torch.arange(4), coefficients=coefficients, noise=noise)
    assert out.log_prob is not None
    assert torch.equal(out.log_prob == 0, torch.tensor([True, False, False, True]))
    assert torch.equal(out.prev_sample[0], out.mean[0])
    (gradient,) = torch.autograd.grad(out.log_prob.sum(), x)
    assert torch.equal(gradient.abs().amax(1) == 0, torch.tensor([True, False, False, True]))


def test_device_sigmas_give_the_host_table() -> None:
    table = sde_coefficients(torch.tensor(SIGMAS, device=GPU), variant="ddim").table
    assert_as_good(table, table.cpu(), sde_coefficients(SIGMAS, variant="ddim").table.double())


@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 1000), (2, 4097), (2, 4, 9, 7), (2, 5, 16)])
@pytest.mark.parametrize("dtypes", [(FP32, FP32, FP32), (FP32, BF16, BF16), (BF16, BF16, FP32), (FP16, FP16, FP16)])
def test_back_ends_agree_bit_for_bit(backend: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """prev_sample and mean come from the same IEEE operations; only the order of the log-prob's sum differs."""
    sample, velocity = inputs(*shape)[0].to(dtypes[0]), inputs(*shape)[1].to(dtypes[1])
    seed = torch.arange(shape[0]) * 2**33 - 5
    for options in ({"seed": seed}, {"seed": seed, "rounding": "after"}, {"noise": inputs(*shape, seed=3)[2]}):
        expected = run("reference", sample, velocity, "sde", 1, out_dtype=dtypes[2], **options)
        out = run(backend, sample, velocity, "sde", 1, out_dtype=dtypes[2], **options)
        assert out.prev_sample.dtype == dtypes[2]
        assert out.mean.dtype == FP32
        assert torch.equal(out.prev_sample, expected.prev_sample)
        assert torch.equal(out.mean, expected.mean)
        torch.testing.assert_close(out.log_prob, expected.log_prob, rtol=2e-6, atol=2e-6)
        short = run(backend, sample, velocity, "sde", 1, out_dtype=dtypes[2], return_mean=False, **options)
        assert short.mean.numel() == 0
        assert torch.equal(short.log_prob, out.log_prob)


@pytest.mark.parametrize("mode", ["seed", "after", "noise", "replay"])
@pytest.mark.parametrize("variant", ["sde", "cps"])
def test_gradients_of_half_inputs(backend: str, variant: str, mode: str) -> None:
    sample, velocity, noise = inputs(2, 4101, dtype=BF16)
    seed = torch.tensor([5, 6])
    weights = (torch.randn(2, 4101), torch.tensor([2.0, -3.0]), torch.randn(2, 4101))
    options = {
        "seed": {"seed": seed},
        "after": {"seed": seed, "rounding": "after"},
        "noise": {"noise": noise.to(BF16)},
        "replay": {"prev_sample": (sample.float() + noise).to(BF16)},
    }[mode]
    if mode in ("seed", "after"):
        noise = seeded_noise(seed, (4101,), 2, backend="reference")
    elif mode == "noise":
        noise = noise.to(BF16)

    def literal(dtype: torch.dtype) -> tuple[Tensor, ...]:
        x, v = (t.to(dtype).requires_grad_() for t in (sample, velocity))
        given = options.get("prev_sample")
        if mode in ("seed", "noise"):  # log_prob is taken on the rounded value
            exact = literal_step(variant, x, v, SIGMAS, [1, 1], 0.7, noise.to(dtype))[0]
            given = exact.to(BF16)
        prev, log_prob, mean, _ = literal_step(
            variant, x, v, SIGMAS, [1, 1], 0.7, noise.to(dtype), None if given is None else given.to(dtype)
        )
        if mode in ("seed", "noise"):
            prev = exact
        return torch.autograd.grad(loss_of(prev, log_prob, mean, weights), (x, v))

    x, v = (t.clone().requires_grad_() for t in (sample, velocity))
    out = run(backend, x, v, variant, 1, **options)
    weights = (weights[0].to(BF16).to(FP32), *weights[1:])
    loss = (
        (out.prev_sample.float() * weights[0]).sum() + (out.log_prob * weights[1]).sum() + (out.mean * weights[2]).sum()
    )
    for mine, truth in zip(torch.autograd.grad(loss, (x, v)), literal(torch.float64), strict=True):
        assert mine.dtype == BF16
        assert_as_good(mine, truth.to(BF16), truth)


def test_only_the_velocity_may_need_a_gradient(backend: str) -> None:
    sample, velocity, noise = inputs(2, 65)
    velocity.requires_grad_()
    out = run(backend, sample, velocity, "sde", 2, prev_sample=noise)
    (gradient,) = torch.autograd.grad(out.log_prob.sum(), velocity)
    table = sde_coefficients(SIGMAS).table[2]
    truth = (table[1] / (65 * table[2] ** 2) * (noise - out.mean)).detach()
    assert_as_good(gradient, truth, truth.double())


def test_kl_gradient_through_the_mean(backend: str) -> None:
    sample, velocity, noise = inputs(2, 65)
    reference = run(backend, sample, velocity + 0.1 * noise, "sde", 2, noise=noise).mean
    velocity.requires_grad_()
    out = run(backend, sample, velocity, "sde", 2, noise=noise)
    (gradient,) = torch.autograd.grad(((out.mean - reference) ** 2).mean(), velocity)
    b = sde_coefficients(SIGMAS).table[2, 1].double()
    truth = 2 * b * b * -0.1 * noise.double() / noise.numel()
    assert_as_good(gradient, truth.float(), truth)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_replay_is_bit_exact(backend: str, variant: str, dtype: torch.dtype) -> None:
    sample, velocity, noise = inputs(3, 4, 1030)
    for source in ({"noise": noise}, {"seed": torch.tensor([1, 2, 3])}):
        sampled = run(backend, sample, velocity.to(BF16), variant, 1, out_dtype=dtype, return_mean=False, **source)
        live = velocity.to(BF16).requires_grad_()
        replayed = run(backend, sample, live, variant, torch.tensor([1, 1, 1]), prev_sample=sampled.prev_sample)
        assert torch.equal(sampled.log_prob, replayed.log_prob)
        assert torch.equal(sampled.prev_sample, replayed.prev_sample)


def test_replay_returns_the_given_tensor() -> None:
    sample, velocity, noise = inputs(2, 9)
    assert sde_step(sample, velocity, sde_coefficients(SIGMAS), 1, prev_sample=noise).prev_sample is noise


def test_rounding_after_takes_the_log_prob_first(backend: str) -> None:
    sample, velocity, noise = inputs(2, 1000)
    exact = run(backend, sample, velocity, "sde", 1, noise=noise)
    after = run(backend, sample, velocity, "sde", 1, noise=noise, out_dtype=BF16, rounding="after")
    before = run(backend, sample, velocity, "sde", 1, noise=noise, out_dtype=BF16)
    assert torch.equal(after.log_prob, exact.log_prob)
    assert torch.equal(after.prev_sample, exact.prev_sample.to(BF16))
    assert not torch.equal(before.log_prob, exact.log_prob)


@pytest.mark.parametrize("numel", [1, 63, 5000])
def test_batch_invariance(backend: str, numel: int) -> None:
    sample, velocity, _ = inputs(16, numel)
    seed = torch.arange(16)
    whole = run(backend, sample, velocity, "sde", 2, seed=seed)
    for start, stop in [(0, 1), (0, 4), (4, 8), (8, 12), (12, 16)]:
        part = slice(start, stop)
        split = run(backend, sample[part], velocity[part], "sde", 2, seed=seed[part])
        for name in SDEStepOutput._fields:
            assert torch.equal(getattr(whole, name)[part], getattr(split, name))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(run(backend, sample[order], velocity[order], "sde", 2, seed=seed[order])[1], whole[1][order])


@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_the_thread_count_changes_nothing(name: str) -> None:
    if name == "cpp" and unavailable_reason("cpp", torch.device("cpu"), ()):
        pytest.skip("the C++ extension is not built")
    sample, velocity, noise = inputs(1, 200_003)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run(name, sample, velocity, "sde", 1, noise=noise))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("variant", ["sde", "ode"])
def test_a_device_step_outside_the_schedule_gives_nan(backend: str, variant: str) -> None:
    """Where the value cannot be looked at, on a GPU and in compiled code; also where no step takes noise."""
    device = DEVICES[backend]
    sample, velocity, noise = (t.to(device) for t in inputs(3, 70))
    steps = torch.tensor([-1, 1, 4], device=device)
    table = sde_coefficients(SIGMAS, variant=variant, device=device).table
    given = (noise, 1) if variant == "sde" else (None, 0)
    out = torch.ops.mtedit_fast.sde_step(
        sample, velocity, table, steps, 0, given[0], None, None, FP32, given[1], True, True, backend
    )
    for value in filter(Tensor.numel, out):  # no log-prob without noise
        assert value.isnan().reshape(3, -1).all(1).tolist() == [True, False, True]


def test_seed_draws_the_noise_of_the_next_counter_step(backend: str) -> None:
    sample, velocity, _ = inputs(2, 3, 21)
    seed, steps = torch.tensor([3, 2**40]), torch.tensor([0, 3])
    noise = torch.cat([seeded_noise(seed[i : i + 1], (3, 21), int(steps[i]) + 1, backend="reference") for i in (0, 1)])
    drawn = run(backend, sample, velocity, "sde", steps, seed=seed)
    assert torch.equal(drawn.prev_sample, run(backend, sample, velocity, "sde", steps, noise=noise).prev_sample)


def test_strided_views(backend: str) -> None:
    big = [t.transpose(1, 2) for t in inputs(4, 12, 10)]
    views = [t[::2, :, 1::3] for t in big]
    packed = [t.contiguous() for t in views]
    a = run(backend, *views[:2], "sde", 1, noise=views[2])
    b = run(backend, *packed[:2], "sde", 1, noise=packed[2])
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)
    live = big[1].clone().requires_grad_()
    run(backend, views[0], live[::2, :, 1::3], "sde", 1, prev_sample=views[2]).log_prob.sum().backward()
    leaf = packed[1].clone().requires_grad_()
    run(backend, packed[0], leaf, "sde", 1, prev_sample=packed[2]).log_prob.sum().backward()
    assert torch.equal(live.grad[::2, :, 1::3], leaf.grad)


def test_empty_batch(backend: str) -> None:
    sample, velocity, noise = inputs(0, 7, 3)
    velocity.requires_grad_()
    out = run(backend, sample, velocity, "sde", 1, noise=noise)
    assert out.prev_sample.shape == out.mean.shape == (0, 7, 3)
    assert out.log_prob.shape == (0,)
    out.log_prob.sum().backward()
    assert velocity.grad.shape == (0, 7, 3)
    assert run(backend, sample, velocity, "sde", 1, seed=torch.empty(0, dtype=torch.int64)).log_prob.shape == (0,)


def test_nan_stays_in_its_sample_and_check_names_it(backend: str) -> None:
    sample, velocity, noise = inputs(3, 70)
    velocity[1, 69] = math.nan
    expected = torch.tensor([False, True, False])
    out = run(backend, sample, velocity, "sde", 1, noise=noise)
    assert torch.equal(out.log_prob.isnan(), expected)
    assert torch.equal(out.prev_sample.isnan().any(1), expected)
    assert torch.equal(run(backend, sample, velocity, "sde", 1, prev_sample=noise).log_prob.isnan(), expected)
    window = sde_coefficients(SIGMAS, sde_steps=[0])
    out = run(backend, sample, velocity, "", torch.tensor([1, 1, 0]), coefficients=window, noise=noise)
    assert torch.equal(out.prev_sample.isnan().any(1), expected)
    assert torch.equal(out.log_prob.isnan(), expected)
    with pytest.raises(ValueError, match=r"velocity is not finite in samples \[1\]"):
        run(backend, sample, velocity, "sde", 1, noise=noise, check=True)
    run(backend, sample, velocity.nan_to_num(), "sde", 1, noise=noise, check=True)


def test_fp64_is_computed_in_fp64_and_passes_gradcheck() -> None:
    sample, velocity, noise = (t.double() for t in inputs(2, 3, 5))
    for variant in VARIANTS:
        coefficients = sde_coefficients(SIGMAS, variant=variant)

        def outputs(x: Tensor, v: Tensor, coefficients: SDECoefficients = coefficients) -> tuple[Tensor, ...]:
            replay = sde_step(x, v, coefficients, torch.tensor([1, 2]), prev_sample=noise)
            sampled = sde_step(x, v, coefficients, 1, noise=noise)
            assert replay.mean.dtype == replay.log_prob.dtype == torch.float64
            return replay.log_prob, replay.mean, sampled.prev_sample

        torch.autograd.gradcheck(outputs, (sample.requires_grad_(), velocity.requires_grad_()))
