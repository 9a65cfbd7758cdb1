"""Whole editors as export folders: their modules as graphs, and their pipeline's configuration beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from mtedit_fast.editors import EDITORS

from .manifest import MANIFEST, Manifest, staged
from .modules import (
    Exportable,
    clip_text,
    klein_transformer,
    kontext_transformer,
    t5_text,
    vae_decoder,
    vae_encoder,
)
from .ports import Bucket
from .qwen import qwen_transformer
from .write import export_module

PIPELINE = "pipeline"
"""Sub-folder of an export with the pipeline's configuration."""


def family_of(pipeline: Any) -> str:
    """Name in `EDITORS` of the family that a pipeline is of; ValueError for a pipeline of none."""
    for name, editor in EDITORS.items():
        if isinstance(pipeline, editor.pipelines):
            return name
    raise ValueError(f"pipeline: expected one of {', '.join(EDITORS)}, got {type(pipeline).__name__}")


def editor_modules(pipeline: Any, *, max_sequence_length: int = 512) -> dict[str, Exportable]:
    """What is exported of an editor's pipeline, by the name of its component.

    Transformer, VAE encoder and decoder of every family, and the text encoders of Kontext; the vision-language encoders
    of the others, a fraction of an edit's time, stay torch modules.

    Raises:
        ValueError: a pipeline of no family, or of one whose transformer keeps state between calls (FLUX.2-Klein-KV).
    """
    family, multiple = family_of(pipeline), 2 * pipeline.vae_scale_factor
    if family not in _TRANSFORMERS:
        raise ValueError(
            f"pipeline: expected a family among {', '.join(_TRANSFORMERS)}, got {family}, not exported yet"
        )
    sizes = {"text_tokens": max_sequence_length, "multiple": multiple}
    modules = {
        "transformer": _TRANSFORMERS[family](pipeline.transformer, **sizes),
        "vae_encoder": vae_encoder(pipeline.vae),
        "vae_decoder": vae_decoder(pipeline.vae),
    }
    if family == "kontext":
        modules["text_encoder"] = clip_text(pipeline.text_encoder)
        modules["text_encoder_2"] = t5_text(pipeline.text_encoder_2, text_tokens=max_sequence_length)
    return modules


_TRANSFORMERS: dict[str, Callable[..., Exportable]] = {
    "kontext": kontext_transformer,
    "flux2_klein": klein_transformer,
    "qwen_image_edit": qwen_transformer,
}


def export_editor(
    directory: str | Path,
    pipeline: Any,
    *,
    buckets: Sequence[Bucket] = (),
    modules: Mapping[str, Exportable] | None = None,
    max_sequence_length: int = 512,
    negative_prompt: str | None = None,
    merged: bool = False,
    only: Sequence[str] | None = None,
    on_module: Callable[[str], None] = lambda name: None,
) -> Manifest:
    """Write everything that `EnginePipeline` needs into one folder.

    Args:
        pipeline: of a family in `EDITORS`, without adapters.
        buckets: see `export_module`.
        modules: default `editor_modules`; with a transformer of `lora_inputs`, adapters are given at run time. What
            is left out is copied with its weights and stays a torch module; the VAE goes whole or not at all.
        max_sequence_length, negative_prompt: of the editor.
        merged: a LoRA has been merged into the transformer (`merge_lora`).
        only: names among `editor_modules`, to export some of them (again) into a folder.
        on_module: called with the name of each module before it is exported.

    Raises:
        ValueError: an unknown name in `only`, and what `export_module` raises.
    """
    directory, family = Path(directory), family_of(pipeline)
    modules = modules or editor_modules(pipeline, max_sequence_length=max_sequence_length)
    unknown = sorted(set(only or ()) - set(modules))
    if unknown:
        raise ValueError(f"only: expected names among {', '.join(modules)}, got {', '.join(unknown)}")
    with staged(directory) as staging:
        if (directory / MANIFEST).is_file():
            manifest = Manifest.read(directory)
            manifest.family = None
            manifest.write(directory)
        save_configuration(pipeline, staging / PIPELINE, modules)
    for name in only or modules:
        on_module(name)
        export_module(directory, name, modules[name], buckets=buckets, merged=merged and name == "transformer")
    manifest = Manifest.read(directory)
    if set(modules) <= set(manifest.modules):  # an editor only when it is whole
        manifest.family = family
    manifest.options = {"max_sequence_length": max_sequence_length}
    if negative_prompt is not None:
        manifest.options["negative_prompt"] = negative_prompt
    manifest.write(directory)
    return manifest


def save_configuration(pipeline: Any, folder: Path, modules: Mapping[str, Exportable]) -> None:
    """model_index.json, scheduler, tokenizers, the configuration of exported modules, and the weights of others."""
    pipeline.save_config(folder)
    exported = [exportable.module for exportable in modules.values()]
    for name, component in pipeline.components.items():
        if component is None or not hasattr(component, "save_pretrained"):
            continue
        if not any(component is module for module in exported):
            component.save_pretrained(folder / name)
        elif hasattr(component, "save_config"):
            component.save_config(folder / name)
        else:
            component.config.save_pretrained(folder / name)
    if isinstance(getattr(pipeline.vae, "bn", None), nn.BatchNorm2d):
        save_file(pipeline.vae.bn.state_dict(), folder / "vae" / "bn.safetensors")


def load_configuration(folder: Path, modules: dict[str, Any]) -> Any:
    """The pipeline of `save_configuration`, with `modules` in place of the exported components."""
    from diffusers import DiffusionPipeline

    index = DiffusionPipeline.load_config(folder)
    components: dict[str, Any] = {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if name in modules:
            components[name] = modules[name]
        elif isinstance(value, list) and value[0] is not None:
            components[name] = getattr(import_module(value[0]), value[1]).from_pretrained(folder / name)
        elif not isinstance(value, list):
            components[name] = value
    return getattr(import_module("diffusers"), index["_class_name"])(**components)


def load_norm(folder: Path) -> nn.BatchNorm2d | None:
    """The statistics of FLUX.2's latents, where the VAE has them."""
    path = folder / "vae" / "bn.safetensors"
    if not path.is_file():
        return None
    state = load_file(path)
    norm = nn.BatchNorm2d(len(state["running_mean"]), affine=False)
    norm.load_state_dict(state)
    return norm.eval()
