"""The manifest of an export: what its files are, what they were made from, and which engine fits which machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from .modules import Exportable, LoraShape
from .ports import Port, Profile

MANIFEST = "manifest.json"
FORMAT = 1


class DamagedFile(ValueError):
    """A file is missing, truncated, or not the one that the manifest describes."""


@dataclass(frozen=True)
class File:
    """A file of an export, by its name in the folder."""

    name: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        return cls(path.name, path.stat().st_size, hash_file(path))


@dataclass(frozen=True)
class Engine:
    """A plan and what it was built by and for.

    backend: "tensorrt" or "tensorrt_rtx". sm: compute capability, 80 for 8.0. device: name of the GPU it was tuned on,
    "" for builds without one. compatibility, version_compatible: see `engine.build_engine`. key: see `key_of`.
    """

    file: File
    backend: str
    version: str
    sm: int
    device: str
    compatibility: str
    version_compatible: bool
    key: str


@dataclass
class Entry:
    """One exported module. lora_mode: "none", "merged" or "inputs"; profiles may be empty, for ONNX of any shape."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    dtype: str
    opset: int
    model_hash: str
    files: tuple[File, ...]
    plain: bool = False
    lora_mode: str = "none"
    lora: LoraShape | None = None
    profiles: tuple[Profile, ...] = ()
    engine: Engine | None = None

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> Self:
        engine, lora = saved["engine"], saved["lora"]
        return cls(
            inputs=tuple(map(Port.read, saved["inputs"])),
            outputs=tuple(map(Port.read, saved["outputs"])),
            dtype=saved["dtype"],
            opset=saved["opset"],
            model_hash=saved["model_hash"],
            files=tuple(File(**file) for file in saved["files"]),
            plain=saved["plain"],
            lora_mode=saved["lora_mode"],
            lora=lora and LoraShape(lora["rank"], tuple(lora["layers"])),
            profiles=tuple(map(Profile.read, saved["profiles"])),
            engine=engine and Engine(**{**engine, "file": File(**engine["file"])}),
        )

    def engine_key(self, *built: Any) -> str:
        """SHA-256 of all that an engine depends on: this module, and what it is `built` by and for."""
        parts = {
            "model": self.model_hash,
            "lora": [self.lora_mode, self.lora and asdict(self.lora)],
            "profiles": [asdict(profile) for profile in self.profiles],
            "ports": [asdict(port) for port in (*self.inputs, *self.outputs)],
            "opset": self.opset,
            "dtype": self.dtype,
            "built": built,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass
class Manifest:
    """What a folder holds.

    family: of the editor whose pipeline configuration lies in `pipeline/`, or None for single modules.
    options: of the editor's constructor.
    """

    family: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: str | Path) -> Self:
        """FileNotFoundError without a manifest, ValueError for one of another format."""
        path = Path(directory) / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"directory: expected an export, with {MANIFEST}, got {directory}; it is written last, so an export "
                "that was stopped has none: run mtedit-fast export again"
            )
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            if saved["format"] != FORMAT:
                raise ValueError(f"format {saved['format']}, and this version reads {FORMAT}")
            modules = {name: Entry.read(entry) for name, entry in saved["modules"].items()}
            return cls(saved["family"], saved["options"], modules)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"directory: {path} cannot be read ({error!r}); run mtedit-fast export again") from None

    def write(self, directory: str | Path) -> None:
        """Atomic: a reader sees the old manifest or the new one."""
        path = Path(directory) / MANIFEST
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)

    def entry(self, name: str) -> Entry:
        if name not in self.modules:
            raise ValueError(f"module: expected one of {', '.join(self.modules) or 'none'}, got {name!r}")
        return self.modules[name]


def verify(directory: str | Path, file: File) -> Path:
    """The file's path, its size and SHA-256 checked; nothing of it has been interpreted.

    Raises:
        DamagedFile: the file is missing, truncated, or not the one that the manifest describes.
    """
    path = Path(directory) / file.name
    remedy = "copy the whole folder again, or run mtedit-fast export"
    if not path.is_file():
        raise DamagedFile(f"{file.name}: in the manifest, but not in {directory}; {remedy}")
    size = path.stat().st_size
    if size != file.bytes:
        raise DamagedFile(f"{file.name}: expected {file.bytes} bytes, got {size}: truncated or replaced; {remedy}")
    if hash_file(path) != file.sha256:
        raise DamagedFile(f"{file.name}: its SHA-256 is not the manifest's: damaged or foreign; {remedy}")
    return path


def verify_engine(
    directory: str | Path, name: str, entry: Entry, *, backend: str, version: str, sm: int, device: str
) -> Path:
    """The plan's path if it is this module's, unchanged, and fits the machine; before anything is deserialised.

    Raises:
        ValueError: there is no engine, it is for another machine or version, or it was not built from this module.
    """
    engine = entry.engine
    if engine is None:
        raise ValueError(f"{name}: expected an engine, got ONNX only; run mtedit-fast export --to {backend}")
    newer = engine.version_compatible and _major(version) == _major(engine.version)
    anywhere = engine.compatibility == "ampere_plus" and sm >= 80
    tuned = engine.compatibility == "none" and engine.device != ""
    for what, was, here, fits in (
        ("library", engine.backend, backend, False),
        ("version", engine.version, version, newer),
        ("compute capability", f"SM{engine.sm}", f"SM{sm}", anywhere),
        ("device", engine.device, device, not tuned),
    ):
        if was != here and not fits:
            raise ValueError(
                f"{name}: the engine was built for {what} {was}, and here it is {here}; export again on this machine, "
                "or with a compatibility that covers both"
            )
    if engine.key != key_of(entry, engine):
        raise ValueError(
            f"{name}: the engine was built from other weights, LoRA mode or profiles than the manifest's; export again"
        )
    return verify(directory, engine.file)


def key_of(entry: Entry, engine: Engine) -> str:
    """The key that an engine of this entry, built as `engine` was, has."""
    built = (engine.backend, engine.version, engine.sm, engine.device, engine.compatibility, engine.version_compatible)
    return entry.engine_key(*built)


def _major(version: str) -> str:
    return version.partition(".")[0]


def hash_file(path: Path) -> str:
    """SHA-256, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_hash(exported: Exportable) -> str:
    """SHA-256 of weights, buffers and configuration, in the dtype that is exported."""
    digest = hashlib.sha256()
    for name, tensor in sorted(exported.module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    config: Any = getattr(exported.module, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    kept = {name: value for name, value in values.items() if not name.startswith("_")}  # _name_or_path and the like
    digest.update(json.dumps([type(exported.module).__name__, kept], sort_keys=True, default=str).encode())
    return digest.hexdigest()


@contextmanager
def staged(directory: str | Path) -> Iterator[Path]:
    """A folder to write into, whose files move to `directory` when all are there; on any error they go.

    Raises:
        OSError: `directory` cannot be made or written.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".partial-", dir=directory))
    except OSError as error:
        raise OSError(
            f"output: expected a folder to write to, got {directory} ({error.strerror}); choose another"
        ) from None
    try:
        yield staging
        for path in sorted(staging.iterdir()):
            if path.is_dir():
                shutil.rmtree(directory / path.name, ignore_errors=True)
            os.replace(path, directory / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
