"""Measurement operators against their adjoints, SciPy and direct sums; corruptions by seed."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch

from mtedit_fast.onestep import (
    FAMILIES,
    Blur,
    Composition,
    Corruption,
    Family,
    Inpainting,
    MultiCoilMRI,
    Operator,
    SuperResolution,
    estimate_noise,
    image_seeds,
    register,
)
from mtedit_fast.onestep.corruption import BoxInpainting, CartesianMRI, CompressedSensing, synthetic_maps
from mtedit_fast.onestep.operators import PartialFourier

SEEDS = torch.arange(5)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def mask(batch: int, height: int, width: int, share: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    drawn = (torch.rand(batch, 1, height, width, generator=generator) < share).double()
    drawn[..., 0] = 1
    return drawn


def maps(*shape: int) -> torch.Tensor:
    return torch.complex(random(*shape), random(*shape, 1)[..., 0])


OPERATORS = {
    "identity": (Operator(), (2, 3, 6, 8)),
    "inpainting": (Inpainting(mask(2, 6, 8)), (2, 3, 6, 8)),
    "inpainting, one mask for all, a channel each": (Inpainting(mask(3, 6, 8).view(1, 3, 6, 8)), (2, 3, 6, 8)),
    "blur": (Blur(), (2, 3, 11, 14)),
    "blur, even image, smallest": (Blur(9, 2.0), (1, 2, 5, 6)),
    "blur, other taps": (Blur(5, 0.7), (2, 1, 9, 3)),
    "one tap": (Blur(1), (1, 1, 3, 3)),
    "super-resolution": (SuperResolution(), (2, 3, 6, 8)),
    "super-resolution, factor 3": (SuperResolution(3), (2, 1, 6, 9)),
    "super-resolution, same size": (SuperResolution(2, keep_size=True), (2, 3, 6, 8)),
    "mri": (MultiCoilMRI(mask(2, 1, 9), maps(3, 7, 9)), (2, 2, 7, 9)),
    "mri, maps per image": (MultiCoilMRI(mask(2, 6, 8), maps(2, 3, 6, 8)), (2, 2, 6, 8)),
    "partial Fourier": (PartialFourier(mask(2, 1, 9)), (2, 3, 7, 9)),
    "partial Fourier, a mask of rows and lines": (PartialFourier(mask(1, 6, 8)), (2, 1, 6, 8)),
    "composition": (Composition([Blur(5, 1.0), SuperResolution(2)]), (2, 3, 6, 8)),
    "three": (Composition([Blur(5, 1.0), SuperResolution(2), Inpainting(mask(2, 3, 4))]), (2, 3, 6, 8)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_adjoint(name):
    operator, shape = OPERATORS[name]
    x = random(*shape)
    measured = operator(x)
    y = random(*measured.shape)
    left, right = (measured * y).sum(), (x * operator.adjoint(y)).sum()
    assert abs(left - right) <= 1e-12 * measured.norm() * y.norm()
    assert operator.normal(x).equal(operator.adjoint(measured))
    moved = operator.to("cpu")
    assert moved(x).equal(measured)


@pytest.mark.parametrize("name", OPERATORS)
def test_gradient_is_the_adjoint(name):
    operator, shape = OPERATORS[name]
    x = random(*shape).requires_grad_()
    measured = operator(x)
    y = random(*measured.shape)
    (measured * y).sum().backward()
    torch.testing.assert_close(x.grad, operator.adjoint(y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPERATORS)
def test_single_precision_is_as_good_as_it_gets(name):
    operator, shape = OPERATORS[name]
    x = random(*shape)
    error = (operator(x.float()).double() - operator(x)).abs().max()
    assert operator(x.float()).dtype == torch.float32
    assert error <= 1e-5


@pytest.mark.parametrize(("taps", "std"), [(9, 2.0), (5, 0.8)])
def test_blur_is_scipys(taps, std):
    x = random(2, 3, 12, 17)
    blurred = Blur(taps, std)(x)
    for image, result in zip(x.flatten(0, 1), blurred.flatten(0, 1), strict=True):
        wanted = scipy.ndimage.gaussian_filter(image.numpy(), std, radius=taps // 2, mode="mirror")
        np.testing.assert_allclose(result.numpy(), wanted, rtol=0, atol=1e-14)


def test_super_resolution_is_scipys():
    x = random(2, 3, 6, 9)
    labels = np.arange(2 * 3)[:, None, None] * 6 + (np.arange(6) // 3 * 3)[None, :, None] + (np.arange(9) // 3)
    wanted = scipy.ndimage.mean(x.view(6, 6, 9).numpy(), labels, np.unique(labels)).reshape(2, 3, 2, 3)
    np.testing.assert_allclose(SuperResolution(3)(x).numpy(), wanted, rtol=0, atol=1e-15)
    kept = SuperResolution(3, keep_size=True)(x)
    np.testing.assert_allclose(kept.numpy(), wanted.repeat(3, 2).repeat(3, 3), rtol=0, atol=1e-15)


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_mri_is_a_direct_sum(size):
    height, width = size
    sensitivities, kept, x = maps(2, *size), mask(1, *size), random(1, 2, *size)
    image = torch.complex(x[0, 0], x[0, 1])
    y = MultiCoilMRI(kept, sensitivities)(x)
    for coil in range(2):
        for row in range(height):
            for column in range(width):
                total = sum(
                    sensitivities[coil, i, j]
                    * image[i, j]
                    * np.exp(
                        -2j
                        * math.pi
                        * (
                            (row - height // 2) * (i - height // 2) / height
                            + (column - width // 2) * (j - width // 2) / width
                        )
                    )
                    for i in range(height)
                    for j in range(width)
                )
                total = total / math.sqrt(height * width) * kept[0, 0, row, column]
                assert abs(complex(y[0, coil, 0, row, column], y[0, coil, 1, row, column]) - complex(total)) < 1e-12


def test_mri_with_everything_measured_is_an_isometry():
    x = random(2, 2, 8, 10)
    operator = MultiCoilMRI(torch.ones(1, 1, 1, 10), synthetic_maps(3, 8, 10).to(torch.complex128))
    torch.testing.assert_close(operator.normal(x), x, rtol=0, atol=1e-6)  # the maps are fp32


@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_partial_fourier_is_one_coil_of_mri(size):
    x, kept = random(2, 3, *size), mask(2, 1, size[1])
    y = PartialFourier(kept)(x)
    coil = MultiCoilMRI(kept, torch.ones(1, *size, dtype=torch.complex128))
    for channel in range(3):
        image = torch.stack((x[:, channel], torch.zeros_like(x[:, channel])), 1)
        torch.testing.assert_close(y[:, channel], coil(image)[:, 0], rtol=0, atol=1e-14)
    full = PartialFourier(torch.ones(1, 1, 1, size[1]))
    torch.testing.assert_close(full.normal(x), x, rtol=0, atol=1e-14)


# ---- drawn by seed


CORRUPTIONS = {
    "noise": ([], 0.3),
    "inpainting": ([{"name": "inpainting", "missing": 0.5}], 0.0),
    "blur": ([{"name": "blur", "std": 1.0, "taps": 5}], 0.1),
    "super_resolution": ([{"name": "super_resolution", "keep_size": False}], 0.2),
    "both": ([{"name": "blur"}, {"name": "super_resolution"}], 0.2),
    "mri": ([{"name": "mri", "acceleration": 3, "coils": 2}], 0.1),
    "box": ([{"name": "box", "share": 0.4}], 0.0),
    "compressed_sensing": ([{"name": "compressed_sensing", "acceleration": 3, "centre": 0.1}], 0.1),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_corrupted_the_same_in_every_batch(name):
    corruption = Corruption(*CORRUPTIONS[name])
    x = random(64, 2, 12, 12).float()
    seeds = image_seeds(3, torch.arange(64))
    together, operator = corruption(x, seeds)
    for size in (1, 7):
        parts = [corruption(part, s)[0] for part, s in zip(x.split(size), seeds.split(size), strict=True)]
        assert torch.cat(parts).equal(together)
    y = corruption.operator(seeds, (12, 12))(x)
    if corruption.sigma:
        noise = (together - y) / corruption.sigma
        assert abs(noise.std().item() - 1) < 5 / math.sqrt(2 * noise.numel())
        assert abs(noise.mean().item()) < 5 / math.sqrt(noise.numel())
    assert operator(x).equal(y)
    again = Corruption(**corruption.describe())
    assert again(x, seeds)[0].equal(together)
    assert not corruption(x, image_seeds(4, torch.arange(64)))[0].equal(together) or name in ("blur",)


def test_inpainting_masks_have_their_share_and_are_corrupted_further():
    corruption = Corruption([{"name": "inpainting", "missing": 0.8}])
    assert corruption.random
    operator = corruption.operator(SEEDS, (64, 64))
    deviation = math.sqrt(0.2 * 0.8 / (5 * 64 * 64))
    assert abs(operator.mask.mean().item() - 0.2) < 5 * deviation
    for delta, share in ((None, 0.9), (0.5, 0.5), (0.0, 1.0)):
        further = corruption.further(operator, SEEDS + 100, delta)
        assert bool((further.mask <= operator.mask).all())
        kept = further.mask.sum() / operator.mask.sum()
        assert abs(kept.item() - share) < 5 * math.sqrt(max(share * (1 - share), 0) / operator.mask.sum().item()) + 1e-9


@pytest.mark.parametrize(("share", "side"), [(0.5, 5), (0.3, 3), (0.01, 1), (0.99, 10)])
def test_boxes_are_squares_anywhere_inside(share, side):
    seeds = torch.arange(400)
    missing = 1 - BoxInpainting(share).draw(seeds, (10, 14)).mask[:, 0]
    rows, columns = missing.amax(2), missing.amax(1)
    assert missing.equal(rows[:, :, None] * columns[:, None])  # a rectangle …
    for lines, length in ((rows, 10), (columns, 14)):
        first = lines.argmax(1)
        assert bool((lines.sum(1) == side).all())  # … of this side, in one piece, at every place there is
        assert bool((first + side - 1 == length - 1 - lines.flip(1).argmax(1)).all())
        assert set(first.tolist()) == set(range(length - side + 1))


def test_boxes_are_corrupted_further():
    family = BoxInpainting()
    operator = family.draw(SEEDS, (64, 64))
    further = family.further(operator, SEEDS, 0.5)
    assert bool((further.mask <= operator.mask).all())
    assert abs((further.mask.sum() / operator.mask.sum()).item() - 0.5) < 0.02


@pytest.mark.parametrize("kind", [CartesianMRI, CompressedSensing])
def test_mri_lines(kind):
    family = kind(acceleration=4, centre=0.1)
    operator = family.draw(SEEDS, (16, 40))
    assert operator.mask.shape == (5, 1, 1, 40)
    assert operator.mask.sum((1, 2, 3)).tolist() == [10] * 5
    assert bool((operator.mask[..., 18:22] == 1).all())
    assert not operator.mask[0].equal(operator.mask[1])
    for delta, lines in ((None, 8), (10.0, 4), (4.0, 10)):
        further = family.further(operator, SEEDS + 9, delta)
        assert further.mask.sum((1, 2, 3)).tolist() == [lines] * 5
        assert bool((further.mask <= operator.mask).all())
        assert bool((further.mask[..., 18:22] == 1).all())


@pytest.mark.parametrize(
    ("width", "centre", "lines"),
    [(16, 0.08, {8}), (32, 0.1, {15, 16, 17}), (15, 0.2, {6, 7, 8}), (16, 0.25, {6, 7, 8, 9}), (17, 0.06, {8})],
)
def test_central_lines_lie_around_frequency_0(width, centre, lines):
    """Which `fftshift` puts at width // 2, for even and odd widths alike."""
    zero = torch.fft.fftshift(torch.fft.fftfreq(width)).abs().argmin().item()
    assert zero in lines
    masks = CompressedSensing(acceleration=1 / centre, centre=centre).draw(SEEDS, (8, width)).mask[:, 0, 0]
    assert all(set(mask.nonzero().flatten().tolist()) == lines for mask in masks)


