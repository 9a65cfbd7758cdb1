"""Distillation of a corruption-aware teacher into a one-step generator of clean images: SiD, DMD, SDS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtedit_fast.onestep import EDMDenoiser, Features, OneStepGenerator, Operator, Stream, load_denoiser, save_denoiser
from mtedit_fast.ops import seeded_noise
from mtedit_fast.training.onestep.config import OneStepConfig
from mtedit_fast.training.onestep.data import CorruptedImages, Part
from mtedit_fast.training.onestep.loop import Loop
from mtedit_fast.training.onestep.objectives import generator_levels, score_gap
from mtedit_fast.training.onestep.proximal import ProximalFID

LOSS_SCALE = 100.0
"""Of the generator's summed loss per image, as in the public code; Adam hardly notices, gradient clipping does."""


class StudentLoop(Loop):
    """Generator and fake score, both starting as the teacher, in turns.

    Args:
        teacher: `TeacherLoop.export`'s folder.
        features: for the proximal FID of `config.evaluation`; None to load what it names.

    Raises:
        ValueError: the teacher is of another corruption.
    """

    stage = "student"

    def __init__(
        self, config: OneStepConfig, data: CorruptedImages, teacher: str | Path, features: Features | None = None
    ) -> None:
        super().__init__(config, data)
        settings = config.distill
        self.steps, self.batch = settings.steps, settings.batch
        self.teacher_path = teacher
        loaded, known, _ = load_denoiser(teacher)
        self.teacher = self.ready(loaded)
        if known.describe() != self.corruption.describe():
            raise ValueError(f"corruption: the teacher {teacher} was trained on {known}, expected {self.corruption}")
        self.teacher.requires_grad_(False)
        for name, rate, betas in (
            ("fake", settings.lr, settings.betas),
            ("generator", settings.generator_lr, settings.generator_betas),
        ):
            module = self.ready(load_denoiser(teacher).denoiser).train()
            self.trained[name] = module
            self.optimizers[name] = torch.optim.Adam(module.parameters(), lr=rate, betas=(betas[0], betas[1]))
        self.average = self.average_of(self.trained["generator"])
        self.best = float("inf")
        self.proximal: ProximalFID | None = None
        if config.evaluation.every:
            self.proximal = ProximalFID(self.data, config.evaluation, features)

    def step(self) -> dict[str, float]:
        settings = self.config.distill
        metrics: dict[str, float] = {}
        self.set_rate("fake", settings.lr, settings.lr_schedule)
        self.set_rate("generator", settings.generator_lr, settings.lr_schedule)
        if settings.method != "sds":
            metrics |= self.update("fake", self._fake_losses, Part.FAKE)
        metrics |= self.update("generator", self._generator_losses, Part.GENERATOR, LOSS_SCALE)
        self.update_average(self.trained["generator"], settings.ema_kimg, settings.ema_ramp)
        return metrics

    def generate(self, seed: Tensor) -> Tensor:
        """x_g [B, C, H, W]: what `OneStepGenerator` draws, with gradient."""
        settings = self.config.distill
        operator = self._seen(seed)
        latents = seeded_noise(seed, self.data.shape, Stream.LATENT) * settings.sigma_init
        sigma = torch.tensor(settings.sigma_init, device=self.device)
        generator = self.trained["generator"]
        if operator is None:
            return generator(latents, sigma)
        return generator(operator.normal(latents), sigma, operator.mask)

    def _seen(self, seed: Tensor) -> Operator | None:
        """With masks, what a network sees of an image."""
        if not self.corruption.random:
            return None
        operator = self.corruption.operator(seed, self.data.shape[1:])
        return self.corruption.further(operator, seed, self.config.teacher.further)

    def _fake_losses(self, numbers: Tensor) -> Tensor:
        """The teacher's objective on measurements of generated images."""
        seed = self.seeds(numbers, Part.FAKE)
        with torch.no_grad():
            y, operator = self.corruption(self.generate(seed), seed)
        return self.teacher_objective(self.trained["fake"], y, operator, seed)

    def _generator_losses(self, numbers: Tensor) -> Tensor:
        settings = self.config.distill
        seed = self.seeds(numbers, Part.GENERATOR)
        uniform = torch.special.ndtr(seeded_noise(seed, (1,), Stream.LEVEL).flatten())
        sigma = generator_levels(uniform, settings.t_max, self.corruption.sigma)
        x = self.generate(seed)
        # The generator saw the mask of its own seed; scores are compared under another one.
        seen = self._seen(self.seeds(numbers, Part.MASKS))
        image = self.corruption.operator(seed, self.data.shape[1:])(x) if seen is None else seen.normal(x)
        noise = sigma.view(-1, 1, 1, 1) * seeded_noise(seed, image.shape[1:], Stream.DIFFUSION)
        with torch.set_grad_enabled(settings.method == "sid"):
            if seen is None:
                real, fake = (denoise(image + noise, sigma) for denoise in (self.teacher, self._frozen_fake()))
            else:
                noisy = image + seen.normal(noise)
                real, fake = (
                    seen.normal(denoise(noisy, sigma, seen.mask)) for denoise in (self.teacher, self._frozen_fake())
                )
        return score_gap(settings.method, image, real, fake, settings.alpha)

    def _frozen_fake(self) -> Any:
        """The fake score, through whose inputs alone the generator's gradient flows."""
        fake = self.trained["fake"]
        parameters = {name: value.detach() for name, value in fake.named_parameters()}
        return lambda *inputs: torch.func.functional_call(fake, parameters, inputs)

    def after_step(self) -> dict[str, float]:
        every = self.config.evaluation.every
        if self.proximal is None or self.iteration % every:
            return {}
        distance = self.proximal(OneStepGenerator(
            self.averaged(), self.data.shape, self.corruption, sigma_init=self.config.distill.sigma_init
        ))  # fmt: skip
        if distance < self.best:
            self.best = distance
            self._write(self.folder / "model")
        return {"proximal_fid": distance}

    def averaged(self) -> EDMDenoiser:
        """A copy of the generator with its averaged weights."""
        copy = load_denoiser(self.teacher_path, device=self.device).denoiser
        for parameter, value in zip(copy.parameters(), self.average, strict=True):
            parameter.data.copy_(value)
        return copy

    def export(self) -> Path:
        """The generator of the lowest proximal FID, or without evaluation the last average: student/model."""
        path = self.folder / "model"
        if self.best == float("inf"):
            self._write(path)
        self.accelerator.wait_for_everyone()
        return path

    def _write(self, path: Path) -> None:
        if self.accelerator.is_main_process:
            card: dict[str, Any] = {
                "stage": self.stage, "shape": list(self.data.shape), "steps": self.iteration,
                "sigma_init": self.config.distill.sigma_init, "method": self.config.distill.method,
            }  # fmt: skip
            if self.best < float("inf"):
                card["proximal_fid"] = self.best
            save_denoiser(path, self.averaged(), self.corruption, card)

    def state(self) -> dict[str, Any]:
        return super().state() | {"best": self.best}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.best = state["best"]

    @property
    def fingerprint(self) -> str:
        return f"{super().fingerprint}, {self.config.distill.method}"
