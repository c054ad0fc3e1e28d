"""Vectors of numbers that a thread reads at once, as the 32-bit words of their dtype."""

from __future__ import annotations

from collections.abc import Sequence

from qserve_jax.pallas_kernels.intrinsics.memory import Address, load_global, store_global
from qserve_jax.pallas_kernels.intrinsics.packed import pack_halves, unpack_halves
from qserve_jax.pallas_kernels.intrinsics.registers import F32, I32, bits_float, float_bits


def load_words(source: Address, size: int) -> list[I32]:
    """`size` bytes, a multiple of 16 and aligned to it."""
    parts = (load_global(source.advance(i, 16), count=4) for i in range(size // 16))
    return [word for part in parts for word in part]


def store_words(target: Address, words: Sequence[I32]) -> None:
    """Any number of words, in vectors as long as their number allows; aligned to such a vector."""
    size = next(size for size in (4, 2, 1) if len(words) % size == 0)
    for i in range(0, len(words), size):
        store_global(target.advance(i, 4), words[i : i + size])


def floats_of(words: Sequence[I32], dtype: str) -> list[F32]:
    """The numbers in words of bf16, f16 or f32, exactly."""
    if dtype == "float32":
        return [bits_float(w) for w in words]
    return [x for w in words for x in unpack_halves(w, dtype)]


def words_of(values: Sequence[F32], dtype: str) -> list[I32]:
    """Words of the nearest numbers of bf16, f16 or f32 (to even)."""
    if dtype == "float32":
        return [float_bits(v) for v in values]
    pairs = zip(values[::2], values[1::2], strict=True)
    return [pack_halves(low, high, dtype) for low, high in pairs]
