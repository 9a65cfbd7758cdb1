"""The C++ kernels against fp64 truths."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mtedit_fast.ops import _cpp as cpp

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 63), (2, 1000), (3, 4097), (2, 3, 17, 31)]
# a, b, c, std: stochastic, deterministic, nearly deterministic
TABLE = torch.tensor([[1.07, -0.11, 0.31, 0.8], [1.0, -0.05, 0.0, 0.0], [0.93, 0.2, 0.003, 0.1]])


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(3))  # type: ignore[return-value]


def truth(sample, velocity, step, prev, mode: int, table: Tensor = TABLE):
    """mean and log-prob in fp64 from the stored fp32 coefficients."""
    a, b, c = table[step, :3].double().reshape(-1, 3).T[..., None]
    mean = a * sample.flatten(1).double() + b * velocity.flatten(1).double()
    difference = prev.flatten(1).double() - mean
    if mode == cpp.LOG_PROB_SQUARED:
        log_prob = -(difference**2).mean(1)
    else:
        log_prob = (-(difference**2) / (2 * c**2) - torch.log(c) - math.log(2 * math.pi) / 2).mean(1)
    return mean.view(sample.shape), log_prob


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_are_torchs(dtype):
    generator = torch.Generator().manual_seed(0)
    any_bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32).view(torch.float32)
    values = torch.randn(100_000, generator=generator) * torch.logspace(-9, 5.2, 100_000)
    ties = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float() * (1 + 2.0**-11)
    wide = torch.cat([any_bits, values, ties, torch.tensor([65519.99, 65520.0, -65520.0, math.inf, 2.0**-25])])
    euler = torch.tensor([[1.0, 0.0, 0.0, 0.0]])

    def copy(values: Tensor, out_dtype: torch.dtype) -> Tensor:
        zeros = torch.zeros_like(values)[None]
        return cpp.sde_step_forward(values[None], zeros, euler, 0, None, None, None, out_dtype, 0, True, False)[0][0]

    def same(ours: Tensor, torchs: Tensor) -> bool:
        return bool(((ours == torchs) | (ours.isnan() & torchs.isnan())).all())

    narrow = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    assert same(copy(wide, dtype), wide.to(dtype))
    assert same(copy(narrow, torch.float32), narrow.float())
    assert same(copy(narrow, dtype), narrow)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [cpp.LOG_PROB_GAUSSIAN, cpp.LOG_PROB_SQUARED])
def test_forward_against_fp64(shape, dtype, mode):
    sample, velocity, noise = inputs(shape, dtype)
    for round_before in (True, False):
        for out_dtype in (dtype, torch.float32):
            prev, log_prob, mean = cpp.sde_step_forward(
                sample, velocity, TABLE, 0, noise, None, None, out_dtype, mode, round_before, True
            )
            exact = TABLE[0, 2].double() * noise.double()
            expected_mean, _ = truth(sample, velocity, [0], prev, mode)
            torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-6, atol=1e-6)
            resolution = torch.finfo(out_dtype).eps
            torch.testing.assert_close(prev.double(), expected_mean + exact, rtol=resolution, atol=1e-6)
            seen = prev if round_before else expected_mean + exact
            _, expected = truth(sample, velocity, [0], seen, mode)
            torch.testing.assert_close(log_prob.double(), expected, rtol=1e-6, atol=1e-6)


def test_forward_without_log_prob_or_mean():
    sample, velocity, noise = inputs((2, 65), torch.bfloat16)
    full = cpp.sde_step_forward(sample, velocity, TABLE, 0, noise, None, None, torch.bfloat16, 1, True, True)
    prev, log_prob, mean = cpp.sde_step_forward(
        sample, velocity, TABLE, 0, noise, None, None, torch.bfloat16, 0, True, False
    )
    assert log_prob is None
    assert mean is None
    assert torch.equal(prev, full[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", ["noise", "seed"])
def test_replay_repeats_the_log_prob_bit_for_bit(dtype, source):
    sample, velocity, noise = inputs((3, 5, 1031), dtype)
    seed = torch.tensor([5, -(2**63), 2**63 - 1])
    given = (noise, None) if source == "noise" else (None, seed)
    prev, log_prob, mean = cpp.sde_step_forward(sample, velocity, TABLE, 2, *given, None, dtype, 1, True, True)
    replayed = cpp.sde_step_forward(sample, velocity, TABLE, 2, None, None, prev, dtype, 1, True, True)
    assert replayed[0] is prev
    assert torch.equal(replayed[1], log_prob)
    assert torch.equal(replayed[2], mean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_depend_on_neither_batch_nor_threads(dtype, two_threads):
    sample, velocity, noise = inputs((4, 9001), dtype)  # 36 tiles: two threads take part
    steps, upstream = torch.tensor([0, 2, 1, 0]), torch.randn(4)

    def run(rows: slice) -> list[Tensor]:
        args = (sample[rows], velocity[rows], TABLE, steps[rows], noise[rows], None, None, dtype, 1, True)
        return [*cpp.sde_step_forward(*args, True), *cpp.sde_step_backward(*args, None, upstream[rows], None, True)]

    together = run(slice(None))
    torch.set_num_threads(1)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(together, run(slice(None)), strict=True))
    for i in range(4):
        assert all(
            torch.equal(bits(a[i : i + 1]), bits(b)) for a, b in zip(together, run(slice(i, i + 1)), strict=True)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [cpp.LOG_PROB_GAUSSIAN, cpp.LOG_PROB_SQUARED])
@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("round_before", [False, True])
def test_backward_against_fp64(dtype, mode, replay, round_before):
    sample, velocity, noise = inputs((3, 7, 149), dtype)
    step = torch.tensor([0, 1, 2])
    grad_prev, grad_mean, _ = inputs((3, 7, 149), dtype, seed=1)
    grad_mean, grad_log_prob = grad_mean.float(), torch.tensor([0.7, -1.3, 0.2])
    source = (None, None, noise) if replay else (noise, None, None)
    args = (sample, velocity, TABLE, step, *source, dtype, mode, round_before)
    ours = cpp.sde_step_backward(*args, None if replay else grad_prev, grad_log_prob, grad_mean, True)
    rounded = cpp.sde_step_forward(*args, False)[0]

    def autograd(precision: torch.dtype) -> tuple[Tensor, ...]:
        x, v = (t.to(precision).requires_grad_() for t in (sample, velocity))
        a, b, c = (column[:, None, None] for column in TABLE[step, :3].to(precision).T)
        mean = a * x + b * v
        value = rounded.to(precision) if replay or round_before else (mean + c * noise.to(precision)).detach()
        density = torch.ones(3) if mode == cpp.LOG_PROB_SQUARED else 0.5 / c.flatten() ** 2
        density = torch.where(c.flatten() == 0, 0.0, density)  # a deterministic step's log-prob is constant
        total = (-density * grad_log_prob * ((value - mean) ** 2).mean((1, 2))).sum() + (mean * grad_mean).sum()
        if not replay:
            total = total + (mean * grad_prev).sum()
        return torch.autograd.grad(total, (x, v))

    for mine, torchs, exact in zip(ours, autograd(torch.float32), autograd(torch.float64), strict=True):
        assert mine.dtype == dtype
        allowed = (torchs.to(dtype).double() - exact).abs().max() + 1e-5
        assert (mine.double() - exact).abs().max() <= allowed


def test_backward_parts():
    sample, velocity, noise = inputs((2, 33), torch.float32)
    args = (sample, velocity, TABLE, 0, noise, None, None, torch.float32, 1, True)
    nothing = cpp.sde_step_backward(*args, None, None, None, False)
    assert nothing[0] is None
    assert not nothing[1].any()
    only_prev = cpp.sde_step_backward(*args, noise, None, None, True)
    torch.testing.assert_close(only_prev[0], TABLE[0, 0] * noise)
    torch.testing.assert_close(only_prev[1], TABLE[0, 1] * noise)


def philox(seed: int, step: int, groups: int) -> np.ndarray:
    """[groups, 4] words of Philox4x32-10 in Python integers."""
    words = np.empty((groups, 4), np.uint64)
    for group in range(groups):
        c0, c1, c2, c3 = group, step, 0, 0
        k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
            c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ c3 ^ k1, p0 & 0xFFFFFFFF
            k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
        words[group] = c0, c1, c2, c3
    return words


@pytest.mark.parametrize("numel", [1, 3, 255, 4097])
def test_seeded_noise_against_fp64_box_muller(numel):
    seeds = [0, -1, 2**62 + 12345]
    ours = cpp.seeded_noise(torch.tensor(seeds), numel, 7, torch.float32)
    for seed, row in zip(seeds, ours, strict=True):
        words = philox(seed, 7, (numel + 3) // 4).astype(np.float64)
        radius = np.sqrt(-2 * np.log((words[:, ::2] + 0.5) * 2.0**-32))
        angle = 2 * np.pi * words[:, 1::2] * 2.0**-32
        expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(-1)[:numel]
        np.testing.assert_allclose(row.numpy(), expected, rtol=0, atol=2e-6)


def test_philox_known_answers():
    # Random123's published vectors for philox4x32-10: zero counter and key
    assert [hex(int(word)) for word in philox(0, 0, 1)[0]] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


def test_seeded_noise_is_standard_normal_and_its_own_stream():
    seed = torch.arange(4)
    noise = cpp.seeded_noise(seed, 250_000, 3, torch.float32).double()
    assert abs(noise.mean()) < 4e-3
    assert abs(noise.var() - 1) < 6e-3
    assert abs((noise**4).mean() - 3) < 0.05
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.01
    assert not torch.equal(noise[:1], cpp.seeded_noise(seed[:1], 250_000, 4, torch.float32).double())
    assert torch.equal(noise[2:3, :1000].float(), cpp.seeded_noise(seed[2:3], 1000, 3, torch.float32))
    steps = torch.tensor([3, 3, 9, 3])
    assert torch.equal(cpp.seeded_noise(seed, 5, steps, torch.float32)[1], noise[1, :5].float())
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(cpp.seeded_noise(seed, 1000, 3, dtype), noise[:, :1000].to(dtype))


def test_seed_draws_the_next_counter_step():
    sample, velocity, _ = inputs((2, 130), torch.float32)
    seed = torch.tensor([11, 12])
    noise = cpp.seeded_noise(seed, 130, 3, torch.float32)  # step 2 of the schedule
    drawn = cpp.sde_step_forward(sample, velocity, TABLE, 2, None, seed, None, torch.float32, 1, True, False)
    given = cpp.sde_step_forward(sample, velocity, TABLE, 2, noise, None, None, torch.float32, 1, True, False)
    assert torch.equal(drawn[0], given[0])
    assert torch.equal(drawn[1], given[1])


def test_nan_stays_in_its_sample():
    sample, velocity, noise = inputs((3, 2049), torch.float32)
    velocity[1, 2048] = math.nan
    for step in (0, 1):
        prev, log_prob, _ = cpp.sde_step_forward(
            sample, velocity, TABLE, step, noise, None, None, torch.float32, 1, True, False
        )
        assert log_prob.isnan().tolist() == [False, True, False]
        assert prev.isnan().any(1).tolist() == [False, True, False]


def test_steps_outside_the_schedule_are_nan():
    sample, velocity, noise = inputs((3, 5), torch.float32)
    steps = torch.tensor([-1, 0, 3])
    prev, log_prob, mean = cpp.sde_step_forward(
        sample, velocity, TABLE, steps, noise, None, None, torch.float32, 1, True, True
    )
    for result in (prev[:, 0], log_prob, mean[:, 0]):
        assert result.isnan().tolist() == [True, False, True]


def test_deterministic_steps_need_no_noise_and_others_do():
    sample, velocity, _ = inputs((2, 5), torch.float32)
    prev, log_prob, mean = cpp.sde_step_forward(
        sample, velocity, TABLE, 1, None, None, None, torch.float32, 1, True, True
    )
    assert torch.equal(prev, mean)
    assert log_prob.tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="step 2 is stochastic: pass noise, seed or prev_sample"):
        cpp.sde_step_forward(sample, velocity, TABLE, 2, None, None, None, torch.float32, 1, True, True)


def test_empty_batch():
    empty = torch.empty(0, 7)
    prev, log_prob, mean = cpp.sde_step_forward(empty, empty, TABLE, 0, empty, None, None, torch.float32, 1, True, True)
    assert (prev.shape, log_prob.shape, mean.shape) == ((0, 7), (0,), (0, 7))
    assert cpp.seeded_noise(torch.empty(0, dtype=torch.int64), 5, 0, torch.float32).shape == (0, 5)


def test_bad_codes_are_named():
    assert cpp.unavailable_reason() is None
    with pytest.raises(ValueError, match="dtype code must be 0, 1 or 2, got 9"):
        cpp._C.seeded_noise(0, 0, 0, 0, 0, 9, 1)
    sample, velocity, noise = inputs((1, 5), torch.float32)
    with pytest.raises(ValueError, match="log_prob_mode must be 0, 1 or 2, got 3"):
        cpp.sde_step_forward(sample, velocity, TABLE, 0, noise, None, None, torch.float32, 3, True, True)
