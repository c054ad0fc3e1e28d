"""Codes of the cache as operands of the tensor core: which lane reads what, and makes what of it.

mma.m16n8k16 multiplies A [16, 16] by B [16, 8]. For the scores A is K, 16 tokens x 16 dims, and B
the queries; for the output A is V transposed, 16 dims x 16 tokens, and B the weights. Of lane l,
g = l // 4 and c = l % 4. Which dim is which column of A is free, if B agrees, and so a lane reads
its dims of K as they lie: 16 bytes of each 64 (8 of 32). Of V it reads H/8 dims in a row, of four
tokens; mma i then has dims H/8 g + 2 i as its rows g, and + 2 i + 1 as its rows g + 8.

Codes become f16 as half_codes says. For K the 1024, and half the range of the codes, are taken off
the sums at once: minus `offset` times the sum of q is what they start with. For V they are taken
off each code, which is exact in f16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import I32
from qserve_jax.pallas_kernels.paged_attention.half_codes import (
    MAGIC,
    OFFSET_4,
    OFFSET_4_HIGH,
    OFFSET_8,
    PAIRS,
    two_halves,
)

LOW, HIGH = 0x000F000F, 0x00F000F0


def row_of_tile(g: I32) -> I32:
    """The token of 16 (or + 8) that is row g: two neighbours change places, for the banks of V."""
    return g ^ ((g >> 1) & 1)


# K: the words of one token -> for each mma (columns 2 c, 2 c + 1; columns 2 c + 8, + 9)


def keys_4(words: Sequence[I32]) -> list[tuple[I32, I32]]:
    """Two mma a word: even dims as 1024 + code, odd ones as 1024 + 16 code."""
    pairs = []
    for word in words:
        other = word >> 8
        pairs += [
            (ptx.masked_or(word, mask, MAGIC), ptx.masked_or(other, mask, MAGIC))
            for mask in (LOW, HIGH)
        ]
    return pairs


def keys_8(words: Sequence[I32]) -> list[tuple[I32, I32]]:
    """1024 + code."""
    magic = ptx.constant(MAGIC)
    return [
        (ptx.pick_bytes(word, magic, PAIRS[0]), ptx.pick_bytes(word, magic, PAIRS[1]))
        for word in words
    ]


def keys_16(words: Sequence[I32]) -> list[tuple[I32, I32]]:
    return list(zip(words[::2], words[1::2], strict=True))


KEYS: dict[int, Callable[[Sequence[I32]], list[tuple[I32, I32]]]] = {
    4: keys_4,
    8: keys_8,
    16: keys_16,
}


def query_order(bits: int) -> list[tuple[tuple[int, ...], float, float]]:
    """Of 8 dims in a row: for each mma the four dims of a lane, a factor of q, and `offset`.

    offset: what each (magic) code has too much, in the units of q times the factor.
    """
    if bits == 4:
        return [((0, 4, 2, 6), 1.0, OFFSET_4), ((1, 5, 3, 7), 1 / 16, 16 * OFFSET_4_HIGH)]
    offset = OFFSET_8 if bits == 8 else 0.0
    return [((0, 1, 2, 3), 1.0, offset), ((4, 5, 6, 7), 1.0, offset)]


# V: words of the same dims of two tokens -> for each dim a word (first, second)


def values_4(first: Sequence[I32], second: Sequence[I32]) -> list[I32]:
    """code - 8, exactly."""
    minus, minus_high = (ptx.constant(two_halves(-x)) for x in (OFFSET_4, OFFSET_4_HIGH))
    sixteenth = ptx.constant(two_halves(1 / 16))
    out = []
    for a, b in zip(first, second, strict=True):
        for selector in (0x5410, 0x7632):
            four = ptx.pick_bytes(a, b, selector)  # dims 0..3 of each token
            for word in (four, four >> 8):
                even, odd = (ptx.masked_or(word, mask, MAGIC) for mask in (LOW, HIGH))
                out.append(ptx.add_halves(even, minus))
                out.append(ptx.multiply_add_halves(odd, sixteenth, minus_high))
    return out


def values_8(first: Sequence[I32], second: Sequence[I32]) -> list[I32]:
    """code - 128, exactly."""
    magic, minus = ptx.constant(MAGIC), ptx.constant(two_halves(-OFFSET_8))
    out = []
    for a, b in zip(first, second, strict=True):
        for selector in (0x5140, 0x7362):
            two = ptx.pick_bytes(a, b, selector)  # dim 0 of each token, dim 1 of each
            for pair in PAIRS:
                out.append(ptx.add_halves(ptx.pick_bytes(two, magic, pair), minus))
    return out


def values_16(first: Sequence[I32], second: Sequence[I32]) -> list[I32]:
    return [
        ptx.pick_bytes(a, b, selector)
        for a, b in zip(first, second, strict=True)
        for selector in (0x5410, 0x7632)
    ]


VALUES: dict[int, Callable[[Sequence[I32], Sequence[I32]], list[I32]]] = {
    4: values_4,
    8: values_8,
    16: values_16,
}
