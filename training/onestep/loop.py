"""The loop that teachers and students are trained in: read `Loop.fit` first.

Everything random is a function of (seed, step, image), and all else that changes is in the checkpoint, so a run that is
killed and resumed ends with the weights of an uninterrupted one: bit for bit where kernels repeat
themselves, as a CPU's do. On several processes every step's batch is the same as on one, divided among them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mtedit_fast.onestep import EDMDenoiser, Operator, Stream, image_seeds, new_unet
from mtedit_fast.ops import seeded_noise
from mtedit_fast.training import distributed
from mtedit_fast.training.checkpoint import latest, load_checkpoint, save_checkpoint
from mtedit_fast.training.config_file import dump_config
from mtedit_fast.training.onestep.config import OneStepConfig
from mtedit_fast.training.onestep.data import CorruptedImages, Part, part_seed
from mtedit_fast.training.onestep.objectives import masked_objective, noise_objective, teacher_levels


def new_denoiser(config: OneStepConfig, shape: tuple[int, int, int]) -> EDMDenoiser:
    """The network of a configuration with its initial weights, for images of `shape`."""
    from diffusers import UNet2DModel

    model, masked = config.model, config.corruption.build().random
    if model.path is None:
        multiple = model.patch << len(model.widths) - 1
        if shape[1] % multiple or shape[2] % multiple:
            raise ValueError(
                f"model.widths: {len(model.widths)} resolutions of patches of {model.patch} expect sides that are "
                f"multiples of {multiple}, got images of {list(shape)}"
            )
        network = new_unet(
            max(shape[1:]), shape[0], masked=masked, widths=tuple(model.widths), layers=model.layers,
            attention=model.attention, seed=config.run.seed, patch=model.patch,
        )  # fmt: skip
    else:
        network = UNet2DModel.from_pretrained(model.path)
    wanted = ((shape[0] + masked) * model.patch**2, shape[0] * model.patch**2)
    if (network.config.in_channels, network.config.out_channels) != wanted:
        raise ValueError(
            f"model.path: expected a network of {wanted[0]} channels in and {wanted[1]} out for images of "
            f"{list(shape)}{' with masks' if masked else ''}, got {network.config.in_channels} and "
            f"{network.config.out_channels}"
        )
    return EDMDenoiser(network, patch=model.patch, hides_pixels=config.corruption.build().hides_pixels)


class Loop:
    """What a stage adds: `trained` modules, their `optimizers`, an average, and `gradients` of one step.

    Its files are in output_dir/stage.
    """

    stage: str
    steps: int
    batch: int

    def __init__(self, config: OneStepConfig, data: CorruptedImages) -> None:
        self.config, self.corruption = config, data.corruption
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), log_with="tensorboard", project_dir=str(self.folder)
        )
        self.device = self.accelerator.device if torch.cuda.is_available() else torch.device("cpu")
        self.data = data.on(self.device)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.trained: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.average: list[Tensor] = []
        self.iteration, self.skipped_in_a_row = 0, 0

    # ---- the loop

    def fit(self) -> Iterator[dict[str, float]]:
        """Train to the last step, from the last checkpoint if there is one; yields each step's metrics.

        ValueError: fewer images in a batch than processes.
        """
        if self.batch < self.world:
            raise ValueError(f"batch: expected at least an image for each of {self.world} processes, got {self.batch}")
        if self.iteration == 0:
            self.resume()
        distributed.assert_same(self.tensors() | {"iteration": torch.tensor(self.iteration)})
        main = self.accelerator.is_main_process
        with self._start_logs().open("a") if main else nullcontext() as lines:
            while self.iteration < self.steps:
                metrics = {"step": self.iteration, **self.step()}
                self.iteration += 1
                metrics |= self.after_step()
                if lines is not None:
                    lines.write(json.dumps(metrics) + "\n")
                    lines.flush()
                self.accelerator.log(metrics, step=self.iteration)
                if self.iteration % self.config.run.checkpoint_every == 0 or self.iteration == self.steps:
                    self.save()
                yield metrics
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def step(self) -> dict[str, float]:
        """One step of every optimizer."""
        raise NotImplementedError

    def after_step(self) -> dict[str, float]:
        """Evaluation, when it is due."""
        return {}

    def update(self, name: str, loss: Callable[[Tensor], Tensor], part: Part, scale: float = 1.0) -> dict[str, float]:
        """Accumulate the gradients of one batch and step the optimizer of `trained[name]`.

        loss: numbers of the batch's images [b] int64 -> losses [b]. Those that are not finite are left out; the others'
        sum is divided by the whole batch and multiplied by `scale`.
        """
        module, optimizer = self.trained[name], self.optimizers[name]
        parameters = list(module.parameters())
        optimizer.zero_grad()
        mine = distributed.share(self.batch, self.rank, self.world)
        numbers = torch.arange(mine.start, mine.stop) + self.iteration * self.batch
        total = torch.zeros(2, device=self.device)
        for chunk in numbers.split(self.config.run.micro_batch):
            losses = loss(chunk)
            finite = losses.isfinite()
            # Indexed, not multiplied: 0 · NaN is NaN in the gradient, too.
            good = losses[finite].sum() * (scale / self.batch)
            if bool(finite.any()):
                good.backward()
            total[0] += good.detach()
            total[1] += (~finite).sum()
        distributed.sum_gradients(list(parameters))
        everyone = sum(distributed.gather_objects(total.cpu()))
        assert isinstance(everyone, Tensor)
        limit = self.config.run.max_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        dropped = int(everyone[1])
        taken = bool(norm.isfinite()) and dropped < self.batch
        if taken:
            optimizer.step()
        self._count_skipped(taken, name)
        optimizer.zero_grad()
        return {
            f"{name}/loss": everyone[0].item(), f"{name}/grad_norm": norm.item(), f"{name}/dropped": float(dropped),
        }  # fmt: skip

    def set_rate(self, name: str, peak: float, schedule: str, warmup: int = 0) -> float:
        """The optimizer's learning rate at this step: a function of the step alone, so that nothing has to be saved."""
        rate = peak * min(1.0, (self.iteration + 1) / (warmup + 1))
        if schedule == "linear":
            rate *= 1 - self.iteration / self.steps
        for group in self.optimizers[name].param_groups:
            group["lr"] = rate
        return rate

    def _count_skipped(self, taken: bool, name: str) -> None:
        self.skipped_in_a_row = 0 if taken else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.config.run.max_skipped:
            raise FloatingPointError(
                f"{name}: loss or gradient not finite in {self.skipped_in_a_row} steps in a row (run.max_skipped); "
                "none was taken, the last checkpoint is good: lower the learning rate, then start again to go on"
            )

    def ready(self, denoiser: EDMDenoiser) -> EDMDenoiser:
        """On the device, its network under autocast where that is asked for: operators and losses keep fp32."""
        denoiser.autocast = torch.bfloat16 if self.config.run.precision == "bf16" else None
        return denoiser.to(self.device)

    def seeds(self, numbers: Tensor, part: Part) -> Tensor:
        """Of what is drawn for images `numbers` (step · batch + place) of a part of the run; on the device."""
        return image_seeds(part_seed(self.config.run.seed, part), numbers).to(self.device)

    def teacher_objective(self, denoise: nn.Module, y: Tensor, operator: Operator, seed: Tensor) -> Tensor:
        """The corruption's own objective on measurements, [B]: of the teacher, and of the fake score."""
        settings = self.config.teacher
        level = seeded_noise(seed, (1,), Stream.LEVEL).flatten()
        sigma = teacher_levels(level, settings.p_mean, settings.p_std)
        if not self.corruption.random:
            noise = seeded_noise(seed, y.shape[1:], Stream.DIFFUSION)
            return noise_objective(denoise, y, sigma, noise, self.corruption.sigma)
        noise = seeded_noise(seed, self.data.shape, Stream.DIFFUSION)
        further = self.corruption.further(operator, seed, settings.further)
        on = operator if settings.loss_on == "measured" else further
        return masked_objective(denoise, y, operator, further, sigma, noise, on=on)

    def update_average(self, module: nn.Module, kimg: float, ramp: float | None) -> None:
        """EDM's: half-life `kimg`, at most `ramp` of the images seen so far."""
        images = kimg * 1000
        if ramp is not None:
            images = min(images, (self.iteration + 1) * self.batch * ramp)
        decay = 0.5 ** (self.batch / max(images, 1e-8))
        torch._foreach_lerp_(self.average, [p.detach() for p in module.parameters()], 1 - decay)

    def average_of(self, module: nn.Module) -> list[Tensor]:
        return [p.detach().clone() for p in module.parameters()]

    # ---- state

    @property
    def folder(self) -> Path:
        return Path(self.config.run.output_dir) / self.stage

    @property
    def fingerprint(self) -> str:
        """What a checkpoint must agree on to be loaded."""
        shapes = {name: list(value.shape) for name, value in self.tensors().items()}
        digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.stage}, operator {self.corruption}, shapes {digest}"

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors by name."""
        return {
            f"{module}.{name}": value.detach()
            for module, trained in self.trained.items()
            for name, value in trained.named_parameters()
        }

    def state(self) -> dict[str, Any]:
        """All else that changes."""
        return {
            "iteration": self.iteration,
            "skipped_in_a_row": self.skipped_in_a_row,
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "average": self.average,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.iteration, self.skipped_in_a_row = state["iteration"], state["skipped_in_a_row"]
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        for mine, saved in zip(self.average, state["average"], strict=True):
            mine.copy_(saved)

    def save(self) -> None:
        if self.accelerator.is_main_process:
            folder, keep = self.folder / "checkpoints", self.config.run.keep_checkpoints
            save_checkpoint(folder, self.iteration, self.tensors(), self.state(), self.fingerprint, keep=keep)

    def resume(self) -> bool:
        """Load the newest complete checkpoint; False when there is none. ValueError if it is of another operator."""
        path = latest(self.folder / "checkpoints")
        if path is None:
            return False
        saved, state = load_checkpoint(path, self.fingerprint)
        for name, tensor in self.tensors().items():
            tensor.copy_(saved[name])
        self.load_state(state)
        return True

    def _start_logs(self) -> Path:
        """config.yaml, TensorBoard, metrics.jsonl; lines after the resumed checkpoint are dropped and made again."""
        path = self.folder / "metrics.jsonl"
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(dump_config(self.config), encoding="utf-8")
            self.accelerator.init_trackers("tensorboard")
            if path.exists():
                kept = [line for line in path.read_text().splitlines() if _step(line) < self.iteration]
                path.write_text("".join(f"{line}\n" for line in kept))
        return path


def _step(line: str) -> float:
    """The step of a metrics line; infinity for one that a killed run left half written."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")
