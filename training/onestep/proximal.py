"""Proximal FID: generated images are corrupted as the training images were, so that no clean image is needed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mtedit_fast.onestep import (
    Features,
    FeatureStatistics,
    ImageSource,
    Operator,
    frechet_distance,
    image_seeds,
    load_features,
    measure,
    to_uint8,
)
from mtedit_fast.training import distributed
from mtedit_fast.training.onestep.config import EvaluationConfig
from mtedit_fast.training.onestep.data import CorruptedImages, Part, part_seed


class ProximalFID:
    """The Fréchet distance between corrupted generated images and the training images as they are.

    Args:
        data: its statistics are taken once, over at most `settings.samples` images.
        features: None to load what `settings.features` names.
    """

    def __init__(self, data: CorruptedImages, settings: EvaluationConfig, features: Features | None = None) -> None:
        if features is None:
            if settings.features is None:
                raise ValueError("evaluation.features: expected what to measure the proximal FID with, got null")
            features = load_features(settings.features, data.device)
        self.features, self.settings, self.corruption, self.data = features, settings, data.corruption, data
        count = min(len(data), settings.samples)
        batches = (data[part] for part in torch.arange(count).split(settings.batch))
        self.reference = measure(features, (visible(y, operator) for y, operator in batches))

    def __call__(self, source: ImageSource) -> float:
        """Of images drawn with seeds that no training step uses; every process draws its share of them."""
        mine = distributed.share(self.settings.samples, *distributed.process())
        total = FeatureStatistics()
        for part in distributed.gather_objects(measure(self.features, self._corrupted(source, mine))):
            total.merge(part)
        return frechet_distance(total, self.reference)

    def _corrupted(self, source: ImageSource, indices: range) -> Iterator[Tensor]:
        for part in torch.arange(indices.start, indices.stop).split(self.settings.batch):
            seeds = image_seeds(part_seed(0, Part.EVALUATION), part).to(source.device)
            with torch.no_grad():
                yield visible(*self.corruption(source(seeds), seeds))


def visible(y: Tensor, operator: Operator) -> Tensor:
    """Measurements as uint8 pixels [B, H, W, 1 or 3]; k-space as what its adjoint makes of it."""
    return to_uint8(operator.adjoint(y) if y.ndim == 5 else y)
