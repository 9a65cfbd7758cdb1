"""From how many rows on the fused head beats library products: measured on the device, never guessed."""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from mtedit_fast.ops._backend import unavailable_reason
from mtedit_fast.ops._crossover import Crossover, cache_file, key_of, load, store
from mtedit_fast.ops.token_log_probs import token_log_probs

ROWS = (1, 16, 64, 256, 1024, 4096)


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
    path, key = cache_file(), key_of(hidden_size, vocab_size, dtype, device)
    known = load(path)
    if force or key not in known:
        known[key] = _measure(hidden_size, vocab_size, dtype, device, sorted(set(rows)), repeats)
        store(path, key, known[key])
    return known[key]


def _measure(
    hidden_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device, rows: Sequence[int], repeats: int
) -> Crossover:
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
