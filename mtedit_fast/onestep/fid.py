"""Fréchet distance between the Gaussians of two sets of features: FID where the features are Inception's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Features = Callable[[Tensor], Tensor]
"""uint8 images [B, H, W, 3] -> features [B, D], float."""


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches, in fp64 on the CPU (Chan, Golub & LeVeque's update).

    Two of them over parts of a set can be merged into the whole's.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """[D] fp64."""
        return self._known(self._mean)

    @property
    def covariance(self) -> Tensor:
        """[D, D] fp64, unbiased; needs two samples."""
        if self.count < 2:
            raise ValueError(f"features: expected at least 2 samples for a covariance, got {self.count}")
        return self._known(self._scatter) / (self.count - 1)

    def update(self, features: Tensor) -> None:
        """features: [B, D] of any floating dtype; ValueError names samples that are not finite."""
        if features.ndim != 2:
            raise ValueError(f"features: expected [B, D], got {list(features.shape)}")
        if self._mean is not None and features.shape[1] != len(self._mean):
            raise ValueError(f"features: expected {len(self._mean)} per sample as before, got {features.shape[1]}")
        features = features.detach().cpu().double()
        bad = (~features.isfinite().all(1)).nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"features: {len(bad)} of {len(features)} samples are not finite, the first at {int(bad[0])}"
            )
        if len(features):
            mean = features.mean(0)
            centred = features - mean
            self._merge(len(features), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> None:
        """Take in the samples that `other` has seen."""
        if other.count:
            self._merge(other.count, other.mean, other._known(other._scatter))

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self._mean is None or self._scatter is None:
            self.count, self._mean, self._scatter = count, mean, scatter
            return
        total = self.count + count
        step = mean - self._mean
        self._mean = self._mean + step * (count / total)
        self._scatter = self._scatter + scatter + torch.outer(step, step) * (self.count * count / total)
        self.count = total

    def _known(self, value: Tensor | None) -> Tensor:
        if value is None:
            raise ValueError("features: expected at least 1 sample, got none")
        return value

    def save(self, path: str | Path) -> None:
        """.npz of mu, sigma and count; mu and sigma are what other projects' reference files hold."""
        np.savez(path, mu=self.mean.numpy(), sigma=self.covariance.numpy(), count=self.count)

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Read .npz of mu [D], sigma [D, D] and, if known, count. ValueError for anything else."""
        try:
            with np.load(path, allow_pickle=False) as data:
                mu, sigma = (torch.from_numpy(data[name]).double() for name in ("mu", "sigma"))
                # Of unknown size: taken to be enough.
                count = int(data["count"]) if "count" in data.files else 10 * len(mu)
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: expected .npz of mu and sigma ({error})") from error
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or count < 2:
            raise ValueError(f"{path}: mu {list(mu.shape)}, sigma {list(sigma.shape)}, count {count} do not fit")
        statistics = cls()
        statistics.count, statistics._mean, statistics._scatter = count, mu, sigma * (count - 1)
        return statistics


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) (Dowson & Landau 1982; Heusel et al. 2017).

    The last trace is the nuclear norm of Σ_a^½ Σ_b^½: no square root of a product that is not symmetric, and none of
    rounding errors where the covariances are singular. Warns about sets with fewer samples than dimensions, whose
    covariances are singular and whose distance is biased upwards.
    """
    size = len(a.mean)
    if len(b.mean) != size:
        raise ValueError(f"b: expected features of the same {size} dimensions, got {len(b.mean)}")
    for name, statistics in (("a", a), ("b", b)):
        if statistics.count <= size:
            warnings.warn(
                f"{name}: {statistics.count} samples for {size} feature dimensions make a singular covariance and a "
                f"distance that is too large; expected more than {size}, better 10 times as many",
                stacklevel=2,
            )
    cross = torch.linalg.svdvals(_square_root(a.covariance) @ _square_root(b.covariance)).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(distance.item(), 0.0)


def _square_root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    # The square root of a rounding error would be 10⁸ times as large as itself.
    known = values > len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    return vectors * torch.where(known, values, 0).sqrt() @ vectors.T


def measure(
    features: Features, images: Iterable[Tensor], statistics: FeatureStatistics | None = None
) -> FeatureStatistics:
    """Statistics of the features of uint8 image batches [B, H, W, 1 or 3]; one channel is repeated."""
    statistics = statistics or FeatureStatistics()
    for batch in images:
        if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[3] not in (1, 3):
            raise ValueError(f"images: expected uint8 [B, H, W, 1 or 3], got {batch.dtype} {list(batch.shape)}")
        with torch.no_grad():
            statistics.update(features(batch.expand(-1, -1, -1, 3)))
    return statistics


def load_features(source: str, device: torch.device | str = "cpu") -> Features:
    """Features by name.

    source: "module:function", called without arguments for a `Features`; or a file of Inception weights: TorchScript
        that takes uint8 [B, 3, H, W] and `return_features=True` (the published StyleGAN detector, the standard FID), or
        a state dict of torchvision's inception_v3 (2048 pooled features of 299² images; its FIDs compare among
        themselves only).

    Raises:
        ValueError: neither, or what it names cannot be loaded.
    """
    if Path(source).is_file():
        return _inception(source, device)
    module, separator, name = source.partition(":")
    if not separator:
        raise ValueError(f"features: expected module:function or a file of Inception weights, got {source!r}")
    try:
        return getattr(import_module(module), name)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"features: {source} cannot be imported: {error}") from error


def _inception(path: str, device: torch.device | str) -> Features:
    try:
        script: Any = torch.jit.load(path, map_location=device)
    except RuntimeError:
        return _torchvision_inception(path, device)
    script.eval()
    return lambda images: script(images.to(device).permute(0, 3, 1, 2), return_features=True)


def _torchvision_inception(path: str, device: torch.device | str) -> Features:
    try:
        from torchvision.models import inception_v3
    except ImportError as error:
        raise ValueError(
            f"features: {path} is not TorchScript; as weights of inception_v3 it needs torchvision: "
            "pip install torchvision"
        ) from error
    network: Any = inception_v3(weights=None, aux_logits=True, init_weights=False)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.fc = torch.nn.Identity()
    network.to(device).eval()

    def features(images: Tensor) -> Tensor:
        x = images.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        x = torch.nn.functional.interpolate(x, size=(299, 299), mode="bilinear", antialias=True)
        mean, std = (
            torch.tensor(v, device=device)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        return network(((x + 1) / 2 - mean) / std)

    return features
