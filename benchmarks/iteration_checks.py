"""What has to be equal before bench_iteration times anything: states, rewards, losses, gradients, log-probs."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from iteration_setup import Case, Setup
from peers.iteration_loop import Draws, Samples
from peers.replay_loop import replay_loop
from peers.rollout_loop import to_pil
from torch import Tensor

from mtedit_fast.attention import without_cudnn_attention
from mtedit_fast.ops import sde_step, seeded_noise
from mtedit_fast.rollout import Trajectories, replay, rollout, sample_seeds, turn_seeds
from mtedit_fast.training import nft
from mtedit_fast.training.update import Chunk

STATES = {"fp32": 1e-3, "bf16": 0.1}
"""Distance of the loop's states from ours that is allowed, relative to what the velocities have added to the noise."""
REWARDS = {"judge": {"fp32": 1e-3, "bf16": 0.1}, "consistency": {"fp32": 0.02, "bf16": 0.02}}
"""Distance of its rewards: bench_judge's and bench_consistency's, where PIL rounds to 8 bits between its passes."""
EPS = {"fp32": torch.finfo(torch.float32).eps, "bf16": torch.finfo(torch.bfloat16).eps}
"""Whose root is the relative distance that loss and gradient are allowed."""


class Checks(NamedTuple):
    """|Δ log-prob| of the replays, where there are any; the other distances as fractions of what is allowed."""

    drift: float | None
    loop_drift: float | None
    states: float
    rewards: float
    loss: float
    gradient: float


def checked(setup: Setup) -> Checks:
    """Both sides on the same noise, images and trajectories.

    Raises:
        RuntimeError: a result of the loop is not ours, the replay is not exact, or all rows are filtered.
    """
    case, trainer, loop = setup.case, setup.trainer, setup.loop
    if case.forward_rows is None:
        refuse(case, first_drift(setup))
    records = setup.records
    trajectories, rewards = trainer.sample(records, iteration=trainer.iteration)
    result = trainer.advantages(trajectories, rewards, records)
    if not result.keep.any():
        raise RuntimeError(f"{case}: filter {case.filter} leaves no trajectory: no row; try another")
    states, loop_drift = sampled_alike(setup, trajectories)
    samples = Samples.of(trajectories)
    theirs = loop.rewards(samples, records)
    reward = max(distance(rewards[name], theirs[name]) / REWARDS[name][case.dtype] for name in rewards)
    with gradient(trainer.optimizer) as own:
        metrics = trainer.update(trainer.learning_batch(trajectories, result)).metrics()
    setup.reset()
    keep = result.keep.to(case.device)
    advantages = result.advantages.to(case.device)
    loop.draws = draws_of(setup, trajectories)
    with gradient(loop.optimizer) as found:
        loop_loss = loop.update(samples, advantages, keep)
    loop.draws = None
    setup.reset()
    trainer.timer.seconds()
    loss = metrics["loss"] + setup.config.objective.kl_weight * metrics.get("kl", 0.0)
    allowed = math.sqrt(EPS[case.dtype])
    scale = max(abs(loss), advantages[keep].abs().mean().item())  # at ratio 1 a GRPO loss is 0 but for roundings
    checks = Checks(
        drift=metrics.get("log_prob/max_drift_first_update"),
        loop_drift=loop_drift,
        states=states / STATES[case.dtype],
        rewards=reward,
        loss=abs(loop_loss - loss) / scale / allowed,
        gradient=relative(found, own) / allowed,
    )
    for name in ("states", "rewards", "loss", "gradient"):
        if not getattr(checks, name) <= 1:
            raise RuntimeError(
                f"{case}: {name} of the loop are {getattr(checks, name):.3g} times as far from ours as "
                "is allowed: no row"
            )
    if case.forward_rows is None:
        refuse(case, checks.drift)
    return checks


