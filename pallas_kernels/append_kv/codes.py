"""Numbers of a head as codes, scale and centre: `numerics.quantize_kv` bit for bit."""

from __future__ import annotations

import functools

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.append_kv.places import Halves
from qserve_jax.pallas_kernels.append_kv.problem import Problem
from qserve_jax.pallas_kernels.intrinsics import F32, I32
from qserve_jax.quantization.numerics import MAX_KV_VALUE, MIN_KV_SCALE

ROUND_TO_INTEGER = 1.5 * 2.0**23
"""Added to a float32 below 2**22, it leaves the nearest integer in the low bits (ties to even)."""


def quantized(p: Problem, halves: list[list[F32]]) -> tuple[Halves, I32]:
    """Words of the codes, and scale and centre in one word: `numerics.quantize_kv`."""
    half, top = 2 ** (p.bits - 1), 2**p.bits - 1
    low, high = _range(p, [x for part in halves for x in part])
    scale = _bounded((high - low) / ptx.constant_float(top), MIN_KV_SCALE, MAX_KV_VALUE)
    exact = _as_halves(scale, scale)[1][0]
    centre = low + exact * ptx.constant_float(half)
    word, (_, centre) = _as_halves(exact, _bounded(centre, -MAX_KV_VALUE, MAX_KV_VALUE))
    inverse = ptx.constant_float(1) / exact
    return [_codes(p, [(x - centre) * inverse for x in part]) for part in halves], word


def _range(p: Problem, values: list[F32]) -> tuple[F32, F32]:
    """Minimum and maximum over the lanes of a head."""
    low = functools.reduce(ptx.float_minimum, values)
    high = functools.reduce(ptx.float_maximum, values)
    for lanes in (1, 2, 4, 8):
        if lanes < p.lanes:
            low = ptx.float_minimum(low, ptx.exchange(low, lanes))
            high = ptx.float_maximum(high, ptx.exchange(high, lanes))
    return low, high


def _bounded(x: F32, low: float, high: float) -> F32:
    least = ptx.float_maximum(x, ptx.constant_float(low))
    return ptx.float_minimum(least, ptx.constant_float(high))


def _as_halves(low: F32, high: F32) -> tuple[I32, tuple[F32, F32]]:
    """Two numbers rounded to float16: their word, and their values."""
    word = ptx.pack_halves(low, high, "float16")
    return word, ptx.unpack_halves(word, "float16")


def _codes(p: Problem, steps: list[F32]) -> list[I32]:
    """Words of clip(round(step) + 2^(bits-1), 0, 2^bits - 1)."""
    half, top = 2 ** (p.bits - 1), 2**p.bits - 1
    shift = ptx.constant_float(ROUND_TO_INTEGER + half)
    bits = [ptx.float_bits(_bounded(x, -half, top - half) + shift) for x in steps]
    if p.bits == 8:
        return [ptx.low_bytes(*bits[:4]), ptx.low_bytes(*bits[4:])]
    return [ptx.low_bytes(*bits[::2]) | ptx.low_bytes(*bits[1::2]) << 4]
