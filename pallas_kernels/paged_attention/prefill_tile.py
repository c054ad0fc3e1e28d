"""64 keys and values: where they lie, and what becomes of them as float16.

A thread takes 16 bytes of a token's K, and of its V. Of a quantised page they are
(code - 2^(bits-1)) s + c, rounded once. Values of tokens that are not there are zeros, because
their weight 0 does not cancel a NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import I32, Address, Predicate
from qserve_jax.pallas_kernels.paged_attention.half_codes import (
    MAGIC,
    OFFSET_4,
    OFFSET_4_HIGH,
    OFFSET_8,
    PAIRS,
    two_halves,
)
from qserve_jax.pallas_kernels.paged_attention.prefill_problem import TILE, Problem
from qserve_jax.pallas_kernels.paged_attention.prefill_rows import Block, count_tiles, first_tile


@dataclasses.dataclass(frozen=True)
class Pages:
    """Tiles that are pages: of a row of the batch and a KV head, in a layer.

    first: the first tile that some row sees, of `count`. end: the position after their last token.
    """

    p: Problem
    table: Address
    pages: Address
    index: I32
    first: I32
    count: I32
    end: I32

    @property
    def chunks(self) -> int:
        """Of 16 bytes that a token has on each side."""
        return self.p.page.side_bytes // 16

    @property
    def bits(self) -> int:
        return self.p.bits

    @property
    def dtype(self) -> str:
        return self.p.stored

    def begin(self, i: I32) -> I32:
        """The position of the i-th tile's first token."""
        return (self.first + i) * TILE

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
        block = self.pages.advance(index, p.page.block_bytes)
        k = block.advance(token, p.page.side_bytes).advance(chunk, 16)
        words = ptx.load_words(k, 16) + ptx.load_words(k.advance(1, p.page.values_at), 16)
        if p.bits == 16:
            return words
        scales = block.advance(1, p.page.scales_at).advance(token, 8)
        return words + ptx.load_global(scales, count=2)


@dataclasses.dataclass(frozen=True)
class NewTokens:
    """Tiles of the tokens of this call, unquantised."""

    p: Problem
    k: Address
    v: Address
    row: I32
    start: I32
    first: I32
    count: I32
    end: I32
    bits = 16

    @property
    def chunks(self) -> int:
        return self.p.head_dim // 8

    @property
    def dtype(self) -> str:
        return self.p.dtype

    def begin(self, i: I32) -> I32:
        return self.start + (self.first + i) * TILE

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


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where all keys and values are: pages, new tokens where they are attended, the layer."""

    p: Problem
    table: Address
    pages: Address
    new: list[Address]
    layer: Address | None

    def of(self, b: Block) -> list[Source]:
        """What a block goes over: the pages, then the new tokens."""
        pages = [self._pages(b)] if self.p.width else []
        return pages + ([self._new_tokens(b)] if self.p.full else [])

    def _pages(self, b: Block) -> Pages:
        p = self.p
        end = b.start if p.full else b.context
        needed = ptx.minimum(end, b.start + b.last + 1)
        first = first_tile(p, b.start + b.first)
        count = count_tiles(b, first, ptx.minimum(needed, p.width * TILE))
        table = self.table.advance(b.batch, 4 * p.width)
        pages = self.pages.advance(b.kv_head, p.page.block_bytes)
        return Pages(p, table, pages, self._first_page(), first, count, end)

    def _first_page(self) -> I32:
        """Of the layer, which is clamped."""
        p = self.p
        if self.layer is None:
            return ptx.constant(0)
        assert p.layers is not None
        number = ptx.load_global(self.layer)[0]
        number = ptx.select(number < 0, number + p.layers, number)
        return ptx.minimum(ptx.maximum(number, 0), p.layers - 1) * p.num_pages

    def _new_tokens(self, b: Block) -> NewTokens:
        p = self.p
        first = first_tile(p, b.first)
        row = b.batch * (p.tokens * p.kv_heads) + b.kv_head
        count = count_tiles(b, first, b.last + 1)
        return NewTokens(p, self.new[0], self.new[1], row, b.start, first, count, b.context)


def sources(p: Problem, table: object, pages: object, more: Sequence[object]) -> Sources:
    """more: new K and V where they are attended, and the layer where there are several."""
    addresses = [ptx.global_address(ref) for ref in more]
    layer = addresses.pop() if p.layers is not None else None
    return Sources(p, ptx.global_address(table), ptx.global_address(pages), addresses, layer)


def halves(source: Source, words: Sequence[I32], there: Predicate) -> tuple[list[I32], list[I32]]:
    """K and V of what was fetched, in float16; of V zeros unless the token is there."""
    k, v = words[:4], words[4:8]
    if source.bits < 16:
        scales = words[8], ptx.select(there, words[9], 0)
        k, v = (_dequantize(source.bits, *x) for x in zip((k, v), scales, strict=True))
        return k, v
    if source.dtype != "float16":
        k, v = (ptx.words_of(ptx.floats_of(x, source.dtype), "float16") for x in (k, v))
    return list(k), [ptx.select(there, word, 0) for word in v]


def _dequantize(bits: int, words: Sequence[I32], scales: I32) -> list[I32]:
    """float16 of (code - 2^(bits-1)) s + c, two neighbouring dimensions a word; scales: (s, c)."""
    scale, centre = (ptx.pick_bytes(scales, scales, half) for half in (0x1010, 0x3232))
    codes = [pair for word in words for pair in (_pairs_4 if bits == 4 else _pairs_8)(word)]
    return [ptx.multiply_add_halves(code, scale, centre) for code in codes]


def _pairs_4(word: I32) -> list[I32]:
    """A byte's low code in the low half, its high code in the high half, which is divided by 16."""
    factors, offsets = two_halves(1, 1 / 16), two_halves(-OFFSET_4, -OFFSET_4_HIGH)
    zero, factors, minus = (ptx.constant(x) for x in (0, factors, offsets))
    pairs = []
    for byte in range(4):
        twice = ptx.pick_bytes(word, zero, 0x4040 | byte | byte << 8)
        both = ptx.masked_or(twice, 0x00F0000F, MAGIC)
        pairs.append(ptx.multiply_add_halves(both, factors, minus))
    return pairs


def _pairs_8(word: I32) -> list[I32]:
    magic, minus = ptx.constant(MAGIC), ptx.constant(two_halves(-OFFSET_8))
    return [ptx.add_halves(ptx.pick_bytes(word, magic, pair), minus) for pair in PAIRS]
