"""Every switch of the advantages, alone and combined, against slow loops over plain floats."""

import itertools
import math
import statistics

import pytest
import torch

from mtedit_fast.training.advantages import (
    AGGREGATORS,
    FUSIONS,
    TRANSFORMS,
    AdvantageConfig,
    advantages,
)

NAN = float("nan")
TURN_CREDITS = ["broadcast", "per_turn", "reward_to_go"]


def defined(values):
    return [v for v in values if not math.isnan(v)]


def slow_aggregate(values, how, gamma):
    """values: one trajectory's K floats."""
    kept = [(k, v) for k, v in enumerate(values) if not math.isnan(v)]
    if how == "last":
        return values[-1]
    if not kept:
        return NAN
    if how == "mean":
        return sum(v for _, v in kept) / len(kept)
    if how == "min":
        return min(v for _, v in kept)
    if how == "product":
        return math.prod(v for _, v in kept)
    if how == "geomean":
        return math.exp(sum(math.log(v) for _, v in kept) / len(kept)) if all(v > 0 for _, v in kept) else 0.0
    if how == "discounted":
        return sum(gamma**k * v for k, v in kept) / sum(gamma**k for k, _ in kept)
    prefixes = [math.prod(v for _, v in kept[: n + 1]) for n in range(len(kept))]
    return sum(prefixes) / len(prefixes)


def slow_zscore(u, groups, std, unbiased, eps, min_std):
    """u: B floats."""
    out = []
    for i, value in enumerate(u):
        members = defined(u[j] for j in range(len(u)) if groups[j] == groups[i])
        if math.isnan(value):
            out.append(0.0)
            continue

        def deviation(x):
            m = math.fsum(x) / len(x)
            return math.sqrt(math.fsum((v - m) ** 2 for v in x) / max(len(x) - int(unbiased), 1))

        own = deviation(members)
        scale = own if std == "group" else deviation(defined(u))
        if own < min_std or max(members) == min(members):
            out.append(0.0)
        else:
            out.append((value - math.fsum(members) / len(members)) / (scale + eps))
    return out


def slow_transform(rewards, groups, how):
    """rewards: {name: [B][M] floats}."""
    if how == "none":
        return rewards
    if how == "log_tame":
        h = {}
        for name, rows in rewards.items():
            flat = defined(v for row in rows for v in row)
            h[name] = statistics.pstdev(flat) / (statistics.fmean(flat) + 1e-6)
        limit = statistics.fmean(h.values())
        return {
            name: [[math.log(1 + v) if h[name] > limit else v for v in row] for row in rows]
            for name, rows in rewards.items()
        }
    out = {}
    for name, rows in rewards.items():
        out[name] = [[NAN] * len(row) for row in rows]
        for i, j in itertools.product(range(len(rows)), range(len(rows[0]))):
            others = [rows[m][j] for m in range(len(rows)) if m != i and groups[m] == groups[i]]
            others = defined(others)
            if math.isnan(rows[i][j]):
                continue
            points = [1.0 if rows[i][j] > o else 0.5 if rows[i][j] == o else 0.0 for o in others]
            out[name][i][j] = sum(points) / len(points) if points else 0.5
    return out


def slow_fusion(u, weights, groups, how, z, unbiased, eps):
    """u: {name: B floats} of one column -> B floats."""
    batch = range(len(groups))
    standard = {name: z(column) for name, column in u.items()}
    summed = [sum(weights[name] * standard[name][i] for name in u) for i in batch]
    empty = {
        name: [all(math.isnan(column[j]) for j in batch if groups[j] == groups[i]) for i in batch]
        for name, column in u.items()
    }
    if how == "reward":
        total = []
        for i in batch:
            parts = [weights[name] * u[name][i] for name in u if not empty[name][i]]
            total.append(sum(parts) if parts else NAN)
        return z(total)
    if how == "advantage":
        return summed
    if how == "gdpo":
        members = [i for i in batch if any(not math.isnan(column[i]) for column in u.values())]
        m = math.fsum(summed[i] for i in members) / len(members)
        variance = math.fsum((summed[i] - m) ** 2 for i in members) / (len(members) - int(unbiased))
        return [(summed[i] - m) / (math.sqrt(variance) + eps) if i in members else 0.0 for i in batch]
    if how == "firm":
        execution, consistency = u
        return z([u[execution][i] * (1.0 if empty[consistency][i] else 0.6 + 0.4 * u[consistency][i]) for i in batch])
    out = list(summed)
    for i, j in itertools.product(batch, batch):
        if groups[i] == groups[j]:
            pairs = [(weights[name] * standard[name][j], weights[name] * standard[name][i]) for name in u]
            if all(a >= b for a, b in pairs) and any(a > b for a, b in pairs):
                out[i] = 0.0
    return out


