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
    """Rounds of a rollout of one group of `config`, rewards included, and an iteration of two.

    On a GPU what a rollout of two takes longer is what scoring costs sampling. Loads the model and the rewards as
    training does, and writes nothing that stays. A round at a time, so that a bench can take turns with it.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._config = two = _two_groups(config, self._folder.name)
        chains = EditChains(two.data.path, turns=two.rollout.turns, resolution=two.data.size, seed=two.run.seed)
        self._trainer = Trainer(load_editor(two, "cuda" if torch.cuda.is_available() else "cpu"), chains, two)
        self._record = chains[chains.draw(0, 1)[0]]
        self._alone: list[dict[str, float]] = []
        self._steps: list[dict[str, float]] = []

    def round(self) -> None:
        self._trainer.sample([self._record], iteration=0)
        self._alone.append(self._trainer.timer.seconds())
        self._steps.append(self._trainer.step())

    def rates(self) -> Rates:
        """From the medians of all rounds but the first, which warms up.

        Raises:
            ValueError: fewer than two rounds.
        """
        if len(self._steps) < 2:
            raise ValueError(f"rounds: expected at least 2, the first to warm up; got {len(self._steps)}")
        work = count(self._config)
        group = {part: median(each[part] for each in self._alone[1:]) for part in ("rollout", "reward", *work.rollout)}
        both = {phase: median(step[f"seconds/{phase}"] for step in self._steps[1:]) for phase in ("rollout", "update")}
        images = self._config.rollout.group_size * self._config.rollout.turns
        cuda = torch.cuda.is_available()
        return Rates(
            **{part: flops / 2 / group[part] for part, flops in work.rollout.items()},
            update=work.phases["update"] / both["update"],
            reward=group["reward"] / images,
            beside=max(0.0, both["rollout"] - 2 * group["rollout"]) / images if cuda else None,
            source=f"{torch.cuda.get_device_name() if cuda else 'this CPU'}, measured on two groups",
        )


def _two_groups(config: TrainConfig, folder: str) -> TrainConfig:
    """Of which every trajectory is learned from."""
    return config.model_copy(
        update={
            "rollout": config.rollout.model_copy(update={"groups_per_iteration": 2}),
            "advantage": config.advantage.model_copy(update={"filter": "none"}),
            "run": config.run.model_copy(update={"output_dir": folder}),
        }
    )
