"""Registers that hold several numbers: two halves (bf16 or f16), or four bytes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from qserve_jax.pallas_kernels.intrinsics._mlir import ptx_value, ptx_values
from qserve_jax.pallas_kernels.intrinsics.registers import F32, I32, bits_float


def _ptx_name(dtype: Any) -> str:
    return {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(dtype).name]


def pack_halves(low: F32, high: F32, dtype: Any) -> I32:
    """Two floats rounded to nearest even to bf16 or f16, low in the low half."""
    return ptx_value(I32, f"cvt.rn.{_ptx_name(dtype)}x2.f32 $0, $1, $2;", high, low)


def unpack_halves(word: I32, dtype: Any) -> tuple[F32, F32]:
    """The bf16 or f16 numbers in the low and the high half, exactly."""
    if _ptx_name(dtype) == "bf16":
        return bits_float(word << 16), bits_float(word & 0xFFFF0000)
    code = "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }"
    low, high = ptx_values(F32, 2, code, word)
    return low, high


def max_magnitudes(a: I32, b: I32, dtype: Any) -> I32:
    """The larger of |a| and |b| in each half, bf16 or f16; NaN where either is."""
    code = f"max.NaN.{_ptx_name(dtype)}x2 $0, $1, $2;"
    return ptx_value(I32, code, a & 0x7FFF7FFF, b & 0x7FFF7FFF)


def low_bytes(a: I32, b: I32, c: I32, d: I32) -> I32:
    """The lowest byte of each, a's lowest."""
    code = (
        "{ .reg .b32 l, h; prmt.b32 l, $1, $2, 0x0040; prmt.b32 h, $3, $4, 0x0040; "
        "prmt.b32 $0, l, h, 0x5410; }"
    )
    return ptx_value(I32, code, a, b, c, d)


def add_bytes(word: I32, total: I32) -> I32:
    """total + the sum of the four int8 in word."""
    return ptx_value(I32, "dp4a.s32.s32 $0, $1, $2, $3;", word, 0x01010101, total)
