"""Rewards: any function of a `RewardBatch` that returns [B, K], named by its import path."""

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtedit_fast.cuda_graphs import undisturbed
from mtedit_fast.editors import Editor
from mtedit_fast.rewards import RewardBatch
from mtedit_fast.training.config import RewardConfig
from mtedit_fast.trajectories import Trajectories

Reward = Callable[..., Any]


def load_reward(path: str) -> Reward:
    """Import `package.module:function`, also from the working directory. ValueError says what is wrong."""
    name, separator, attribute = path.partition(":")
    if not separator or not name or not attribute:
        raise ValueError(f"reward path {path!r}: expected package.module:function")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"reward path {path!r}: cannot import {name}: {error}") from error
    function = getattr(module, attribute, None)
    if function is None:
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"reward path {path!r}: {name} has no {attribute!r}{hint}")
    if not callable(function):
        raise ValueError(f"reward path {path!r}: expected a function, got {type(function).__name__}")
    return function


def check_rewards(rewards: Sequence[RewardConfig]) -> None:
    """Import every reward and compare its options with what it takes: before hours of loading and sampling, not after.

    ValueError names the reward, and what cannot be imported or which option it has not.
    """
    for reward in rewards:
        function = load_reward(reward.path)
        try:
            signature = inspect.signature(function)
        except ValueError:  # a function in C that does not say
            continue
        try:
            signature.bind(None, **reward.options)
        except TypeError as error:
            raise ValueError(
                f"reward {reward.name!r} ({reward.path}): options: {error}; it takes {signature}"
            ) from None


class RewardStream:
    """Scores trajectories of a GPU in a thread of its own while the next ones are being sampled.

    Those of a CPU are scored in `result`: a second thread's products there wake a second team of OpenMP's threads, and
    both teams together take longer than one after the other.

    Use it as a context; `submit` batches in order, then `result()`. An exception of a reward is raised there.
    """

    def __init__(self, rewards: Sequence[RewardConfig]) -> None:
        self._rewards = list(rewards)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rewards")
        self._parts: list[Callable[[], dict[str, Tensor]]] = []

    def __enter__(self) -> "RewardStream":
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.shutdown(cancel_futures=True)

    def submit(self, batch: RewardBatch) -> None:
        if not batch.edits.is_cuda:
            self._parts.append(partial(score, self._rewards, batch))
            return
        ready = torch.cuda.Event()
        ready.record()
        self._parts.append(self._worker.submit(self._score, batch, ready).result)

    def _score(self, batch: RewardBatch, ready: torch.cuda.Event) -> dict[str, Tensor]:
        """On a stream of their own, behind what has decoded these images."""
        stream = _stream(batch.edits.device)
        with undisturbed, torch.cuda.stream(stream):  # a reward is any code
            ready.wait(stream)
            values = score(self._rewards, batch)
        stream.synchronize()
        return values

    def result(self) -> dict[str, Tensor]:
        """{name: fp32 [B, K]} of everything submitted, in order."""
        parts = [part() for part in self._parts]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for the whole run: the allocator keeps memory per stream, and a new one would take its own."""
    return torch.cuda.Stream(device)


@torch.no_grad()
def score(rewards: Sequence[RewardConfig], batch: RewardBatch) -> dict[str, Tensor]:
    """Call every reward -> {name: fp32 [B, K] on the edits' device}.

    A reward returns a tensor, an array or nested lists of numbers, NaN (or None in a list) where it is undefined;
    ValueError or TypeError names one that returns something else.
    """
    shape = batch.edits.shape[:2]
    scores: dict[str, Tensor] = {}
    for reward in rewards:
        value = load_reward(reward.path)(batch, **reward.options)
        if not isinstance(value, Tensor):
            try:
                value = torch.from_numpy(np.array(value, dtype=np.float64))
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"reward {reward.name!r} ({reward.path}): expected numbers [B, K], got {error}"
                ) from error
        if value.is_complex():
            raise TypeError(f"reward {reward.name!r} ({reward.path}): expected real numbers, got {value.dtype}")
        if value.shape != shape:
            raise ValueError(
                f"reward {reward.name!r} ({reward.path}): expected [B, K] = {list(shape)}, got {list(value.shape)}"
            )
        scores[reward.name] = value.to(batch.edits.device, torch.float32)
    return scores


@torch.no_grad()
def step_rewards(
    editor: Editor, trajectories: Trajectories, batch: RewardBatch, rewards: Sequence[RewardConfig]
) -> dict[str, Tensor]:
    """Every reward at every stored state s of every turn, {name: fp32 [B, K, S+1]}.

    The image at state s is decoded from the clean estimate x − σv there, and judged in its turn's place among the
    finished images of the others: K·(S+1) calls of each reward.

    Raises:
        ValueError: the rollout kept no estimates.
    """
    estimates = trajectories.estimates
    if estimates is None:
        raise ValueError("trajectories.estimates: expected the clean estimates; set RolloutConfig.keep_estimates")
    height, width = trajectories.height, trajectories.width
    values = {reward.name: torch.empty(estimates.shape[:3], device=batch.edits.device) for reward in rewards}
    for turn in range(estimates.shape[1]):
        for state in range(estimates.shape[2]):
            edits = batch.edits.clone()
            for rows in trajectories.micro_batches():
                decoded = editor.decode(estimates[rows, turn, state], height, width)
                edits[rows, turn] = (decoded * 255).round() / 255
            for name, value in score(rewards, replace(batch, edits=edits)).items():
                values[name][:, turn, state] = value[:, turn]
    return values
