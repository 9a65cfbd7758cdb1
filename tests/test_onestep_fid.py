"""The Fréchet distance against closed forms, and its statistics against NumPy."""

import math
import sys

import numpy as np
import pytest
import scipy.linalg
import torch

from mtedit_fast.onestep import FeatureStatistics, frechet_distance, load_features, measure


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def gaussian(mean: torch.Tensor, covariance: torch.Tensor, count: int = 10**6) -> FeatureStatistics:
    statistics = FeatureStatistics()
    statistics.count, statistics._mean, statistics._scatter = count, mean, covariance * (count - 1)
    return statistics


def random_covariance(size: int, rank: int | None = None, seed: int = 0) -> torch.Tensor:
    factor = random(size, rank or size + 2, seed=seed)
    return factor @ factor.T


# ---- statistics


@pytest.mark.parametrize("batches", [[50], [1, 49], [20, 0, 30], [7] * 7 + [1]])
def test_streaming_is_numpys(batches):
    features = random(50, 6) * 1e-3 + 1000  # a mean that a sum of squares would drown in
    statistics = FeatureStatistics()
    for part in features.split(batches):
        statistics.update(part)
    assert statistics.count == 50
    np.testing.assert_allclose(statistics.mean.numpy(), features.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(statistics.covariance.numpy(), np.cov(features.numpy().T), rtol=1e-8, atol=1e-15)


def test_parts_merge_to_the_whole():
    features = random(40, 5)
    whole, parts = FeatureStatistics(), [FeatureStatistics() for _ in range(3)]
    whole.update(features)
    for statistics, part in zip(parts, features.split([10, 25, 5]), strict=True):
        statistics.update(part)
    total = FeatureStatistics()
    for part in [*parts, FeatureStatistics()]:
        total.merge(part)
    assert total.count == 40
    torch.testing.assert_close(total.mean, whole.mean)
    torch.testing.assert_close(total.covariance, whole.covariance)


def test_half_precision_features_are_summed_in_double():
    features = random(64, 3).half()
    statistics = FeatureStatistics()
    statistics.update(features)
    assert statistics.mean.dtype == torch.float64
    torch.testing.assert_close(statistics.mean, features.double().mean(0), rtol=1e-14, atol=1e-14)


def test_saved_and_loaded(tmp_path):
    statistics = FeatureStatistics()
    statistics.update(random(30, 4))
    statistics.save(tmp_path / "s.npz")
    loaded = FeatureStatistics.load(tmp_path / "s.npz")
    assert loaded.count == 30
    torch.testing.assert_close(loaded.covariance, statistics.covariance)
    # other projects' files have no count
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(4), sigma=np.eye(4))
    assert FeatureStatistics.load(tmp_path / "theirs.npz").covariance.equal(torch.eye(4, dtype=torch.float64))


# ---- distances


def test_one_dimension():
    a, b = (
        gaussian(torch.tensor([1.0]).double(), torch.tensor([[4.0]]).double()),
        gaussian(torch.tensor([-2.0]).double(), torch.tensor([[0.25]]).double()),
    )
    assert frechet_distance(a, b) == pytest.approx(9 + (2 - 0.5) ** 2, rel=1e-14)


def test_commuting_covariances():
    basis = torch.linalg.qr(random(6, 6))[0]
    first, second = torch.arange(6).double() + 0.5, torch.tensor([0.0, 3, 1, 4, 1, 5]).double()
    mean = random(6)
    a = gaussian(mean, basis * first @ basis.T)
    b = gaussian(torch.zeros(6).double(), basis * second @ basis.T)
    wanted = mean.square().sum() + (first.sqrt() - second.sqrt()).square().sum()
    assert frechet_distance(a, b) == pytest.approx(wanted.item(), rel=1e-12)


def test_two_dimensions_that_do_not_commute():
    first, second = (torch.tensor(v).double() for v in ([[2.0, 0.5], [0.5, 1.0]], [[1.0, -0.7], [-0.7, 3.0]]))
    product = first @ second
    # of a 2 × 2 matrix with positive eigenvalues: tr √M = √(tr M + 2 √det M)
    cross = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    zero = torch.zeros(2).double()
    wanted = first.trace() + second.trace() - 2 * cross
    assert frechet_distance(gaussian(zero, first), gaussian(zero, second)) == pytest.approx(wanted.item(), rel=1e-12)


def test_many_dimensions_are_scipys():
    a, b = random_covariance(20), random_covariance(20, seed=1)
    mean = random(20)
    cross = scipy.linalg.sqrtm(a.numpy() @ b.numpy()).real.trace()
    wanted = (mean.square().sum() + a.trace() + b.trace()).item() - 2 * cross
    zero = torch.zeros(20).double()
    assert frechet_distance(gaussian(mean, a), gaussian(zero, b)) == pytest.approx(wanted, rel=1e-10)
    assert frechet_distance(gaussian(zero, b), gaussian(mean, a)) == pytest.approx(wanted, rel=1e-10)


