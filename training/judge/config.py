"""The configuration of judge training; training/configs/judge_real.yaml documents every key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mtedit_fast.judge.prompts import JudgePrompt
from mtedit_fast.training.config import Section
from mtedit_fast.training.config_file import read_config

IMITATION = ("sft", "tract", "regression")
POLICY = ("rloo", "grpo", "real")


class LoRA(Section):
    rank: int = Field(default=16, ge=1, description="rank of the update")
    alpha: int = Field(default=32, ge=1, description="scale is alpha / rank")
    target_modules: list[str] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="module name suffixes; the vision tower has others",
    )


class ModelConfig(Section):
    path: str | None = Field(default=None, description="folder or hub id; null: the tiny playground weights")
    dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="of computation and of frozen weights; trained ones are kept in fp32"
    )
    lora: LoRA | None = Field(default=None, description="null: all weights are trained")
    train_vision: bool = Field(default=True, description="without LoRA: train the vision tower, too")
    attention: Literal["sdpa", "eager"] = Field(default="sdpa", description="implementation in transformers")
    activation_checkpointing: bool = Field(
        default=False, description="recompute activations in the backward: less memory, a third slower"
    )


class PromptConfig(Section):
    scale: Literal["1-5", "0-5", "binary", "yes_no"] = Field(default="1-5", description="the answers there are")
    thinking: bool = Field(default=True, description="a thought precedes the scores; false: they are predicted at once")
    rubric: str | None = Field(default=None, description="what the system message says; null: the scale's own words")

    @property
    def prompt(self) -> JudgePrompt:
        return JudgePrompt(self.scale, thinking=self.thinking, rubric=self.rubric)


class DataConfig(Section):
    path: str = Field(min_length=1, description="JSONL of {id, image, edits, instructions, scores, thought?}")
    skip_unreadable: bool = Field(
        default=False, description="leave examples with missing or broken images out, and count them; false: an error"
    )


class MethodConfig(Section):
    name: Literal["sft", "tract", "regression", "rloo", "grpo", "real"] = Field(
        default="real",
        description="imitation (cross-entropy, also with squared error, squared error alone), or reinforcement on "
        "sampled thoughts (0/1 accuracy, 0/1 in the group's units, regression-aware)",
    )
    squared_weight: float = Field(default=1.0, ge=0, description="tract: of (ŷ − y)² beside the cross-entropy")
    advantage: Literal["leave_one_out", "group"] = Field(
        default="leave_one_out", description="real: over the deviation of the leave-one-out advantages, or of rewards"
    )
    reward: Literal["probability", "log_probability"] = Field(
        default="probability", description="real: the second reward, p(y) as in its code or log p(y) as in its paper"
    )
    likelihood_weight: float = Field(
        default=1.0, ge=0, description="real: λ, of the likelihood, in reward and refinement"
    )
    beta: float = Field(default=0.01, ge=0, description="real: of the refinement (ŷ − y)² − λ·log p(y); 0: none")
    advantage_clip: float = Field(default=1.0, gt=0, description="real: advantages are clamped to ± this")


class SamplingConfig(Section):
    samples: int = Field(default=8, ge=2, description="thoughts per question (n)")
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=0.9, gt=0, le=1, description="nucleus")
    max_new_tokens: int = Field(default=1024, ge=1, description="of an answer; a longer one is cut and invalid")


class OptimizerConfig(Section):
    lr: float = Field(default=1e-6, gt=0, description="AdamW learning rate; LoRA takes about ten times as much")
    lr_schedule: Literal["constant", "linear"] = Field(default="linear", description="linear falls to 0 over run.steps")
    warmup: int = Field(default=0, ge=0, description="steps over which the learning rate rises from 0")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    weight_decay: float = Field(default=0.1, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradient clipping")
    questions: int = Field(default=32, ge=1, description="examples per optimizer step")
    micro_batch: int = Field(default=8, ge=1, description="questions per forward, each with all its answers")
    sample_batch: int = Field(default=32, ge=1, description="questions per call of generation, each samples times")
    max_skipped: int = Field(
        default=5, ge=1, description="steps in a row that may be skipped because loss or gradient is not finite"
    )


class EvaluationConfig(Section):
    path: str | None = Field(default=None, description="JSONL of held-out examples; null: no evaluation")
    examples: int = Field(default=512, ge=1, description="how many, from the top of the file")
    every: int = Field(default=0, ge=0, description="steps; 0: only after training")
    samples: int = Field(default=4, ge=1, description="thoughts per question")
    batch: int = Field(default=32, ge=1, description="questions per forward")
    seed: int = Field(default=0, ge=0)


class RunConfig(Section):
    steps: int = Field(default=200, ge=0, description="optimizer steps")
    seed: int = Field(default=0, ge=0, description="of data order, sampling and adapter")
    output_dir: str = Field(default="runs/judge_train", min_length=1)
    checkpoint_every: int = Field(default=50, ge=1, description="steps")
    keep_checkpoints: int = Field(default=2, ge=1)


class JudgeConfig(Section):
    model: ModelConfig = ModelConfig()
    prompt: PromptConfig = PromptConfig()
    data: DataConfig
    method: MethodConfig = MethodConfig()
    sampling: SamplingConfig = SamplingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    run: RunConfig = RunConfig()

    @property
    def samples_thoughts(self) -> bool:
        return self.method.name in POLICY

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.samples_thoughts and not self.prompt.thinking:
            raise ValueError(
                f"method.name: {self.method.name} learns from sampled thoughts, which prompt.thinking: false has none "
                f"of; expected one of {', '.join(IMITATION)}, or prompt.thinking: true"
            )
        if self.run.steps and self.optimizer.warmup > self.run.steps:
            raise ValueError(
                f"optimizer.warmup: expected at most run.steps = {self.run.steps}, got {self.optimizer.warmup}"
            )
        return self


def load_judge_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> JudgeConfig:
    """Read the configuration of a judge's training; see `training.config_file.read_config`."""
    return read_config(source, overrides, JudgeConfig)
