"""EdiVal's figures over many chains: image and marginal success, content consistency, quality, O, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np


class Estimate(NamedTuple):
    mean: float
    low: float
    high: float


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a binomial proportion; (0, 1) for n = 0.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes: expected between 0 and n = {n}, got {successes}")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_bootstrap(
    before: Any, after: Any, *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """Mean of after − before over N paired scenes [N], with its percentile bootstrap interval over scenes."""
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or len(first) == 0:
        raise ValueError(f"before, after: expected the same [N], got {list(first.shape)} and {list(second.shape)}")
    # Resampling scenes with replacement is a multinomial draw over the distinct differences.
    values, counts = np.unique(second - first, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(first), counts / len(first), size=resamples)
    low, high = np.quantile(draws @ values / len(first), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate((second - first).mean().item(), low.item(), high.item())


@dataclass(frozen=True)
class ChainScores:
    """What one chain of K turns scored; None where a value is undefined.

    `verdicts` are None where a model's answer was neither yes nor no; `consistency`, the mean of `object` and
    `background`, from the first background change on and where one of its parts is undefined.
    """

    image_index: str
    types: list[str]
    instructions: list[str]
    verdicts: list[bool | None]
    reasons: list[str]
    consistency: list[float | None]
    object: list[float | None]
    background: list[float | None]
    quality: list[float | None]


def overall(instruction_following: float, consistency: float) -> float:
    """EdiVal's O = √(IF · CC) of the turn's image success and mean consistency, both as shares; NaN if one is."""
    return math.sqrt(instruction_following * max(consistency, 0.0))


def image_success(verdicts: Any) -> np.ndarray:
    """Π_{s≤t} v_s of verdicts [N, K] in {0, 1, NaN}: 0 from the first failure on, NaN from an unknown on before it."""
    known = np.asarray(verdicts, dtype=np.float64)
    failed = np.logical_or.accumulate(known == 0, axis=1)
    unknown = np.logical_or.accumulate(np.isnan(known), axis=1)
    return np.where(failed, 0.0, np.where(unknown, np.nan, 1.0))


def summarize(chains: Sequence[ChainScores], *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """The figures of a report over N chains of at most K turns.

    `per_turn`: for each turn `instruction_following` (IF, image success), `marginal`, `consistency` (CC), `object`,
    `background`, `quality` (VQ) and `overall` (O), each {mean, low, high, n} over the n chains where it is defined, or
    None where it is nowhere. Shares of successes carry Wilson's 95 % interval, the others percentile bootstrap
    intervals over chains. `per_type`: marginal success of every type that occurs. `undefined`: how many verdicts and
    consistencies are undefined, the latter by cause.
    """
    turns = max((len(chain.types) for chain in chains), default=0)
    table = {name: _table(chains, name, turns) for name in _METRICS}
    image = image_success(table["verdicts"])
    # a chain that ended is no failure, and no success
    image = np.where(_ended(chains, turns), np.nan, image)
    draws = np.random.default_rng(seed).multinomial(max(len(chains), 1), _uniform(len(chains)), size=resamples)
    per_turn = []
    for turn in range(turns):
        following, consistency = image[:, turn], table["consistency"][:, turn]
        line = {
            "instruction_following": _share(following),
            "marginal": _share(table["verdicts"][:, turn]),
            **{name: _mean(table[name][:, turn], draws) for name in _METRICS if name != "verdicts"},
        }
        line["overall"] = _overall(following, consistency, draws)
        per_turn.append({"turn": turn + 1, **line})
    verdicts = [(kind, value) for c in chains for kind, value in zip(c.types, c.verdicts, strict=True)]
    kinds = sorted({kind for kind, _ in verdicts})
    return {
        "chains": len(chains),
        "turns": turns,
        "per_turn": per_turn,
        "per_type": {
            kind: _share(np.array([math.nan if v is None else v for k, v in verdicts if k == kind], dtype=np.float64))
            for kind in kinds
        },
        "undefined": _undefined(chains),
    }


_METRICS = ("verdicts", "consistency", "object", "background", "quality")
Figure = dict[str, float | int]


def _table(chains: Sequence[ChainScores], name: str, turns: int) -> np.ndarray:
    """[N, K] fp64, NaN where undefined or past a chain's end."""
    rows = np.full((len(chains), turns), np.nan)
    for row, chain in zip(rows, chains, strict=True):
        values = getattr(chain, name)
        row[: len(values)] = [math.nan if value is None else value for value in values]
    return rows


def _ended(chains: Sequence[ChainScores], turns: int) -> np.ndarray:
    lengths = np.array([len(chain.types) for chain in chains], dtype=np.int64)
    return np.arange(turns)[None] >= lengths[:, None]


def _uniform(n: int) -> np.ndarray:
    return np.full(max(n, 1), 1 / max(n, 1))


def _share(values: np.ndarray) -> Figure | None:
    known = values[~np.isnan(values)]
    if not len(known):
        return None
    low, high = wilson_interval(known.sum().item(), len(known))
    return {"mean": known.mean().item(), "low": low, "high": high, "n": len(known)}


def _mean(values: np.ndarray, draws: np.ndarray) -> Figure | None:
    known = ~np.isnan(values)
    return _figure(values[known].mean(), _resampled(values, draws), known.sum()) if known.any() else None


def _overall(following: np.ndarray, consistency: np.ndarray, draws: np.ndarray) -> Figure | None:
    known = ~np.isnan(following), ~np.isnan(consistency)
    if not (known[0].any() and known[1].any()):
        return None
    centre = overall(following[known[0]].mean(), consistency[known[1]].mean())
    resampled = np.sqrt(_resampled(following, draws) * _resampled(consistency, draws).clip(0))
    return _figure(centre, resampled, known[0].sum())


def _resampled(values: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Mean of the defined values [N] under each of R multinomial draws of chains [R, N]."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):  # a draw may hold undefined values alone
        return (draws @ np.where(known, values, 0)) / (draws @ known.astype(np.float64))


def _figure(mean: float, resampled: np.ndarray, n: int) -> Figure:
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    return {"mean": float(mean), "low": low.item(), "high": high.item(), "n": int(n)}


def _undefined(chains: Sequence[ChainScores]) -> dict[str, int]:
    counts = {"verdicts": 0, "consistency_after_background_change": 0, "consistency_without_parts": 0}
    for chain in chains:
        counts["verdicts"] += sum(verdict is None for verdict in chain.verdicts)
        changed = False
        for kind, value in zip(chain.types, chain.consistency, strict=True):
            changed |= kind == "background_change"
            if value is None:
                counts["consistency_after_background_change" if changed else "consistency_without_parts"] += 1
    return counts
