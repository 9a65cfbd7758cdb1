"""Objectives of one-step restoration against EDM's, and on Gaussians whose answers are known, in fp64."""

import pytest
import torch
from torch import Tensor

from mtedit_fast.onestep import Corruption, Inpainting, MultiCoilMRI, Operator, loss_weight
from mtedit_fast.training.onestep.objectives import (
    generator_levels,
    masked_objective,
    noise_objective,
    score_gap,
    teacher_levels,
)

COVARIANCE = torch.tensor(
    [[1.0, 0.6, 0.2, 0.1], [0.6, 0.8, 0.3, 0.0], [0.2, 0.3, 0.5, -0.2], [0.1, 0.0, -0.2, 0.9]], dtype=torch.float64
)
MEAN = torch.tensor([0.3, -0.5, 0.1, 0.2], dtype=torch.float64)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def standard(n: int, size: int) -> Tensor:
    """[n, size] fp64 with mean 0 and covariance 1 *exactly*: least squares then gives the population's answer."""
    x = draw(n, size)
    x = x - x.mean(0)
    return torch.linalg.qr(x)[0] * n**0.5


def least(loss, size: int) -> tuple[Tensor, Tensor]:
    """(W, b) at the minimum of loss(W, b), which is quadratic: one Newton step. Directions without curvature stay 0."""

    def flat(parameters: Tensor) -> Tensor:
        return loss(parameters[: size * size].view(size, size), parameters[size * size :])

    start = torch.zeros(size * size + size, dtype=torch.float64)
    gradient, hessian = torch.func.grad(flat)(start), torch.func.hessian(flat)(start)
    solution = -torch.linalg.pinv(hessian, hermitian=True) @ gradient
    return solution[: size * size].view(size, size), solution[size * size :]


def linear(weight: Tensor, bias: Tensor):
    """A denoiser of images [B, 1, 2, 2]."""
    return lambda x, sigma, mask=None: (x.flatten(1) @ weight.T + bias).view_as(x)


# ---- noise


def test_without_noise_it_is_edms():
    x, noise = draw(2, 5, 3, 4, 6)
    sigma = teacher_levels(draw(5), -1.2, 1.2)

    def denoise(x, sigma):
        return torch.tanh(x) * sigma.view(-1, 1, 1, 1)

    # Karras et al., eq. 2 with the weight of table 1
    s = sigma.view(-1, 1, 1, 1)
    wanted = (s**2 + 0.25) / (0.5 * s) ** 2 * (denoise(x + s * noise, sigma) - x) ** 2
    got = noise_objective(denoise, x, sigma, noise, 0.0)
    torch.testing.assert_close(got, wanted.mean((1, 2, 3)), rtol=1e-14, atol=0)


