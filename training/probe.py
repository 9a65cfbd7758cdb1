"""What a device reaches on a configuration: short rollouts and iterations, timed. plan.py predicts from it."""

from __future__ import annotations

import tempfile
from statistics import median

import torch

from mtedit_fast.training.config import TrainConfig
from mtedit_fast.training.data import EditChains
from mtedit_fast.training.plan import Rates, count
from mtedit_fast.training.run import load_editor
from mtedit_fast.training.trainer import Trainer


def probe(config: TrainConfig, *, repetitions: int = 2) -> Rates:
    """The rates of this device on `config`, from `repetitions` rounds of a `Probe` after a first."""
    measured = Probe(config)
    for _ in range(repetitions + 1):
        measured.round()
    return measured.rates()


class Probe:
    """Rounds of an iteration of two groups of `config`, on a GPU also of a rollout of one, rewards included.

    There, rewards are scored beside the sampling: what a rollout of two takes longer than two is what that costs.
    Loads the model and the rewards as training does, and writes nothing that stays. A round at a time, so that a bench
    can take turns with it.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._cuda = torch.cuda.is_available()
        self._folder = tempfile.TemporaryDirectory()
        self._config = two = _two_groups(config, self._folder.name)
        chains = EditChains(two.data.path, turns=two.rollout.turns, resolution=two.data.size, seed=two.run.seed)
        self._trainer = Trainer(load_editor(two, "cuda" if self._cuda else "cpu"), chains, two)
        self._record = chains[chains.draw(0, 1)[0]]
        self._alone: list[dict[str, float]] = []
        self._pairs: list[dict[str, float]] = []

    def round(self) -> None:
        if self._cuda:
            self._trainer.sample([self._record], iteration=0)
            self._alone.append(self._trainer.timer.seconds())
        metrics = self._trainer.step()
        self._pairs.append(
            {name.removeprefix("seconds/"): value for name, value in metrics.items() if name.startswith("seconds/")}
        )

    def rates(self) -> Rates:
        """From the medians of all rounds but the first, which warms up.

        Raises:
            ValueError: fewer than two rounds.
        """
        if len(self._pairs) < 2:
            raise ValueError(f"rounds: expected at least 2, the first to warm up; got {len(self._pairs)}")
        work, pair = count(self._config), _medians(self._pairs[1:])
        group = _medians(self._alone[1:]) if self._cuda else {part: seconds / 2 for part, seconds in pair.items()}
        images = self._config.rollout.group_size * self._config.rollout.turns
        return Rates(
            **{part: flops / 2 / group[part] for part, flops in work.rollout.items()},
            update=work.phases["update"] / pair["update"],
            reward=group["reward"] / images,
            beside=max(0.0, pair["rollout"] - 2 * group["rollout"]) / images if self._cuda else None,
            source=f"{torch.cuda.get_device_name() if self._cuda else 'this CPU'}, measured on two groups",
        )


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Of every phase."""
    return {phase: median(each[phase] for each in rounds) for phase in rounds[0]}


def _two_groups(config: TrainConfig, folder: str) -> TrainConfig:
    """Of which every trajectory is learned from."""
    return config.model_copy(
        update={
            "rollout": config.rollout.model_copy(update={"groups_per_iteration": 2}),
            "advantage": config.advantage.model_copy(update={"filter": "none"}),
            "run": config.run.model_copy(update={"output_dir": folder}),
        }
    )
