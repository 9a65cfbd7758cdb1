"""Numbers as a GPU rounds them."""

from __future__ import annotations

import numpy as np

from ptx_machine.memory import Array

BFLOAT16 = np.uint16  # numpy has no such type: the bits


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(value: Array) -> Array:
    """To nearest even."""
    bits = np.ascontiguousarray(value).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), nearest).astype(np.uint16)


def tf32(value: Array) -> Array:
    """What the tensor cores look at: the upper 19 bits."""
    return (np.ascontiguousarray(value).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a·b + c in fp32 with one rounding: in fp64 the product is exact and the sum is rounded to odd, which a second
    rounding to half as many bits does not harm (Boldo and Melquiond, 2008)."""
    product = a.astype(np.float64) * b.astype(np.float64)
    added = c.astype(np.float64)
    total = product + added
    rest = total - product
    error = (product - (total - rest)) + (added - rest)
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    away = np.where((error > 0) == (total > 0), 1, -1)
    odd = np.where(inexact, bits + away, bits).view(np.float64)
    return odd.astype(np.float32)


def fma_double(a: Array, b: Array, c: Array) -> Array:
    """a·b + c in fp64, the product's error added (Dekker, 1971): half a unit in the last place, or hardly more."""

    def split(value: Array) -> tuple[Array, Array]:
        high = value * 134217729.0
        high = high - (high - value)
        return high, value - high

    product = a * b
    (a_high, a_low), (b_high, b_low) = split(a), split(b)
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    total = product + c
    rest = total - product
    return total + np.where(np.isfinite(error), (product - (total - rest)) + (c - rest) + error, 0)


def approximate(exact: Array, of: Array, error: float) -> Array:
    """fp32 that is off by up to `error` of the exact result in fp64, and the same for the same number `of`."""
    bits = np.ascontiguousarray(of).view(np.uint32) * np.uint32(2654435761)  # a hash (Knuth)
    off = np.where(np.abs(exact) == 1, 0, bits.astype(np.float64) * 2.0**-31 - 1)
    return (exact * (1 + off * error)).astype(np.float32)