def first_drift(setup: Setup) -> float:
    """|Δ log-prob| of one step of one micro-batch, replayed with gradient: seconds, where all else takes minutes."""
    trainer, record = setup.trainer, setup.records[0]
    editor, settings = trainer.sample.editor, trainer.sample.settings(trainer.iteration)
    one = replace(settings, group_size=settings.micro_batch)
    references, seeds = record.image[None].to(setup.case.device), sample_seeds(0, 0, one.group_size)
    with without_cudnn_attention():
        trajectories = rollout(editor, references, [record.instructions[:1]], one, seeds)
        found = replay(trainer.editor, trajectories, slice(0, one.group_size), 0, 0, return_mean=False).log_prob
    assert found is not None
    return finite((found.detach() - trajectories.log_probs[:, 0, 0]).abs().max().item())


def refuse(case: Case, drift: float | None) -> None:
    if drift != 0:
        raise RuntimeError(f"{case}: |Δ log-prob| of the replay is {drift}, expected 0: no row")


@torch.no_grad()
def sampled_alike(setup: Setup, trajectories: Trajectories) -> tuple[float, float | None]:
    """(distance of its final states from ours, drift of its own replay) of the loop's first batch in the first turn
    with the noise of ours."""
    loop, record = setup.loop, setup.records[0]
    rows = slice(0, min(setup.case.loop_batch, setup.case.group))
    keys = turn_seeds(trajectories.seeds[rows], 0)
    loop.rollout.noise = lambda rows, turn, draw, shape: seeded_noise(keys, tuple(shape[1:]), draw)
    pictures, instruction = [to_pil(record.image)] * (rows.stop - rows.start), record.instructions[0]
    loop.policy.set_adapter("old" if loop.sample_old else "default")
    drift, steps = None, trajectories.steps
    with loop.precision():
        turn = loop.rollout.turn(pictures, instruction, rows, 0)
        if len(steps):
            replayed = replay_loop(loop.rollout, pictures, instruction, turn)
            drift = (replayed - turn.log_probs[:, steps.start : steps.stop]).abs().max().item()
    loop.policy.set_adapter("default")
    loop.rollout.noise = None
    found, ours = turn.latents[:, -1].float(), trajectories.clean[rows, 0].float()
    still = seeded_noise(keys, tuple(ours.shape[1:]), 0)
    for step in range(setup.case.steps):
        still = sde_step(still, torch.zeros_like(still), trajectories.coefficients, step, seed=keys).prev_sample
    return finite(((found - ours).norm() / (ours - still).norm()).item()), drift


def draws_of(setup: Setup, trajectories: Trajectories) -> Draws:
    """The noise levels and noise that an update of ours takes."""
    config = setup.config.objective

    def draws(rows: Tensor, turn: int, index: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        chunk = Chunk(rows, turn, index)
        t = nft.times(trajectories, chunk, config.draws, spread=config.times, shared=False)
        seeds = turn_seeds(trajectories.seeds[rows], turn) + index * nft._SPREAD
        return t, seeded_noise(seeds, tuple(shape[1:]), nft._NOISE)

    return draws


@contextmanager
def gradient(optimizer: torch.optim.Optimizer) -> Iterator[list[Tensor]]:
    """Of the steps taken within."""
    found: list[Tensor] = []
    parameters = optimizer.param_groups[0]["params"]
    hook = optimizer.register_step_pre_hook(
        lambda *_: found.extend(p.grad.cpu() for p in parameters if p.grad is not None)
    )
    try:
        yield found
    finally:
        hook.remove()


def relative(found: list[Tensor], own: list[Tensor]) -> float:
    distances = torch.stack([(a - b).norm() for a, b in zip(found, own, strict=True)])
    return finite((distances.norm() / torch.stack([b.norm() for b in own]).norm()).item())


def distance(a: Tensor, b: Tensor) -> float:
    """The largest; infinite unless both are undefined at the same places."""
    if not torch.equal(a.isnan(), b.to(a.device).isnan()):
        return math.inf
    return (a - b.to(a.device)).abs().nan_to_num(0.0).max().item()


def finite(value: float) -> float:
    return math.inf if math.isnan(value) else value
