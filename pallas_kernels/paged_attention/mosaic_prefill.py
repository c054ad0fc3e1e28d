"""Attention of many new tokens to the pages before them and to each other, from sm_80 on.

For chunks of a prompt, whose earlier tokens are in the cache, quantised. A block takes 128 query
rows of a KV head (its G query heads, token by token), 16 a warp, and goes over the keys that some
of them see, 64 at a time (FlashAttention 2):

    store      the next tile, fetched during the last step, dequantised to shared memory
    fetch      the words of the one after it (both: prefill_tile)
    scores     q @ k by mma.sync
    softmax    online, in powers of two, in float32 (prefill_rows)
    values     acc += weights @ v

First the pages, then, where new tokens are attended unquantised, the new ones. The tensor core
multiplies float16: bf16 numbers are exact in it, up to its range of 65504 (also of a cache's
scales), weights and what is dequantised are rounded to it. Nothing is ever dequantised but two
tiles. The maximum is lazy: it follows only scores that lie far above it, which few tiles have, and
only then all sums are rescaled. The arithmetic is tested thread by thread in numpy.

Hopper has its own kernel with wgmma, sm90_prefill.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import F32, I32
from qserve_jax.pallas_kernels.paged_attention import (
    cudnn_prefill,
    prefill_rows,
    prefill_tile,
    sm90_prefill,
)
from qserve_jax.pallas_kernels.paged_attention.prefill_problem import (
    TILE,
    WARPS,
    Problem,
    problem,
)
from qserve_jax.pallas_kernels.paged_attention.prefill_rows import Block, State
from qserve_jax.pallas_kernels.paged_attention.prefill_tile import Source
from qserve_jax.pallas_kernels.paged_attention.problem import real_tokens
from qserve_jax.quantization.qtensor import Array, KVCache

THREADS = 32 * WARPS


def attention(
    backend: str,
    q: Array,
    cache: KVCache,
    block_table: Array,
    context_lens: Array,
    *,
    new_k: Array | None,
    new_v: Array | None,
    query_lens: Array,
    attends: str,
    order: Array | None = None,
    **options: Any,
) -> Array:
    """See `api.paged_attention`; q is [B, T, N, H]. Prompts that have no pages before them, and
    attend to themselves unquantised, are cuDNN's where there is one."""
    query_lens = real_tokens(query_lens, context_lens, q.shape[1])
    if cudnn_prefill.takes(q, block_table, new_k, attends, options["softcap"]):
        with contextlib.suppress(NotImplementedError):
            return cudnn_prefill.attention(q, new_k, new_v, query_lens, options)
    p = problem(backend, q, cache, block_table, new_k=new_k, attends=attends, **options)
    lens = jnp.stack([context_lens, query_lens], axis=1).astype(jnp.int32)
    operands = [q, lens, block_table.astype(jnp.int32), cache.pages]
    operands += [new_k, new_v.astype(q.dtype)] if p.full else []  # pyright: ignore
    if p.layers is not None:
        operands.append(jnp.asarray(options["layer"], jnp.int32).reshape(1))
    if p.width == 0:  # an operand without elements is none
        operands[2] = jnp.full((p.rows, 1), -1, jnp.int32)
    return sm90_prefill.launch(p, operands) if backend == "mosaic_sm90" else _launch(p, operands)


def _launch(p: Problem, operands: Sequence[Array]) -> Array:
    return ptx.launch(
        functools.partial(_body, p),
        operands,
        jax.ShapeDtypeStruct(operands[0].shape, operands[0].dtype),
        name=f"prefill_attention_kv{p.bits}",
        blocks=p.blocks,
        warpgroups=WARPS // 4,
        shared_bytes=p.shared_bytes,
        arch=(8, 0),
    )


def _body(p: Problem, q: Any, lens: Any, table: Any, pages: Any, *refs: Any) -> None:
    """The kernel. refs: new K and V where they are attended, the layer, output, shared memory."""
    *more, out, shared = refs
    thread, lens = ptx.thread_index(), ptx.global_address(lens)
    b = prefill_rows.block(p, ptx.block_index(), lens, thread)
    words = prefill_rows.fetch_query(p, b, ptx.global_address(q))
    query, state = prefill_rows.query_operands(p, words), State.start(p)
    for source in prefill_tile.sources(p, table, pages, more).of(b):
        state = _attend(p, b, source, ptx.shared_address(shared), query, state)
    # Computed again, so that fewer registers are kept.
    b = prefill_rows.block(p, ptx.block_index(), lens, ptx.opaque(thread))
    prefill_rows.store_output(p, b, ptx.global_address(out), state)


