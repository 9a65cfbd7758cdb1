"""Configuration files: YAML plus `key=value` overrides -> `TrainConfig`, and back with its documentation."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from mtedit_fast.training.config import TrainConfig

Schema = TypeVar("Schema", bound=BaseModel)
CONFIGS = Path(__file__).with_name("configs")


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
    """Read the configuration of an editor's training; see `read_config`."""
    return read_config(source, overrides, TrainConfig)


def read_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str], schema: type[Schema]) -> Schema:
    """Read a configuration from a YAML file or a mapping, then apply overrides such as `rollout.eta=0.9`.

    Those that come with the package are known by name, too: `kontext_8gpu` is training/configs/kontext_8gpu.yaml. An
    override's key is dotted, with an index for a list (`rewards.1.weight=0.5`); its value is YAML. ValueError names
    every wrong key, with the nearest valid one, and every wrong value, with what was expected.
    """
    name = "config"
    if isinstance(source, Mapping):
        data: Any = yaml.load(yaml.safe_dump(dict(source)), _Loader)  # a deep copy of plain values
    else:
        name = str(source)
        path = Path(source)
        if not path.is_file():
            path = CONFIGS / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(each.stem for each in CONFIGS.glob("*.yaml")))
            raise ValueError(f"config: no file {name}; expected a YAML file, or one of {known}")
        try:
            data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"{name}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        section = next(iter(schema.model_fields))
        raise ValueError(f"{name}: expected sections such as '{section}:', got {type(data).__name__}")
    for override in overrides:
        _override(data, override)
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        lines = (f"  {_explain(dict(e), schema)}" for e in error.errors())
        raise ValueError("\n".join([f"{name}:", *lines])) from None


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


def _explain(error: dict[str, Any], schema: type[BaseModel]) -> str:
    location = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        model = schema
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


def dump_config(config: BaseModel, *, comments: bool = False) -> str:
    """YAML that reads back to an equal configuration; with `comments`, every key with its meaning."""
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
