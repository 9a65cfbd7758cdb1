"""The training loop: roll out, score, compute advantages, update. Read `Trainer.fit` and `Trainer.step` first.

Everything random is a pure function of (seed, iteration, sample), and everything else that changes is in the
checkpoint, so a run that is killed and resumed ends with the weights of an uninterrupted one: bit for bit where
kernels repeat themselves, as a CPU's do. On several processes every iteration's batch is the same as on one, divided
by whole groups.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor

from mtedit_fast.editors import Editor
from mtedit_fast.editors.fp8 import Float8Switch
from mtedit_fast.editors.speed import compile_transformer, set_attention
from mtedit_fast.rollout import Trajectories
from mtedit_fast.timing import PhaseTimer
from mtedit_fast.training import distributed
from mtedit_fast.training.adapters import OLD_DECAY, Adapters
from mtedit_fast.training.advantages import AdvantageResult, advantages, shuffle_advantages
from mtedit_fast.training.checkpoint import latest, load_checkpoint, save_checkpoint
from mtedit_fast.training.config import TrainConfig
from mtedit_fast.training.config_file import dump_config
from mtedit_fast.training.data import EditChains, Record
from mtedit_fast.training.evaluation import Evaluation, evaluate
from mtedit_fast.training.grpo import GRPO
from mtedit_fast.training.headroom import FirstIteration, settle_micro_batch
from mtedit_fast.training.memory import rows_within
from mtedit_fast.training.nft import NFT
from mtedit_fast.training.rebalance import rebalance
from mtedit_fast.training.sampler import Sampler
from mtedit_fast.training.sharding import shard
from mtedit_fast.training.update import PolicyUpdate, UpdateBatch

KEPT = "kept.jsonl"


class Trainer:
    """Reinforcement learning on the multi-turn trajectories of one editor.

    Args:
        editor: its transformer gets a LoRA adapter; the reference policy is the adapter switched off.
        chains: training data.
        config: see `training.config`.
        held_out: chains for `evaluate`.
    """

    def __init__(self, editor: Editor, chains: EditChains, config: TrainConfig, held_out: EditChains | None = None):
        self.editor, self.chains, self.config, self.held_out = editor, chains, config, held_out
        self.output_dir = Path(config.run.output_dir)
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),  # else several processes without a GPU would not know of each other
            mixed_precision=config.run.precision,
            log_with="tensorboard",
            project_dir=str(self.output_dir),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.run.timeout))],
        )
        # accelerate says "cpu:0", which torch takes for another device than "cpu".
        self.device = self.accelerator.device if torch.cuda.is_available() else torch.device("cpu")
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self._check_groups()
        self.config = config = settle_micro_batch(config, self.device, self.world)
        self._guarded = FirstIteration(self, self.world)
        if config.run.sharding == "none":
            editor.to(self.device)
        self.model: Any = editor.transformer  # the module itself; editor.transformer may become a wrapper
        self.adapters = Adapters(
            self.model,
            rank=config.model.lora.rank,
            alpha=config.model.lora.alpha,
            target_modules=config.model.lora.target_modules or editor.lora_targets,
            seed=config.run.seed,
            old=config.objective.likelihood_free,
        )
        self.fp8: Float8Switch | None = None
        self._prepare_model()
        self.optimizer = torch.optim.AdamW(
            self.adapters.parameters,
            lr=config.optimizer.lr,
            betas=(config.optimizer.betas[0], config.optimizer.betas[1]),
            weight_decay=config.optimizer.weight_decay,
        )
        self.objective: GRPO | NFT = self._objective()
        self._budget = config.optimizer.memory_gib  # until the rows it allows have been measured
        self.update = PolicyUpdate(
            list(self.adapters.parameters),
            self.optimizer,
            self.objective,
            config.optimizer,
            after_backward=editor.backward_references,
            on_step=self.adapters.stepped,
            sharded=config.run.sharding != "none",
        )
        self.timer = PhaseTimer(self.device)
        self.sample = Sampler(editor, self.adapters, config, self.timer, self.fp8)
        self.iteration = 0

    def _check_groups(self) -> None:
        groups = self.config.rollout.groups_per_iteration
        if groups < self.world:
            raise ValueError(
                f"rollout.groups_per_iteration: expected at least one group per process ({self.world}), got {groups}"
            )
        if self.config.run.sharding != "none" and groups % self.world:
            raise ValueError(
                f"rollout.groups_per_iteration: with run.sharding={self.config.run.sharding} all processes must run "
                f"equally many forwards: expected a multiple of the {self.world} processes, got {groups}"
            )

    def _prepare_model(self) -> None:
        """Sharding, checkpointing, compilation and autocast of the transformer, in the order they need."""
        config = self.config
        if config.model.activation_checkpointing:
            self.model.enable_gradient_checkpointing()
        if config.model.attention != "native":
            set_attention(self.editor, config.model.attention)
        if config.rollout.precision == "fp8":
            self.fp8 = Float8Switch(self.editor)
        if config.model.compile != "none":
            compile_transformer(self.editor, config.model.compile)
        if config.run.sharding == "fsdp2":
            shard(self.model, self.device)
        # Evaluation mode: autocast only, without DistributedDataParallel (see training.distributed).
        sharded = config.run.sharding != "none"
        self.editor.transformer = self.accelerator.prepare_model(
            self.model, device_placement=not sharded, evaluation_mode=True
        )

    def _objective(self) -> GRPO | NFT:
        config, rows = self.config.objective, self.config.optimizer.forward_rows
        if self.config.exact_replay:
            return GRPO(self.editor, self.adapters, config, None)
        kind = NFT if config.likelihood_free else GRPO
        rows = rows or self.config.rollout.micro_batch
        assert rows is not None  # settled
        return kind(self.editor, self.adapters, config, rows)

    # ---- the loop

    def fit(self) -> Iterator[dict[str, float]]:
        """Train to `run.iterations`, from the last checkpoint if there is one; yields each iteration's metrics."""
        run, every = self.config.run, self.config.evaluation.every
        if self.iteration == 0:
            self.resume()
        distributed.assert_same(self.adapter() | {"iteration": torch.tensor(self.iteration)})
        metrics_path = self._start_logs()
        main = self.accelerator.is_main_process
        with metrics_path.open("a") if main else nullcontext() as lines:
            while self.iteration < run.iterations:
                metrics = self._guarded(self.step)
                self.iteration += 1
                if every and self.iteration % every == 0 and self.held_out is not None:
                    metrics |= self.evaluate().metrics()
                if lines is not None:
                    lines.write(json.dumps(metrics) + "\n")
                    lines.flush()
                self.accelerator.log(metrics, step=self.iteration)
                if self.iteration % run.checkpoint_every == 0 or self.iteration == run.iterations:
                    self.save()
                yield metrics
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def step(self) -> dict[str, float]:
        """One iteration: rollout and rewards, advantages, update."""
        names = self.chains.draw(self.iteration, self.config.rollout.groups_per_iteration)
        mine = distributed.share(len(names), self.rank, self.world)
        records = [self.chains[names[index]] for index in mine]
        trajectories, rewards = self.sample(records, iteration=self.iteration, first_group=mine.start)
        distributed.check_alive(self.iteration, self.config.run.timeout)
        result = self.advantages(trajectories, rewards, records)
        if self.config.run.control == "shuffle":
            result = shuffle_advantages(result, seed=self.config.run.seed * 1_000_003 + self.iteration)
        self._log_kept(result, [self.chains.id(name) for name in names])
        with self.timer("update"):
            self._set_learning_rate()
            stats = self.update(self.learning_batch(trajectories, result))
            self._follow()
        seconds = {f"seconds/{name}": value for name, value in self.timer.seconds().items()}
        rate = self.optimizer.param_groups[0]["lr"]
        return {"iteration": self.iteration, "learning_rate": rate, **result.stats, **stats.metrics(), **seconds}

    def advantages(
        self, trajectories: Trajectories, rewards: dict[str, Tensor], records: list[Record]
    ) -> AdvantageResult:
        """Advantages of the whole iteration, over all processes and the same on each; this one's rows by group."""
        configured = self.config.rewards
        everything = distributed.gather_rows(rewards | {"/group": trajectories.group})  # "/" is in no reward's name
        groups = everything.pop("/group")
        kinds = distributed.gather_objects([record.extra.get("types") for record in records])
        types: list[Any] = [kind for part in kinds for kind in part for _ in range(self.config.rollout.group_size)]
        return advantages(
            everything,
            groups,
            self.config.advantage,
            weights={reward.name: reward.weight for reward in configured},
            ranges={reward.name: (reward.range[0], reward.range[1]) for reward in configured if reward.range},
            binarize={reward.name: reward.binarize for reward in configured if reward.binarize is not None},
            types=[list(kind)[: trajectories.turns] for kind in types] if all(types) else None,
        )

    def learning_batch(self, trajectories: Trajectories, result: AdvantageResult) -> UpdateBatch:
        """What this process learns from: with `forward_rows` the kept rows alone, evened out over the processes."""
        start, count = int(trajectories.group[0]) * self.config.rollout.group_size, len(trajectories)
        own = slice(start, start + count)
        values, keep = result.advantages[own].to(self.device), result.keep[own].to(self.device)
        if self.config.exact_replay:
            return UpdateBatch(trajectories, values, keep)
        kept = keep.nonzero().flatten()
        rows = trajectories.learning_rows(kept) | {"advantages": values[kept]}
        rows, text = rebalance(rows, trajectories.text, whole_groups=self.config.objective.name == "crd")
        learned = torch.ones(len(rows["group"]), dtype=torch.bool, device=self.device)
        if len(learned) == 0:  # fewer rows than processes: any one, which does not count
            learned = torch.zeros(1, dtype=torch.bool, device=self.device)
            rows = trajectories.learning_rows(learned.long()) | {"advantages": values[:1]}
            text = trajectories.text
        batch = UpdateBatch(trajectories.with_rows(rows, text), rows["advantages"], learned)
        if self._budget is not None:
            self.objective.forward_rows, self._budget = rows_within(self._budget, self.objective, batch), None
        return batch

    def _set_learning_rate(self) -> None:
        """A function of the iteration alone, so that there is no scheduler state to resume."""
        optimizer = self.config.optimizer
        left = 1 - self.iteration / self.config.run.iterations if optimizer.lr_schedule == "linear" else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = optimizer.lr * left

    def _follow(self) -> None:
        """The averages that trail the policy."""
        # Warmed up, so that the first iterations are not held back by the untrained adapter.
        self.adapters.update_average(min(self.config.optimizer.ema_decay, (1 + self.iteration) / (10 + self.iteration)))
        if self.config.objective.likelihood_free:
            self.adapters.update_old(OLD_DECAY[self.config.objective.old_decay](self.iteration))

    def evaluate(self, *, reference: bool = False, progress: Callable[[int], None] | None = None) -> Evaluation:
        """The held-out chains under the averaged adapter, or under the reference (adapter off)."""
        if self.held_out is None:
            raise ValueError("evaluation.path: expected held-out chains, got null")
        with self.adapters.reference() if reference else self.adapters.averaged():
            return evaluate(
                self.editor,
                self.held_out,
                self.sample.settings(0),
                self.config.evaluation,
                self.config.rewards,
                progress=progress,
            )

    # ---- state

    @property
    def fingerprint(self) -> str:
        """What a checkpoint must agree on to be loaded: family, LoRA scale, the adapter's names and shapes."""
        lora, shapes = self.config.model.lora, {name: list(value.shape) for name, value in self.adapter().items()}
        digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.config.model.family}, LoRA rank {lora.rank} alpha {lora.alpha}, shapes {digest}"

    def adapter(self) -> dict[str, Tensor]:
        """The policy's LoRA tensors by name."""
        return dict(zip(self.adapters.names, (p.detach() for p in self.adapters.parameters), strict=True))

    def save(self) -> Path | None:
        """Write a checkpoint atomically; on a full disk the last good one stays.

        Trainable tensors are equal on every process, so one of them writes and any number of them can resume.
        """
        if not self.accelerator.is_main_process:
            return None
        return save_checkpoint(
            self.output_dir / "checkpoints",
            self.iteration,
            self.adapter(),
            {
                "iteration": self.iteration,
                "optimizer": self.optimizer.state_dict(),
                "adapters": self.adapters.state_dict(),
            },
            self.fingerprint,
            keep=self.config.run.keep_checkpoints,
        )

    def resume(self) -> bool:
        """Load the newest complete checkpoint of `output_dir`; False when there is none."""
        path = latest(self.output_dir / "checkpoints")
        if path is None:
            return False
        adapter, state = load_checkpoint(path, self.fingerprint)
        self.adapters.load("default", adapter)
        self.adapters.load_state_dict(state["adapters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration = state["iteration"]
        return True

    def export(self) -> Path:
        """The averaged LoRA as safetensors for stock `pipe.load_lora_weights(output_dir / "lora")`."""
        path = self.output_dir / "lora"
        with self.adapters.averaged():
            if self.accelerator.is_main_process:
                self.editor.save_lora(str(path))
        return path

    def _start_logs(self) -> Path:
        """Config, TensorBoard and metrics.jsonl; lines after the resumed checkpoint are dropped and made again."""
        path = self.output_dir / "metrics.jsonl"
        if not self.accelerator.is_main_process:
            return path
        self.output_dir.mkdir(parents=True, exist_ok=True)
        (self.output_dir / "config.yaml").write_text(dump_config(self.config))
        self.accelerator.init_trackers("tensorboard")
        for lines in (path, self.output_dir / KEPT):
            if lines.exists():
                kept = [line for line in lines.read_text().splitlines() if _iteration(line) < self.iteration]
                lines.write_text("".join(f"{line}\n" for line in kept))
        return path

    def _log_kept(self, result: AdvantageResult, ids: list[str]) -> None:
        """Which members of which chains the update learns from, a line per iteration of kept.jsonl."""
        if self.accelerator.is_main_process:
            members = result.keep.view(len(ids), -1)
            kept = {name: row.nonzero().flatten().tolist() for name, row in zip(ids, members, strict=True)}
            self.output_dir.mkdir(parents=True, exist_ok=True)
            with (self.output_dir / KEPT).open("a") as lines:
                lines.write(json.dumps({"iteration": self.iteration, "kept": kept}) + "\n")


def _iteration(line: str) -> float:
    """The iteration of a metrics line; infinity for one that a killed run left half written."""
    try:
        return json.loads(line)["iteration"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")
