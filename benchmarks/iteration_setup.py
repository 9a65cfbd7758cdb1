"""What bench_iteration runs: a Trainer, and beside it the loop of today's trainers on the same weights and rewards."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import record
import torch
from iteration_rewards import loop_scores
from peers.iteration_loop import IterationLoop, Recorded, Samples
from peft import LoraConfig, get_peft_model
from random_editors import random_editor
from torch import Tensor, nn

from mtedit_fast.timing import PhaseTimer
from mtedit_fast.training.config import TrainConfig
from mtedit_fast.training.config_file import load_config
from mtedit_fast.training.data import EditChains, Record
from mtedit_fast.training.playground.data import write_dataset
from mtedit_fast.training.playground.models import MAX_TOKENS
from mtedit_fast.training.run import load_editor
from mtedit_fast.training.trainer import Trainer

KL_WEIGHT = 1e-4
ITERATIONS = 16
"""Of which each has other chains; then they come again."""
NEEDED = {"both": (KL_WEIGHT, False), "old": (0.0, False), "neither": (0.0, True)}
"""Weight of the reference's velocities, and whether the old policy equals θ; the names are bench_update's."""


@dataclass(frozen=True)
class Case:
    """An iteration of `groups` × `group` trajectories of `turns` turns in `steps` steps each.

    full: FLUX.1-Kontext-dev, a Qwen3-VL-8B and a DINOv3 ViT-B/16 with random weights; else the playground's models.
    needed: of `NEEDED`, what an NFT update has to compute. forward_rows: None: grpo's exact replay.
    """

    full: bool
    device: torch.device
    dtype: str
    objective: str
    needed: str
    groups: int
    group: int
    turns: int
    size: int
    steps: int
    draws: int
    micro_batch: int
    loop_batch: int
    forward_rows: int | None
    filter: str
    compile: str = "none"
    cuda_graphs: bool = True
    attention: str = "native"

    @property
    def update_rows(self) -> int:
        """Samples per forward with gradient, the loop's too."""
        return self.forward_rows or self.micro_batch

    @property
    def checkpointing(self) -> bool:
        """Of both sides: GRPO's exact replay has as many rows to a forward as the rollout."""
        return self.full and self.objective == "grpo"

    @property
    def columns(self) -> dict[str, Any]:
        modes = [self.needed if self.objective == "nft" else "batched" if self.forward_rows else "exact"]
        modes += [f"compiled {self.compile}"] * (self.compile != "none")
        modes += ["graphs"] * (self.cuda_graphs and self.device.type == "cuda")
        modes += [f"{self.attention} attention"] * (self.attention != "native")
        learned = f", {self.draws} draws" if self.objective == "nft" else ""
        return record.environment(self.device) | {
            "op": "iteration",
            "variant": f"{'kontext' if self.full else 'playground'} {self.objective}, {self.filter}",
            "shape": f"{self.groups}x{self.group}x{self.turns}x{self.size} in {self.steps}{learned} "
            f"by {self.micro_batch}|{self.loop_batch}|{self.update_rows}",
            "dtype": self.dtype,
            "backend": ", ".join(modes),
            "timing": "call",
        }

    def __str__(self) -> str:
        columns = self.columns
        return "; ".join(columns[name] for name in ("variant", "shape", "dtype", "backend"))

    def config(self, folder: Path) -> TrainConfig:
        path = "iteration_rewards:random" if self.full else "mtedit_fast.training.playground.rewards:"
        judge, consistency = ("_judge_score", "_consistency") if self.full else ("judge_score", "content_consistency")
        kl_weight, _ = NEEDED[self.needed] if self.objective == "nft" else (0.0, False)
        mixed = self.dtype == "bf16"
        return load_config(
            {
                "model": {
                    "dtype": self.dtype,
                    "lora": {"rank": 32, "alpha": 64} if self.full else {"rank": 16, "alpha": 32},
                    "compile": self.compile,
                    "attention": self.attention,
                    "activation_checkpointing": self.checkpointing,
                },
                "data": {"path": str(folder / "train.jsonl"), "resolution": self.size},
                "rollout": {
                    "groups_per_iteration": self.groups,
                    "group_size": self.group,
                    "turns": self.turns,
                    "num_steps": self.steps,
                    "variant": "ode" if self.objective == "nft" else "sde",  # whose step the loop has, too
                    "micro_batch": self.micro_batch,
                    "guidance_scale": 2.5,
                    "cuda_graphs": self.cuda_graphs,
                    "max_sequence_length": 512 if self.full else MAX_TOKENS,
                },
                "rewards": [
                    {"name": "judge", "path": path + judge, "range": [1.0, 5.0]},
                    {"name": "consistency", "path": path + consistency, "weight": 0.3},
                ],
                "advantage": {"filter": self.filter},
                "objective": {"name": self.objective, "draws": self.draws, "kl_weight": kl_weight, "clip_range": 0.1},
                "optimizer": {"forward_rows": self.forward_rows, "max_grad_norm": 1e9},  # a check sees the gradient
                "run": {"output_dir": str(folder), "precision": "bf16" if mixed else "no"},
            }
        )


