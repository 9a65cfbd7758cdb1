"""What bench_update measures: an editor at two sizes, with adapters and a batch of its own."""

import copy
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import bench_adapters
import torch
from torch import Tensor

from mtedit_fast.attention import without_cudnn_attention
from mtedit_fast.editors import Condition, KontextEditor
from mtedit_fast.rollout import RolloutConfig, Trajectories, rollout, sample_seeds
from mtedit_fast.training.nft import NFT
from mtedit_fast.training.planned_lora import PlannedLinear
from mtedit_fast.training.playground.models import load_pipeline
from mtedit_fast.training.update import UpdateBatch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """What an iteration learns from: `groups` × `group_size` trajectories of `turns` turns.

    model: "tiny", the playground's, or "kontext", FLUX.1-Kontext-dev at full size with random weights.
    """

    model: str
    dtype: torch.dtype
    device: torch.device
    groups: int
    group_size: int
    turns: int
    num_steps: int  # of the sampler
    stored: int  # of them stochastic
    draws: int  # noise levels per trajectory and turn
    micro_batch: int  # of the rollout, and so of its exact replay
    forward_rows: int  # nft
    replay_rows: tuple[int, ...]  # grpo
    samples: int  # timed updates per implementation, at least

    @property
    def side(self) -> int:
        return 64 if self.model == "tiny" else 512

    @property
    def tokens(self) -> tuple[int, int]:
        """(image with its reference, text)."""
        return (32, 16) if self.model == "tiny" else (2048, 512)

    @property
    def shape(self) -> str:
        return f"{self.groups}x{self.group_size}x{self.turns}x{sum(self.tokens)} by {self.forward_rows}"


def tiny(device: torch.device, dtype: torch.dtype = torch.float32) -> Case:
    return Case("tiny", dtype, device, 2, 16, 3, 6, 5, 2, 16, 32, (32, 128), 10)


def full(device: torch.device) -> Case:
    return Case("kontext", torch.bfloat16, device, 1, 16, 1, 4, 2, 1, 4, 2, (8, 16), 3)


class Editor(KontextEditor):
    """Any Flux transformer behind the playground's VAE, with random text, under autocast as the trainer has it."""

    def __init__(self, case: Case, transformer: Any):
        super().__init__(load_pipeline(dtype=case.dtype).to(case.device))
        self.case, self.transformer, self.config = case, transformer, transformer.config
        self.rows: Counter[bool] = Counter()  # through the transformer, by whether they had a gradient

    def encode_text(self, prompts: list[str], images: Tensor | None = None) -> dict[str, Tensor]:
        generator = torch.Generator(self.device).manual_seed(len(prompts))

        def random(*shape: int) -> Tensor:
            return torch.randn(len(prompts), *shape, generator=generator, device=self.device).to(self.dtype)

        text = random(self.case.tokens[1], self.config.joint_attention_dim)
        return {"prompt_embeds": text, "pooled": random(self.config.pooled_projection_dim)}

    def velocity(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        self.rows[torch.is_grad_enabled()] += len(latents)
        mixed = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype) if mixed else nullcontext():
            return super().velocity(latents, timestep, condition).float()

    def of(self, transformer: Any) -> "Editor":
        twin = copy.copy(self)
        twin.transformer = transformer
        return twin


class LowPrecision(NFT):
    """Rows without gradient go through another transformer."""

    def __init__(self, *arguments: Any, transformer: Any):
        super().__init__(*arguments)
        self.transformer = transformer

    def _others(self, *arguments: Any) -> tuple[Tensor | None, Tensor | None]:
        policy = self.editor.transformer
        self.editor.transformer = self.transformer
        try:
            return super()._others(*arguments)
        finally:
            self.editor.transformer = policy


class Setup:
    """A model with its adapters, ours and peft's of equal values, and a batch that it rolled out."""

    def __init__(self, case: Case, *, compiled: bool = False):
        self.case = case
        if compiled:  # ours and peft's blocks share their code, and each has a graph for θ, the old policy and so on
            torch._dynamo.reset()
            torch._dynamo.config.recompile_limit = 64
            torch._dynamo.config.fail_on_recompile_limit_hit = True  # or it would go on without compiled code
        self.models = bench_adapters.Models(bench_adapters.Case(case.model, 1, 1, case.dtype, case.device, compiled))
        self.own = self.models.own
        self.values = {name: [p.detach().clone() for p in self.models.theirs(name)] for name in ("default", "old")}
        self.editor = Editor(case, self.own.model)
        self.optimizers = {
            name: torch.optim.AdamW(parameters, lr=0.0)  # so that every update starts from the same weights
            for name, parameters in (("own", self.own.parameters), ("peft", self.models.theirs("default")))
        }
        for optimizer in self.optimizers.values():  # their state is there before any memory is measured
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
        with (
            torch.compiler.set_stance("force_eager"),
            without_cudnn_attention(),
        ):  # as what is replayed exactly is sampled
            self.trajectories = self.rolled_out()
        self.trajectories.raise_if_not_finite()
        generator = torch.Generator().manual_seed(2)
        advantages = torch.randn(len(self.trajectories), case.turns, generator=generator).to(case.device)
        self.batch = UpdateBatch(self.trajectories, advantages, torch.ones_like(advantages[:, 0], dtype=torch.bool))

    def rolled_out(self) -> Trajectories:
        case = self.case
        references = torch.rand(case.groups, 3, case.side, case.side, generator=torch.Generator().manual_seed(3))
        config = RolloutConfig(
            group_size=case.group_size,
            num_steps=case.num_steps,
            window=(0, case.stored),
            micro_batch=case.micro_batch,
            guidance_scale=2.5,
            latent_chain=True,
        )
        seeds = sample_seeds(0, 0, case.groups * case.group_size, case.device)
        return rollout(self.editor, references.to(case.device), [[""] * case.turns] * case.groups, config, seeds)

    @cached_property
    def low_precision(self) -> Any:
        """The transformer with float8 weights in place of the frozen ones, its adapters shared."""
        try:
            from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
        except ImportError:
            raise ImportError("--fp8 needs torchao: pip install 'mtedit-fast[fp8]'") from None
        layers = [module for module in self.own.model.modules() if isinstance(module, PlannedLinear)]
        shared: list[Any] = [self.own, layers[0].plan, *self.own.model.parameters()]
        twin = copy.deepcopy(self.own.model, {id(value): value for value in shared})
        config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
        quantize_(twin, config, filter_fn=lambda _, name: name.endswith(".base_layer"))
        # Eager, quantising the activations costs more than the product saves.
        twin.compile_repeated_blocks(dynamic=False)
        return twin

    def set_old(self, *, current: bool) -> None:
        """The old policy equal to θ, or different."""
        self.models.load("old", self.values["default" if current else "old"])
