"""How well scores agree with true ones: correlations and errors, with bootstrap intervals over original images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

METRICS = ("pearson", "spearman", "kendall", "l1", "rmse")
BLOCK = 1024  # columns of the pair matrices held at once
Figure = dict[str, float | int | None]


def agreement(
    scores: Any, truth: Any, groups: Sequence[object], *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Figure]:
    """{metric: {mean, low, high, n}} of Pearson's r, Spearman's ρ, Kendall's τ-b, mean absolute error and RMSE.

    Intervals are percentile bootstraps that resample groups (an image and all edits of it), whose members are not
    independent. A correlation with a constant is None.

    Args:
        scores, truth: [N]; items where either is NaN are left out.
        groups: N hashable names.

    Raises:
        ValueError: lengths that differ.
    """
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or len(groups) != len(x):
        raise ValueError(
            f"scores, truth, groups: expected the same [N], got {list(x.shape)}, {list(y.shape)}, [{len(groups)}]"
        )
    known = ~(np.isnan(x) | np.isnan(y))
    x, y = x[known], y[known]
    if not len(x):
        return {name: {"mean": None, "low": None, "high": None, "n": 0} for name in METRICS}
    names: dict[object, int] = {}
    group = np.array([names.setdefault(name, len(names)) for name, k in zip(groups, known, strict=True) if k])
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    # The first row is the sample itself. A group drawn m times counts m times.
    weights = np.concatenate((np.ones((1, len(x))), draws[:, group]))
    edges = [(1 - confidence) / 2, (1 + confidence) / 2]
    return {name: _figure(values, edges, len(x)) for name, values in weighted_agreement(x, y, weights).items()}


def weighted_agreement(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """{metric: [R]} of items x, y [N] that count weights [R, N] times each, whole numbers: as of samples in which they
    are repeated. NaN where a correlation is undefined."""
    total = weights.sum(1)
    ranks_x, ranks_y = np.empty_like(weights), np.empty_like(weights)
    concordant, untied_x, untied_y = (np.zeros(len(weights)) for _ in range(3))
    single = weights.astype(np.float32)  # exact: sums of small whole numbers
    for start in range(0, len(x), BLOCK):
        block = slice(start, start + BLOCK)
        above_x = np.sign(x[None, block] - x[:, None]).astype(np.float32)  # [N, block]: is the column's above the row's
        above_y = np.sign(y[None, block] - y[:, None]).astype(np.float32)
        own = weights[:, block]
        # With b below, t tied (itself included) and a above of W = b + t + a: the mid-rank is b + (t + 1)/2
        # = (W + 1 + b − a)/2.
        ranks_x[:, block] = (total[:, None] + 1 + single @ above_x) / 2
        ranks_y[:, block] = (total[:, None] + 1 + single @ above_y) / 2
        concordant += ((single @ (above_x * above_y)) * own).sum(1)
        untied_x += ((single @ np.abs(above_x)) * own).sum(1)
        untied_y += ((single @ np.abs(above_y)) * own).sum(1)
    error = np.abs(x - y)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "pearson": _pearson(np.broadcast_to(x, weights.shape), np.broadcast_to(y, weights.shape), weights),
            "spearman": _pearson(ranks_x, ranks_y, weights),
            "kendall": concordant / np.sqrt(untied_x * untied_y),
            "l1": weights @ error / total,
            "rmse": np.sqrt(weights @ error**2 / total),
        }


def _pearson(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[R] of x, y [R, N]; NaN where either is constant."""
    total = weights.sum(1, keepdims=True)
    x = x - (weights * x).sum(1, keepdims=True) / total
    y = y - (weights * y).sum(1, keepdims=True) / total
    variance_x, variance_y = (weights * x * x).sum(1), (weights * y * y).sum(1)
    scale = np.finfo(np.float64).eps * total[:, 0] * 16
    constant = (variance_x <= scale * np.square(x).max(1)) | (variance_y <= scale * np.square(y).max(1))
    return np.where(constant, np.nan, (weights * x * y).sum(1) / np.sqrt(variance_x * variance_y))


def _figure(values: np.ndarray, edges: list[float], n: int) -> Figure:
    mean, resampled = values[0], values[1:][~np.isnan(values[1:])]
    if np.isnan(mean):
        return {"mean": None, "low": None, "high": None, "n": n}
    low, high = np.quantile(resampled, edges) if len(resampled) else (mean, mean)
    return {"mean": float(mean), "low": float(low), "high": float(high), "n": n}
