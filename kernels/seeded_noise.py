"""Counter-based standard normals: the integers and the normals of `ops.seeded_noise`, bit for bit."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
NUM_WARPS = 4  # 32 elements to a thread, among which what a program does once is shared
DRAWING_WARPS = 8  # of kernels that draw: 16 elements, and registers for twice the warps
INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET=1 was set when this module was imported: the kernels then run on CPU tensors."""
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def round_to(values, dtype: tl.constexpr):
    """fp32 to dtype, to nearest even; the interpreter's own conversion to bf16 truncates."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        values = tl.where(values == values, nearest, values)
    return values.to(dtype)


@triton.jit
def fast_sqrt(x):
    """`tl.sqrt_rn` of 0, −0 and what is positive and normal: what ptxas makes of it, without the branch for all else.
    Both multiply-adds must be fused."""
    inverse = tl.minimum(tl.rsqrt(tl.abs(x)), 1e18)
    root = x * inverse
    return tl.fma(tl.fma(-root, root, x), 0.5 * inverse, root)


@triton.jit
def _philox(key_lo, key_hi, x, y):
    """`tl.philox` of counter x, y, 0, 0: a product's halves come of one instruction here, there of one each."""
    z = tl.zeros_like(x)
    w = tl.zeros_like(x)
    a = tl.full((1,), 0xD2511F53, tl.uint64)
    b = tl.full((1,), 0xCD9E8D57, tl.uint64)
    for _ in tl.static_range(10):
        p0 = x.to(tl.uint64) * a
        p1 = z.to(tl.uint64) * b
        x = (p1 >> 32).to(tl.uint32) ^ y ^ key_lo
        y = p1.to(tl.uint32)
        z = (p0 >> 32).to(tl.uint32) ^ w ^ key_hi
        w = p0.to(tl.uint32)
        key_lo = key_lo + tl.full((1,), 0x9E3779B9, tl.uint32)
        key_hi = key_hi + tl.full((1,), 0xBB67AE85, tl.uint32)
    return x, y, z, w


@triton.jit
def _box_muller(radius_bits, angle_bits):
    # `tl.sin`, `tl.cos` and `tl.log` would reduce their arguments in fp64 or round differently from one device to the
    # next. Every operation here is IEEE fp32 as long as the launch turns fused multiply-adds off; those that are
    # written out multiply exactly, so that fused or not they give the same bits.
    u = tl.fma(radius_bits.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    bits = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = (bits >> 23).to(tl.float32)
    f = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    square = f * f
    log = f * -0.08101558685302734 + 0.12712307274341583
    log = log * f + -0.12972238659858704
    log = log * f + 0.14202173054218292
    log = log * f + -0.16642247140407562
    log = log * f + 0.20001468062400818
    log = log * f + -0.25000298023223877
    log = log * f + 0.333333283662796
    log = tl.fma(square, -0.5, e * -0.00021219444170128554 + log * f * square) + f
    squared_radius = -2.0 * tl.fma(e, 0.693359375, log)
    radius = tl.sqrt_rn(squared_radius) if _INTERPRETED else fast_sqrt(squared_radius)  # which it would not fuse

    rotated = angle_bits + tl.full((1,), 0x20000000, tl.uint32)
    theta = (angle_bits << 2).to(tl.int32, bitcast=True).to(tl.float32) * 3.657295198167899e-10
    square = theta * theta
    sin = square * -0.0001958794891834259 + 0.008332748897373676
    sin = sin * square + -0.166666641831398
    sin = sin * square * theta + theta
    cos = square * 2.454758941894397e-05 + -0.0013888300163671374
    cos = cos * square + 0.0416666641831398
    cos = tl.fma(square, -0.5, cos * square * square) + 1.0
    # The two upper bits of `rotated` say which quarter turn: sine for cosine in the odd ones, and the signs.
    odd = (rotated & 0x40000000) != 0
    x = (radius * tl.where(odd, sin, cos)).to(tl.uint32, bitcast=True) ^ ((rotated + 0x40000000) & 0x80000000)
    y = (radius * tl.where(odd, cos, sin)).to(tl.uint32, bitcast=True) ^ (rotated & 0x80000000)
    return x.to(tl.float32, bitcast=True), y.to(tl.float32, bitcast=True)


@triton.jit
def standard_normals(seed, counter_step, tile, BLOCK: tl.constexpr):
    """Elements tile·BLOCK … of a sample's noise, [BLOCK] fp32; seed and counter_step are scalars."""
    quad = (tile * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = tl.zeros_like(quad)
    w0, w1, w2, w3 = _philox(seed.to(tl.uint32), (seed >> 32).to(tl.uint32), quad, zero + counter_step.to(tl.uint32))
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (BLOCK,))


@triton.jit(do_not_specialize=["step"])
def _kernel(seed_ptr, out_ptr, step, numel, tiles, BLOCK: tl.constexpr):
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    offsets = tile * BLOCK + tl.arange(0, BLOCK)
    normals = standard_normals(tl.load(seed_ptr + sample), step, tile, BLOCK)
    tl.store(out_ptr + sample * numel + offsets, round_to(normals, out_ptr.dtype.element_ty), mask=offsets < numel)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def seeded_noise(seed: Tensor, numel: int, step: int, dtype: torch.dtype) -> Tensor:
    """seed [B] int64 -> [B, numel] standard normals of counter step `step`."""
    out = torch.empty(seed.shape[0], numel, dtype=dtype, device=seed.device)
    tiles = triton.cdiv(numel, BLOCK)
    if out.numel():
        with on_device(seed):
            _kernel[(seed.shape[0] * tiles,)](
                seed, out, step, numel, tiles, BLOCK=BLOCK, num_warps=DRAWING_WARPS, enable_fp_fusion=False
            )
    return out
