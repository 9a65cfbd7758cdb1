"""GRPO and GRPO-Guard against fp64 formulas written out element by element."""

import math

import numpy as np
import pytest
import torch

from mtedit_fast.ops import sde_coefficients, sde_step
from mtedit_fast.training.objectives import grpo, grpo_guard, kl_to_reference

N, D = 7, 12


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    old = torch.randn(N, generator=g)
    new = (old + 0.3 * torch.randn(N, generator=g)).requires_grad_()
    advantage = 4 * torch.randn(N, generator=g)
    mean_old = torch.randn(N, 3, D // 3, generator=g)
    mean = mean_old + 0.05 * torch.randn(N, 3, D // 3, generator=g)
    dt = -torch.rand(N, generator=g) * 0.2 - 0.05
    std = torch.rand(N, generator=g) + 0.2
    return new, old, advantage, mean.requires_grad_(), mean_old, dt, std


@pytest.mark.parametrize(("clip_range", "advantage_clip"), [(0.1, 5.0), (1e-4, 2.0)])
def test_grpo_equals_the_formula(batch, clip_range, advantage_clip):
    new, old, advantage, *_ = batch
    result = grpo(new, old, advantage, clip_range=clip_range, advantage_clip=advantage_clip)
    total, clipped = 0.0, []
    for logp, logp_old, a in zip(new.tolist(), old.tolist(), advantage.tolist(), strict=True):
        a = min(max(a, -advantage_clip), advantage_clip)
        ratio = math.exp(logp - logp_old)
        plain, bounded = -a * ratio, -a * min(max(ratio, 1 - clip_range), 1 + clip_range)
        clipped.append(bounded > plain)
        total += max(plain, bounded) / N
    assert result.loss.mean().item() == pytest.approx(total, rel=1e-5)
    assert result.clipped.tolist() == clipped
    result.loss.mean().backward()
    # the clipped branch is constant: no gradient there
    assert new.grad[result.clipped].abs().sum() == 0
    assert (new.grad[~result.clipped] != 0).all()


def test_gradient_at_the_rollout_is_the_policy_gradient(batch):
    _, old, advantage, *_ = batch
    new = old.clone().requires_grad_()
    result = grpo(new, old, advantage, clip_range=1e-4)
    result.loss.mean().backward()
    assert (result.ratio == 1).all()
    np.testing.assert_allclose(new.grad, -advantage.clamp(-5, 5) / N, rtol=1e-6)


@pytest.mark.parametrize("mean_over", ["sample", "batch_mean"])
def test_guard_equals_the_formula(batch, mean_over):
    new, old, advantage, mean, mean_old, dt, std = batch
    options = {"dt": dt, "scale": std * (-dt).sqrt(), "clip_range": 0.01, "mean_over": mean_over}
    result = grpo_guard(new, old, advantage, mean, mean_old, **options)
    shift = ((mean - mean_old).detach().double() ** 2).reshape(N, -1).mean(1).numpy()
    if mean_over == "batch_mean":
        shift = np.full(N, shift.mean())
    total = 0.0
    for i in range(N):
        d, s = math.sqrt(-dt[i].item()), std[i].item()
        exponent = (new[i].item() - old[i].item() + shift[i] / (2 * (d * s) ** 2)) * d * s
        ratio, a = math.exp(exponent), max(min(advantage[i].item(), 5), -5)
        total += max(-a * ratio, -a * min(max(ratio, 0.99), 1.01)) / d**2 / N
    assert result.loss.mean().item() == pytest.approx(total, rel=1e-5)
    result.loss.mean().backward()
    assert mean.grad is not None


def test_guard_ratio_is_one_at_the_rollout(batch):
    _, old, advantage, _, mean_old, dt, std = batch
    result = grpo_guard(old, old, advantage, mean_old, mean_old, dt=dt, scale=std, clip_range=1e-6)
    assert (result.ratio == 1).all()


@pytest.mark.parametrize("variant", ["sde", "dance", "ddim", "wan"])
def test_guards_log_ratio_has_no_bias(variant):
    """Over the old policy's samples log ρ is 0 on average; over ±ε, exactly. c and log-probs are sde_step's."""
    coefficients = sde_coefficients([1.0, 0.8, 0.5, 0.0], variant=variant, eta=0.6)
    generator = torch.Generator().manual_seed(0)
    x, v, change, noise = torch.randn(4, 3, 40, generator=generator).double()
    for step in (0, 1):
        ratios = []
        for sign in (1, -1):
            old = sde_step(x, v, coefficients, step, noise=sign * noise)
            new = sde_step(x, v + 0.3 * change, coefficients, step, prev_sample=old.prev_sample)
            scale = coefficients.table[step, 2].double().expand(3)
            means = (new.mean, old.mean)
            dt, one = -torch.ones(3), torch.ones(3)
            out = grpo_guard(new.log_prob, old.log_prob, one, *means, dt=dt, scale=scale, clip_range=9.0)
            ratios.append(out.ratio)
        assert (ratios[0] - 1).abs().min() > 1e-4
        torch.testing.assert_close((ratios[0] * ratios[1]).double(), torch.ones(3).double(), rtol=0, atol=1e-6)


def test_kl(batch):
    *_, mean, mean_ref, _, std = batch
    value = kl_to_reference(mean, mean_ref, std=std)
    expected = []
    for i in range(N):
        first = torch.distributions.Normal(mean[i].double(), std[i].double())
        second = torch.distributions.Normal(mean_ref[i].double(), std[i].double())
        expected.append(torch.distributions.kl_divergence(first, second).mean())
    assert value.tolist() == pytest.approx(torch.stack(expected).tolist(), rel=1e-5)


def test_unknown_options_are_named(batch):
    new, old, advantage, mean, mean_old, dt, std = batch
    with pytest.raises(ValueError, match="mean_over: expected"):
        grpo_guard(new, old, advantage, mean, mean_old, dt=dt, scale=std, clip_range=0.1, mean_over="group")
