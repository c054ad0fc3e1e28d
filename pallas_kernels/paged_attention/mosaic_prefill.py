"""Attention of many new tokens to the pages before them and to each other, from sm_80 on.

For chunks of a prompt, whose earlier tokens are in the cache, quantised. A block takes 128 query
rows of a KV head (its G query heads, token by token), 16 a warp, and goes over the keys that some
of them see, 64 at a time (FlashAttention 2):

    store      the next tile, fetched during the last step, dequantised to shared memory
    fetch      the words of the one after it (both: prefill_tile)
    scores     q @ k by mma.sync
    softmax    online, in powers of two, in float32
    values     acc += weights @ v

First the pages, then, where new tokens are attended unquantised, the new ones. The tensor core
multiplies float16: bf16 numbers are exact in it, up to its range of 65504 (also of a cache's
scales), weights and what is dequantised are rounded to it. Nothing is ever dequantised but two
tiles. The maximum is lazy: it follows only scores that lie far above it, which few tiles have, and
only then all sums are rescaled. The arithmetic is tested thread by thread in numpy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import F32, I32, Address
from qserve_jax.pallas_kernels.paged_attention import cudnn_prefill, prefill_tile
from qserve_jax.pallas_kernels.paged_attention.prefill_problem import (
    MARGIN,
    MINUS_FAR,
    ROWS,
    TILE,
    WARPS,
    Problem,
    problem,
)
from qserve_jax.pallas_kernels.paged_attention.prefill_tile import NewTokens, Pages, Source
from qserve_jax.quantization.qtensor import Array, KVCache


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
    return ptx.launch(
        functools.partial(_body, p),
        operands,
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        name=f"prefill_attention_kv{p.bits}",
        blocks=p.rows * p.kv_heads * p.tiles,
        warpgroups=WARPS // 4,
        shared_bytes=p.shared_bytes,
        arch=(8, 0) if backend == "mosaic_mma" else None,
    )


@dataclasses.dataclass(frozen=True)
class _Block:
    """What a block works on, and where a lane stands: rows g and g + 8 of its warp's 16 query
    rows, columns 2 c and 2 c + 1 of every 8 keys or dimensions. first, last: its tokens."""

    batch: I32
    kv_head: I32
    start: I32
    query_len: I32
    context: I32
    first: I32
    last: I32
    rows: list[I32]
    c: I32
    lane: I32
    shared: I32


def _block(p: Problem, lens: Address, shared: Any, thread: I32) -> _Block:
    """The last rows of all come first: they see most."""
    block, lane = ptx.block_index(), thread & 31
    kv_head, rest = block % p.kv_heads, block // p.kv_heads
    batch, tile = rest % p.rows, (p.tiles - 1) - rest // p.rows
    context, query_len = ptx.load_global(lens.advance(batch, 8), count=2)
    row = tile * ROWS + (thread >> 5) * 16 + (lane >> 2)
    first = tile * ROWS // p.group
    last = ptx.minimum(((tile + 1) * ROWS - 1) // p.group, query_len - 1)
    start = context - query_len
    return _Block(
        *(batch, kv_head, start, query_len, context, first, last),
        *([row, row + 8], lane & 3, lane, ptx.shared_address(shared)),
    )


@dataclasses.dataclass
class _State:
    """Of the lane's two rows: the largest score, the sum of weights, and of weighted values."""

    top: list[F32]
    total: list[F32]
    acc: list[F32]

    def registers(self) -> list[F32]:
        return [*self.top, *self.total, *self.acc]

    @staticmethod
    def of(registers: list[F32]) -> _State:
        return _State(registers[:2], registers[2:4], registers[4:])