def _attend(
    p: Problem, b: Block, source: Source, shared: I32, query: list[list[I32]], state: State
) -> State:
    """Over all tiles of a source. One tile is stored while another is read."""

    def valid(i: I32, page: I32) -> I32:
        """How many tokens of the i-th tile are there."""
        return (source.end - source.begin(i)) * source.exists(page)

    def store(i: I32, page: I32, words: list[I32]) -> None:
        _store(p, source, shared + (i & 1) * p.tile_bytes, words, valid(i, page))

    def step(i: I32, carry: list[Any]) -> list[Any]:
        page, following, words = carry[0], carry[1], carry[2 : 2 + size]
        found = State.of(carry[2 + size :])
        ptx.sync_block(THREADS)  # this tile is stored, and the last has been read
        store(i + 1, following, words)
        later = source.page(i + 2)
        tile, begin, count = shared + (i & 1) * p.tile_bytes, source.begin(i), valid(i, page)
        bounds = [prefill_rows.seen(p, b, row, begin, count) for row in b.rows]
        scores = prefill_rows.mask(b, _scores(p, b, tile, query), bounds)
        words = _fetch(source, later)  # not before: registers are scarce
        found, weights = prefill_rows.weigh(p, found, scores)
        found.acc = _add_values(p, b, tile, found.acc, weights)
        return [following, later, *words, *found.registers()]

    page, following = (source.page(ptx.constant(i)) for i in range(2))
    ptx.sync_block(THREADS)  # another source's last tile has been read
    store(ptx.constant(0), page, _fetch(source, page))
    words = _fetch(source, following)
    size = len(words)
    last: list[Any] = ptx.loop(source.count, [page, following, *words, *state.registers()], step)
    return State.of(last[2 + size :])


# A tile: K, then V, in rows of p.stride bytes


def _items(source: Source) -> list[tuple[I32, I32]]:
    """(token, chunk of 16 bytes) that this thread takes; those beyond a small tile take its last
    item again, and store the same."""
    passes = max(1, TILE * source.chunks // THREADS)
    items = [ptx.thread_index() + i * THREADS for i in range(passes)]
    items = [ptx.minimum(item, TILE * source.chunks - 1) for item in items]
    return [(item // source.chunks, item % source.chunks) for item in items]


def _fetch(source: Source, page: I32) -> list[I32]:
    """The words of this thread, of all its items."""
    return [word for item in _items(source) for word in source.fetch(page, *item)]


def _store(p: Problem, source: Source, tile: I32, words: Sequence[I32], count: I32) -> None:
    """What was fetched; `count` tokens of the tile are there."""
    items = _items(source)
    each = len(words) // len(items)
    for i, (token, chunk) in enumerate(items):
        k, v = prefill_tile.halves(source, words[i * each : (i + 1) * each], token < count)
        at = tile + token * p.stride + chunk * (4 * len(k))
        for offset, side in ((0, k), (p.values_at, v)):
            for j in range(0, len(side), 4):
                ptx.store_shared_words(at, side[j : j + 4], offset + 4 * j)


# Products of a warp. Fragments: PTX ISA, m16n8k16.


def _scores(p: Problem, b: Block, tile: I32, query: list[list[I32]]) -> list[F32]:
    """q @ k. For each 8 keys: rows g (two keys) and g + 8."""
    zero = ptx.constant_float(0)
    matrix = tile + (b.lane & 7) * p.stride + (b.lane >> 3) * 16
    scores = []
    for key in range(0, TILE, 8):
        acc = [zero] * 4
        for dim in range(0, p.head_dim, 32):
            words = ptx.load_matrix(matrix, key * p.stride + 2 * dim)
            acc = ptx.mma_halves(acc, query[dim // 16], words[:2], "float16")
            acc = ptx.mma_halves(acc, query[dim // 16 + 1], words[2:], "float16")
        scores += acc
    return scores


def _add_values(p: Problem, b: Block, tile: I32, acc: list[F32], weights: list[I32]) -> list[F32]:
    """acc [16 rows, H] + weights @ v."""
    acc = list(acc)
    matrix = tile + (b.lane & 15) * p.stride + (b.lane >> 4) * 16
    for key in range(0, TILE, 16):
        a = weights[key // 4 : key // 4 + 4]
        for dim in range(0, p.head_dim, 16):
            offset = p.values_at + key * p.stride + 2 * dim
            words = ptx.load_matrix(matrix, offset, transposed=True)
            for half in range(2):
                where = slice(dim // 2 + 4 * half, dim // 2 + 4 * half + 4)
                part = words[2 * half : 2 * half + 2]
                acc[where] = ptx.mma_halves(acc[where], a, part, "float16")
    return acc