def test_rank_deficient_covariances():
    # N(0, u uᵀ) and N(0, v vᵀ): |u|² + |v|² − 2 |uᵀ v|
    u, v, zero = random(8), random(8, seed=3), torch.zeros(8).double()
    a, b = gaussian(zero, torch.outer(u, u)), gaussian(zero, torch.outer(v, v))
    wanted = u @ u + v @ v - 2 * (u @ v).abs()
    assert frechet_distance(a, b) == pytest.approx(wanted.item(), rel=1e-7)
    # orthogonal supports: nothing overlaps
    low = gaussian(zero, torch.diag(torch.tensor([1.0, 2, 3, 4, 0, 0, 0, 0]).double()))
    high = gaussian(zero, torch.diag(torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1]).double()))
    assert frechet_distance(low, high) == pytest.approx(14, rel=1e-14)


def test_the_same_set_is_at_distance_zero():
    features = random(500, 16) @ random(16, 16) * 50
    statistics = FeatureStatistics()
    statistics.update(features)
    assert frechet_distance(statistics, statistics) <= 1e-10 * statistics.covariance.trace().item()
    # and with a null space
    flat = gaussian(torch.zeros(64).double(), random_covariance(64, 10))
    assert frechet_distance(flat, flat) <= 1e-6 * flat.covariance.trace().item()


def test_too_few_samples_are_warned_about():
    few, many = FeatureStatistics(), FeatureStatistics()
    few.update(random(8, 8))
    many.update(random(100, 8))
    with pytest.warns(UserWarning, match="a: 8 samples for 8 feature dimensions make a singular covariance"):
        frechet_distance(few, many)
    with pytest.warns(UserWarning, match="b: 8 samples"):
        frechet_distance(many, few)


# ---- features


def test_measure_takes_pixels_of_one_or_three_channels():
    images = torch.randint(0, 256, (9, 4, 5, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def features(x):
        assert x.shape[1:] == (4, 5, 3)
        return x.float().mean((1, 2))

    statistics = measure(features, images.split(4))
    wanted = images.double().mean((1, 2)).expand(-1, 3)
    torch.testing.assert_close(statistics.mean, wanted.mean(0), rtol=1e-6, atol=1e-6)
    more = measure(features, [images], statistics)
    assert more is statistics
    assert statistics.count == 18


class Detector(torch.nn.Module):
    """The call of the published TorchScript detector."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        x = x.to(torch.float32)
        return x.mean(dim=[2, 3]) if return_features else x


def test_torchscript_inception(tmp_path):
    torch.jit.script(Detector()).save(str(tmp_path / "inception.pt"))
    features = load_features(str(tmp_path / "inception.pt"))
    images = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    torch.testing.assert_close(features(images), images.float().mean((1, 2)))


def test_features_by_import_path(tmp_path, monkeypatch):
    (tmp_path / "my_features_of_pixels.py").write_text(
        "def make():\n    return lambda images: images.float().mean((1, 2))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    images = torch.ones(2, 4, 4, 3, dtype=torch.uint8)
    assert load_features("my_features_of_pixels:make")(images).equal(torch.ones(2, 3))
    sys.modules.pop("my_features_of_pixels")


def test_a_state_dict_needs_torchvision(tmp_path, monkeypatch):
    torch.save({"weight": torch.ones(1)}, tmp_path / "weights.pth")
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ValueError, match="needs torchvision"):
        load_features(str(tmp_path / "weights.pth"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_features("inception"), "features: expected module:function or a file"),
        (lambda: load_features("no_such_module:make"), "cannot be imported"),
        (lambda: load_features("math:no_such_function"), "cannot be imported"),
        (lambda: FeatureStatistics().update(torch.ones(3)), r"features: expected \[B, D\], got \[3\]"),
        (
            lambda: FeatureStatistics().update(torch.tensor([[1.0], [math.nan]])),
            "1 of 2 samples are not finite, the .* 1",
        ),
        (lambda: FeatureStatistics().mean, "got none"),
        (lambda: gaussian(torch.ones(1), torch.ones(1, 1), 1).covariance, "at least 2 samples"),
        (
            lambda: gaussian(torch.ones(2), torch.eye(2)).update(torch.ones(2, 3)),
            "expected 2 per sample as before, got 3",
        ),
        (
            lambda: frechet_distance(gaussian(torch.ones(2), torch.eye(2)), gaussian(torch.ones(3), torch.eye(3))),
            "b: expected features of the same 2 dimensions, got 3",
        ),
        (lambda: measure(lambda x: x, [torch.ones(1, 2, 2, 3)]), "images: expected uint8"),
        (lambda: measure(lambda x: x, [torch.ones(1, 2, 2, 4, dtype=torch.uint8)]), "images: expected uint8"),
        (lambda: FeatureStatistics.load("/no/such.npz"), "expected .npz of mu and sigma"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_statistics_that_do_not_fit(tmp_path):
    for name, content in {
        "a": {"mu": np.zeros(3), "sigma": np.eye(2)},
        "b": {"mu": np.zeros(2), "sigma": np.eye(2), "count": 1},
        "c": {"mu": np.zeros(2)},
    }.items():
        np.savez(tmp_path / f"{name}.npz", **content)
        with pytest.raises(ValueError, match=f"{name}.npz"):
            FeatureStatistics.load(tmp_path / f"{name}.npz")
