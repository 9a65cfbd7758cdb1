"""Export folders: modules, and whole editors with their pipeline's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .manifest import Entry, File, Manifest, model_hash, staged
from .modules import Exportable
from .onnx import export_onnx
from .ports import Bucket


def export_module(
    directory: str | Path,
    name: str,
    exported: Exportable,
    *,
    buckets: Sequence[Bucket] = (),
    merged: bool = False,
    opset: int | None = None,
) -> Entry:
    """Write NAME.onnx (and NAME.onnx.data) into a folder and describe it in the folder's manifest.

    The manifest forgets a former module of this name first and learns of the new one last, so that a folder whose
    export was stopped holds nothing half-written that would load.

    Args:
        buckets: of the engine's profiles; without any, the graph serves every shape and no engine can be built.
        merged: the weights hold a LoRA (`merge_lora`).
        opset: see `export_onnx`.

    Raises:
        ImportError, ValueError, OSError: see `export_onnx` and `staged`.
    """
    directory = Path(directory)
    profiles = tuple(exported.profile(bucket) for bucket in buckets)
    with staged(directory) as staging:
        manifest = Manifest.read(directory) if (directory / "manifest.json").is_file() else Manifest()
        if manifest.modules.pop(name, None):
            manifest.write(directory)
        path = staging / f"{name}.onnx"
        opset = export_onnx(exported, path, opset=opset)
        files = tuple(File.of(file) for file in sorted(staging.iterdir()))
    entry = Entry(
        inputs=exported.inputs,
        outputs=exported.outputs,
        dtype=exported.dtype,
        opset=opset,
        model_hash=model_hash(exported),
        files=files,
        plain=exported.plain,
        lora_mode="inputs" if exported.lora else "merged" if merged else "none",
        lora=exported.lora,
        profiles=profiles,
    )
    manifest.modules[name] = entry
    manifest.write(directory)
    return entry
