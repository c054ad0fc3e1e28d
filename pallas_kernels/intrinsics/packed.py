"""Registers that hold several numbers: two halves (bf16 or f16), or four bytes."""

from __future__ import annotations

from typing import Any

from qserve_jax.pallas_kernels.intrinsics._mlir import ptx_name, ptx_value, ptx_values
from qserve_jax.pallas_kernels.intrinsics.registers import F32, I32, bits_float


def pack_halves(low: F32, high: F32, dtype: Any) -> I32:
    """Two floats rounded to nearest even to bf16 or f16, low in the low half."""
    return ptx_value(I32, f"cvt.rn.{ptx_name(dtype)}x2.f32 $0, $1, $2;", high, low)


def unpack_halves(word: I32, dtype: Any) -> tuple[F32, F32]:
    """The bf16 or f16 numbers in the low and the high half, exactly."""
    if ptx_name(dtype) == "bf16":
        return bits_float(word << 16), bits_float(word & 0xFFFF0000)
    code = "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }"
    low, high = ptx_values(F32, 2, code, word)
    return low, high


def add_halves(a: I32, b: I32) -> I32:
    """a + b in each f16 half."""
    return ptx_value(I32, "add.rn.f16x2 $0, $1, $2;", a, b)


def multiply_add_halves(a: I32, b: I32, c: I32) -> I32:
    """a * b + c in each f16 half, rounded once."""
    return ptx_value(I32, "fma.rn.f16x2 $0, $1, $2, $3;", a, b, c)


def masked_or(word: I32, mask: int, bits: int) -> I32:
    """(word & mask) | bits, in one instruction."""
    return ptx_value(I32, f"lop3.b32 $0, $1, {mask:#x}, {bits:#x}, 0xEA;", word)


def pick_bytes(a: I32, b: I32, selector: int) -> I32:
    """Four of a's bytes (0..3) and b's (4..7), named by the selector's hex digits, lowest last."""
    return ptx_value(I32, f"prmt.b32 $0, $1, $2, {selector:#06x};", a, b)


def max_magnitudes(a: I32, b: I32, dtype: Any) -> I32:
    """The larger of |a| and |b| in each half, bf16 or f16; NaN where either is."""
    code = f"max.NaN.{ptx_name(dtype)}x2 $0, $1, $2;"
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
