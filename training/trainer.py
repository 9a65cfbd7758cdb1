"""The training loop: roll out, score, compute advantages, update. Read `Trainer.fit` and `Trainer.step` first.

Everything random is a pure function of (seed, iteration, sample), and everything else that changes is in the
checkpoint, so a run that is killed and resumed ends with the weights of an uninterrupted one, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from mtedit_fast.editors import Editor
from mtedit_fast.rollout import RolloutConfig, Trajectories, rollout, sample_seeds
from mtedit_fast.sampling import sde_window
from mtedit_fast.timing import PhaseTimer
from mtedit_fast.training.advantages import advantages, shuffle_advantages
from mtedit_fast.training.checkpoint import latest, load_checkpoint, save_checkpoint
from mtedit_fast.training.config import TrainConfig, dump_config
from mtedit_fast.training.data import EditChains, Record
from mtedit_fast.training.evaluation import Evaluation, evaluate
from mtedit_fast.training.rewards import RewardBatch, score
from mtedit_fast.training.update import PolicyUpdate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Every linear layer of a Flux block; the embedders and the final projection stay as they are.
KONTEXT_LORA_TARGETS = (
    r"(transformer_blocks|single_transformer_blocks)\.\d+\."
    r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
)


class Trainer:
    """GRPO on the multi-turn trajectories of one editor.

    Args:
        editor: its transformer gets a LoRA adapter; the reference policy is the adapter switched off.
        chains: training data.
        config: see `training.config`.
        accelerator: device and precision; made from the config when None.
    """

    def __init__(self, editor: Editor, chains: EditChains, config: TrainConfig, held_out: EditChains | None = None):
        self.editor, self.chains, self.config, self.held_out = editor, chains, config, held_out
        self.output_dir = Path(config.run.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=config.run.precision, log_with="tensorboard", project_dir=str(self.output_dir)
        )
        self.device = self.accelerator.device
        self.model: Any = editor.transformer  # the module itself; editor.transformer may become a wrapper
        self._add_adapter()
        optimizer = torch.optim.AdamW(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=config.optimizer.lr,
            betas=(config.optimizer.betas[0], config.optimizer.betas[1]),
            weight_decay=config.optimizer.weight_decay,
        )
        editor.transformer, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.update = PolicyUpdate(editor, self.optimizer, self.accelerator, config.objective, config.optimizer)
        self.average = [parameter.detach().clone() for parameter in self.update.parameters]
        self.timer = PhaseTimer(self.device)
        self.iteration = 0

    def _add_adapter(self) -> None:
        lora = self.config.model.lora
        torch.manual_seed(self.config.run.seed)  # the adapter's initial values
        self.model.add_adapter(
            LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.target_modules or KONTEXT_LORA_TARGETS)
        )
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # a bf16 adapter would lose small updates

    # ---- the loop

    def fit(self) -> Iterator[dict[str, float]]:
        """Train to `run.iterations`, from the last checkpoint if there is one; yields each iteration's metrics."""
        run, every = self.config.run, self.config.evaluation.every
        if self.iteration == 0:
            self.resume()
        metrics_path = self._start_logs()
        with metrics_path.open("a") as lines:
            while self.iteration < run.iterations:
                metrics = self.step()
                self.iteration += 1
                if every and self.iteration % every == 0 and self.held_out is not None:
                    metrics |= self.evaluate().metrics()
                if self.accelerator.is_main_process:
                    lines.write(json.dumps(metrics) + "\n")
                    lines.flush()
                self.accelerator.log(metrics, step=self.iteration)
                if self.iteration % run.checkpoint_every == 0 or self.iteration == run.iterations:
                    self.save()
                yield metrics
        self.accelerator.end_training()

    def step(self) -> dict[str, float]:
        """One iteration: rollout, rewards, advantages, update."""
        # Each process has groups and noise of its own; a group is never split.
        draw = self.iteration * self.accelerator.num_processes + self.accelerator.process_index
        records = self.chains.batch(draw, self.config.rollout.groups_per_iteration)
        with self.timer("rollout"):
            trajectories = self.rollout(records, draw)
        trajectories.raise_if_not_finite()
        with self.timer("reward"):
            rewards = self.score(records, trajectories)
        result = advantages(
            rewards,
            trajectories.groups.cpu(),
            self.config.advantage,
            weights={reward.name: reward.weight for reward in self.config.rewards},
        )
        if self.config.run.control == "shuffle":
            result = shuffle_advantages(result, seed=self.config.run.seed * 1_000_003 + self.iteration)
        with self.timer("update"):
            self._set_learning_rate()
            stats = self.update(trajectories, result)
            # Warmed up, so that the first iterations are not held back by the untrained adapter.
            decay = min(self.config.optimizer.ema_decay, (1 + self.iteration) / (10 + self.iteration))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.update.parameters], 1 - decay)
        seconds = {f"seconds/{name}": value for name, value in self.timer.seconds().items()}
        rate = self.optimizer.param_groups[0]["lr"]
        return {"iteration": self.iteration, "learning_rate": rate, **result.stats, **stats.metrics(), **seconds}

    def _set_learning_rate(self) -> None:
        """A function of the iteration alone, so that there is no scheduler state to resume."""
        optimizer = self.config.optimizer
        left = 1 - self.iteration / self.config.run.iterations if optimizer.lr_schedule == "linear" else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = optimizer.lr * left

    def rollout(self, records: list[Record], draw: int) -> Trajectories:
        """G trajectories per record with the current weights."""
        config = self.rollout_config(self.iteration)
        references = torch.stack([record.image for record in records]).to(self.device)
        seeds = sample_seeds(self.config.run.seed, draw, len(records) * config.group_size)
        return rollout(
            self.editor,
            references,
            [record.instructions for record in records],
            config,
            seeds,
            timer=self.timer,
        )

    def rollout_config(self, iteration: int) -> RolloutConfig:
        """The sampler's settings, with this iteration's SDE window."""
        config = self.config.rollout
        window = None
        if config.window is not None:
            window = sde_window(
                config.num_steps,
                config.window.size,
                lo=config.window.lo,
                hi=config.window.hi,
                seed=self.config.run.seed * 1_000_003 + iteration,
            )
        return RolloutConfig(
            group_size=config.group_size,
            num_steps=config.num_steps,
            variant=config.variant,
            eta=config.eta,
            window=None if window is None else (window.start, window.stop),
            micro_batch=config.micro_batch,
            guidance_scale=config.guidance_scale,
            latent_chain=config.latent_chain,
            keep_means=self.config.objective.name == "grpo_guard",
            state_dtype=DTYPES[config.state_dtype],
        )

    def score(self, records: list[Record], trajectories: Trajectories) -> dict[str, Tensor]:
        """Every configured reward, [B, K]."""
        group = self.config.rollout.group_size
        repeated = [record for record in records for _ in range(group)]
        references = torch.stack([record.image for record in records]).to(trajectories.images.device)
        batch = RewardBatch(
            references=references.repeat_interleave(group, 0),
            edits=trajectories.images,
            instructions=[record.instructions for record in repeated],
            records=[{"id": record.id, "objects": record.objects, **record.extra} for record in repeated],
        )
        return score(self.config.rewards, batch)

    def evaluate(self, *, reference: bool = False, progress: Callable[[int], None] | None = None) -> Evaluation:
        """The held-out chains under the averaged adapter, or under the reference (adapter off)."""
        if self.held_out is None:
            raise ValueError("evaluation.path: expected held-out chains, got null")
        with self.update.reference_policy() if reference else self.averaged():
            return evaluate(
                self.editor,
                self.held_out,
                self.rollout_config(0),
                self.config.evaluation,
                self.config.rewards,
                progress=progress,
            )

    # ---- state

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving average in place of the adapter's current values."""
        current = [parameter.detach().clone() for parameter in self.update.parameters]
        self._assign(self.average)
        try:
            yield
        finally:
            self._assign(current)

    @torch.no_grad()
    def _assign(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.update.parameters, values, strict=True):
            parameter.copy_(value)

    @property
    def fingerprint(self) -> str:
        """What a checkpoint must agree on to be loaded: family, LoRA scale, the adapter's names and shapes."""
        lora, shapes = self.config.model.lora, {name: list(value.shape) for name, value in self.adapter().items()}
        digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.config.model.family}, LoRA rank {lora.rank} alpha {lora.alpha}, shapes {digest}"

    def adapter(self) -> dict[str, Tensor]:
        """LoRA tensors by name."""
        return get_peft_model_state_dict(self.model)

    def save(self) -> Path | None:
        """Write a checkpoint atomically; on a full disk the last good one stays."""
        if not self.accelerator.is_main_process:
            return None
        return save_checkpoint(
            self.output_dir / "checkpoints",
            self.iteration,
            self.adapter(),
            {"iteration": self.iteration, "optimizer": self.optimizer.state_dict(), "average": self.average},
            self.fingerprint,
            keep=self.config.run.keep_checkpoints,
        )

    def resume(self) -> bool:
        """Load the newest complete checkpoint of `output_dir`; False when there is none."""
        path = latest(self.output_dir / "checkpoints")
        if path is None:
            return False
        adapter, state = load_checkpoint(path, self.fingerprint)
        set_peft_model_state_dict(self.model, adapter)
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = [value.to(self.device) for value in state["average"]]
        self.iteration = state["iteration"]
        return True

    def export(self) -> Path:
        """The averaged LoRA as safetensors for stock `pipe.load_lora_weights(output_dir / "lora")`."""
        path = self.output_dir / "lora"
        with self.averaged():
            self.editor.save_lora(str(path))
        return path

    def _start_logs(self) -> Path:
        """Config, TensorBoard and metrics.jsonl; lines after the resumed checkpoint are dropped and made again."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        (self.output_dir / "config.yaml").write_text(dump_config(self.config))
        self.accelerator.init_trackers("tensorboard")
        path = self.output_dir / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _iteration(line) < self.iteration]
            path.write_text("".join(f"{line}\n" for line in kept))
        return path


def _iteration(line: str) -> float:
    """The iteration of a metrics line; infinity for one that a killed run left half written."""
    try:
        return json.loads(line)["iteration"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")
