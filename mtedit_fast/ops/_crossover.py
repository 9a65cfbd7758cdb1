"""From how many rows on the fused head beats library products: measured on the device, remembered, never guessed."""

import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from mtedit_fast.ops._backend import unavailable_reason

CACHE_VARIABLE = "MTEDIT_FAST_CACHE"
ROWS = (1, 16, 64, 256, 1024, 4096)


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
    found = _load(cache_file()).get(_key(hidden_size, vocab_size, dtype, device))
    if found is None:
        return "reference", "no crossover is known for this device, H, V and dtype: measure_crossover finds it"
    if found.rows is None or rows < found.rows:
        best = "at no number of rows" if found.rows is None else f"only from {found.rows} rows on, not at {rows}"
        return "reference", f"the fused kernel was measured to be faster {best}"
    return "triton", f"it was measured to be faster from {found.rows} rows on, and there are {rows}"


def measure_crossover(
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    *,
    rows: Sequence[int] = ROWS,
    repeats: int = 5,
    force: bool = False,
) -> Crossover:
    """Times `token_log_probs` of both kinds on random data, once per device, H, V, dtype and versions of torch and
    triton: "auto" of `digit_score` and `token_log_probs` goes by it from then on, in this and in later processes.

    It takes seconds, and memory for a weight [vocab_size, hidden_size] and max(rows) rows. The result is kept in
    head_crossover.json in $MTEDIT_FAST_CACHE (default: mtedit_fast under $XDG_CACHE_HOME or ~/.cache).

    Args:
        hidden_size: H of the model.
        vocab_size: of its lm_head, the rows that are tokens.
        dtype: of both.
        device: where the fused kernel can run.
        rows: the numbers of rows to time.
        repeats: timed calls of each kind, of which the median counts.
        force: measure again what is known already.

    Raises:
        ValueError: no rows to time, or the fused kernel cannot run there.
    """
    device = torch.device(device)
    reason = unavailable_reason("triton", device, (dtype,))
    if reason is not None:
        raise ValueError(f"device must be one that the fused kernel runs on: {reason}")
    if not rows or min(rows) < 1 or repeats < 1:
        raise ValueError(f"rows and repeats must be positive, got {list(rows)} and {repeats}")
    path, key = cache_file(), _key(hidden_size, vocab_size, dtype, device)
    known = _load(path)
    if force or key not in known:
        known[key] = _measure(hidden_size, vocab_size, dtype, device, sorted(set(rows)), repeats)
        _store(path, key, known[key])
    return known[key]


def _measure(
    hidden_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device, rows: Sequence[int], repeats: int
) -> Crossover:
    from mtedit_fast.ops.token_log_probs import token_log_probs

    generator = torch.Generator(device).manual_seed(0)
    weight = torch.empty(vocab_size, hidden_size, dtype=dtype, device=device).normal_(generator=generator)
    hidden = torch.empty(rows[-1], hidden_size, dtype=dtype, device=device)
    hidden.normal_(generator=generator).mul_(hidden_size**-0.5)
    targets = torch.randint(vocab_size, (rows[-1],), generator=generator, device=device)
    times: dict[str, dict[int, float]] = {"reference": {}, "triton": {}}
    with torch.no_grad():
        for count in rows:
            for backend, found in times.items():

                def call(count: int = count, backend: str = backend) -> None:
                    token_log_probs(hidden[:count], weight, targets[:count], backend=backend)

                found[count] = _microseconds(call, device, repeats)
    library, fused = times["reference"], times["triton"]
    crossover = None
    for count in reversed(rows):
        if fused[count] >= library[count]:
            break
        crossover = count
    return Crossover(crossover, library, fused)


def _microseconds(call: Callable[[], None], device: torch.device, repeats: int) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return round(1e6 * median(seconds), 3)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _key(hidden_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> str:
    return f"{_where(device)}, {hidden_size} x {vocab_size}, {str(dtype).removeprefix('torch.')}"


@lru_cache
def _where(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    try:
        return f"{name}, torch {torch.__version__}, triton {version('triton')}"
    except PackageNotFoundError:
        return f"{name}, torch {torch.__version__}"


@lru_cache
def _load(path: Path) -> dict[str, Crossover]:
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


def _store(path: Path, key: str, found: Crossover) -> None:
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
