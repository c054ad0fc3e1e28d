"""64 keys and values, from where they lie to shared memory as float16.

All threads of a block together: each takes 16 bytes of a token's K, and of its V. Of a quantised
page they are (code - 2^(bits-1)) s + c, rounded once. Values of tokens that are not there are
zeros, because their weight 0 does not cancel a NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import I32, Address
from qserve_jax.pallas_kernels.paged_attention.prefill_problem import TILE, WARPS, Problem

MAGIC = 0x64006400  # 1024 in both halves
THREADS = 32 * WARPS


@dataclasses.dataclass(frozen=True)
class Pages:
    """Tiles that are pages: of a row of the batch and a KV head, in a layer."""

    p: Problem
    table: Address
    pages: Address
    first: I32
    index: I32

    @property
    def chunks(self) -> int:
        """Of 16 bytes that a token has on each side."""
        return self.p.side_bytes // 16

    @property
    def bits(self) -> int:
        return self.p.bits

    @property
    def dtype(self) -> str:
        return self.p.stored

    def page(self, i: I32) -> I32:
        """Its id; one outside the table is its last."""
        at = ptx.minimum(self.first + i, self.p.width - 1)
        return ptx.load_global(self.table.advance(at, 4))[0]

    def exists(self, page: I32) -> I32:
        """1 or 0."""
        return ptx.select(~(page < 0) & (page < self.p.num_pages), 1, 0)

    def fetch(self, page: I32, token: I32, chunk: I32) -> list[I32]:
        """K, V and, of a quantised page, scales: (sk, ck), (sv, cv)."""
        p = self.p
        index = (self.index + page * self.exists(page)) * p.kv_heads
        block = self.pages.advance(index, p.block_bytes)
        k = block.advance(token, p.side_bytes).advance(chunk, 16)
        words = ptx.load_words(k, 16) + ptx.load_words(k.advance(1, TILE * p.side_bytes), 16)
        if p.bits == 16:
            return words
        scales = block.advance(1, 2 * TILE * p.side_bytes).advance(token, 8)
        return words + ptx.load_global(scales, count=2)


@dataclasses.dataclass(frozen=True)
class NewTokens:
    """Tiles of the tokens of this call, unquantised."""

    p: Problem
    k: Address
    v: Address
    first: I32
    row: I32
    bits = 16

    @property
    def chunks(self) -> int:
        return self.p.head_dim // 8

    @property
    def dtype(self) -> str:
        return self.p.dtype

    def page(self, i: I32) -> I32:
        return self.first + i

    def exists(self, page: I32) -> I32:
        return ptx.constant(1)

    def fetch(self, page: I32, token: I32, chunk: I32) -> list[I32]:
        p = self.p
        at = self.row + ptx.minimum(page * TILE + token, p.tokens - 1) * p.kv_heads
        sides = (side.advance(at, 2 * p.head_dim).advance(chunk, 16) for side in (self.k, self.v))
        return [word for side in sides for word in ptx.load_words(side, 16)]


Source = Pages | NewTokens


def passes(source: Source) -> int:
    """How often each thread takes 16 bytes of a tile."""
    return max(1, TILE * source.chunks // THREADS)


def _items(source: Source) -> list[tuple[I32, I32]]:
    """(token, chunk) of each pass; there are fewer than threads where a tile is small."""
    items = [ptx.thread_index() + i * THREADS for i in range(passes(source))]
    items = [ptx.minimum(item, TILE * source.chunks - 1) for item in items]
    return [(item // source.chunks, item % source.chunks) for item in items]


def fetch(source: Source, page: I32) -> list[I32]:
    """The words of this thread, of all passes."""
    return [word for item in _items(source) for word in source.fetch(page, *item)]


def store(p: Problem, source: Source, shared: I32, words: Sequence[I32], count: I32) -> None:
    """What was fetched to shared memory; `count` tokens of the tile are there.

    Threads beyond a small tile do its last item again, and store the same.
    """
    each = len(words) // passes(source)
    for i, (token, chunk) in enumerate(_items(source)):
        mine = words[i * each : (i + 1) * each]
        k, v = mine[:4], mine[4:8]
        if source.bits < 16:
            k, v = (_dequantize(source.bits, *x) for x in ((k, mine[8]), (v, mine[9])))
        else:
            k, v = (ptx.words_of(ptx.floats_of(x, source.dtype), "float16") for x in (k, v))
        v = [ptx.select(token < count, word, 0) for word in v]
        at = shared + token * p.stride + chunk * (4 * len(k))
        for offset, side in ((0, k), (p.values_at, v)):
            for j in range(0, len(side), 4):
                ptx.store_shared_words(at, side[j : j + 4], offset + 4 * j)


def _dequantize(bits: int, words: Sequence[I32], scales: I32) -> list[I32]:
    """float16 of (code - 2^(bits-1)) s + c, two neighbouring dimensions a word; scales: (s, c)."""
    scale, centre = (ptx.pick_bytes(scales, scales, half) for half in (0x1010, 0x3232))
    codes = [pair for word in words for pair in (_pairs_4 if bits == 4 else _pairs_8)(word)]
    return [ptx.multiply_add_halves(code, scale, centre) for code in codes]


def _pairs_4(word: I32) -> list[I32]:
    """A byte's low code into the low bits of 1024, minus 1032; its high code, 16 times as much in
    the high half's, divided by 16, minus 72."""
    zero, factors, minus = (ptx.constant(x) for x in (0, 0x2C003C00, 0xD480E408))
    pairs = []
    for byte in range(4):
        twice = ptx.pick_bytes(word, zero, 0x4040 | byte | byte << 8)
        both = ptx.masked_or(twice, 0x00F0000F, MAGIC)
        pairs.append(ptx.multiply_add_halves(both, factors, minus))
    return pairs


def _pairs_8(word: I32) -> list[I32]:
    """1024 + code, minus 1152."""
    magic, minus = ptx.constant(MAGIC), ptx.constant(0xE480E480)
    return [ptx.add_halves(ptx.pick_bytes(word, magic, s), minus) for s in (0x5150, 0x5352)]
