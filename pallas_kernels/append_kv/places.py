"""Where a lane stands, and where in memory its numbers are."""

from __future__ import annotations

import dataclasses

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.append_kv.problem import WARPS, Problem
from qserve_jax.pallas_kernels.intrinsics import I32, Address, Predicate

Halves = list[list[I32]]
"""The words of a lane's two vectors of a head."""


@dataclasses.dataclass(frozen=True)
class Lane:
    """Where a lane stands: its warp's token and part of the token's heads; its head among those of
    the warp, and its first vector of the head."""

    token: I32
    part: I32
    group: I32
    vector: I32

    def head(self, p: Problem, part: I32, count: int) -> I32:
        """Of `count`, the last one where there are no more."""
        return ptx.minimum(part * (32 // p.lanes) + self.group, count - 1)


def lane_of(p: Problem) -> Lane:
    warp, lane = ptx.block_index() * WARPS + ptx.warp_index(), ptx.thread_index() & 31
    return Lane(warp // p.warps, warp % p.warps, lane // p.lanes, lane % p.lanes)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Heads of all tokens in memory: `stride` heads a token, of which these begin at `first`."""

    address: Address
    stride: int
    first: int = 0

    def vectors(self, p: Problem, t: Lane, head: I32) -> list[Address]:
        """Of this lane's token."""
        row = self.address.advance(t.token * self.stride + head + self.first, p.row_bytes)
        return vectors_of(p, t, row, p.row_bytes)


def vectors_of(p: Problem, t: Lane, row: Address, size: int) -> list[Address]:
    """The lane's two vectors of a head that takes `size` bytes."""
    first = row.advance(t.vector, size // (2 * p.lanes))
    return [first, first.advance(1, size // 2)]


@dataclasses.dataclass(frozen=True)
class Operands:
    """Of the kernel, in this order; those that it does not have are None."""

    q: Rows | None
    k: Rows
    v: Rows
    slots: Address
    layer: Address | None
    turn: list[Address]
    center: Address | None
    pages: Address
    q_out: Rows | None
    k_out: Rows | None
    v_out: Rows | None


def operands_of(p: Problem, addresses: list[Address]) -> Operands:
    take = iter(addresses)
    if p.fused:
        stride, both = p.heads + 2 * p.kv_heads, next(take)
        q, k, v = (Rows(both, stride, n) for n in (0, p.heads, p.heads + p.kv_heads))
    else:
        q = Rows(next(take), p.heads) if p.heads else None
        k, v = (Rows(next(take), p.kv_heads) for _ in range(2))
    return Operands(
        *(q, k, v),
        slots=next(take),
        layer=None if p.layers is None else next(take),
        turn=[next(take), next(take)] if p.rotate else [],
        center=next(take) if p.centred else None,
        pages=next(take),
        q_out=Rows(next(take), p.heads) if p.rotate else None,
        k_out=Rows(next(take), p.kv_heads) if p.rotate else None,
        v_out=Rows(next(take), p.kv_heads) if p.fused else None,
    )


def load(p: Problem, vectors: list[Address]) -> Halves:
    return [ptx.load_words(vector, p.row_bytes // (2 * p.lanes)) for vector in vectors]


def store(vectors: list[Address], words: Halves) -> None:
    for vector, part in zip(vectors, words, strict=True):
        ptx.store_words(vector, part)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a token goes: its (page, head) block, and which token there; whether anywhere."""

    exists: Predicate
    block: Address
    offset: I32


def place_of(p: Problem, o: Operands, t: Lane, head: I32) -> Place:
    slot = ptx.load_global(o.slots.advance(t.token, 4))[0]
    page = slot // p.page_size
    exists = ~(slot < 0) & (page < p.num_pages)
    index = page
    if o.layer is not None:
        assert p.layers is not None
        layer = ptx.load_global(o.layer)[0]
        layer = ptx.select(layer < 0, layer + p.layers, layer)  # as an index of XLA
        exists &= ~(layer < 0) & (layer < p.layers)
        index += layer * p.num_pages
    block = o.pages.advance(index * p.kv_heads + head, p.page.block_bytes)
    return Place(exists, block, slot % p.page_size)