def test_maps_from_a_file(tmp_path):
    measured = maps(2, 8, 8).to(torch.complex64)
    np.save(tmp_path / "maps.npy", measured.numpy())
    corruption = Corruption([{"name": "mri", "maps": str(tmp_path / "maps.npy"), "acceleration": 2}])
    operator = corruption.operator(SEEDS, (8, 8))
    assert operator.maps[0].equal(measured)


class Minus(Operator):
    def __call__(self, x):
        return -x

    adjoint = __call__


def test_a_family_of_ones_own():
    @register("negative")
    class Negative(Family):
        def draw(self, seed, size):
            return Minus()

    try:
        x = random(5, 1, 4, 4)
        y, operator = Corruption([{"name": "negative"}])(x, SEEDS)
        assert y.equal(-x)
        assert operator.normal(x).equal(x)
        with pytest.raises(ValueError, match="'negative' is registered already"):
            register("negative")(Negative)
    finally:
        del FAMILIES["negative"]


@pytest.mark.parametrize("sigma", [0.05, 0.2, 0.4])
def test_noise_is_estimated(sigma):
    smooth = torch.linspace(-1, 1, 64).view(1, 1, 64, 1).expand(8, 3, 64, 65)
    noisy = smooth + sigma * random(8, 3, 64, 65)
    assert abs(estimate_noise(noisy) / sigma - 1) < 0.05
    assert estimate_noise(smooth) < 1e-6