class Setup:
    """Both sides, on one set of frozen weights; `reset` gives both the adapters they began with.

    folder: for the data set and what a trainer writes.
    """

    def __init__(self, case: Case, folder: Path):
        self.case, self.config = case, case.config(folder)
        write_dataset(folder, ITERATIONS * case.groups, turns=case.turns)
        chains = EditChains(self.config.data.path, turns=case.turns, resolution=case.size)
        device = case.device
        if case.full:
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.dtype]
            self.editor = random_editor("kontext", device, dtype)
        else:
            self.editor = load_editor(self.config, device)
        twin = self._twin(self.editor)
        if case.checkpointing:
            twin.transformer.enable_gradient_checkpointing()
        self.trainer = Trainer(self.editor, chains, self.config)
        self.adapters = self.trainer.adapters
        lora = self.config.model.lora
        options = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=self.editor.lora_targets)
        self.policy: Any = get_peft_model(twin.pipeline.transformer, options)
        self.policy.add_adapter("old", options)
        self.policy.eval()
        self.values = {name: self._values(seed) for name, seed in (("default", 1), ("old", 2))}
        if case.objective != "nft" or NEEDED[case.needed][1]:
            self.values["old"] = self.values["default"]
        self.timer = PhaseTimer(device)
        self.loop = self._loop(twin)
        self.reset()

    @property
    def records(self) -> list[Record]:
        """Of the iteration, read anew, as the trainer does."""
        return self.trainer.chains.batch(self.trainer.iteration, self.case.groups)

    def _twin(self, editor: Any) -> Any:
        """Another editor over the same weights, whose transformer can have other adapters."""
        parts, transformer = editor.pipeline.components, editor.pipeline.transformer
        shared = {id(tensor): tensor for tensor in (*transformer.parameters(), *transformer.buffers())}
        pipeline = type(editor.pipeline)(**(parts | {"transformer": copy.deepcopy(transformer, shared)}))
        return type(editor)(pipeline, max_sequence_length=editor.max_sequence_length)

    def _values(self, seed: int) -> list[Tensor]:
        """Near an adapter's beginning: an update that is small beside the weights."""
        generator = torch.Generator(self.case.device).manual_seed(seed)
        scales = (p.shape[1] ** -0.5 if ".lora_A." in name else 2e-3 for name, p in self._own())
        return [
            scale * torch.randn(p.shape, generator=generator, device=p.device)
            for scale, (_, p) in zip(scales, self._own(), strict=True)
        ]

    def _own(self) -> list[tuple[str, nn.Parameter]]:
        return list(zip(self.adapters.names, self.adapters.parameters, strict=True))

    def _theirs(self, adapter: str) -> list[nn.Parameter]:
        """peft's, in the order of ours."""
        found = dict(self.policy.named_parameters())
        return [found[f"base_model.model.{name.removesuffix('.weight')}.{adapter}.weight"] for name, _ in self._own()]

    def reset(self) -> None:
        for adapter, values in self.values.items():
            if adapter == "default" or self.adapters.has_old:
                self.adapters.load(adapter, dict(zip(self.adapters.names, values, strict=True)))
            torch._foreach_copy_([parameter.data for parameter in self._theirs(adapter)], values)
        if self.adapters.has_old and self.values["old"] is self.values["default"]:
            self.adapters.update_old(0.0)

    def _loop(self, twin: Any) -> IterationLoop:
        case, config = self.case, self.config
        optimizer = torch.optim.AdamW(
            self._theirs("default"), lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay
        )
        mixed = config.run.precision == "bf16"
        precision: Callable[[], AbstractContextManager[object]] = nullcontext
        if mixed:
            precision = partial(torch.autocast, case.device.type, torch.bfloat16)
        return IterationLoop(
            Recorded(twin, self.trainer.sample.settings(0), batch=case.loop_batch),
            self.policy,
            optimizer,
            loop_scores(case.full, case.device),
            self.advantages,
            config.objective,
            forward_rows=case.update_rows,
            max_grad_norm=config.optimizer.max_grad_norm,
            timer=self.timer,
            precision=precision,
            sample_old=case.objective == "nft",
        )

    def advantages(self, samples: Samples, rewards: dict[str, Tensor], records: list[Record]) -> tuple[Tensor, Tensor]:
        """As the trainer's: both sides learn from the same."""
        result = self.trainer.advantages(samples, rewards, records)
        return result.advantages.to(self.case.device), result.keep.to(self.case.device)
