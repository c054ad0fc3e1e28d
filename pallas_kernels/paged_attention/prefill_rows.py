"""A block's query rows, and what becomes of their scores: the half that both prefill kernels share.

A warp has 16 rows of the query heads of a KV head, token by token. Of lane l, g = l // 4 and c =
l % 4: it has rows g and g + 8, and of every 8 keys or dimensions the columns 2 c and 2 c + 1 (PTX
ISA, fragments of m16n8k16; a warp of wgmma has the same).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import F32, I32, Address
from qserve_jax.pallas_kernels.paged_attention.prefill_problem import (
    LAZY,
    MINUS_FAR,
    ROWS,
    TILE,
    Problem,
)


@dataclasses.dataclass(frozen=True)
class Block:
    """128 query rows of a KV head, and where a lane stands. start: tokens before the new ones.
    first, last: the rows' tokens. rows: the lane's. corners: the first and last of the warp's."""

    batch: I32
    kv_head: I32
    start: I32
    query_len: I32
    context: I32
    first: I32
    last: I32
    rows: list[I32]
    corners: list[I32]
    c: I32
    lane: I32


def block(p: Problem, index: I32, lens: Address) -> Block:
    """The index-th block: the last rows of all come first, since they see most."""
    lane = ptx.thread_index() & 31
    kv_head, rest = index % p.kv_heads, index // p.kv_heads
    batch, tile = rest % p.rows, (p.tiles - 1) - rest // p.rows
    context, query_len = ptx.load_global(lens.advance(batch, 8), count=2)
    corner = tile * ROWS + ptx.warp_index() * 16
    row = corner + (lane >> 2)
    first = tile * ROWS // p.group
    last = ptx.minimum(((tile + 1) * ROWS - 1) // p.group, query_len - 1)
    start = context - query_len
    return Block(
        *(batch, kv_head, start, query_len, context, first, last),
        *([row, row + 8], [corner, corner + 15], lane & 3, lane),
    )


@dataclasses.dataclass
class State:
    """Of the lane's two rows: the largest score, the sum of weights, and of weighted values."""

    top: list[F32]
    total: list[F32]
    acc: list[F32]

    def registers(self) -> list[F32]:
        return [*self.top, *self.total, *self.acc]

    @staticmethod
    def of(registers: list[F32]) -> State:
        return State(registers[:2], registers[2:4], registers[4:])

    @staticmethod
    def start(p: Problem) -> State:
        top, zero = ptx.constant_float(MINUS_FAR), ptx.constant_float(0)
        return State([top] * 2, [zero] * 2, [zero] * (p.head_dim // 2))


# Queries


def _row_address(p: Problem, b: Block, base: Address, row: I32) -> Address:
    """Where a row of [B, T, N, H] halves begins."""
    token, head = row // p.group, b.kv_head * p.group + row % p.group
    return base.advance((b.batch * p.tokens + token) * p.heads + head, 2 * p.head_dim)


def fetch_query(p: Problem, b: Block, q: Address) -> list[I32]:
    """For each 16 dimensions four words: of rows g and g + 8 the dimensions 2 c.., then 2 c + 8...
    Rows beyond the last repeat it."""
    most = p.tokens * p.group - 1
    rows = [_row_address(p, b, q, ptx.minimum(row, most)).advance(b.c, 4) for row in b.rows]
    return [
        ptx.load_global(row.advance(dim, 2))[0] for dim in range(0, p.head_dim, 8) for row in rows
    ]


def query_operands(p: Problem, words: list[I32]) -> list[list[I32]]:
    """What was fetched as operands A, f16, for each 16 dimensions."""
    words = [ptx.words_of(ptx.floats_of([word], p.dtype), "float16")[0] for word in words]
    return [words[i : i + 4] for i in range(0, len(words), 4)]


def row_sums(query: list[list[I32]]) -> list[F32]:
    """Sums of q over its dimensions, of rows g and g + 8."""
    sums = []
    for row in range(2):
        words = [word for fragment in query for word in fragment[row::2]]
        values = [x for word in words for x in ptx.unpack_halves(word, "float16")]
        sums.append(_over_columns(F32.__add__, functools.reduce(F32.__add__, values)))
    return sums


def _over_columns(combine: Callable[[F32, F32], F32], value: F32) -> F32:
    """Over the four lanes that share a row."""
    for lanes in (1, 2):
        value = combine(value, ptx.exchange(value, lanes))
    return value


# Scores: for each 8 keys four, rows g (two keys) and g + 8.


def seen(p: Problem, b: Block, row: I32, begin: I32, count: I32) -> tuple[I32, I32]:
    """The first key that a row sees of a tile, which begins at this position and has so many
    tokens, and the one after the last."""
    own = b.start + row // p.group - begin  # the row's own token, counted from the tile's first
    low = 0 - begin  # there is nothing before position 0
    if p.window is not None:
        low = ptx.maximum(low, own - (p.window - 1))
    return low, ptx.minimum(count, own + 1)


def masked(b: Block, scores: list[list[F32]], bounds: list[tuple[I32, I32]]) -> list[list[F32]]:
    """-inf for what the lane's two rows do not see."""
    far = ptx.constant_float(float("-inf"))
    own = [(low - b.c * 2, end - b.c * 2) for low, end in bounds]  # counted from the lane's first

    def one(score: F32, key: int, low: I32, end: I32) -> F32:
        return ptx.select_float((end > key) & ~(low > key), score, far)

    return [
        [one(x, 8 * j + i % 2, *own[i // 2]) for i, x in enumerate(four)]
        for j, four in enumerate(scores)
    ]


def weigh(state: State, scores: list[list[F32]]) -> tuple[State, list[list[F32]]]:
    """Weights relative to the state's maximum, which has followed where it must."""
    best = []
    for found in _of_rows(scores):
        best.append(_over_columns(ptx.float_maximum, _tree(ptx.float_maximum, found)))
    state = _follow(state, best)
    weights = [[ptx.exp2(x - state.top[i // 2]) for i, x in enumerate(four)] for four in scores]
    sums = [_tree(F32.__add__, found) for found in _of_rows(weights)]
    total = [a + b for a, b in zip(state.total, sums, strict=True)]
    return State(state.top, total, state.acc), weights


def _follow(state: State, best: list[F32]) -> State:
    """The state relative to the new maximum, if that has risen much in some row of the warp. Few
    tiles see that; until then weights are up to 2^LAZY, which float16 holds as well."""
    limits = [top + ptx.constant_float(LAZY) for top in state.top]
    low = [~(x > limit) for x, limit in zip(best, limits, strict=True)]

    def followed() -> list[F32]:
        top = [ptx.float_maximum(*pair) for pair in zip(state.top, best, strict=True)]
        shrink = [ptx.exp2(old - new) for old, new in zip(state.top, top, strict=True)]
        total = [x * factor for x, factor in zip(state.total, shrink, strict=True)]
        acc = [x * shrink[i // 2 % 2] for i, x in enumerate(state.acc)]
        return State(top, total, acc).registers()

    has_risen = ptx.any_lane(~(low[0] & low[1]))
    return State.of(ptx.branch_values(has_risen, state.registers(), followed))


def _of_rows(scores: list[list[F32]]) -> list[list[F32]]:
    """Those of row g, and those of row g + 8."""
    return [[x for four in scores for x in four[2 * row : 2 * row + 2]] for row in range(2)]


def _tree(combine: Callable[[F32, F32], F32], values: list[F32]) -> F32:
    """Of a power of two of values: pairs at once, that they need not wait for each other."""
    while len(values) > 1:
        values = [combine(*pair) for pair in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def weight_words(weights: list[list[F32]]) -> list[list[I32]]:
    """For each 16 keys the operand A, f16."""
    pairs = zip(weights[::2], weights[1::2], strict=True)
    return [ptx.words_of([*near, *far], "float16") for near, far in pairs]


def store_output(p: Problem, b: Block, out: Address, state: State) -> None:
    """Weighted means; zeros where a row has seen nothing."""
    for row in range(2):
        total = _over_columns(F32.__add__, state.total[row])
        zero, one = ptx.constant_float(0), ptx.constant_float(1)
        inverse = ptx.select_float(total > zero, one / total, zero)
        with ptx.when(b.rows[row] < p.tokens * p.group):
            address = _row_address(p, b, out, b.rows[row]).advance(b.c, 4)
            for i in range(p.head_dim // 8):
                pair = [x * inverse for x in state.acc[4 * i + 2 * row :][:2]]
                ptx.store_words(address.advance(i, 16), ptx.words_of(pair, p.dtype))


def first_tile(p: Problem, position: I32) -> I32:
    """Of what the row at this position sees."""
    if p.window is None:
        return ptx.constant(0)
    return ptx.maximum(position - (p.window - 1), 0) // TILE


def count_tiles(b: Block, first: I32, end: I32) -> I32:
    """Tiles from `first` to the position `end`; none where the block has no token."""
    tiles = (ptx.maximum(end, 0) + (TILE - 1)) // TILE - first
    return ptx.select(b.first < b.query_len, ptx.maximum(tiles, 0), 0)