def slow_advantages(rewards, groups, config, weights):
    """[B][K] lists of floats for the credits over turns, [B][K * S] for dense_ode (rewards [B][K][S + 1])."""
    z_options = (config.std, config.unbiased, config.eps, config.min_std)
    if config.credit == "dense_ode":
        turns, states = len(rewards[next(iter(rewards))][0]), len(rewards[next(iter(rewards))][0][0])
        flat = {name: [[v for turn in row for v in turn] for row in rows] for name, rows in rewards.items()}
        flat = slow_transform(flat, groups, config.transform)
        columns = {
            name: [
                [row[k * states + s + 1] - row[k * states + s] for k in range(turns) for s in range(states - 1)]
                for row in rows
            ]
            for name, rows in flat.items()
        }
    else:
        columns = {}
        for name, rows in slow_transform(rewards, groups, config.transform).items():
            start = {"broadcast": lambda k: 0, "reward_to_go": lambda k: k}.get(config.credit)
            columns[name] = [
                [slow_aggregate(row[start(k) :], config.aggregator, config.gamma) for k in range(len(row))]
                if start
                else list(row)
                for row in rows
            ]
    result = []
    for column in range(len(columns[next(iter(columns))][0])):
        u = {name: [row[column] for row in rows] for name, rows in columns.items()}
        result.append(
            slow_fusion(
                u,
                weights,
                groups,
                config.fusion,
                lambda x: slow_zscore(x, groups, *z_options),
                config.unbiased,
                config.eps,
            )
        )
    return [list(row) for row in zip(*result, strict=True)]


def poisoned(shape, groups, seed):
    """Rewards in quarters (so that ties occur), one member undefined in places, one column undefined for a group."""
    generator = torch.Generator().manual_seed(seed)
    rewards = {}
    for name in "fc":
        value = (torch.randint(1, 5, shape, generator=generator) / 4).double()
        value[0, 1] = NAN
        value[torch.rand(shape, generator=generator) < 0.08] = NAN
        rewards[name] = value
    rewards["c"][groups == groups[0], 0] = NAN
    rewards["f"][groups == groups[-1]] = 0.75  # a constant group
    return rewards


def compare(config, shape, seed):
    groups = torch.tensor([3, 3, -1, -1, -1, 3, 8, 8, 8, 8])
    rewards, weights = poisoned((len(groups), *shape), groups, seed), {"f": 1.0, "c": 0.3}
    result = advantages(rewards, groups, config, weights=weights).advantages
    expected = slow_advantages({k: v.tolist() for k, v in rewards.items()}, groups.tolist(), config, weights)
    expected = torch.tensor(expected, dtype=torch.float64).reshape(len(groups), shape[0], -1)
    torch.testing.assert_close(result.double().reshape(expected.shape), expected, rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize(("fusion", "credit"), itertools.product(FUSIONS, TURN_CREDITS))
def test_every_combination_equals_the_slow_loops(fusion, credit):
    switches = itertools.cycle(itertools.product(["group", "global"], [False, True], [1e-4, 1e-2], [0.0, 0.2]))
    for seed, (transform, aggregator) in enumerate(itertools.product(TRANSFORMS, AGGREGATORS)):
        std, unbiased, eps, min_std = next(switches)
        config = AdvantageConfig(
            transform=transform,
            aggregator=aggregator,
            gamma=0.7,
            fusion=fusion,
            credit=credit,
            std=std,
            unbiased=unbiased,
            eps=eps,
            min_std=min_std,
        )
        compare(config, (3,), seed)


@pytest.mark.parametrize(
    ("fusion", "transform", "std", "unbiased"),
    itertools.product(sorted(set(FUSIONS) - {"firm"}), TRANSFORMS, ["group", "global"], [False, True]),
)
def test_dense_ode_equals_the_slow_loops(fusion, transform, std, unbiased):
    config = AdvantageConfig(credit="dense_ode", fusion=fusion, transform=transform, std=std, unbiased=unbiased)
    compare(config, (2, 4), seed=1)
