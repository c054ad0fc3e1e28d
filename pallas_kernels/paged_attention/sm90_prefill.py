"""Many new tokens attend to the pages before them and to each other, on Hopper: wgmma.

What mosaic_prefill computes, in the shape of FlashAttention 3. Two warpgroups have 64 query rows
each and multiply; the third makes tiles of 64 keys for both (sm90_prefill_ring), several ahead:

    produce    wait empty -> K, V dequantised to float16 in a slot of the ring -> fetch the next
    scores     q @ k: q in registers, K in shared memory as it lies, a token a row
    values     acc += weights @ v: weights in registers, V as it lies, which is B transposed
    softmax    online, in powers of two, in float32 (prefill_rows)

A step multiplies the scores of a tile and the values of the one before together, so that the tensor
core has long work from one warpgroup while the other is at its softmax. Making the two take turns
at it (FlashAttention 3, section 3.1) gained nothing.

Blocks stay: one on each SM takes blocks of rows one after another, forth and back through all of
them, which are sorted by what they see. The ring goes on from one to the next, so that keys are
made while a block begins and ends. A block that sees no key has one tile, of which it sees nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import F32, I32, Address
from qserve_jax.pallas_kernels.paged_attention import prefill_rows, prefill_tile
from qserve_jax.pallas_kernels.paged_attention.prefill_problem import TILE, WARPS, Problem
from qserve_jax.pallas_kernels.paged_attention.prefill_rows import Block, State
from qserve_jax.pallas_kernels.paged_attention.problem import SMS
from qserve_jax.pallas_kernels.paged_attention.sm90_prefill_ring import Ring, fill, shared_bytes
from qserve_jax.quantization.qtensor import Array

THREADS = 32 * (WARPS + 4)
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 120, 192
"""Of a thread: together what 384 threads may begin with, 3 x 168."""


def launch(p: Problem, operands: Sequence[Array]) -> Array:
    """operands: q [B, T, N, H], lens i32[B, 2] (context, new), block table, pages, then new K and V
    where they are attended, and the layer where the pages have several -> like q."""
    q = operands[0]
    if not (p.width or p.full):
        return jnp.zeros_like(q)
    return ptx.launch(
        functools.partial(_body, p),
        operands,
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        name=f"prefill_attention_kv{p.bits}_wgmma",
        blocks=min(SMS, p.blocks),
        warpgroups=THREADS // 128,
        shared_bytes=shared_bytes(p) + 1024,
        barriers=Ring.BARRIERS,
    )


@dataclasses.dataclass(frozen=True)
class _Operands:
    q: Address
    lens: Address
    tiles: prefill_tile.Sources
    out: Address


def _body(p: Problem, q: Any, lens: Any, table: Any, pages: Any, *refs: Any) -> None:
    """The kernel. refs: new K and V where they are attended, the layer, output, shared memory,
    barriers."""
    *more, out, shared, barriers = refs
    operands = _Operands(
        ptx.global_address(q),
        ptx.global_address(lens),
        prefill_tile.sources(p, table, pages, more),
        ptx.global_address(out),
    )
    base = (ptx.shared_address(shared) + 1023) & 0xFFFFFC00
    ring = Ring(p, base, ptx.shared_address(barriers))
    with ptx.when(ptx.thread_index().is_(0)):
        ring.start(consumers=WARPS)
    ptx.sync_block(THREADS)
    ptx.branch(
        ptx.warp_index() < WARPS,
        lambda: _consume(p, operands, ring),
        lambda: _produce(p, operands, ring),
    )


@dataclasses.dataclass(frozen=True)
class _Share:
    """The blocks of rows that this one takes: forth in the first round, back in the second, ..."""

    p: Problem
    lens: Address

    @property
    def _blocks(self) -> int:
        return min(SMS, self.p.blocks)

    def _index(self, i: I32 | int) -> I32:
        ahead = ptx.block_index()
        back = (self._blocks - 1) - ahead
        if isinstance(i, int):
            return (back if i % 2 else ahead) + i * self._blocks
        return ptx.select((i & 1).is_(0), ahead, back) + i * self._blocks

    def count(self) -> I32:
        rounds = self.p.blocks // self._blocks
        return ptx.select(self._index(rounds) < self.p.blocks, rounds + 1, rounds)

    def block(self, i: I32 | int) -> Block:
        """The i-th, or the last of all if there is none."""
        index = ptx.minimum(self._index(i), self.p.blocks - 1)
        return prefill_rows.block(self.p, index, self.lens, ptx.thread_index())


def _sources(operands: _Operands, b: Block) -> list[prefill_tile.Source]:
    """With one tile at least."""
    *most, last = operands.tiles.of(b)
    return [*most, dataclasses.replace(last, count=ptx.maximum(last.count, 1))]


def _produce(p: Problem, operands: _Operands, ring: Ring) -> None:
    ptx.set_max_registers(PRODUCER_REGISTERS, increase=False)
    share = _Share(p, operands.lens)

    def one(i: I32, carry: list[I32]) -> list[I32]:
        (n,) = carry
        for source in _sources(operands, share.block(i)):
            n = fill(p, ring, source, n)
        return [n]

    ptx.loop(share.count(), [ptx.constant(0)], one)


# Consumers


def _consume(p: Problem, operands: _Operands, ring: Ring) -> None:
    """The queries of the next block of rows are fetched before this one ends."""
    ptx.set_max_registers(CONSUMER_REGISTERS, increase=True)
    share = _Share(p, operands.lens)

    def one(i: I32, carry: list[I32]) -> list[I32]:
        n, *words = carry
        b = share.block(i)
        tiles = functools.reduce(I32.__add__, (x.count for x in _sources(operands, b)))
        query = prefill_rows.query_operands(p, words)
        state, weights = _attend(p, b, ring, n, tiles, query)
        words = prefill_rows.fetch_query(p, share.block(i + 1), operands.q)
        state = _finish(p, b, ring, n + (tiles - 1), state, weights)
        prefill_rows.store_output(p, b, operands.out, state)
        return [n + tiles, *words]

    words = prefill_rows.fetch_query(p, share.block(0), operands.q)
    ptx.loop(share.count(), [ptx.constant(0), *words], one)


def _attend(
    p: Problem, b: Block, ring: Ring, n: I32, tiles: I32, query: list[list[I32]]
) -> tuple[State, list[I32]]:
    """Over all tiles, from the n-th of the ring on; the last one's values are left to add, with
    these weights."""
    ring.wait_full(n)
    held = ptx.wgmma_fence([word for a in query for word in a])
    scores = _start_scores(ring.keys(n), held)
    ptx.wgmma_commit()
    scores = ptx.wgmma_wait(scores, held)
    state, weights = _softmax(p, b, ring, n, State.start(p), scores)

    def step(i: I32, carry: list[Any]) -> list[Any]:
        weights, state, m = carry[: TILE // 4], State.of(carry[TILE // 4 :]), n + i
        ring.wait_full(m + 1)
        weights, state.acc = ptx.wgmma_fence(weights), ptx.wgmma_fence(state.acc)
        scores = _start_scores(ring.keys(m + 1), held)
        acc = _start_values(ring.values(m), weights, state.acc)
        ptx.wgmma_commit()
        found = ptx.wgmma_wait([*scores, *acc], [*weights, *held])
        ring.release(m, b.lane)
        scores, state.acc = found[: TILE // 2], found[TILE // 2 :]
        state, weights = _softmax(p, b, ring, m + 1, state, scores)
        return [*weights, *state.registers()]

    last: list[Any] = ptx.loop(tiles - 1, [*weights, *state.registers()], step)
    return State.of(last[TILE // 4 :]), last[: TILE // 4]


def _finish(p: Problem, b: Block, ring: Ring, n: I32, state: State, weights: list[I32]) -> State:
    """The values of the last tile, the n-th of the ring."""
    weights = ptx.wgmma_fence(weights)
    acc = _start_values(ring.values(n), weights, ptx.wgmma_fence(state.acc))
    ptx.wgmma_commit()
    acc = ptx.wgmma_wait(acc, weights)
    ring.release(n, b.lane)
    return State(state.top, state.total, acc)


def _start_scores(keys: I32, query: list[I32]) -> list[F32]:
    """q @ k [64 rows, 64 keys]; 64 dimensions of K lie together."""
    acc: list[F32] | int = TILE
    for i in range(len(query) // 4):
        part = ptx.wgmma_descriptor(keys) + (i // 4 * Ring.PART + i % 4 * 32) // 16
        acc = ptx.wgmma_halves(acc, query[4 * i : 4 * i + 4], part)
    assert not isinstance(acc, int)
    return acc


def _start_values(values: I32, weights: list[I32], acc: list[F32]) -> list[F32]:
    """acc [64 rows, H] + weights @ v; 64 dimensions of V lie together."""
    first = ptx.wgmma_descriptor(values, columns_apart=Ring.PART)
    for i in range(TILE // 16):
        a = weights[4 * i : 4 * i + 4]
        acc = ptx.wgmma_halves(acc, a, first + i * 16 * 128 // 16, transposed=True)
    return acc


def _softmax(
    p: Problem, b: Block, ring: Ring, n: I32, state: State, scores: list[F32]
) -> tuple[State, list[I32]]:
    """Of the n-th tile's scores: the state, and the weights as operands A."""
    begin, count = ring.extent(n)
    bounds = [prefill_rows.seen(p, b, row, begin, count) for row in b.rows]
    return prefill_rows.weigh(p, state, prefill_rows.mask(b, scores, bounds))
