"""Exported modules in place of torch ones: same calls, torch tensors in and out."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .lora import SCALE, graph_lora
from .manifest import Entry, Manifest, verify
from .ports import DTYPES, choose_profile, sizes_of

_IGNORED = ("return_dict", "output_hidden_states", "sample_posterior", "generator")
"""Options of the torch modules' forward whose False or None is what the graph does."""


class ExportedModule(nn.Module):
    """A graph behind the call of the torch module it was exported from.

    Inputs are given by name, or by position in the graph's order; they are cast to the graph's dtypes. The result is a
    named tuple of the outputs, which serves `output[0]` and `output.last_hidden_state` alike, or the one tensor if that
    is what the module returned.

    Args:
        directory, name: of an export. Its hashes are checked before anything is opened.
        config: what `.config` shall be, such as the torch module's.

    Raises:
        FileNotFoundError, ValueError: see `Manifest.read` and `verify`.
    """

    def __init__(self, directory: str | Path, name: str, *, config: Any = None, device: torch.device | str = "cpu"):
        super().__init__()
        self.name, self.config, self._device = name, config, torch.device(device)
        self.entry: Entry = Manifest.read(directory).entry(name)
        self._ports = {port.name: port for port in self.entry.inputs}
        self._outputs = namedtuple("Outputs", [port.name for port in self.entry.outputs])  # type: ignore[misc]
        self._lora: dict[str, Tensor] = {}
        if self.entry.lora is not None:
            self.set_lora({})

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.entry.dtype]

    def set_lora(self, tensors: Mapping[str, Tensor], scaling: float = 1.0) -> None:
        """The adapter of the calls that follow; {}: none. Written in place: nothing is rebuilt, refitted or recaptured.

        Args:
            tensors: A and B by layer, in the names of peft, diffusers or `training.adapters` (`names` with
                `parameters`, or the "average" of its state); of any dtype and device.
            scaling: alpha/rank.

        Raises:
            ValueError: the graph takes no adapter, or not this one, see `graph_lora`.
        """
        if self.entry.lora is None:
            raise ValueError(
                f"lora: expected a graph that takes an adapter, got {self.name} with LoRA {self.entry.lora_mode}; "
                "export it with --lora-rank"
            )
        values = graph_lora(self.entry.lora, self._ports, tensors, scaling, device=self.device)
        for name, value in values.items():
            if name in self._lora:
                self._lora[name].copy_(value)
            else:
                self._lora[name] = value

    @torch.no_grad()
    def forward(self, *arguments: Tensor, **options: Any) -> Any:
        """Run the graph.

        With an adapter, `lora_scale` [batch] is its strength in every row; default 1.

        Raises:
            ValueError: an input is missing, unknown or of a shape that the graph or its profiles do not have.
        """
        values = self._values(arguments, options)
        sizes = sizes_of(self.entry.inputs, {name: tuple(value.shape) for name, value in values.items()})
        profile = choose_profile(self.entry.profiles, sizes) if self.entry.profiles else 0
        outputs = self._run(values, sizes, profile)
        return outputs[0] if self.entry.plain else self._outputs(*outputs)

    def _values(self, arguments: tuple[Tensor, ...], options: dict[str, Any]) -> dict[str, Tensor]:
        given = dict(zip(self._ports, arguments, strict=False)) | options
        for name, value in options.items():
            if name not in self._ports and not (value is None or (name in _IGNORED and not value)):
                raise ValueError(
                    f"{name}: expected one of the graph's inputs {', '.join(self._own_inputs())}, got {value!r:.60}; "
                    f"{self.name} was exported without it"
                )
        values: dict[str, Tensor] = {}
        for name, port in self._ports.items():
            value = given.get(name)
            if value is None:
                value = self._default(name, values)
            values[name] = value.to(device=self.device, dtype=DTYPES[port.dtype]).contiguous()
        return values

    def _default(self, name: str, values: dict[str, Tensor]) -> Tensor:
        if name in self._lora:
            return self._lora[name]
        if name == SCALE:
            return torch.ones(next(iter(values.values())).shape[0], device=self.device)
        raise ValueError(f"{name}: expected {self._ports[name]}, got nothing; inputs: {', '.join(self._own_inputs())}")

    def _own_inputs(self) -> list[str]:
        return [name for name in self._ports if name not in self._lora]

    def _run(self, values: dict[str, Tensor], sizes: dict[str, int], profile: int) -> list[Tensor]:
        raise NotImplementedError


class OnnxModule(ExportedModule):
    """An exported module through onnxruntime, on the CPU.

    The shapes it takes are those of its profiles, if it was exported with any: what runs here runs on the engine.

    Raises:
        ImportError: onnxruntime is not installed.
        ValueError: the graph is in bf16, which onnxruntime does not compute on a CPU.
    """

    def __init__(self, directory: str | Path, name: str, *, config: Any = None):
        super().__init__(directory, name, config=config)
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError(
                f"runtime: onnxruntime cannot be imported ({error}); run pip install 'mtedit-fast[export]'"
            ) from None
        if self.entry.dtype == "bfloat16":
            raise ValueError(
                f"{name}: expected fp32 or fp16 for onnxruntime on a CPU, got bfloat16; export with --dtype fp32"
            )
        for file in self.entry.files:
            verify(directory, file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        graph = str(Path(directory) / self.entry.files[0].name)
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def _run(self, values: dict[str, Tensor], sizes: dict[str, int], profile: int) -> list[Tensor]:
        found = self._session.run(None, {name: value.numpy() for name, value in values.items()})
        return [torch.from_numpy(value) for value in found]


class ExportedVAE(nn.Module):
    """Exported encoder and decoder behind the calls that pipelines and editors make of a diffusers VAE.

    config: the VAE's own. norm: statistics of FLUX.2's latents, its `bn`.
    """

    def __init__(self, encoder: ExportedModule, decoder: ExportedModule, config: Any, norm: nn.Module | None = None):
        super().__init__()
        self.encoder, self.decoder, self.config = encoder, decoder, config
        if norm is not None:
            self.bn = norm
        for name in ("temperal_downsample", "z_dim"):
            if name in config:
                setattr(self, name, config[name])

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.dtype

    def encode(self, images: Tensor, return_dict: bool = True) -> Any:
        """Images in [−1, 1]; the distribution has its mode alone."""
        (latents,) = self.encoder(images)
        distribution = SimpleNamespace(mode=lambda: latents)
        return SimpleNamespace(latent_dist=distribution) if return_dict else (distribution,)

    def decode(self, latents: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """Unnormalised latents."""
        (images,) = self.decoder(latents)
        return SimpleNamespace(sample=images) if return_dict else (images,)
