"""From how many rows on the fused head beats library products: what `measure_crossover` found, remembered."""

import json
import os
import tempfile
import warnings
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from mtedit_fast.ops._backend import unavailable_reason

CACHE_VARIABLE = "MTEDIT_FAST_CACHE"


class Crossover(NamedTuple):
    rows: int | None
    """The fused kernel was faster at this many rows and at every larger number timed; None: not at the largest."""
    library_us: dict[int, float]
    """Median microseconds by number of rows."""
    fused_us: dict[int, float]


def cache_file() -> Path:
    """$MTEDIT_FAST_CACHE/head_crossover.json; by default in mtedit_fast under $XDG_CACHE_HOME or ~/.cache."""
    folder = os.environ.get(CACHE_VARIABLE)
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mtedit_fast")
    return Path(folder).expanduser() / "head_crossover.json"


def vocab_backend(
    rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, str]:
    """What "auto" takes for the softmax over the vocabulary, "reference" (library products) or "triton", and why."""
    reason = unavailable_reason("triton", device, (dtype,))
    if device.type != "cuda" or reason is not None:
        return "reference", f"the fused kernel is not for this device: {reason or f'it is for CUDA, not {device}'}"
    found = load(cache_file()).get(key_of(hidden_size, vocab_size, dtype, device))
    if found is None:
        return "reference", "no crossover is known for this device, H, V and dtype: measure_crossover finds it"
    if found.rows is None or rows < found.rows:
        best = "at no number of rows" if found.rows is None else f"only from {found.rows} rows on, not at {rows}"
        return "reference", f"the fused kernel was measured to be faster {best}"
    return "triton", f"it was measured to be faster from {found.rows} rows on, and there are {rows}"


def key_of(hidden_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> str:
    return f"{_where(device)}, {hidden_size} x {vocab_size}, {str(dtype).removeprefix('torch.')}"


@lru_cache
def _where(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    try:
        return f"{name}, torch {torch.__version__}, triton {version('triton')}"
    except PackageNotFoundError:
        return f"{name}, torch {torch.__version__}"


@lru_cache
def load(path: Path) -> dict[str, Crossover]:
    """What the file holds, read once per process; nothing if it cannot be read."""
    try:
        content = json.loads(path.read_text())
        return {
            key: Crossover(
                entry["rows"],
                {int(count): float(time) for count, time in entry["library_us"].items()},
                {int(count): float(time) for count, time in entry["fused_us"].items()},
            )
            for key, entry in content.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{path} is not readable and is ignored: {error}", stacklevel=3)
        return {}


def store(path: Path, key: str, found: Crossover) -> None:
    """Adds an entry to the file, which other processes may be writing too: the last one's is whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            content = {}
        content = content if isinstance(content, dict) else {}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            json.dump(content | {key: found._asdict()}, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"the crossover could not be stored and holds for this process: {error}", stacklevel=3)
