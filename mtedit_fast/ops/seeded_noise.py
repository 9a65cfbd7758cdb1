"""Standard normals that depend on (seed, step, element) alone, never on the batch around them."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from mtedit_fast.ops._backend import choose_backend
from mtedit_fast.ops._operator import Operator


def seeded_noise(
    seed: Tensor,
    shape: Sequence[int],
    step: int,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Counter-based standard normals: a sample's noise is a function of its own seed, whatever the batch or device.

    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the seed's (low, high)
    words as key and (element // 4, step, 0, 0) as counter; two Box–Muller pairs make the four normals. They are not
    `torch.randn`'s numbers. |noise| < 6.77.

    Args:
        seed: [B] int64.
        shape: of one sample, without the batch dimension.
        step: counter step, in [0, 2³²). `sde_step` draws step i's noise at i + 1, so that 0 is left for the initial
            noise.
        dtype: of the result; the normals are computed in fp32 and rounded to it.
        backend: "auto", "reference", "cpp" or "triton".

    Returns:
        [B, *shape] on seed's device.

    Raises:
        TypeError: seed is not an int64 tensor, or dtype is not a floating one.
        ValueError: seed is not [B], step is out of range, or the backend cannot run here.
    """
    check_seed(seed)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
    if not 0 <= step < 2**32:
        raise ValueError(f"step must be in [0, 2**32), got {step}")
    chosen = choose_backend(backend, seed.device, (dtype,))
    numel = prod(shape)
    return _op(seed, numel, step, dtype, chosen).view(seed.shape[0], *shape)


def check_seed(seed: Tensor) -> None:
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        got = seed.dtype if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"seed must be an int64 tensor of shape [B], got {got}; use torch.tensor(seeds)")
    if seed.ndim != 1:
        raise ValueError(f"seed must have shape [B], one per sample, got {list(seed.shape)}")


_MASK = 0xFFFFFFFF
_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 on 32-bit words held in int64 tensors that broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # An int64 product wraps to the low 64 bits, which are those of the unsigned one.
        p0, p1 = c0 * _PHILOX_M[0], c2 * _PHILOX_M[1]
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + _PHILOX_W[0] & _MASK, k1 + _PHILOX_W[1] & _MASK
    return c0, c1, c2, c3


# Chebyshev fits, relative error < 3e-8: (log1p(f) - f + f²/2) / f³ on [√½ - 1, √2 - 1]; sin and cos on [-π/4, π/4].
LOG = (
    0.333333283662796,
    -0.25000298023223877,
    0.20001468062400818,
    -0.16642247140407562,
    0.14202173054218292,
    -0.12972238659858704,
    0.12712307274341583,
    -0.08101558685302734,
)
SIN = (-0.166666641831398, 0.008332748897373676, -0.0001958794891834259)
COS = (0.0416666641831398, -0.0013888300163671374, 2.454758941894397e-05)
TURN = 1.4629180792671596e-09  # 2π / 2³² in fp32
LN2_HIGH, LN2_LOW = 0.693359375, -0.00021219444170128554


def box_muller(radius_bits: Tensor, angle_bits: Tensor) -> tuple[Tensor, Tensor]:
    """Two normals from two 32-bit words: √(-2 ln u)·(cos 2πt, sin 2πt), u = (w₀ + ½)·2⁻³² and t = w₁·2⁻³².

    Only IEEE fp32 +, × and √, with no fused multiply-add, so every back end that does the same operations in the same
    order returns the same bits. All arguments are bounded, so no slow range reduction is ever needed.
    """
    u = radius_bits.float() * 2.0**-32 + 2.0**-33
    # ln u = e ln 2 + ln(1 + f), with 1 + f in [√½, √2)
    bits = u.view(torch.int32) - 0x3F3504F3
    e = (bits >> 23).float()
    f = ((bits & 0x7FFFFF) + 0x3F3504F3).view(torch.float32) - 1.0
    square = f * f
    log = e * LN2_HIGH + (e * LN2_LOW + _horner(f, LOG) * f * square - 0.5 * square + f)
    radius = (-2.0 * log).double().sqrt().float()  # torch's fp32 square root on CPU is not the IEEE one
    # The nearest quarter turn, and an exact remainder in [-1/8, 1/8) turn.
    quarter = angle_bits + 0x20000000 >> 30 & 3
    theta = ((angle_bits + 0x20000000 & 0x3FFFFFFF) - 0x20000000).float() * TURN
    square = theta * theta
    sin = _horner(square, SIN) * square * theta + theta
    cos = _horner(square, COS) * square * square - 0.5 * square + 1.0
    odd = quarter & 1 == 1
    x = torch.where(odd, sin, cos)
    y = torch.where(odd, cos, sin)
    x = torch.where((quarter == 1) | (quarter == 2), -x, x)
    y = torch.where(quarter >= 2, -y, y)
    return radius * x, radius * y


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = x * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        value = value * x + coefficient
    return value


def reference(seed: Tensor, numel: int, step: int | Tensor, dtype: torch.dtype) -> Tensor:
    """Plain PyTorch: seed [B], step an int or an int64 tensor [] or [B] -> [B, numel] of dtype."""
    column = seed[:, None]
    element = torch.arange((numel + 3) // 4, device=seed.device)[None]
    zero = torch.zeros_like(element)
    counter_step = step.reshape(-1, 1) if isinstance(step, Tensor) else torch.full_like(column, step)
    words = philox4x32((element, counter_step & _MASK, zero, zero), (column & _MASK, column >> 32 & _MASK))
    normals = (*box_muller(words[0], words[1]), *box_muller(words[2], words[3]))
    return torch.stack(normals, dim=-1).flatten(1)[:, :numel].to(dtype).contiguous()


def _forward(seed: Tensor, numel: int, step: int, dtype: torch.dtype, backend: str) -> Tensor:
    if backend == "triton":
        from mtedit_fast.kernels.seeded_noise import seeded_noise as launch

        return launch(seed.contiguous(), numel, step, dtype)
    if backend == "cpp":
        from mtedit_fast.ops import _cpp

        return _cpp.seeded_noise(seed.contiguous(), numel, step, dtype)
    return reference(seed, numel, step, dtype)


def _fake(seed: Tensor, numel: int, step: int, dtype: torch.dtype, backend: str) -> Tensor:
    return seed.new_empty((seed.shape[0], numel), dtype=dtype)


_op = Operator("seeded_noise", _forward, _fake)