def _body(p: Problem, q: Any, lens: Any, table: Any, pages: Any, *refs: Any) -> None:
    """The kernel. refs: new K and V where they are attended, the layer, output, shared memory."""
    *more, out, shared = refs
    thread = ptx.thread_index()
    b = _block(p, ptx.global_address(lens), shared, thread)
    query = _load_query(p, b, ptx.global_address(q))
    top, zero = ptx.constant_float(MINUS_FAR), ptx.constant_float(0)
    state = _State([top] * 2, [zero] * 2, [zero] * (p.head_dim // 2))
    if p.width:
        layer = ptx.global_address(more[-1]) if p.layers is not None else None
        source, count = _pages(p, b, ptx.global_address(table), ptx.global_address(pages), layer)
        state = _attend(p, b, source, count, query, state)
    if p.full:
        source, count = _new_tokens(p, b, *map(ptx.global_address, more[:2]))
        state = _attend(p, b, source, count, query, state)
    b = _block(p, ptx.global_address(lens), shared, ptx.opaque(thread))  # fewer registers are kept
    _store_output(p, b, ptx.global_address(out), state)


def _pages(p: Problem, b: _Block, table: Address, pages: Address, layer: Address | None):
    """The pages that some row sees, and how many."""
    end = b.start if p.full else ptx.minimum(b.context, b.start + b.last + 1)
    end = ptx.minimum(end, p.width * TILE)
    first = _first_tile(p, b.start + b.first)
    index = ptx.constant(0)
    if layer is not None:
        assert p.layers is not None
        number = ptx.load_global(layer)[0]
        number = ptx.select(number < 0, number + p.layers, number)
        index = ptx.minimum(ptx.maximum(number, 0), p.layers - 1) * p.num_pages
    pages = pages.advance(b.kv_head, p.block_bytes)
    source = Pages(p, table.advance(b.batch, 4 * p.width), pages, first, index)
    return source, _count(b, first, end)


def _new_tokens(p: Problem, b: _Block, k: Address, v: Address):
    """The tiles of new tokens that some row sees, and how many."""
    first = _first_tile(p, b.first)
    row = b.batch * (p.tokens * p.kv_heads) + b.kv_head
    return NewTokens(p, k, v, first, row), _count(b, first, b.last + 1)


def _first_tile(p: Problem, position: I32) -> I32:
    """Of what the row at this position sees."""
    if p.window is None:
        return ptx.constant(0)
    return ptx.maximum(position - (p.window - 1), 0) // TILE


def _count(b: _Block, first: I32, end: I32) -> I32:
    """Tiles from `first` to the position `end`; none where the block has no token."""
    tiles = (ptx.maximum(end, 0) + (TILE - 1)) // TILE - first
    return ptx.select(b.first < b.query_len, ptx.maximum(tiles, 0), 0)


def _attend(p: Problem, b: _Block, source: Source, count: I32, query: Any, state: _State) -> _State:
    """Over all tiles of a source. One tile is stored while another is read."""

    def valid(i: I32, page: I32) -> I32:
        """How many tokens of the i-th tile are there."""
        return _valid(p, b, source, (source.first + i) * TILE) * source.exists(page)

    def store(i: I32, page: I32, words: list[I32]) -> None:
        prefill_tile.store(p, source, b.shared + (i & 1) * p.tile_bytes, words, valid(i, page))

    def step(i: I32, carry: list[Any]) -> list[Any]:
        page, following, words = carry[0], carry[1], carry[2 : 2 + size]
        found = _State.of(carry[2 + size :])
        ptx.sync_block(32 * WARPS)  # this tile is stored, and the last has been read
        store(i + 1, following, words)
        later = source.page(i + 2)
        tile = b.shared + (i & 1) * p.tile_bytes
        seen = _seen(p, b, source, (source.first + i) * TILE, valid(i, page))
        scores = _mask(_scores(p, b, tile, query), seen, b)
        words = prefill_tile.fetch(source, later)  # not before: registers are scarce
        found, weights = _weigh(p, found, scores)
        found.acc = _add_values(p, b, tile, found.acc, weights)
        return [following, later, *words, *found.registers()]

    page, following = (source.page(ptx.constant(i)) for i in range(2))
    ptx.sync_block(32 * WARPS)  # another source's last tile has been read
    store(ptx.constant(0), page, prefill_tile.fetch(source, page))
    words = prefill_tile.fetch(source, following)
    size = len(words)
    last: list[Any] = ptx.loop(count, [page, following, *words, *state.registers()], step)
    return _State.of(last[2 + size :])


def _valid(p: Problem, b: _Block, source: Source, begin: I32) -> I32:
    """How many tokens of a tile are there."""
    if isinstance(source, NewTokens):
        return b.query_len - begin
    return (b.start if p.full else b.context) - begin


def _seen(p: Problem, b: _Block, source: Source, begin: I32, count: I32) -> list[tuple[I32, I32]]:
    """Of the lane's two rows, the first key of a tile that it sees, and the one after the last."""
    base = ptx.constant(0) if isinstance(source, NewTokens) else b.start
    seen = []
    for row in b.rows:
        own = base + row // p.group - begin  # the row's own token, counted from the tile's first
        end = ptx.minimum(count, own + 1)
        low = ptx.constant(0) if p.window is None else own - (p.window - 1)
        if isinstance(source, NewTokens):
            low = ptx.maximum(low, 0 - (b.start + begin))  # there is nothing before position 0
        seen.append((low, end))
    return seen


# Fragments: PTX ISA, m16n8k16. Of lane l, g = l // 4 and c = l % 4.


def _load_query(p: Problem, b: _Block, q: Address) -> list[list[I32]]:
    """For each 16 dimensions the operand A: rows g, g + 8, dimensions 2 c.. and 2 c + 8.., f16."""
    rows = []
    for row in b.rows:
        token = ptx.minimum(row // p.group, p.tokens - 1)
        head = b.kv_head * p.group + row % p.group
        address = q.advance((b.batch * p.tokens + token) * p.heads + head, 2 * p.head_dim)
        rows.append(address.advance(b.c, 4))

    def load(row: int, dim: int) -> I32:
        words = ptx.load_global(rows[row].advance(dim, 2))
        return ptx.words_of(ptx.floats_of(words, p.dtype), "float16")[0]

    return [
        [load(0, dim), load(1, dim), load(0, dim + 8), load(1, dim + 8)]
        for dim in range(0, p.head_dim, 16)
    ]


def _over_columns(combine: Any, value: F32) -> F32:
    """Over the four lanes that share a row."""
    for lanes in (1, 2):
        value = combine(value, ptx.exchange(value, lanes))
    return value


def _scores(p: Problem, b: _Block, tile: I32, query: Any) -> list[F32]:
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


def _mask(scores: list[F32], seen: list[tuple[I32, I32]], b: _Block) -> list[F32]:
    """-inf where not seen; most tiles are seen whole by all rows of a warp."""

    def masked() -> list[F32]:
        minus = ptx.constant_float(float("-inf"))
        found = []
        for i, score in enumerate(scores):
            (low, end), key = seen[i // 2 % 2], b.c * 2 + (8 * (i // 4) + i % 2)
            found.append(ptx.select_float((key < end) & ~(key < low), score, minus))
        return found

    low = ptx.maximum(seen[0][0], seen[1][0])
    end = ptx.minimum(seen[0][1], seen[1][1])
    whole = (end > TILE - 1) & (low < 1)
    return ptx.branch_values(ptx.any_lane(~whole), scores, masked)


def _weigh(p: Problem, state: _State, scores: list[F32]) -> tuple[_State, list[F32]]:
    """Weights relative to the maximum, which follows scores that are far above it; then all that
    was summed is rescaled."""
    rows = [[x for i, x in enumerate(scores) if i // 2 % 2 == row] for row in range(2)]
    best = [_over_columns(ptx.float_maximum, _reduce(ptx.float_maximum, row)) for row in rows]
    factor = ptx.constant_float(p.score_factor)
    above = ptx.float_maximum(*(x - top for x, top in zip(best, state.top, strict=True)))

    def rescaled() -> list[F32]:
        top = [ptx.float_maximum(*pair) for pair in zip(state.top, best, strict=True)]
        pairs = zip(state.top, top, strict=True)
        shrink = [ptx.exp2((old - new) * factor) for old, new in pairs]
        total = [x * s for x, s in zip(state.total, shrink, strict=True)]
        return [*top, *total, *(x * shrink[i // 2 % 2] for i, x in enumerate(state.acc))]

    far = ptx.any_lane(above > ptx.constant_float(MARGIN / p.score_factor))
    state = _State.of(ptx.branch_values(far, state.registers(), rescaled))
    minus = [ptx.constant_float(0) - top * factor for top in state.top]
    weights = [
        ptx.exp2(ptx.multiply_add(x, factor, minus[i // 2 % 2])) for i, x in enumerate(scores)
    ]
    for row in range(2):
        mine = [x for i, x in enumerate(weights) if i // 2 % 2 == row]
        state.total[row] = state.total[row] + _reduce(operator.add, mine)
    return state, weights


def _reduce(combine: Any, values: list[F32]) -> F32:
    """As a tree, whose steps need not wait for each other."""
    while len(values) > 1:
        values = [combine(*pair) for pair in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _add_values(p: Problem, b: _Block, tile: I32, acc: list[F32], weights: list[F32]) -> list[F32]:
    """acc [16 rows, H] + weights @ v."""
    acc = list(acc)
    matrix = tile + (b.lane & 15) * p.stride + (b.lane >> 4) * 16
    for key in range(0, TILE, 16):
        a = ptx.words_of(weights[key // 2 : key // 2 + 8], "float16")
        for dim in range(0, p.head_dim, 16):
            offset = p.values_at + key * p.stride + 2 * dim
            words = ptx.load_matrix(matrix, offset, transposed=True)
            for half in range(2):
                where = slice(dim // 2 + 4 * half, dim // 2 + 4 * half + 4)
                part = words[2 * half : 2 * half + 2]
                acc[where] = ptx.mma_halves(acc[where], a, part, "float16")
    return acc


def _store_output(p: Problem, b: _Block, out: Address, state: _State) -> None:
    """Weighted means; zeros where a row has seen nothing."""
    for row in range(2):
        total = _over_columns(F32.__add__, state.total[row])
        zero, one = ptx.constant_float(0), ptx.constant_float(1)
        inverse = ptx.select_float(total > zero, one / total, zero)
        token, head = b.rows[row] // p.group, b.kv_head * p.group + b.rows[row] % p.group
        with ptx.when(token < p.tokens):
            address = out.advance((b.batch * p.tokens + token) * p.heads + head, 2 * p.head_dim)
            address = address.advance(b.c, 4)
            for i in range(p.head_dim // 8):
                pair = [x * inverse for x in state.acc[4 * i + 2 * row :][:2]]
                ptx.store_words(address.advance(i, 16), ptx.words_of(pair, p.dtype))
