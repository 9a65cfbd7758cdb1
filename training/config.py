"""The sections of the training configuration; `training.config_file` reads and writes them as YAML."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from mtedit_fast.training.advantages import AdvantageConfig


class Section(BaseModel):
    """Unknown keys and silent conversions (a quoted number, yes for 1) are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class LoRAConfig(Section):
    rank: int = Field(default=16, ge=1, description="rank of the update")
    alpha: int = Field(default=32, ge=1, description="scale is alpha / rank")
    target_modules: list[str] | None = Field(
        default=None, description="module name suffixes; null: the family's defaults"
    )
    dropout: float = Field(default=0.0, description="0: dropout would break the exact replay of a rollout")

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, value: float) -> float:
        if value != 0:
            raise ValueError("expected 0, because dropout would break the exact replay of a rollout")
        return value


class ModelConfig(Section):
    family: Literal["kontext", "qwen_image_edit", "flux2_klein", "flux2_klein_kv"] = Field(
        default="kontext", description="editor family"
    )
    path: str | None = Field(default=None, description="pipeline folder or hub id; null: the tiny playground weights")
    dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="of the frozen weights and the transformer's input"
    )
    lora: LoRAConfig = LoRAConfig()
    compile: Literal["none", "blocks", "whole"] = Field(
        default="none", description="the transformer: each kind of block once, or as one graph (minutes, then faster)"
    )
    attention: Literal["native", "cudnn", "flash", "flash3", "flash3_hub", "xformers"] = Field(
        default="native", description="back end; native is torch's own choice, flash3 is for Hopper GPUs"
    )
    activation_checkpointing: bool = Field(
        default=False, description="recompute the blocks' activations in the backward: less memory, a third slower"
    )


def _pixels(value: Any) -> Any:
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    if not all(type(side) is int and side >= 8 for side in sides):
        raise ValueError("expected pixels, such as 512 or [512, 768]")
    return value


Resolution = Annotated[int | list[int], BeforeValidator(_pixels)]


def size_of(resolution: int | list[int]) -> tuple[int, int]:
    """(height, width) in pixels."""
    height, width = resolution if isinstance(resolution, list) else [resolution] * 2
    return height, width


class DataConfig(Section):
    path: str = Field(min_length=1, description="JSONL of {id, image, instructions}")
    resolution: Resolution = Field(default=64, description="pixels: a side, or [height, width]")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return size_of(self.resolution)


class WindowConfig(Section):
    """`size` consecutive stochastic steps, starting uniformly in [lo, hi - size]; ODE outside."""

    size: int = Field(default=2, ge=1, description="stochastic steps per rollout")
    lo: int = Field(default=0, ge=0, description="first step of the range")
    hi: int = Field(description="one past its last step")


class RolloutConfig(Section):
    groups_per_iteration: int = Field(
        default=4, ge=1, description="(reference image, instructions) chains per iteration, over all processes"
    )
    group_size: int = Field(default=8, ge=2, description="trajectories per chain")
    turns: int = Field(default=3, ge=1, description="edits per trajectory (K)")
    num_steps: int = Field(default=6, ge=2, description="denoising steps per edit (T)")
    variant: Literal["sde", "cps", "dance", "ddim", "wan", "ode", "dpm2m"] = Field(
        default="sde", description="sampler; ode (Euler) and dpm2m (DPM-Solver++ 2M) are deterministic, for nft and crd"
    )
    eta: float = Field(default=0.7, gt=0, description="noise level")
    window: WindowConfig | None = Field(default=None, description="stochastic steps; null: all but the last")
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="samples per transformer forward; null: the most that is estimated to fit the GPU",
    )
    guidance_scale: float = Field(default=1.0, ge=0, description="the editor's embedded guidance")
    reference_resolution: Resolution | None = Field(
        default=None, description="pixels that references are brought to, a side or [height, width]; null: the edit's"
    )
    precision: Literal["model", "fp8"] = Field(
        default="model", description="of the sampler's linear layers; fp8 needs compute capability 8.9 and no sharding"
    )
    engine: str | None = Field(
        default=None,
        description="folder of `mtedit-fast export --lora-rank`, which samples in the model's place (nft, crd)",
    )
    cuda_graphs: bool = Field(
        default=True,
        description="replay each denoising step as one captured launch; the same numbers, on CUDA alone, not for Qwen",
    )
    latent_chain: bool = Field(
        default=False, description="hand latents to the next turn without decode, 8-bit and encode"
    )
    state_dtype: Literal["fp32", "bf16"] = Field(default="fp32", description="of the stored trajectory")
    max_sequence_length: int = Field(default=512, ge=1, description="text tokens")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.latent_chain and self.reference_resolution is not None:
            raise ValueError(
                "reference_resolution: expected null with latent_chain, which does not come back to pixels"
            )
        window = self.window
        if window is not None and not window.lo + window.size <= window.hi <= self.num_steps - 1:
            raise ValueError(
                f"window: expected lo + size <= hi <= num_steps - 1 = {self.num_steps - 1} (the last step is "
                f"deterministic), got lo={window.lo}, size={window.size}, hi={window.hi}"
            )
        return self


