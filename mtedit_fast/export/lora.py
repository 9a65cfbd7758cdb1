"""LoRA in a graph: merged into its weights, or as inputs that change from call to call."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from .modules import Exportable, LoraShape
from .ports import DTYPES, Port

SCALE = "lora_scale"
"""Input [batch]: the adapter's strength in every row, 0 for the plain model."""

_PREFIXES = ("base_model.model.", "transformer.")


class Lora(NamedTuple):
    """An adapter: W ← W + scaling·B A."""

    tensors: dict[str, Tensor]
    """By layer and factor, "transformer_blocks.0.attn.to_q.lora_A.weight": A [rank, in], B [out, rank]."""
    scaling: float
    """alpha/rank."""


def read_lora(path: str | Path) -> Lora:
    """An adapter saved by diffusers (`save_lora_weights`) or peft: a safetensors file or its folder.

    alpha is read from diffusers' metadata or peft's adapter_config.json beside the file; without either it is the rank.
    Where a layer's is another (peft's rank_pattern and alpha_pattern), B is scaled by the difference.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        names = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
        path = next((path / name for name in names if (path / name).is_file()), path / names[0])
    if not path.is_file():
        raise FileNotFoundError(f"lora: no file {path}; pass a safetensors file, or the folder save_lora wrote")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    beside = path.with_name("adapter_config.json")
    if beside.is_file():
        metadata |= json.loads(beside.read_text(encoding="utf-8"))
    known = {key.rpartition(".")[2]: value for key, value in metadata.items()}
    if "lora_alpha" not in known:
        return Lora(tensors, 1.0)
    rank = known.get("r") or next(iter(_factors(tensors).values()))[0].shape[0]

    def scaling(alpha: float, rank: int) -> float:
        return alpha / (rank**0.5 if known.get("use_rslora") else rank)

    common = scaling(known["lora_alpha"], rank)
    alphas = known.get("alpha_pattern") or {}
    for key in [key for key in tensors if ".lora_B" in key]:
        layer = key.partition(".lora_B")[0]
        alpha = next((alphas[name] for name in alphas if re.fullmatch(rf"(.*\.)?({name})", layer)), known["lora_alpha"])
        if (own := scaling(alpha, tensors[key].shape[1])) != common:
            tensors[key] = tensors[key] * (own / common)
    return Lora(tensors, common)


def _factors(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by layer, whatever prefix and adapter name the keys have."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.[^.]+)?\.weight", key)
        if match is None:
            raise ValueError(f"lora: expected keys LAYER.lora_A.weight and LAYER.lora_B.weight, got {key}")
        layer = match[1]
        for prefix in _PREFIXES:
            layer = layer.removeprefix(prefix)
        found.setdefault(layer, {})[match[2]] = tensor
    for layer, factors in found.items():
        if len(factors) < 2:
            raise ValueError(f"lora: expected A and B of every layer, got only {next(iter(factors))} of {layer}")
        if factors["A"].shape[0] != factors["B"].shape[1]:
            raise ValueError(
                f"lora: expected A [rank, in] and B [out, rank] of one rank, got {list(factors['A'].shape)} and "
                f"{list(factors['B'].shape)} of {layer}"
            )
    return {layer: (factors["A"], factors["B"]) for layer, factors in found.items()}


@torch.no_grad()
def merge_lora(model: nn.Module, tensors: Mapping[str, Tensor], scaling: float = 1.0) -> None:
    """W ← W + scaling·B A in place, in fp32 or better, rounded once to W's dtype.

    Raises:
        ValueError: a layer of the adapter is not a linear layer of the model, or of another shape; nothing is changed.
    """
    factors = _factors(tensors)
    layers = {name: _linear(model, name) for name in factors}
    for name, (down, up) in factors.items():
        expected = list(layers[name].weight.shape)
        if [up.shape[0], down.shape[1]] != expected:
            raise ValueError(f"lora: expected {name} of shape {expected}, got {[up.shape[0], down.shape[1]]}")
    for name, (down, up) in factors.items():
        weight = layers[name].weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        change = up.to(weight.device, wide) @ down.to(weight.device, wide)
        weight.copy_(torch.add(weight.to(wide), change, alpha=scaling))


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear):
        got = "no such layer" if layer is None else type(layer).__name__
        raise ValueError(
            f"lora: expected linear layers of {type(model).__name__}, got {name} ({got}); it belongs to another model"
        )
    return layer


def lora_inputs(exported: Exportable, *, rank: int, targets: str) -> Exportable:
    """The same module with an adapter's A and B as inputs, and its strength per row of the batch.

    The inputs are "LAYER.lora_A" [rank, in], "LAYER.lora_B" [out, rank] and "lora_scale" [batch]; about 2·rank/d more
    arithmetic per adapted d×d layer, and no rebuild or refit for another adapter.

    Args:
        rank: of the inputs; adapters of a smaller one are padded with zeros, which changes nothing.
        targets: regular expression of the layers' whole names, as in `Editor.lora_targets`.

    Raises:
        ValueError: rank < 1, or no linear layer matches.
    """
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    model = exported.module
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(targets, name)
    }
    if not layers:
        raise ValueError(f"targets: expected linear layers of {type(model).__name__}, got none for {targets!r}")
    ports = [Port(SCALE, exported.dtype, ("batch",))]
    for name, layer in layers.items():
        ports.append(Port(f"{name}.lora_A", exported.dtype, (rank, layer.in_features)))
        ports.append(Port(f"{name}.lora_B", exported.dtype, (layer.out_features, rank)))
    added = [port.name for port in ports]

    def call(**tensors: Tensor) -> Any:
        adapter = {name: tensors.pop(name) for name in added}
        with _adapted(layers, adapter):
            return exported.call(**tensors)

    return replace(
        exported, call=call, inputs=(*exported.inputs, *ports), lora=LoraShape(rank=rank, layers=tuple(layers))
    )


@contextmanager
def _adapted(layers: Mapping[str, nn.Linear], adapter: Mapping[str, Tensor]) -> Iterator[None]:
    """The layers add scale·B A x; modules and weights keep their names."""
    scale = adapter[SCALE]
    for name, layer in layers.items():
        layer.forward = _forward(name, layer, adapter[f"{name}.lora_A"], adapter[f"{name}.lora_B"], scale)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


def _forward(name: str, layer: nn.Linear, down: Tensor, up: Tensor, scale: Tensor) -> Any:
    def forward(x: Tensor) -> Tensor:
        if x.shape[0] != scale.shape[0]:
            raise ValueError(
                f"targets: expected layers whose first dimension is the batch, got {name} with input {list(x.shape)}; "
                "leave it out"
            )
        low = F.linear(x, down) * scale.view(-1, *(1,) * (x.ndim - 1))
        return F.linear(x, layer.weight, layer.bias) + F.linear(low, up)

    return forward


def graph_lora(
    shape: LoraShape,
    ports: Mapping[str, Port],
    tensors: Mapping[str, Tensor],
    scaling: float = 1.0,
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """An adapter as a graph takes it: named, scaled (into B), padded to the graph's rank, zero where it has no layer.

    Args:
        shape: of the graph's adapter.
        ports: its inputs by name.
        tensors, scaling: see `Lora`; also peft's names, and `training.adapters`' state. Whole tensors, not shards.
        device: of the result.

    Raises:
        ValueError: a layer that the graph does not adapt, a higher rank, or another size.
    """
    factors = _factors(tensors)
    unknown = sorted(factors.keys() - set(shape.layers))
    if unknown:
        raise ValueError(
            f"lora: expected layers among the {len(shape.layers)} that the graph adapts, got {unknown[0]} (and "
            f"{len(unknown) - 1} more); export again with targets that cover them"
        )
    values: dict[str, Tensor] = {}
    for layer in shape.layers:
        for factor, index in (("A", 0), ("B", 1)):
            port = ports[f"{layer}.lora_{factor}"]
            value = torch.zeros(port.sized({}), dtype=DTYPES[port.dtype], device=device)
            if layer in factors:
                given = factors[layer][index].detach()
                _check_factor(layer, factor, given, value, shape.rank)
                corner = value[: given.shape[0]] if factor == "A" else value[:, : given.shape[1]]
                corner.copy_(given if factor == "A" else given * scaling)
            values[port.name] = value
    return values


def _check_factor(layer: str, factor: str, given: Tensor, value: Tensor, rank: int) -> None:
    axis = 0 if factor == "A" else 1
    if given.shape[axis] > rank:
        raise ValueError(
            f"lora: expected rank {rank} at most, got {given.shape[axis]} ({layer}); export again with a higher rank"
        )
    if given.shape[1 - axis] != value.shape[1 - axis]:
        raise ValueError(
            f"lora: expected {layer}.lora_{factor} of size {value.shape[1 - axis]} along {1 - axis}, got "
            f"{list(given.shape)}; it belongs to another model"
        )
