"""What an iteration of a configuration will take: its floating-point operations, counted on the meta device, over the
rate that a device reaches. A prediction, which probe.py anchors in a measurement where there is a device to measure on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from rich.table import Column, Table
from torch.utils.flop_counter import FlopCounterMode

from mtedit_fast.training.config import TrainConfig
from mtedit_fast.training.memory import MemoryEstimate, estimate
from mtedit_fast.training.meta_model import MetaModel, model_path
from mtedit_fast.training.public_models import describe

UTILISATION = 0.4
"""Share of the data sheet's rate that is assumed where nothing was measured."""


@dataclass(frozen=True)
class Gpu:
    """Dense rates of NVIDIA's data sheets in FLOP/s, and memory in bytes."""

    name: str
    bf16: float
    fp8: float | None
    memory: float


GPUS = {
    "a100": Gpu("A100 80 GB", 312e12, None, 80e9),
    "h100": Gpu("H100 SXM", 989e12, 1979e12, 80e9),
    "h200": Gpu("H200 SXM", 989e12, 1979e12, 141e9),
    "b200": Gpu("B200", 2250e12, 4500e12, 180e9),
}


def parse_gpus(text: str) -> tuple[int, Gpu]:
    """ "8xH100" -> 8 and what is known of an H100; a kind alone is one of it."""
    number, separator, kind = text.lower().rpartition("x")
    if kind not in GPUS or (separator and not (number.isdecimal() and int(number))):
        kinds = ", ".join(name.upper() for name in GPUS)
        raise ValueError(f"gpus: expected a number and one of {kinds}, e.g. 8xH100; got {text!r}")
    return int(number or 1), GPUS[kind]


EDITORS = {"kontext": "kontext", "qwen": "qwen_image_edit", "klein": "flux2_klein"}
GPU_COUNTS = (16, 8, 1)
"""That training/configs has configurations for, of each editor."""


def configuration_of(editor: str, gpus: int) -> str:
    """The name of what training/configs has for `editor` and at most `gpus` GPUs."""
    if editor not in EDITORS:
        raise ValueError(f"editor: expected one of {', '.join(EDITORS)}, or a configuration; got {editor!r}")
    return f"{EDITORS[editor]}_{next(count for count in GPU_COUNTS if count <= gpus)}gpu"


@dataclass(frozen=True)
class Work:
    """FLOPs of one iteration on the busiest GPU, a multiply-add counted as 2, by phase and part; rewards are not in it.

    forward: of one sample.
    """

    rollout: dict[str, float]
    """encode: texts and references; denoise; decode."""
    update: dict[str, float]
    forward: float

    @property
    def phases(self) -> dict[str, float]:
        return {"rollout": sum(self.rollout.values()), "update": sum(self.update.values())}


@dataclass(frozen=True)
class Rates:
    """What a device reaches.

    encode, denoise, decode, update: FLOP/s. reward: seconds that the rewards of an image take; beside: seconds by which
    scoring an image holds up the sampling that goes on meanwhile, None where scoring follows sampling, as on a CPU.
    source: where that comes from.
    """

    encode: float
    denoise: float
    decode: float
    update: float
    reward: float
    beside: float | None
    source: str


@dataclass(frozen=True)
class Plan:
    """Seconds of an iteration by phase, and what the run takes of `gpus` GPUs."""

    seconds: dict[str, float]
    work: Work
    memory: MemoryEstimate
    rates: Rates
    gpus: int
    iterations: int
    available: float | None
    """Bytes of a GPU."""

    @property
    def iteration(self) -> float:
        return sum(self.seconds.values())

    @property
    def gpu_hours(self) -> float:
        return self.iteration * self.iterations * self.gpus / 3600

    @property
    def fits(self) -> bool:
        return self.available is None or self.memory.total <= self.available

    def table(self) -> Table:
        table = Table("prediction", Column("", justify="right"), "", title=f"{self.gpus} × {self.rates.source}")
        for phase, seconds in self.seconds.items():
            flops = self.work.phases.get(phase)
            table.add_row(phase, f"{seconds:,.1f} s", "" if flops is None else f"{flops / 1e12:,.2f} TFLOP on a GPU")
        table.add_section()
        table.add_row("iteration", f"{self.iteration:,.1f} s", f"{self.iteration / 3600 * self.gpus:,.2f} GPU hours")
        table.add_row("run", f"{self.gpu_hours:,.1f} GPU hours", f"{self.iterations} iterations")
        room = (
            "" if self.available is None else f"of {self.available / 2**30:.1f}: {'fits' if self.fits else 'too much'}"
        )
        table.add_row("memory", f"{self.memory.total / 2**30:.1f} GiB", room)
        return table


