"""A multi-turn edit from an export folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtedit_fast.editors import EDITORS
from mtedit_fast.rollout import RolloutConfig, rollout

from .editors import PIPELINE, load_configuration, load_norm
from .manifest import Manifest
from .qwen import QwenTransformer
from .runtime import ExportedModule, ExportedVAE, OnnxModule
from .tensorrt import DeviceMemory, TensorRTModule

Runtime = Literal["auto", "onnx", "tensorrt"]


class EnginePipeline:
    """The editor of an export folder, its modules run by onnxruntime or TensorRT.

    `editor` is the family's own adapter around the exported modules, so rollouts, evaluation and benchmarks take it
    as they take one around torch modules.

    Args:
        directory: of `export_editor`.
        runtime: "onnx", "tensorrt" (engines for this GPU), or "auto": engines where all modules have one and there is
            a GPU, else onnxruntime.
        device: of the engines.

    Raises:
        ValueError: the folder holds single modules without a pipeline, and what the modules raise.
    """

    def __init__(self, directory: str | Path, *, runtime: Runtime = "auto", device: torch.device | str = "cuda"):
        directory = Path(directory)
        self.manifest = Manifest.read(directory)
        family = self.manifest.family
        if family is None:
            raise ValueError(
                f"directory: expected an editor's export, got single modules ({', '.join(self.manifest.modules)}); "
                "export a pipeline folder or a training configuration"
            )
        load = _loader(self.manifest, runtime, device)
        self.modules: dict[str, ExportedModule] = {}
        configurations = directory / PIPELINE
        for name in self.manifest.modules:
            component = "vae" if name.startswith("vae_") else name
            config = _configuration(configurations / component)
            self.modules[name] = load(directory, name, config=config)
        components: dict[str, nn.Module] = {n: m for n, m in self.modules.items() if not n.startswith("vae_")}
        if family == "qwen_image_edit":
            components["transformer"] = QwenTransformer(self.modules["transformer"])
        if "vae_encoder" in self.modules:
            encoder, decoder = self.modules["vae_encoder"], self.modules["vae_decoder"]
            norm = load_norm(configurations)
            components["vae"] = ExportedVAE(encoder, decoder, encoder.config, norm and norm.to(encoder.device))
        pipeline = load_configuration(configurations, components)
        for component in pipeline.components.values():  # what stayed a torch module
            if isinstance(component, nn.Module) and not any(component is module for module in components.values()):
                component.to(self.transformer.device, self.transformer.dtype)
        self.editor = EDITORS[family](pipeline, **self.manifest.options)

    @property
    def transformer(self) -> ExportedModule:
        return self.modules["transformer"]

    def set_lora(self, tensors: Mapping[str, Tensor], scaling: float = 1.0) -> None:
        """The adapter of the edits that follow; see `ExportedModule.set_lora`."""
        self.transformer.set_lora(tensors, scaling)

    def fit(self, image: Tensor) -> Tensor:
        """[3, H, W] as it is if a profile covers its size, else resized to the profile nearest in shape, then in area.

        Without profiles, the sides become multiples of what the VAE and the packing need.
        """
        height, width = image.shape[1:]
        encoder = self.modules.get("vae_encoder")
        profiles = [profile.sizes for profile in encoder.entry.profiles] if encoder else []
        sides = {"height": height, "width": width}
        if any(all(p[name][0] <= side <= p[name][2] for name, side in sides.items()) for p in profiles):
            return image
        if not profiles:
            multiple = 2 * self.editor.pipeline.vae_scale_factor
            size = (max(height // multiple, 1) * multiple, max(width // multiple, 1) * multiple)
        else:

            def distance(size: tuple[int, int]) -> tuple[float, float]:
                shape = abs(math.log(size[0] / size[1] * width / height))
                return round(shape, 6), abs(math.log(size[0] * size[1] / (height * width)))

            size = min(((p["height"][1], p["width"][1]) for p in profiles), key=distance)
        if size == (height, width):
            return image
        resized = F.interpolate(image[None], size, mode="bicubic", antialias=True, align_corners=False)[0]
        return (resized.clamp(0, 1) * 255).round() / 255

    def __call__(
        self,
        image: Tensor,
        instructions: Sequence[str],
        *,
        num_steps: int = 28,
        guidance_scale: float = 3.5,
        seed: int = 0,
        reference_size: tuple[int, int] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Edit turn by turn: each instruction edits the image that the one before it made.

        Args:
            image: [3, H, W] in [0, 1], of a size that the profiles cover.
            instructions: K of them.
            num_steps, guidance_scale, reference_size: see `RolloutConfig`.
            seed: of the noise.
            progress: called after every turn.

        Returns:
            [K, 3, H, W] fp32, multiples of 1/255.

        Raises:
            ValueError: a size or a number of rows that no profile covers, or no instruction.
        """
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"image: expected [3, H, W], got {list(image.shape)}")
        config = RolloutConfig(
            group_size=1,
            num_steps=num_steps,
            variant="ode",
            micro_batch=1,
            guidance_scale=guidance_scale,
            reference_size=reference_size,
        )
        device = self.editor.device
        seeds = torch.tensor([seed], device=device)
        edited = rollout(self.editor, image[None].to(device), [list(instructions)], config, seeds, progress=progress)
        return edited.images[0]


def _loader(manifest: Manifest, runtime: Runtime, device: torch.device | str) -> Callable[..., ExportedModule]:
    if runtime not in ("auto", "onnx", "tensorrt"):
        raise ValueError(f"runtime: expected auto, onnx or tensorrt, got {runtime!r}")
    if runtime == "auto":
        built = all(entry.engine for entry in manifest.modules.values())
        runtime = "tensorrt" if built and torch.cuda.is_available() else "onnx"
    if runtime == "onnx":
        return OnnxModule
    return partial(TensorRTModule, device=device, memory=DeviceMemory())


def _configuration(folder: Path) -> Any:
    """A component's config.json with attributes and keys, as diffusers' own."""
    from diffusers.configuration_utils import FrozenDict

    return FrozenDict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