@pytest.mark.parametrize("sigma_n", [0.0, 0.2, 0.7])
@pytest.mark.parametrize("level", [0.75, 2.0])
def test_a_denoiser_of_noisy_gaussians_learns_the_clean_posterior_mean(sigma_n, level):
    n, size = 64, 4
    parts = standard(n, 3 * size)
    x = MEAN + parts[:, :size] @ torch.linalg.cholesky(COVARIANCE).T
    y = (x + sigma_n * parts[:, size : 2 * size]).view(n, 1, 2, 2)
    noise, sigma = parts[:, 2 * size :].view(n, 1, 2, 2), torch.full((n,), level, dtype=torch.float64)
    weight, bias = least(lambda w, b: noise_objective(linear(w, b), y, sigma, noise, sigma_n).mean(), size)
    wanted = COVARIANCE @ torch.linalg.inv(COVARIANCE + level**2 * torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(weight, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bias, MEAN - wanted @ MEAN, rtol=1e-9, atol=1e-9)


def test_levels_below_the_noise_are_raised_to_it_and_teach_nothing():
    y, noise = draw(2, 3, 1, 2, 2)
    seen = []

    def denoise(x, sigma):
        seen.append((x, sigma))
        return x * 7

    losses = noise_objective(denoise, y, torch.tensor([0.01, 0.3, 0.5], dtype=torch.float64), noise, 0.3)
    assert seen[0][1].tolist() == [0.3, 0.3, 0.5]
    assert seen[0][0][:2].equal(y[:2])
    assert losses[:2].abs().max() < 1e-25
    assert losses[2] > 0


# ---- masks


@pytest.mark.parametrize("on", ["measured", "further"])
def test_from_masked_gaussians_the_hidden_pixels_are_learnt_where_the_loss_sees_them(on):
    """Seen: pixels 0 and 1, always. Measured: these, and now and then 2 or 3, or both."""
    n, size, level = 64, 4, 0.4
    parts = standard(n, 2 * size)
    x = (MEAN + parts[:, :size] @ torch.linalg.cholesky(COVARIANCE).T).view(n, 1, 2, 2)
    noise, sigma = parts[:, size:].view(n, 1, 2, 2), torch.full((n,), level, dtype=torch.float64)
    further = Inpainting(torch.tensor([1.0, 1, 0, 0]).view(1, 1, 2, 2))
    measured = [Inpainting(torch.tensor([1.0, 1, a, b]).view(1, 1, 2, 2)) for a in (0, 1) for b in (0, 1)]

    def loss(weight, bias):
        total = torch.zeros((), dtype=torch.float64)
        for operator in measured:
            where = operator if on == "measured" else further
            total = (
                total
                + masked_objective(linear(weight, bias), operator(x), operator, further, sigma, noise, on=where).mean()
            )
        return total

    weight, bias = least(loss, size)
    seen = COVARIANCE[:, :2] @ torch.linalg.inv(COVARIANCE[:2, :2] + level**2 * torch.eye(2, dtype=torch.float64))
    known = slice(0, 4 if on == "measured" else 2)
    torch.testing.assert_close(weight[known, :2], seen[known], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bias[known], (MEAN - seen @ MEAN[:2])[known], rtol=1e-9, atol=1e-9)
    if on == "further":  # nothing was said about them
        assert not weight[2:].any()
        assert not bias[2:].any()


def test_with_everything_measured_mri_is_edms():
    x, noise = draw(2, 3, 2, 4, 6)
    maps = torch.polar(torch.ones(1, 4, 6, dtype=torch.float64), draw(1, 4, 6))
    full = MultiCoilMRI(torch.ones(1, 1, 1, 6), maps)
    sigma = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)

    def denoise(x, sigma, mask=None):
        return torch.tanh(x)

    got = masked_objective(denoise, full(x), full, full, sigma, noise, on=full)
    torch.testing.assert_close(got, noise_objective(denoise, x, sigma, noise, 0.0), rtol=1e-10, atol=1e-10)


def test_the_network_sees_no_more_than_the_further_mask():
    corruption = Corruption([{"name": "inpainting", "missing": 0.5}])
    seeds = torch.arange(3)
    x, noise = draw(2, 3, 1, 8, 8).float()
    y, operator = corruption(x, seeds)
    further = corruption.further(operator, seeds, 0.5)

    def denoise(seen, sigma, mask):
        assert mask.equal(further.mask)
        assert not seen[further.mask.expand_as(seen) == 0].any()
        return torch.zeros_like(seen)

    sigma = torch.full((3,), 0.5)
    got = masked_objective(denoise, y, operator, further, sigma, noise, on=further)
    wanted = loss_weight(sigma) * (further.mask * x).square().mean((1, 2, 3))
    torch.testing.assert_close(got, wanted)
    got = masked_objective(denoise, y, operator, further, sigma, noise, on=operator)
    hidden = (operator.mask - further.mask) * x  # measured, but not seen: as at σ = ∞
    wanted = wanted + loss_weight(torch.tensor(torch.inf)) * hidden.square().mean((1, 2, 3))
    torch.testing.assert_close(got, wanted)
    assert loss_weight(torch.tensor(torch.inf)) == 4


# ---- the generator

CLEAN = COVARIANCE[:2, :2]
MIXING = torch.tensor([[0.8, 0.3], [-0.1, 0.9]], dtype=torch.float64)


class Mixing(Operator):
    def __call__(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ MIXING.T).view_as(x)


