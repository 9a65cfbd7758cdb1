"""The training configuration: YAML plus `key=value` overrides -> `TrainConfig`, and back with its documentation."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

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
    family: Literal["kontext"] = Field(default="kontext", description="editor family")
    path: str | None = Field(default=None, description="pipeline folder or hub id; null: the tiny playground weights")
    dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="of the frozen weights and the transformer's input"
    )
    lora: LoRAConfig = LoRAConfig()


class DataConfig(Section):
    path: str = Field(min_length=1, description="JSONL of {id, image, instructions}")
    resolution: int | list[int] = Field(default=64, description="pixels: a side, or [height, width]")

    @field_validator("resolution", mode="before")
    @classmethod
    def _pixels(cls, value: Any) -> Any:
        sides = value if isinstance(value, list) and len(value) == 2 else [value]
        if not all(type(side) is int and side >= 8 for side in sides):
            raise ValueError("expected pixels, such as 512 or [512, 768]")
        return value

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        height, width = self.resolution if isinstance(self.resolution, list) else [self.resolution] * 2
        return height, width


class WindowConfig(Section):
    """`size` consecutive stochastic steps, starting uniformly in [lo, hi - size]; ODE outside."""

    size: int = Field(default=2, ge=1, description="stochastic steps per rollout")
    lo: int = Field(default=0, ge=0, description="first step of the range")
    hi: int = Field(description="one past its last step")


class RolloutConfig(Section):
    groups_per_iteration: int = Field(
        default=4, ge=1, description="(reference image, instructions) chains per iteration"
    )
    group_size: int = Field(default=8, ge=2, description="trajectories per chain")
    turns: int = Field(default=3, ge=1, description="edits per trajectory (K)")
    num_steps: int = Field(default=6, ge=2, description="denoising steps per edit (T)")
    variant: Literal["sde", "cps", "dance", "ddim", "wan"] = Field(
        default="sde", description="sampler of the stochastic steps"
    )
    eta: float = Field(default=0.7, gt=0, description="noise level")
    window: WindowConfig | None = Field(default=None, description="stochastic steps; null: all but the last")
    micro_batch: int = Field(default=32, ge=1, description="samples per transformer forward")
    guidance_scale: float = Field(default=1.0, ge=0, description="the editor's embedded guidance")
    latent_chain: bool = Field(
        default=False, description="hand latents to the next turn without decode, 8-bit and encode"
    )
    state_dtype: Literal["fp32", "bf16"] = Field(default="fp32", description="of the stored trajectory")
    max_sequence_length: int = Field(default=512, ge=1, description="text tokens")

    @model_validator(mode="after")
    def _window_inside(self) -> Self:
        window = self.window
        if window is not None and not window.lo + window.size <= window.hi <= self.num_steps - 1:
            raise ValueError(
                f"window: expected lo + size <= hi <= num_steps - 1 = {self.num_steps - 1} (the last step is "
                f"deterministic), got lo={window.lo}, size={window.size}, hi={window.hi}"
            )
        return self


class RewardConfig(Section):
    name: str = Field(min_length=1, description="under which it is logged")
    path: str = Field(pattern=r"^[\w.]+:\w+$", description="package.module:function of a RewardBatch -> [B, K]")
    weight: float = Field(default=1.0, description="in the fusion")


class ObjectiveConfig(Section):
    name: Literal["grpo", "grpo_guard"] = Field(default="grpo", description="policy objective")
    clip_range: float = Field(default=1e-4, gt=0, description="of the ratio around 1")
    advantage_clip: float = Field(default=5.0, gt=0, description="advantages are clamped to ± this")
    kl_weight: float = Field(
        default=0.0, ge=0, description="of the KL to the model without its adapter; 0: not computed"
    )
    kl_form: Literal["flow_grpo", "exact"] = Field(
        default="flow_grpo", description="without the step size, or the Gaussian's"
    )
    guard_mean: Literal["sample", "batch_mean"] = Field(
        default="sample", description="of grpo_guard's correction, per sample or as in its public code"
    )


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
    steps_per_forward: int = Field(
        default=1, ge=1, description="1: exact replay in the rollout's batch shape; more: faster"
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

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [reward.name for reward in self.rewards]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"rewards: expected distinct names, got {', '.join(sorted(repeated))} more than once")
        stochastic = self.rollout.window.size if self.rollout.window else self.rollout.num_steps - 1
        if self.optimizer.steps_per_forward > stochastic:
            raise ValueError(
                f"optimizer.steps_per_forward: expected at most the {stochastic} stochastic steps of a rollout, "
                f"got {self.optimizer.steps_per_forward}"
            )
        return self


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (PyYAML reads 1e-4 as a string), and repeated keys are errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.YAMLError(
                    f"key {key!r} given twice, again in line {node.value[index][0].start_mark.line + 1}"
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a configuration from a YAML file or a mapping, then apply overrides such as `rollout.eta=0.9`.

    An override's key is dotted, with an index for a list (`rewards.1.weight=0.5`); its value is YAML. ValueError names
    every wrong key, with the nearest valid one, and every wrong value, with what was expected.
    """
    name = "config"
    if isinstance(source, Mapping):
        data: Any = yaml.load(yaml.safe_dump(dict(source)), _Loader)  # a deep copy of plain values
    else:
        name = str(source)
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"config: no file {name}; expected a YAML file, such as training/configs/demo.yaml")
        try:
            data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"{name}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{name}: expected sections such as 'rollout:', got {type(data).__name__}")
    for override in overrides:
        _override(data, override)
    try:
        return TrainConfig.model_validate(data)
    except ValidationError as error:
        raise ValueError("\n".join([f"{name}:", *(f"  {_explain(dict(e))}" for e in error.errors())])) from None


