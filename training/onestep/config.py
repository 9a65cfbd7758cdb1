"""The configuration of a corruption-aware teacher and its one-step student; training/configs/rsd_ffhq64.yaml documents
every key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mtedit_fast.onestep import Corruption
from mtedit_fast.training.config import Section
from mtedit_fast.training.config_file import read_config

Schedule = Literal["constant", "linear"]
Betas = Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]


class CorruptionConfig(Section):
    operators: list[dict[str, Any]] = Field(
        default=[],
        description="applied in order, each a name (noise, inpainting, box, blur, super_resolution, mri, "
        "compressed_sensing) with its options; []: noise alone",
    )
    sigma: float = Field(
        default=0.0, ge=0, description="σ_n, standard deviation of the noise in units of images in [-1, 1]"
    )

    def build(self) -> Corruption:
        return Corruption(self.operators, self.sigma)

    @model_validator(mode="after")
    def _known(self) -> Self:
        self.build()
        return self


class DataConfig(Section):
    path: str = Field(
        min_length=1,
        description="folder of images of one size, .npy or .npz of uint8 [N, H, W, C] or float [N, C, H, W], or "
        "module:function, called with count and seed",
    )
    measured: bool = Field(
        default=False, description="the images are measurements already; false: they are clean and get corrupted, once"
    )
    count: int | None = Field(default=None, ge=1, description="only so many images; null: all (a function needs it)")
    seed: int = Field(default=0, ge=0, lt=2**24, description="of the corruption, and of a function")


class ModelConfig(Section):
    path: str | None = Field(
        default=None,
        description="UNet2DModel folder to start the teacher from; null: random weights of the shape below",
    )
    widths: list[int] = Field(default=[128, 256, 256, 256], min_length=1, description="channels per resolution")
    layers: int = Field(default=2, ge=1, description="residual blocks per resolution")
    attention: int = Field(
        default=16, ge=0, description="blocks attend at this side and below; 0: the middle one alone"
    )
    patch: int = Field(
        default=1,
        ge=1,
        description="squares of so many pixels are the channels of one position; 2 or 4: less to compute",
    )


class TeacherConfig(Section):
    steps: int = Field(default=200_000, ge=0)
    batch: int = Field(default=256, ge=1)
    lr: float = Field(default=2e-4, gt=0)
    warmup: int = Field(default=1000, ge=0, description="steps over which the learning rate rises from 0")
    lr_schedule: Schedule = Field(default="constant", description="after that; linear falls to 0 over the steps")
    p_mean: float = Field(default=-1.2, description="σ = exp(p_mean + p_std · normal)")
    p_std: float = Field(default=1.2, gt=0)
    further: float | None = Field(
        default=None,
        description="with masks: the part of the measured pixels that is hidden, too (mri: the acceleration left); "
        "null: 0.1 (mri: R + 1)",
    )
    loss_on: Literal["measured", "further"] = Field(
        default="measured", description="with masks: all that was measured (Ambient diffusion) or what the network sees"
    )
    ema_kimg: float = Field(default=500.0, ge=0, description="half-life of the averaged weights, in thousand images")


class DistillConfig(Section):
    method: Literal["sid", "dmd", "sds"] = Field(default="sid", description="gradient of the generator")
    steps: int = Field(default=50_000, ge=0)
    batch: int = Field(default=512, ge=1)
    lr: float = Field(default=1e-5, gt=0, description="of the fake score")
    generator_lr: float = Field(default=1e-5, gt=0)
    lr_schedule: Schedule = Field(default="constant", description="of both; linear falls to 0 over the steps")
    betas: Betas = Field(default=[0.0, 0.999], description="Adam's, of the fake score")
    generator_betas: Betas = Field(default=[0.9, 0.999])
    alpha: float = Field(
        default=1.2, description="sid: α; 0.5 is the plain model-based explicit loss, 1 drops its square"
    )
    sigma_init: float = Field(default=2.5, gt=0, description="noise level of the generator's only step")
    t_max: float = Field(
        default=800.0, gt=0, le=1000, description="levels: of 1000 from σ_min = 0.002 up; 800 is σ 24.4"
    )
    ema_kimg: float = Field(default=500.0, ge=0, description="half-life of the averaged generator, in thousand images")
    ema_ramp: float = Field(default=0.05, gt=0, description="it is at most this part of the images seen")


class EvaluationConfig(Section):
    every: int = Field(default=0, ge=0, description="distillation steps between proximal FIDs, which choose the "
                       "generator that is kept; 0: the last one is")  # fmt: skip
    features: str | None = Field(default=None, description="file of Inception weights, or module:function")
    samples: int = Field(default=50_000, ge=2)
    batch: int = Field(default=256, ge=1)


class RunConfig(Section):
    seed: int = Field(default=0, ge=0, lt=2**24, description="of initial weights, data order and noise")
    output_dir: str = Field(default="runs/rsd", min_length=1, description="teacher/ and student/ are written in it")
    checkpoint_every: int = Field(default=1000, ge=1, description="steps")
    keep_checkpoints: int = Field(default=2, ge=1)
    micro_batch: int = Field(default=64, ge=1, description="images per forward")
    max_grad_norm: float | None = Field(default=None, gt=0, description="gradient clipping; null: none")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="of the networks' autocast; weights are fp32"
    )
    max_skipped: int = Field(default=5, ge=1, description="steps in a row that may be skipped for not being finite")


class OneStepConfig(Section):
    corruption: CorruptionConfig = CorruptionConfig()
    data: DataConfig
    model: ModelConfig = ModelConfig()
    teacher: TeacherConfig = TeacherConfig()
    distill: DistillConfig = DistillConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        corruption = self.corruption.build()
        if corruption.random and corruption.sigma:
            raise ValueError(
                "corruption.sigma: expected 0 with masks, whose objective does not know noise, "
                f"got {corruption.sigma:g}"
            )
        if corruption.random and self.data.measured:
            raise ValueError("data.measured: expected false with masks: measurements without their masks say nothing")
        if self.evaluation.every and self.evaluation.features is None:
            raise ValueError("evaluation.features: expected what to measure the proximal FID with, got null")
        return self


def load_onestep_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> OneStepConfig:
    """Read the configuration of a teacher and its student; see `training.config_file.read_config`."""
    return read_config(source, overrides, OneStepConfig)
