"""What scores of chains come to, against published numbers, brute force and scipy."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from mtedit_fast.edival.statistics import ChainScores, image_success, overall, summarize


def test_overall_golden_numbers():
    assert overall(0.4159, 0.8586) == pytest.approx(0.5976, abs=5e-5)
    # published per turn, in per cent: FLUX.1-Kontext-dev, and Qwen-Image-Edit's third
    for following, consistency, expected in (
        (59.97, 95.32, 75.61),
        (32.69, 92.24, 54.91),
        (16.61, 90.22, 38.71),
        (22.55, 77.98, 41.93),
    ):
        assert 100 * overall(following / 100, consistency / 100) == pytest.approx(expected, abs=0.01)
    assert overall(0.5, -0.1) == 0
    assert math.isnan(overall(math.nan, 0.5))


def test_image_success_is_the_product():
    values = np.array([[a, b, c] for a in (0, 1, math.nan) for b in (0, 1, math.nan) for c in (0, 1, math.nan)])

    def product(prefix):
        if 0 in prefix:
            return 0.0  # a known failure decides, whatever is unknown
        return math.nan if any(math.isnan(v) for v in prefix) else 1.0

    expected = [[product(list(line[: t + 1])) for t in range(3)] for line in values]
    np.testing.assert_array_equal(image_success(values), expected)


def scored(index, verdicts, consistency, types=None):
    k = len(verdicts)
    types = types or ["subject_add"] * k
    return ChainScores(
        index, types, ["do"] * k, verdicts, ["so"] * k, consistency, consistency, consistency, [None] * k
    )


def test_summary_against_brute_force():
    generator = np.random.default_rng(0)
    chains = []
    kinds = np.array(["subject_add", "color_alter", "background_change"])
    for i in range(60):
        k = int(generator.integers(1, 4))
        verdicts = generator.choice([True, False, None], size=k, p=[0.6, 0.3, 0.1]).tolist()
        consistency = [None if v < 0.2 else v for v in generator.random(k).tolist()]
        chains.append(scored(str(i), verdicts, consistency, generator.choice(kinds, k).tolist()))
    summary = summarize(chains)
    assert (summary["chains"], summary["turns"]) == (60, 3)
    for t, line in enumerate(summary["per_turn"]):
        long = [c for c in chains if len(c.types) > t]
        image = []
        for chain in long:
            prefix = chain.verdicts[: t + 1]
            if False in prefix:
                image.append(0.0)
            elif None not in prefix:
                image.append(1.0)
        marginal = [c.verdicts[t] for c in long if c.verdicts[t] is not None]
        cc = [c.consistency[t] for c in long if c.consistency[t] is not None]
        for key, values in (("instruction_following", image), ("marginal", marginal), ("consistency", cc)):
            assert line[key]["mean"] == pytest.approx(np.mean(values), rel=1e-12)
            assert line[key]["n"] == len(values)
            assert line[key]["low"] <= line[key]["mean"] <= line[key]["high"]
        interval = stats.binomtest(int(sum(image)), len(image)).proportion_ci(method="wilson")
        assert (line["instruction_following"]["low"], line["instruction_following"]["high"]) == pytest.approx(interval)
        assert line["overall"]["mean"] == pytest.approx(math.sqrt(np.mean(image) * np.mean(cc)), rel=1e-12)
        assert line["quality"] is None
    for kind in kinds:
        values = [v for c in chains for k, v in zip(c.types, c.verdicts, strict=True) if k == kind and v is not None]
        assert summary["per_type"][kind]["mean"] == pytest.approx(np.mean(values))
    after, without = 0, 0
    for chain in chains:
        for t, value in enumerate(chain.consistency):
            if value is None:
                changed = "background_change" in chain.types[: t + 1]
                after, without = after + changed, without + (not changed)
    assert summary["undefined"] == {
        "verdicts": sum(c.verdicts.count(None) for c in chains),
        "consistency_after_background_change": after,
        "consistency_without_parts": without,
    }
    assert summarize(chains) == summary
    json.dumps(summary, allow_nan=False)


def test_bootstrap_intervals_against_scipy():
    generator = np.random.default_rng(1)
    verdicts, consistency = generator.random(200) < 0.4, generator.beta(5, 2, 200)
    chains = [scored(str(i), [bool(v)], [float(c)]) for i, (v, c) in enumerate(zip(verdicts, consistency, strict=True))]
    line = summarize(chains, resamples=8000)["per_turn"][0]
    for key, data, statistic in (
        ("consistency", (consistency,), lambda c: c.mean()),
        ("overall", (verdicts.astype(float), consistency), lambda v, c: np.sqrt(v.mean() * c.mean())),
    ):
        theirs = stats.bootstrap(
            data, statistic, paired=True, n_resamples=8000, method="percentile", vectorized=False, rng=generator
        ).confidence_interval
        tolerance = 0.1 * (theirs.high - theirs.low)  # both are Monte Carlo
        assert line[key]["low"] == pytest.approx(theirs.low, abs=tolerance)
        assert line[key]["high"] == pytest.approx(theirs.high, abs=tolerance)


def test_nothing_to_summarize():
    assert summarize([])["per_turn"] == []
    line = summarize([scored("a", [None], [None])])["per_turn"][0]
    assert {line[key] for key in line if key != "turn"} == {None}