def _override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override {override!r}: expected key=value, such as rollout.eta=0.9")
    *parents, last = key.split(".")
    node: Any = data
    for part in parents:
        if isinstance(node, list):
            node = node[_index(node, part, override)]
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, dict | list):
            raise ValueError(f"override {override!r}: {part} is a value, not a section")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not valid YAML: {error}") from None
    node[_index(node, last, override) if isinstance(node, list) else last] = value


def _index(items: list[Any], part: str, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        raise ValueError(f"override {override!r}: expected an index below {len(items)}, got {part!r}")
    return int(part)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models inside an annotation such as `list[RewardConfig]` or `WindowConfig | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (list, Annotated, Union, UnionType):
        for argument in get_args(annotation):
            yield from _models(argument)


def _explain(error: dict[str, Any]) -> str:
    location = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        model: type[BaseModel] = TrainConfig
        for part in error["loc"][:-1]:
            if isinstance(part, str) and part in model.model_fields:
                model = next(_models(model.model_fields[part].annotation), model)
        key = str(error["loc"][-1])
        near = difflib.get_close_matches(key, model.model_fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(model.model_fields)}"
        return f"{location}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{location}: required, but missing"
    if not location or isinstance(error["input"], dict | BaseModel):
        return f"{location}.{message}" if location else message
    return f"{location}: {message}, got {error['input']!r}"


def dump_config(config: TrainConfig, *, comments: bool = False) -> str:
    """YAML that `load_config` reads back to an equal configuration; with `comments`, every key with its meaning."""
    if comments:
        return "\n".join(_documented(config, "")).lstrip("\n") + "\n"
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def _documented(section: BaseModel, pad: str) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        choices = ", ".join(get_args(field.annotation)) if get_origin(field.annotation) is Literal else ""
        meaning = ": ".join(filter(None, (field.description, choices)))
        comment = f"  # {meaning}" if meaning else ""
        if isinstance(value, BaseModel):
            if not pad:
                yield ""
            yield f"{pad}{name}:{comment}"
            yield from _documented(value, pad + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            yield ""
            yield f"{pad}{name}:{comment}"
            for item in value:
                first, *rest = _documented(item, pad + "    ")
                yield f"{pad}  - {first.lstrip()}"
                yield from rest
        else:
            flow = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
            yield f"{pad}{name}: {flow}{comment}"