def plan(config: TrainConfig, gpus: int, rates: Rates, *, kept: float = 1.0, gpu: Gpu | None = None) -> Plan:
    """Predict time and memory of `config` on `gpus` devices of those rates.

    On a GPU rewards are scored while sampling goes on, group by group: they hold it up, and what is waited for are the
    last group's, and what the others take longer than sampling.

    Args:
        kept: part of the trajectories that the filters leave to learn from.
        gpu: whose memory has to suffice.

    Raises:
        ValueError: gpus < 1, kept outside (0, 1], or a model whose sizes are not known.
    """
    if not 0 < kept <= 1:
        raise ValueError(f"kept: expected a share in (0, 1], got {kept}")
    memory, work = estimate(config, gpus), count(config, gpus, kept=kept)
    groups, images = _groups(config, gpus), config.rollout.group_size * config.rollout.turns
    sampling = sum(flops / getattr(rates, part) for part, flops in work.rollout.items())
    reward = rates.reward * images
    seconds = {"rollout": sampling, "reward": groups * reward, "update": work.phases["update"] / rates.update}
    if rates.beside is not None:
        beside = rates.beside * images
        seconds["rollout"] += (groups - 1) * beside
        seconds["reward"] = reward + (groups - 1) * max(0.0, reward - beside - sampling / groups)
    return Plan(seconds, work, memory, rates, gpus, config.run.iterations, None if gpu is None else gpu.memory)


def assumed_rates(
    config: TrainConfig, gpu: Gpu, *, utilisation: float = UTILISATION, reward_seconds: float = 0.0
) -> Rates:
    """`utilisation` of what the data sheet promises; sampling in fp8 at the rate of that.

    reward_seconds: of one image, on the same device, so that sampling is held up by as much.
    """
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation: expected a share in (0, 1], got {utilisation}")
    if reward_seconds < 0:
        raise ValueError(f"reward_seconds: expected ≥ 0, got {reward_seconds}")
    sampling = gpu.bf16
    if config.rollout.precision == "fp8":
        if gpu.fp8 is None:
            raise ValueError(f"rollout.precision: {gpu.name} has no fp8; expected another GPU or null, got 'fp8'")
        sampling = gpu.fp8
    return Rates(
        encode=gpu.bf16 * utilisation,
        denoise=sampling * utilisation,
        decode=gpu.bf16 * utilisation,
        update=gpu.bf16 * utilisation,
        reward=reward_seconds,
        beside=reward_seconds,
        source=f"{gpu.name}, {utilisation:.0%} of its data sheet's rate assumed"
        + ("" if reward_seconds else ", rewards left out"),
    )


def count(config: TrainConfig, gpus: int = 1, *, kept: float = 1.0) -> Work:
    """FLOPs of an iteration on the GPU with most groups: linear layers, convolutions and attention, backward included.

    Text encoders are counted as two FLOPs for every parameter and token.
    """
    if gpus < 1:
        raise ValueError(f"gpus: expected at least 1, got {gpus}")
    unit = _units(config.model_copy(update={"run": type(config.run)()}).model_dump_json())
    rollout, groups = config.rollout, _groups(config, gpus)
    rows, turns = groups * rollout.group_size, rollout.turns
    later = rows * (turns - 1)
    texts = groups + later if unit["text_sees_image"] else groups * turns
    images = groups + (0 if rollout.latent_chain else later)
    samples = rows * kept * turns * _learned(config)
    size = describe(model_path(config)).text_parameters
    sampling = {
        "encode": 2.0 * size * unit["text_tokens"] * texts + unit["encode"] * images,
        "denoise": unit["forward"] * rows * turns * rollout.num_steps + unit["condition"] * (groups + later),
        "decode": unit["decode"] * rows * turns,
    }
    update = {"with gradient": unit["trained"] * samples}
    if config.objective.likelihood_free:
        old = config.objective.old_decay != "on_policy" or config.optimizer.updates_per_iteration > 1
        update["old and reference"] = unit["forward"] * samples * (old + (config.objective.kl_weight > 0))
    elif config.objective.kl_weight > 0:
        update["reference"] = unit["forward"] * samples
    return Work(sampling, update, unit["forward"])


def _groups(config: TrainConfig, gpus: int) -> int:
    return -(-config.rollout.groups_per_iteration // gpus)


def _learned(config: TrainConfig) -> int:
    """Samples per turn of a trajectory: its stored steps, or draws of noise."""
    if config.objective.likelihood_free:
        return config.objective.draws
    window = config.rollout.window
    return config.rollout.num_steps - 1 if window is None else window.size


def _flops(call: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


@cache
def _units(dumped: str) -> dict[str, float]:
    """FLOPs of one row each."""
    model = MetaModel(TrainConfig.model_validate_json(dumped))
    with torch.no_grad():
        condition = model.condition(1)
        units = {
            "condition": _flops(lambda: model.condition(1)),
            "forward": _flops(lambda: model.velocity(1, condition)),
            "encode": _flops(lambda: model.encode(1)),
            "decode": _flops(lambda: model.decode(1)),
        }
    condition = model.condition(1)
    units["trained"] = _flops(lambda: model.velocity(1, condition).sum().backward())
    return units | {"text_tokens": model.text_tokens, "text_sees_image": model.editor.text_sees_image}