# ---- what is refused

X = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Inpainting(torch.zeros(2, 1, 4, 4)), r"mask: sample 0, 1 is all zeros"),
        (lambda: Inpainting(torch.full((1, 1, 2, 2), 0.5)), "expected 0 .missing. and 1"),
        (lambda: Inpainting(torch.ones(4, 4)), r"mask: expected \[B or 1, channels or 1, H, W\], got \[4, 4\]"),
        (lambda: Inpainting(torch.ones(1, 1, 4, 8))(X), r"x: \[2, 3, 8, 8\] does not fit the operator's mask"),
        (lambda: Inpainting(torch.ones(3, 1, 8, 8))(X), "does not fit"),
        (lambda: Blur(8), "taps: expected an odd number"),
        (lambda: Blur(9, 0.0), "std: expected > 0"),
        (lambda: Blur(17)(X), "expects images larger than 8 pixels"),
        (lambda: Blur()(X[0]), r"expected floating-point images \[B, C, H, W\], got torch.float32 \[3, 8, 8\]"),
        (lambda: Blur()(X.byte()), "got torch.uint8"),
        (lambda: SuperResolution(0), "factor: expected ≥ 1"),
        (lambda: SuperResolution(3)(X), "multiples of factor 3"),
        (lambda: MultiCoilMRI(torch.ones(1, 1, 1, 8), torch.ones(2, 8, 8)), "maps: expected complex"),
        (lambda: MultiCoilMRI(torch.ones(1, 1, 1, 9), maps(2, 8, 8)), r"mask: expected \[B or 1, 1, 8 or 1, 8\]"),
        (lambda: MultiCoilMRI(torch.ones(1, 1, 1, 8), maps(2, 8, 8))(X), r"x: expected \[B, 2, 8, 8\]"),
        (lambda: MultiCoilMRI(torch.zeros(1, 1, 1, 8), maps(2, 8, 8)), "sample 0 is all zeros"),
        (
            lambda: MultiCoilMRI(torch.ones(1, 1, 1, 8), maps(2, 8, 8)).adjoint(torch.zeros(1, 3, 2, 8, 8)),
            r"y: expected \[B, 2, 2, 8, 8\]",
        ),
        (lambda: PartialFourier(torch.ones(1, 3, 1, 8)), "mask: expected one channel"),
        (lambda: PartialFourier(torch.ones(1, 1, 1, 9))(X), "does not fit the operator's mask"),
        (lambda: PartialFourier(torch.ones(1, 1, 1, 8)).adjoint(X), r"y: expected k-space \[B, C, 2, H, W\]"),
        (lambda: BoxInpainting(1.0), "share: expected 0 < share < 1"),
        (lambda: Corruption([{"name": "fog"}]), "expected a name of noise, inpainting, .*, got 'fog'"),
        (lambda: Corruption([{"name": "blur", "width": 3}]), "blur: .*width"),
        (lambda: Corruption([{"name": "inpainting", "missing": 1.0}]), "missing: expected 0 <= missing < 1"),
        (lambda: Corruption([{"name": "inpainting"}, {"name": "blur"}]), "stand alone"),
        (lambda: Corruption([], -0.1), "sigma: expected a standard deviation"),
        (lambda: Corruption([], math.inf), "sigma"),
        (lambda: CartesianMRI(0.5), "acceleration"),
        (lambda: CartesianMRI(4, centre=0.5), "centre"),
        (lambda: CartesianMRI(coils=0), "coils"),
        (lambda: Corruption([{"name": "mri", "maps": "/none.npy"}]), "maps: no file /none.npy"),
        (lambda: CartesianMRI(4).further(CartesianMRI(4).draw(SEEDS, (16, 16)), SEEDS, 2.0), "delta"),
        (lambda: Corruption([{"name": "inpainting"}]).further(Inpainting(torch.ones(5, 1, 4, 4)), SEEDS, 1.0), "delta"),
        (lambda: Corruption().further(Operator(), SEEDS), "no masks"),
        (lambda: image_seeds(-1, SEEDS), "seed: expected"),
        (lambda: image_seeds(0, SEEDS - 1), "indices: expected"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
