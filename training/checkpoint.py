"""Checkpoints that survive a kill, a full disk and a cut cable: one safetensors file each, renamed into place."""

import contextlib
import hashlib
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_NAME = re.compile(r"step-(\d+)\.safetensors")


class Checkpoint(NamedTuple):
    tensors: dict[str, Tensor]
    state: Any


def save_checkpoint(
    directory: str | Path, step: int, tensors: dict[str, Tensor], state: Any, fingerprint: str, *, keep: int = 2
) -> Path:
    """Write `directory`/step-<step>.safetensors atomically and drop all but the `keep` newest up to it.

    tensors: {name: tensor of any dtype and device}; state: dicts, lists and tuples of tensors, numbers, texts and None,
    such as `optimizer.state_dict()` and RNG states. Both come back bit for bit. fingerprint: identifies the model.
    OSError (a full disk, say) leaves the earlier checkpoints untouched and no temporary file behind.
    """
    if keep < 1:
        raise ValueError(f"keep: expected at least 1, got {keep}")
    directory = Path(directory)
    flat = {f"tensors/{name}": tensor for name, tensor in tensors.items()}
    tree = _flatten(state, flat, "state")
    # Own storage for each: safetensors refuses tensors that share memory.
    flat = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in flat.items()}
    content = json.dumps({"fingerprint": fingerprint, "state": tree})
    payload = save(flat, metadata={"content": content, "sha256": digest(flat, content)})
    path = directory / f"step-{step:08d}.safetensors"
    temporary = directory / f".{path.name}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_directory(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        kept = _checkpoints(directory)
        remains = f"{kept[-1].name} is kept" if kept else "there is no earlier one"
        raise OSError(error.errno, f"checkpoint not saved ({error.strerror}); {remains}", str(path)) from error
    # Temporary files of a killed process, and what is older than the `keep` newest.
    stale = list(directory.glob(".step-*.safetensors.tmp"))
    for old in stale + [p for p in _checkpoints(directory) if _step(p) < step][: -(keep - 1) or None]:
        old.unlink(missing_ok=True)
    return path


def load_checkpoint(path: str | Path, fingerprint: str) -> Checkpoint:
    """Read a checkpoint back. ValueError if it is missing, cut short, damaged, or another model's (fingerprint)."""
    content, flat = _read(Path(path))
    if content["fingerprint"] != fingerprint:
        raise ValueError(
            f"{path}: a checkpoint of another model: expected fingerprint {fingerprint}, got {content['fingerprint']}; "
            "resume with its own configuration or choose another output_dir"
        )
    tensors = {name.removeprefix("tensors/"): value for name, value in flat.items() if name.startswith("tensors/")}
    return Checkpoint(tensors, _unflatten(content["state"], flat))


def latest(directory: str | Path) -> Path | None:
    """The newest checkpoint that is whole, or None. One that is damaged is passed over with a warning."""
    for path in reversed(_checkpoints(Path(directory))):
        try:
            _read(path)
        except ValueError as error:
            warnings.warn(f"{error}; falling back to the one before it", stacklevel=2)
        else:
            return path
    return None


def _checkpoints(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Clones: tensors mapped from the file are unaligned, and alignment can change the bits of later results.
            flat = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118, not a dict
    except SafetensorError as error:
        raise ValueError(f"{path}: cut short or damaged ({error})") from error
    if "content" not in metadata or "sha256" not in metadata:
        raise ValueError(f"{path}: not a training checkpoint (no content or sha256 in its header)")
    if digest(flat, metadata["content"]) != metadata["sha256"]:
        raise ValueError(f"{path}: damaged (its SHA-256 differs from the one recorded)")
    return json.loads(metadata["content"]), flat


def digest(tensors: dict[str, Tensor], content: str = "") -> str:
    """SHA-256 of CPU tensors (names, dtypes, shapes, bits) and a text."""
    total = hashlib.sha256(content.encode())
    for name in sorted(tensors):
        total.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        total.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _flatten(value: Any, flat: dict[str, Tensor], name: str) -> Any:
    """JSON for `value`, its tensors moved to `flat`. Keeps what JSON alone would lose: tuples and integer keys."""
    if isinstance(value, Tensor):
        key = f"state/{len(flat)}"
        flat[key] = value
        return {"tensor": key}
    if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
        return {"dict": [[key, _flatten(item, flat, f"{name}.{key}")] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_flatten(item, flat, f"{name}.{index}") for index, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{name}: expected tensors, numbers, texts, None, or dicts, lists, tuples of them, got {type(value).__name__}"
    )


def _unflatten(value: Any, flat: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    (kind, content), *_ = value.items()
    if kind == "tensor":
        return flat[content]
    if kind == "dict":
        return {key: _unflatten(item, flat) for key, item in content}
    items = [_unflatten(item, flat) for item in content]
    return tuple(items) if kind == "tuple" else items


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
