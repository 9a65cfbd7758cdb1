"""EDM preconditioning, its samplers, and images from seeds: the same in every batch and for one process or two."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from distributed_worker import run_ranks
from PIL import Image

from mtedit_fast.onestep import (
    Corruption,
    EDMDenoiser,
    EDMSampling,
    OneStepGenerator,
    Stream,
    TeacherSampler,
    edm_sample,
    image_seeds,
    new_unet,
    save_denoiser,
    to_uint8,
)
from mtedit_fast.ops import seeded_noise
from mtedit_fast.training.onestep.run import load_source, write_images

INPAINTING = Corruption([{"name": "inpainting", "missing": 0.4}])
MRI = Corruption([{"name": "mri", "acceleration": 2, "coils": 2}])


def unet(channels: int = 3, *, masked: bool = False, size: int = 16) -> UNet2DModel:
    network = new_unet(size, channels, masked=masked, widths=(8, 16), layers=1, attention=8, seed=0)
    return network.eval()


def denoiser(channels: int = 3, *, masked: bool = False) -> EDMDenoiser:
    return EDMDenoiser(unet(channels, masked=masked), hides_pixels=masked and channels == 3)


# ---- EDM's samplers

SPREAD = torch.tensor([0.3, 0.05, 1.5], dtype=torch.float64).view(3, 1, 1)
CENTRE = torch.tensor([0.2, -0.4, 0.0], dtype=torch.float64).view(3, 1, 1)


def gaussian(x, sigma):
    """The denoiser of pixels N(CENTRE, SPREAD²)."""
    share = (SPREAD**2 / (SPREAD**2 + sigma.double().view(-1, 1, 1, 1) ** 2)).to(x)
    return (CENTRE.to(x) + share * (x - CENTRE.to(x))).float()


def exact(seed, sampling):
    """The solution of the probability-flow ODE from the same noise: (x − centre) / √(spread² + σ²) is constant."""
    x = seeded_noise(seed, (3, 4, 4), Stream.LATENT).double() * sampling.sigma_max
    return CENTRE + (x - CENTRE) * SPREAD / (SPREAD**2 + sampling.sigma_max**2).sqrt()


def test_levels():
    sampling = EDMSampling()
    i = np.arange(18)
    wanted = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(sampling.sigmas(), [*wanted, 0], rtol=1e-12)
    assert sampling.evaluations == 35


def test_the_deterministic_sampler_is_second_order():
    seed = torch.arange(4)
    errors = []
    for steps in (32, 64, 128):
        sampling = EDMSampling(steps=steps)
        errors.append((edm_sample(gaussian, seed, (3, 4, 4), sampling).double() - exact(seed, sampling)).abs().max())
    assert errors[0] < 0.03 * SPREAD.max()
    for coarse, fine in itertools.pairwise(errors):  # half the step, a quarter of the error
        assert 3.5 < coarse / fine < 4.5


def test_evaluations_are_counted_right():
    calls = []

    def counting(x, sigma):
        calls.append(sigma[0].item())
        assert sigma.equal(torch.full((2,), sigma[0].item()))
        assert x.dtype == torch.float32
        return gaussian(x, sigma)

    sampling = EDMSampling(steps=7, sigma_min=0.1, sigma_max=5.0, rho=3.0)
    edm_sample(counting, torch.arange(2), (3, 4, 4), sampling)
    assert len(calls) == sampling.evaluations == 13
    assert (calls[0], calls[-1]) == (5.0, pytest.approx(0.1))


def test_the_stochastic_sampler_is_algorithm_2():
    sampling = EDMSampling(steps=6, churn=3.0, churn_min=0.1, churn_max=20.0, churn_noise=1.01)
    seed, sigmas = torch.arange(3), sampling.sigmas()
    x = seeded_noise(seed, (3, 4, 4), Stream.LATENT).double() * sigmas[0]
    for i in range(6):
        gamma = min(3.0 / 6, math.sqrt(2) - 1) if 0.1 <= sigmas[i] <= 20 else 0.0
        t = sigmas[i] + gamma * sigmas[i]
        noise = seeded_noise(seed, (3, 4, 4), Stream.CHURN + i).double() * 1.01
        hat = x + math.sqrt(t**2 - sigmas[i] ** 2) * noise
        d = (hat - gaussian(hat.float(), torch.tensor([t]))) / t
        x = hat + (sigmas[i + 1] - t) * d
        if sigmas[i + 1] > 0:
            again = (x - gaussian(x.float(), torch.tensor([sigmas[i + 1]]))) / sigmas[i + 1]
            x = hat + (sigmas[i + 1] - t) * (d + again) / 2
    got = edm_sample(gaussian, seed, (3, 4, 4), sampling)
    torch.testing.assert_close(got, x.float(), rtol=1e-5, atol=1e-5)
    assert not got.equal(edm_sample(gaussian, seed, (3, 4, 4), EDMSampling(steps=6)))


def test_the_stochastic_sampler_keeps_the_distribution():
    sampling = EDMSampling(steps=40, churn=20.0)
    x = edm_sample(gaussian, torch.arange(500), (3, 4, 4), sampling).double()
    n = 500 * 16
    for channel in range(3):
        spread = SPREAD[channel].item()
        assert abs(x[:, channel].mean().item() - CENTRE[channel].item()) < 5 * spread / math.sqrt(n) + 0.01
        assert abs(x[:, channel].std().item() / spread - 1) < 5 / math.sqrt(2 * n) + 0.03


def test_a_teacher_of_noisy_images_stops_at_their_noise():
    assert TeacherSampler(denoiser(), (3, 16, 16), Corruption([], 0.3)).sampling.sigma_min == 0.3
    assert TeacherSampler(denoiser(), (3, 16, 16)).sampling == EDMSampling()
    own = EDMSampling(steps=5)
    assert TeacherSampler(denoiser(), (3, 16, 16), Corruption([], 0.3), sampling=own).sampling is own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1}, "steps"),
        ({"sigma_min": 0.0}, "sigma_min"),
        ({"sigma_max": 0.001}, "sigma_m"),
        ({"churn": -1}, "churn"),
    ],
)
def test_bad_sampling(options, message):
    with pytest.raises(ValueError, match=message):
        EDMSampling(**options)


# ---- images from seeds


def sources():
    return {
        "noise": OneStepGenerator(denoiser(), (3, 16, 16), Corruption([], 0.2)),
        "inpainting": OneStepGenerator(denoiser(masked=True), (3, 16, 16), INPAINTING, sigma_init=1.5),
        "mri": OneStepGenerator(denoiser(2, masked=True), (2, 16, 16), MRI),
        "teacher": TeacherSampler(
            denoiser(masked=True), (3, 16, 16), INPAINTING, sampling=EDMSampling(steps=3, churn=1)
        ),
    }


@pytest.mark.parametrize("name", ["noise", "inpainting", "mri", "teacher"])
def test_an_image_is_the_same_in_every_batch(name):
    source = sources()[name]
    seeds = image_seeds(5, torch.arange(64))
    together = source(seeds)
    assert together.dtype == torch.float32
    assert together.std() > 0.01
    scale = source.sampling.sigma_max if name == "teacher" else 1  # what the rounding is relative to
    for size in (1, 7):
        apart = torch.cat([source(part) for part in seeds.split(size)])
        torch.testing.assert_close(apart, together, rtol=0, atol=1e-5 * scale)
        operators = [source.operator(part) for part in seeds.split(size)]
        if operators[0] is not None:  # what does not pass through the network is the same to the bit
            assert torch.cat([operator.mask for operator in operators]).equal(source.operator(seeds).mask)
        if name != "teacher":
            assert torch.cat([source.latents(part) for part in seeds.split(size)]).equal(source.latents(seeds))


@pytest.mark.parametrize("name", ["noise", "inpainting", "mri"])
def test_the_generator_is_the_denoiser_at_its_level(name):
    source = sources()[name]
    seeds = image_seeds(1, torch.arange(3))
    x, operator = source.latents(seeds) * source.sigma_init, source.operator(seeds)
    sigma = torch.tensor(source.sigma_init)
    with torch.no_grad():
        if operator is None:
            wanted = source.denoiser(x, sigma)
        else:
            wanted = source.denoiser(operator.normal(x), sigma, operator.mask)
    torch.testing.assert_close(source(seeds), wanted, rtol=1e-5, atol=1e-5)
    assert source.pixels(seeds).equal(to_uint8(source(seeds)))


def test_the_compiled_generator_draws_the_same_images():
    plain = OneStepGenerator(denoiser(), (3, 16, 16))
    compiled = OneStepGenerator(denoiser(), (3, 16, 16), compile={"backend": "aot_eager", "fullgraph": True})
    seeds = torch.arange(2)
    torch.testing.assert_close(compiled(seeds), plain(seeds), rtol=1e-5, atol=1e-5)
    assert (compiled.pixels(seeds).int() - plain.pixels(seeds).int()).abs().max() <= 1
    teacher = {"sampling": EDMSampling(steps=2)}
    ours = TeacherSampler(denoiser(), (3, 16, 16), compile={"backend": "eager"}, **teacher)
    torch.testing.assert_close(ours(seeds), TeacherSampler(denoiser(), (3, 16, 16), **teacher)(seeds))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("masked", [False, True])
def test_graphs_replay_what_eager_draws(masked):
    corruption = INPAINTING if masked else Corruption()
    options = (denoiser(masked=masked).cuda(), (3, 16, 16), corruption)
    graphed, eager = OneStepGenerator(*options), OneStepGenerator(*options, cuda_graph=False)
    for count in (4, 4, 2):
        seeds = image_seeds(count, torch.arange(count)).cuda()
        assert graphed(seeds).equal(eager(seeds))
        assert graphed.pixels(seeds).equal(eager.pixels(seeds))
    first, second = torch.arange(4).cuda(), torch.arange(4, 8).cuda()
    kept = graphed(first)
    graphed(second)
    assert kept.equal(eager(first))


def test_pixels():
    x = torch.tensor([-1.5, -1.0, 0.0, 1.0, 3.0, math.nan]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    pixels = to_uint8(x)
    assert (pixels.shape, pixels.dtype) == ((1, 1, 6, 3), torch.uint8)
    assert pixels[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 0]
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256)
    assert to_uint8(every.float() / 127.5 - 1).flatten().equal(every.flatten())
    assert to_uint8(torch.tensor([0.6, 0.8]).view(1, 2, 1, 1)).flatten().tolist() == [255]
    assert to_uint8(torch.zeros(1, 2, 1, 1)).flatten().tolist() == [0]


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (3, 8), (1, 1), (0, 4)])
def test_streaming(count, batch):
    source = sources()["noise"]
    indices, parts = [], []
    for some, pixels in source.stream(range(5, 5 + count), seed=3, batch=batch):
        assert len(some) == len(pixels) <= batch
        indices += some
        parts.append(torch.from_numpy(pixels.copy()))
    assert indices == list(range(5, 5 + count))
    if count:
        wanted = source.pixels(image_seeds(3, torch.tensor(indices)))
        assert (torch.cat(parts).int() - wanted.int()).abs().max() <= 1


def test_bad_generators():
    with pytest.raises(ValueError, match="sigma_init: expected > 0"):
        OneStepGenerator(denoiser(), (3, 16, 16), sigma_init=0.0)
    with pytest.raises(ValueError, match="batch: expected ≥ 1"):
        next(sources()["noise"].stream(range(3), batch=0))


# ---- two processes


def _draw(rank: int, folder: str) -> torch.Tensor:
    source = load_source(f"{folder}/model")
    assert isinstance(source, OneStepGenerator)
    write_images(source, f"{folder}/two", 9, seed=7, batch=2)
    return source.latents(image_seeds(7, torch.arange(9)))


def test_two_processes_draw_what_one_does(tmp_path):
    card = {"shape": [3, 16, 16], "sigma_init": 2.0}
    save_denoiser(tmp_path / "model", denoiser(masked=True), INPAINTING, card)
    latents = run_ranks(2, _draw, str(tmp_path))
    assert latents[0].equal(latents[1])
    source = load_source(tmp_path / "model")
    assert source.sigma_init == 2.0
    assert latents[0].equal(source.latents(image_seeds(7, torch.arange(9))))
    assert write_images(source, tmp_path / "one", 9, seed=7, batch=4) == {}
    names = [f"{i:06d}.png" for i in range(9)]
    for folder in ("one", "two"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == names
    for name in names:
        one, two = (np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in ("one", "two"))
        assert abs(one - two).max() <= 1