def optimal(covariance: Tensor):
    """E[x | x + σ ε] for x ~ N(0, covariance), of [B, 1, 1, 2], a level each."""
    values, vectors = torch.linalg.eigh(covariance)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        shrink = values / (values + sigma[:, None] ** 2)
        return ((x.flatten(1) @ vectors * shrink) @ vectors.T).view_as(x)

    return denoise


def trained(method: str, alpha: float = 1.0, operator: Operator | None = None, steps: int = 600) -> Tensor:
    """The covariance of x = L z after `steps` of Adam on the generator's loss, with the best fake score at each."""
    operator = operator or Operator()
    mixing = MIXING if isinstance(operator, Mixing) else torch.eye(2, dtype=torch.float64)
    teacher = optimal(mixing @ CLEAN @ mixing.T)
    factor = torch.tensor([[0.3, 0.1], [0.0, 0.4]], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([factor], lr=0.02)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        z, noise = (torch.randn(512, 1, 1, 2, dtype=torch.float64, generator=generator) for _ in range(2))
        sigma = generator_levels(torch.rand(512, dtype=torch.float64, generator=generator), 800)
        y = operator((z.flatten(1) @ factor.T).view_as(z))
        now = (mixing @ factor @ factor.T @ mixing.T).detach()
        noisy = y + sigma.view(-1, 1, 1, 1) * noise
        loss = score_gap(method, y, teacher(noisy, sigma), optimal(now)(noisy, sigma), alpha).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (factor @ factor.T).detach()


@pytest.mark.parametrize(
    ("method", "alpha", "operator"),
    [("sid", 1.0, None), ("sid", 1.2, None), ("sid", 1.0, Mixing()), ("dmd", 0.0, None), ("dmd", 0.0, Mixing())],
    ids=["sid 1.0", "sid 1.2", "sid through an operator", "dmd", "dmd through an operator"],
)
def test_the_generator_finds_the_clean_covariance(method, alpha, operator):
    torch.testing.assert_close(trained(method, alpha, operator), CLEAN, rtol=0, atol=0.05)


def test_sds_forgets_diversity():
    assert torch.linalg.eigvalsh(trained("sds"))[-1] < 0.1 * torch.linalg.eigvalsh(CLEAN)[-1]


def test_score_gaps_by_hand():
    image = torch.tensor([[[[0.5, -1.0]]]], dtype=torch.float64, requires_grad=True)
    real, fake = torch.tensor([[[[0.1, 0.2]]]]).double(), torch.tensor([[[[0.4, -0.3]]]]).double()
    scale = (0.4 + 1.2) / 2
    gap = (-0.3, 0.5)
    wanted = sum(g * (r - 1.5 * g) for g, r in zip(gap, (-0.4, 1.2), strict=True)) / scale
    torch.testing.assert_close(score_gap("sid", image, real, fake, 1.5), torch.tensor([wanted]).double())
    for method, against in (("dmd", fake), ("sds", image)):
        (gradient,) = torch.autograd.grad(score_gap(method, image, real, fake, 0.0).sum(), image)
        torch.testing.assert_close(gradient, (against - real).detach() / scale)


def test_a_perfect_image_does_not_divide_by_zero():
    image = torch.zeros(1, 1, 2, 2, requires_grad=True)
    assert score_gap("sid", image, image.detach(), image.detach() + 1, 1.0).isfinite().all()


def test_levels():
    uniform = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    levels = generator_levels(uniform, 800)
    u = uniform * 0.8  # the public code's own formula, with (1 - u)
    code = (80 ** (1 / 7) + (1 - u) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(levels, code, rtol=1e-12, atol=0)
    assert levels[0].item() == pytest.approx(0.002)
    assert levels[-1].item() == pytest.approx(24.408, abs=1e-3)
    assert generator_levels(uniform, 1000)[-1].item() == pytest.approx(80)
    above = generator_levels(uniform, 800, 0.4)
    assert above[0].item() == pytest.approx(0.4)
    assert above[-1].item() == pytest.approx(24.408, abs=1e-3)
    assert above[1].item() == pytest.approx(((0.4 ** (1 / 7) + 24.408 ** (1 / 7)) / 2) ** 7, rel=1e-4)
    assert generator_levels(uniform, 300, 5.0).equal(
        generator_levels(torch.ones_like(uniform), 300)
    )  # no lower than σ_n
