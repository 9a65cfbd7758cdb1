"""SDE windows, timestep lookup and cached step coefficients."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mtedit_fast.ops import SDECoefficients, sde_coefficients


def _check_window(num_steps: int, size: int, lo: int, hi: int | None) -> int:
    if num_steps < 2:
        raise ValueError(f"num_steps must be at least 2 (the last step is always an ODE step), got {num_steps}")
    hi = num_steps - 1 if hi is None else hi
    if not 0 <= lo < hi <= num_steps - 1:
        raise ValueError(
            f"the window range needs 0 <= lo < hi <= num_steps - 1 = {num_steps - 1} (the last step is always an ODE "
            f"step), got lo={lo}, hi={hi}"
        )
    if not 1 <= size <= hi - lo:
        raise ValueError(f"size must be between 1 and hi - lo = {hi - lo}, got {size}")
    return hi


def sde_window(num_steps: int, size: int, lo: int = 0, hi: int | None = None, *, seed: int | torch.Generator) -> range:
    """Steps that are stochastic in one rollout, as in Flow-GRPO-Fast: ``size`` of them, the start uniform.

    Args:
        num_steps: denoising steps of the schedule.
        size: steps in the window.
        lo, hi: the window lies in ``[lo, hi)``, so its start is uniform in ``[lo, hi - size]``. ``hi`` is at most (and
            by default) ``num_steps - 1``: the last step stays an ODE step, its Gaussian is too sharp to learn from.
        seed: an int, or a CPU ``torch.Generator`` that is advanced. Equal seeds give equal windows on every rank.

    Raises:
        ValueError: an empty range, or a window that does not fit in it.
    """
    hi = _check_window(num_steps, size, lo, hi)
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    start = int(torch.randint(lo, hi - size + 1, (), generator=generator))
    return range(start, start + size)


def progressive_window(
    iteration: int,
    num_steps: int,
    size: int = 4,
    *,
    iterations_per_window: int = 25,
    stride: int = 1,
    lo: int = 0,
    hi: int | None = None,
) -> range:
    """MixGRPO's progressive window: it moves by ``stride`` every ``iterations_per_window`` training iterations.

    It starts at ``lo`` and stays at the last full window of ``[lo, hi)``. ``stride=size`` gives windows that do not
    overlap. ``hi`` is at most (and by default) ``num_steps - 1``, see :func:`sde_window`.

    Raises:
        ValueError: a negative iteration, a stride or period below 1, or a window that does not fit.
    """
    hi = _check_window(num_steps, size, lo, hi)
    if iteration < 0:
        raise ValueError(f"iteration must be 0 or more, got {iteration}")
    if iterations_per_window < 1 or stride < 1:
        raise ValueError(
            f"iterations_per_window and stride must be at least 1, got {iterations_per_window} and {stride}"
        )
    start = min(lo + stride * (iteration // iterations_per_window), hi - size)
    return range(start, start + size)


def nearest_index(timestep: float, schedule: Sequence[float]) -> int:
    """Index of ``timestep`` in ``schedule`` by exact equality.

    Raises:
        ValueError: it is not there; the message lists the nearest ones.
    """
    try:
        return schedule.index(timestep)
    except ValueError:
        nearest = sorted(schedule, key=lambda t: abs(t - timestep))[:3]
        raise ValueError(
            f"timestep {timestep:.9g} is not in the schedule of {len(schedule)} timesteps (nearest: "
            f"{', '.join(f'{t:.9g}' for t in nearest)}); pass an element of scheduler.timesteps in fp32, from the last "
            "set_timesteps call (bf16 rounds timesteps)"
        ) from None


@functools.lru_cache(maxsize=256)
def _host_coefficients(sigmas: tuple[float, ...], variant: str, eta: float, device: torch.device) -> SDECoefficients:
    return sde_coefficients(sigmas, variant=variant, eta=eta, device=device)


# keyed by identity: reading the values of a device tensor would stop the host
_on_device: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def cached_coefficients(sigmas: Tensor, *, variant: str, eta: float, device: torch.device) -> SDECoefficients:
    """:func:`mtedit_fast.ops.sde_coefficients` of a schedule, computed once per (sigmas, variant, eta, device).

    Host sigmas are compared by value, device sigmas by identity and version, so that no call reads them back.
    """
    # tables outlive the call: one made under inference_mode could not be saved for a later backward
    with torch.inference_mode(False), torch.no_grad():
        if sigmas.device.type == "cpu":
            return _host_coefficients(tuple(sigmas.tolist()), variant, float(eta), device)
        tables = _on_device.setdefault(sigmas, {})
        key = (variant, float(eta), device, _version(sigmas))
        if key not in tables:
            tables[key] = sde_coefficients(sigmas, variant=variant, eta=float(eta), device=device)
        return tables[key]


def host_values(tensor: Tensor) -> list[float]:
    """``tensor.tolist()``; for a device tensor read back once and remembered."""
    if tensor.device.type == "cpu":
        return tensor.tolist()
    memo = _on_device.setdefault(tensor, {})
    key = ("values", _version(tensor))
    if key not in memo:
        memo[key] = tensor.tolist()
    return memo[key]
