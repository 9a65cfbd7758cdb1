"""The corruption-aware diffusion teacher: a denoiser of clean images that has only seen corrupted ones."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mtedit_fast.onestep import save_denoiser
from mtedit_fast.training.onestep.config import OneStepConfig
from mtedit_fast.training.onestep.data import CorruptedImages, Part
from mtedit_fast.training.onestep.loop import Loop, new_denoiser


class TeacherLoop(Loop):
    """Trains the network of `config.model` by the objective of `config.corruption`."""

    stage = "teacher"

    def __init__(self, config: OneStepConfig, data: CorruptedImages) -> None:
        super().__init__(config, data)
        self.steps, self.batch = config.teacher.steps, config.teacher.batch
        self.denoiser = self.ready(new_denoiser(config, data.measured_shape)).train()
        self.trained["teacher"] = self.denoiser
        self.optimizers["teacher"] = torch.optim.Adam(self.denoiser.parameters(), lr=config.teacher.lr)
        self.average = self.average_of(self.denoiser)

    def step(self) -> dict[str, float]:
        settings = self.config.teacher
        rate = self.set_rate("teacher", settings.lr, settings.lr_schedule, settings.warmup)
        metrics = self.update("teacher", self._losses, Part.TEACHER)
        self.update_average(self.denoiser, settings.ema_kimg, ramp=0.05)
        return {**metrics, "learning_rate": rate}

    def _losses(self, numbers: Tensor) -> Tensor:
        order = self.data.order(int(numbers[0]), len(numbers), self.config.run.seed)
        y, operator = self.data[order]
        return self.teacher_objective(self.denoiser, y, operator, self.seeds(numbers, Part.TEACHER))

    def export(self) -> Path:
        """Write the averaged denoiser to output_dir/teacher/model, for `load_denoiser` and the student."""
        averaged = new_denoiser(self.config, self.data.measured_shape)
        for parameter, value in zip(averaged.parameters(), self.average, strict=True):
            parameter.data.copy_(value)
        path = self.folder / "model"
        if self.accelerator.is_main_process:
            card = {"stage": self.stage, "shape": list(self.data.measured_shape), "steps": self.iteration}
            save_denoiser(path, averaged, self.corruption, card)
        self.accelerator.wait_for_everyone()
        return path