class RewardConfig(Section):
    name: str = Field(min_length=1, pattern="^[^/]+$", description="under which it is logged")
    path: str = Field(pattern=r"^[\w.]+:\w+$", description="package.module:function of a RewardBatch -> [B, K]")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the function")
    weight: float = Field(default=1.0, description="in the fusion; 0: only logged")
    range: list[float] | None = Field(
        default=None, min_length=2, max_length=2, description="[lo, hi] of its scores, brought to [0, 1]; null: as is"
    )
    binarize: float | None = Field(
        default=None, description="1 where the score is at least this, else 0; null: the score itself"
    )
    audit: str | None = Field(
        default=None,
        description="a reward of weight 0, on the same scale, that this one should agree with: a gap that grows over "
        "training is reported as reward hacking",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"range: expected [lo, hi] with lo < hi, got {self.range}")
        if self.range is not None and self.binarize is not None and not self.range[0] < self.binarize <= self.range[1]:
            raise ValueError(f"binarize: expected a score within range {self.range}, got {self.binarize}")
        return self


class ObjectiveConfig(Section):
    name: Literal["grpo", "grpo_guard", "nft", "crd"] = Field(
        default="grpo", description="policy gradients on sampled steps, or likelihood-free on clean images"
    )
    advantage_clip: float = Field(default=5.0, gt=0, description="advantages are clamped to ± this")
    kl_weight: float = Field(
        default=0.0, ge=0, description="of the distance to the model without its adapter; 0: not computed"
    )
    clip_range: float = Field(default=1e-4, gt=0, description="grpo: of the ratio around 1")
    importance_cap: float | None = Field(
        default=None,
        gt=0,
        description="grpo: weight samples by min(p trained / p sampled, this), for a rollout in another precision",
    )
    kl_form: Literal["flow_grpo", "exact"] = Field(
        default="flow_grpo", description="grpo: without the step size, or the Gaussian's"
    )
    guard_mean: Literal["sample", "batch_mean"] = Field(
        default="sample", description="grpo_guard: its correction per sample or as in its public code"
    )
    beta: float = Field(default=1.0, gt=0, description="nft, crd: how far from the old policy a sample pushes")
    advantage_mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = Field(
        default="all", description="nft, crd: which advantages count"
    )
    draws: int = Field(default=2, ge=1, description="nft, crd: noise levels per trajectory and turn")
    times: Literal["schedule", "uniform"] = Field(
        default="schedule", description="nft, crd: noise levels from the sampler's schedule, or spread over [0, 1]"
    )
    old_decay: Literal["on_policy", "ramp", "delayed", "crd"] = Field(
        default="on_policy", description="nft, crd: how slowly the sampling policy follows the trained one"
    )

    @property
    def likelihood_free(self) -> bool:
        return self.name in ("nft", "crd")


