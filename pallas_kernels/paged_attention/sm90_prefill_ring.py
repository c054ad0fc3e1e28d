"""The ring of tiles between the warpgroup that makes them and those that multiply.

A slot holds 64 tokens: K, then V, each in parts of 64 dimensions, [64 tokens, 128 bytes] of
float16, with the 16-byte pieces of a row XORed by the token's number (the 128-byte swizzle of
wgmma, which reads K as it lies, and V transposed). Beside it the tile's extent: the position where
it begins, and how many of its tokens are there.

Two barriers each: `full` counts the four warps that have made it, `empty` those that have read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import I32
from qserve_jax.pallas_kernels.paged_attention.prefill_problem import TILE, Problem
from qserve_jax.pallas_kernels.paged_attention.prefill_tile import Source, halves

STAGES = 4


def shared_bytes(p: Problem) -> int:
    """From an address that is a multiple of 1024."""
    return STAGES * (_tile_bytes(p) + Ring.EXTENT)


def _tile_bytes(p: Problem) -> int:
    """Of K and V."""
    return 2 * p.head_dim // 64 * Ring.PART


@dataclasses.dataclass(frozen=True)
class Ring:
    """n counts the tiles of all blocks of rows. base: a multiple of 1024."""

    p: Problem
    base: I32
    barriers: I32
    PART = TILE * 128
    """Bytes of 64 dimensions of K or V."""
    EXTENT = 8
    """Bytes."""
    BARRIERS = 2 * STAGES

    def start(self, consumers: int) -> None:
        """By one thread."""
        for slot in range(STAGES):
            ptx.init_barrier(self.barriers + 16 * slot, arrivals=4)
            ptx.init_barrier(self.barriers + (16 * slot + 8), arrivals=consumers)
        ptx.publish_barriers()

    def keys(self, n: I32) -> I32:
        return self.base + n % STAGES * _tile_bytes(self.p)

    def values(self, n: I32) -> I32:
        return self.keys(n) + _tile_bytes(self.p) // 2

    def _extent(self, n: I32) -> I32:
        return self.base + n % STAGES * self.EXTENT + STAGES * _tile_bytes(self.p)

    def set_extent(self, n: I32, begin: I32, count: I32) -> None:
        ptx.store_shared_words(self._extent(n), [begin, count])

    def extent(self, n: I32) -> tuple[I32, I32]:
        begin, count = ptx.load_shared(self._extent(n), count=2)
        return begin, count

    def _full(self, n: I32) -> I32:
        return self.barriers + n % STAGES * 16

    def wait_full(self, n: I32) -> None:
        ptx.wait(self._full(n), n // STAGES & 1)

    def wait_empty(self, n: I32) -> None:
        """The first round finds all slots empty."""
        ptx.wait(self._full(n) + 8, (n // STAGES + 1) & 1)

    def release(self, n: I32, lane: I32) -> None:
        """This warp has read it."""
        ptx.sync_warp()
        with ptx.when(lane.is_(0)):
            ptx.arrive(self._full(n) + 8)

    def publish(self, n: I32, lane: I32) -> None:
        """This warp has written its share."""
        ptx.fence_writes()
        ptx.sync_warp()
        with ptx.when(lane.is_(0)):
            ptx.arrive(self._full(n))


def fill(p: Problem, ring: Ring, source: Source, n: I32) -> I32:
    """All tiles of a source, by the warpgroup that makes them; the ring's next tile."""
    thread = ptx.thread_index() & 127
    pages = [source.page(ptx.constant(i)) for i in range(2)]
    fetched = _fetch(p, source, thread, pages[0])

    def step(i: I32, carry: list[I32]) -> list[I32]:
        page, following, *words = carry
        begin = source.begin(i)
        count = (source.end - begin) * source.exists(page)
        ring.wait_empty(n + i)
        _store(p, ring, source, thread, n + i, words, count)
        with ptx.when(thread.is_(0)):
            ring.set_extent(n + i, begin, count)
        ring.publish(n + i, thread & 31)
        later = source.page(i + 2)
        return [following, later, *_fetch(p, source, thread, following)]

    ptx.loop(source.count, [*pages, *fetched], step)
    return n + source.count


def _items(p: Problem, source: Source, thread: I32) -> Iterator[tuple[int, I32, I32]]:
    """(part, token, chunk of 16 bytes of the part) that a thread takes.

    Eight threads beside each other then store to different banks: between them they have all
    eight places that the first pieces of their chunks may have in 128 bytes.
    """
    chunks = source.bits // 2  # of 64 dimensions
    for part in range(p.head_dim // 64):
        for first in range(0, TILE * chunks, 128):
            yield part, (thread + first) // chunks, (thread + first) % chunks


def _fetch(p: Problem, source: Source, thread: I32, page: I32) -> list[I32]:
    chunks = source.bits // 2
    return [
        word
        for part, token, chunk in _items(p, source, thread)
        for word in source.fetch(page, token, chunk + part * chunks)
    ]


def _store(
    p: Problem,
    ring: Ring,
    source: Source,
    thread: I32,
    n: I32,
    words: Sequence[I32],
    count: I32,
) -> None:
    items: Any = list(_items(p, source, thread))
    each = len(words) // len(items)
    for i, (part, token, chunk) in enumerate(items):
        k, v = halves(source, words[each * i : each * i + each], token < count)
        at = ring.keys(n) + token * 128 + _piece(token, chunk, len(k) // 4) * 16
        for offset, side in ((0, k), (_tile_bytes(p) // 2, v)):
            for j in range(0, len(side), 4):
                ptx.store_shared_words(at ^ 4 * j, side[j : j + 4], offset + part * Ring.PART)


def _piece(token: Any, chunk: Any, pieces: int) -> Any:
    """Where in its row the first of a chunk's pieces of 16 bytes lies; the j-th is at that ^ j."""
    return chunk * pieces ^ token & 7