class OptimizerConfig(Section):
    lr: float = Field(default=3e-4, gt=0, description="AdamW learning rate")
    lr_schedule: Literal["constant", "linear"] = Field(
        default="constant", description="linear falls to 0 over run.iterations"
    )
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    weight_decay: float = Field(default=1e-4, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradient clipping")
    updates_per_iteration: int = Field(default=1, ge=1, description="optimizer steps per rollout")
    ema_decay: float = Field(
        default=0.9, ge=0, lt=1, description="of the adapter's moving average, which is evaluated and exported; 0: none"
    )
    forward_rows: int | None = Field(
        default=None,
        ge=1,
        description="samples per forward with gradient; null: grpo replays exactly, in the rollout's batch shape",
    )
    memory_gib: float | None = Field(
        default=None, gt=0, description="activation memory of such a forward, from which forward_rows is then measured"
    )
    max_skipped: int = Field(
        default=5, ge=1, description="optimizer steps in a row that may be skipped because the gradient is not finite"
    )


class EvaluationConfig(Section):
    """Held-out chains, edited with the deterministic sampler and the same noise before, during and after training."""

    path: str | None = Field(default=None, description="JSONL of held-out chains; null: no evaluation")
    success: str | None = Field(
        default=None,
        pattern=r"^[\w.]+:\w+$",
        description="package.module:function of a RewardBatch -> [B, K], 1 where a turn succeeded; null: rewards only",
    )
    chains: int = Field(default=400, ge=1, description="how many, from the top of the file")
    every: int = Field(default=0, ge=0, description="iterations; 0: only before and after")
    num_steps: int | None = Field(default=None, ge=1, description="denoising steps; null: the rollout's")
    seed: int = Field(default=0, ge=0, description="of the noise")


class RunConfig(Section):
    iterations: int = Field(default=100, ge=0)
    seed: int = Field(default=0, ge=0)
    output_dir: str = Field(default="runs/train", min_length=1)
    checkpoint_every: int = Field(default=10, ge=1, description="iterations")
    keep_checkpoints: int = Field(default=2, ge=1)
    sharding: Literal["none", "fsdp2"] = Field(
        default="none", description="of the frozen weights over the processes of torchrun or accelerate launch"
    )
    timeout: float = Field(
        default=1800.0, gt=0, description="seconds to wait for another process before it counts as lost"
    )
    control: Literal["none", "shuffle"] = Field(
        default="none", description="shuffle permutes advantages within the batch"
    )
    precision: Literal["no", "bf16"] = Field(default="no", description="accelerate's mixed precision")


class TrainConfig(Section):
    model: ModelConfig = ModelConfig()
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    rewards: list[RewardConfig] = Field(min_length=1)
    advantage: AdvantageConfig = AdvantageConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    run: RunConfig = RunConfig()

    def captures_steps(self, text_sees_image: bool) -> bool:
        """Whether rollouts on CUDA replay captured steps. Sharded weights come and go, texts that see the image differ
        in length and would each be captured, and an engine captures for itself."""
        rollout = self.rollout
        return rollout.cuda_graphs and rollout.engine is None and self.run.sharding == "none" and not text_sees_image

    @property
    def exact_replay(self) -> bool:
        """Whether the update repeats the rollout's forwards in their own shape."""
        optimizer = self.optimizer
        return not self.objective.likelihood_free and optimizer.forward_rows is None and optimizer.memory_gib is None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [reward.name for reward in self.rewards]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"rewards: expected distinct names, got {', '.join(sorted(repeated))} more than once")
        weights = {reward.name: reward.weight for reward in self.rewards}
        for reward in self.rewards:
            if reward.audit is not None and (reward.audit == reward.name or weights.get(reward.audit) != 0):
                unweighted = ", ".join(name for name, weight in weights.items() if weight == 0) or "none here"
                raise ValueError(
                    f"rewards: {reward.name}.audit: expected the name of a reward of weight 0 ({unweighted}), "
                    f"got {reward.audit!r}"
                )
        deterministic = self.rollout.variant in ("ode", "dpm2m")
        if deterministic and not self.objective.likelihood_free:
            raise ValueError(
                f"rollout.variant: objective {self.objective.name} needs a stochastic sampler such as 'sde', "
                f"got {self.rollout.variant!r}; or set objective.name to nft or crd"
            )
        if self.objective.name == "grpo_guard" and self.rollout.variant == "cps":
            raise ValueError(
                "rollout.variant: grpo_guard corrects Gaussian log-probs, and those of cps are squared distances: "
                "expected sde, dance, ddim or wan, got 'cps'; or set objective.name to grpo"
            )
        if self.advantage.credit == "dense_ode" and self.objective.likelihood_free:
            raise ValueError(
                f"advantage.credit: dense_ode has one advantage per sampling step, which objective "
                f"{self.objective.name} does not use; expected another credit, or objective.name grpo"
            )
        if self.objective.likelihood_free and self.objective.times == "schedule":
            steps = self.rollout.num_steps
            if self.objective.draws > steps:
                raise ValueError(
                    f"objective.draws: expected at most the {steps} noise levels of rollout.num_steps, got "
                    f"{self.objective.draws}; or set objective.times to uniform"
                )
        if self.model.family == "flux2_klein_kv" and self.run.sharding != "none":
            raise ValueError(
                "run.sharding: processes extract unequal numbers of references' keys and values: expected none with "
                f"model.family flux2_klein_kv, got {self.run.sharding}; or take flux2_klein"
            )
        low, exact = self.rollout.precision != "model", self.exact_replay
        if low and exact:
            raise ValueError(
                f"rollout.precision: {self.rollout.precision} cannot be replayed exactly: expected "
                "optimizer.forward_rows or memory_gib, with which old log-probs are taken in the trained precision, or "
                "objective.name nft or crd"
            )
        if self.rollout.engine is not None and not (self.objective.likelihood_free and self.run.sharding == "none"):
            raise ValueError(
                "rollout.engine: an engine has no log-probs of the trained model: expected objective.name nft or crd, "
                f"and run.sharding none, got {self.objective.name} and {self.run.sharding}"
            )
        if low and self.run.sharding != "none":
            raise ValueError(f"rollout.precision: expected model with run.sharding {self.run.sharding}, got fp8")
        if self.objective.importance_cap is not None and (exact or self.objective.likelihood_free):
            raise ValueError(
                "objective.importance_cap: expected null where there is nothing to correct (exact replay, nft, crd); "
                "set optimizer.forward_rows for grpo"
            )
        if self.optimizer.forward_rows is not None and self.optimizer.memory_gib is not None:
            raise ValueError("optimizer: expected forward_rows or memory_gib, which decides on it, got both")
        return self
