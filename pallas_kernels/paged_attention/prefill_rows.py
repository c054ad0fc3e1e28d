"""A block's query rows, and what becomes of their scores: the half that both prefill kernels share.

A warp has 16 rows of the query heads of a KV head, token by token. Of lane l, g = l // 4 and c =
l % 4: it has rows g and g + 8, and of every 8 keys or dimensions the columns 2 c and 2 c + 1 (PTX
ISA, fragments of m16n8k16; a warp of wgmma has the same).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import F32, I32, Address
from qserve_jax.pallas_kernels.paged_attention.prefill_problem import (
    MARGIN,
    ROWS,
    TILE,
    Problem,
)
from qserve_jax.pallas_kernels.paged_attention.problem import LOWEST


@dataclasses.dataclass(frozen=True)
class Block:
    """128 query rows of a KV head, and where a lane stands. start: tokens before the new ones.
    first, last: the rows' tokens. rows: the lane's."""

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


def block(p: Problem, index: I32, lens: Address, thread: I32) -> Block:
    """The index-th block: the last rows of all come first, since they see most."""
    lane = thread & 31
    kv_head, rest = index % p.kv_heads, index // p.kv_heads
    batch, tile = rest % p.rows, (p.tiles - 1) - rest // p.rows
    context, query_len = ptx.load_global(lens.advance(batch, 8), count=2)
    row = tile * ROWS + (thread >> 5) * 16 + (lane >> 2)
    first = tile * ROWS // p.group
    last = ptx.minimum(((tile + 1) * ROWS - 1) // p.group, query_len - 1)
    start = context - query_len
    return Block(
        *(batch, kv_head, start, query_len, context, first, last),
        *([row, row + 8], lane & 3, lane),
    )


@dataclasses.dataclass
class State:
    """Of the lane's two rows: the score that weights are relative to (for FlashAttention's m), the
    sum of weights (l), and of weighted values."""

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
        top, zero = ptx.constant_float(LOWEST), ptx.constant_float(0)
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


def _over_columns(combine: Callable[[F32, F32], F32], value: F32) -> F32:
    """Over the four lanes that share a row."""
    for lanes in (1, 2):
        value = combine(value, ptx.exchange(value, lanes))
    return value


# Scores, and weights: for each 8 keys four, rows g (two keys) and g + 8.


def seen(p: Problem, b: Block, row: I32, begin: I32, count: I32) -> tuple[I32, I32]:
    """The first key that a row sees of a tile, which begins at this position and has so many
    tokens, and the one after the last."""
    own = b.start + row // p.group - begin  # the row's own token, counted from the tile's first
    low = 0 - begin  # there is nothing before position 0
    if p.window is not None:
        low = ptx.maximum(low, own - (p.window - 1))
    return low, ptx.minimum(count, own + 1)


def mask(b: Block, scores: list[F32], bounds: list[tuple[I32, I32]]) -> list[F32]:
    """-inf where not seen; most tiles are seen whole by all rows of a warp."""

    def masked() -> list[F32]:
        minus, found = ptx.constant_float(float("-inf")), []
        own = [(low - b.c * 2, end - b.c * 2) for low, end in bounds]  # from the lane's first key
        for i, score in enumerate(scores):
            (low, end), key = own[i // 2 % 2], 8 * (i // 4) + i % 2
            found.append(ptx.select_float((end > key) & ~(low > key), score, minus))
        return found

    low = ptx.maximum(bounds[0][0], bounds[1][0])
    end = ptx.minimum(bounds[0][1], bounds[1][1])
    whole = (end > TILE - 1) & (low < 1)
    return ptx.branch_values(ptx.any_lane(~whole), scores, masked)


def weigh(p: Problem, state: State, scores: list[F32]) -> tuple[State, list[I32]]:
    """Weights relative to the maximum, which follows scores that are far above it; then all that
    was summed is rescaled. The weights as operands A, f16, four words for each 16 keys."""
    best = [_over_columns(ptx.float_maximum, _tree(ptx.float_maximum, x)) for x in _rows(scores)]
    factor = ptx.constant_float(p.score_factor)
    above = ptx.float_maximum(*(x - top for x, top in zip(best, state.top, strict=True)))

    def rescaled() -> list[F32]:
        top = [ptx.float_maximum(*pair) for pair in zip(state.top, best, strict=True)]
        pairs = zip(state.top, top, strict=True)
        shrink = [ptx.exp2((old - new) * factor) for old, new in pairs]
        total = [x * s for x, s in zip(state.total, shrink, strict=True)]
        return [*top, *total, *(x * shrink[i // 2 % 2] for i, x in enumerate(state.acc))]

    far = ptx.any_lane(above > ptx.constant_float(MARGIN / p.score_factor))
    state = State.of(ptx.branch_values(far, state.registers(), rescaled))
    minus = [ptx.constant_float(0) - top * factor for top in state.top]
    weights = [
        ptx.exp2(ptx.multiply_add(x, factor, minus[i // 2 % 2])) for i, x in enumerate(scores)
    ]
    sums = [_tree(operator.add, x) for x in _rows(weights)]
    total = [a + b for a, b in zip(state.total, sums, strict=True)]
    return State(state.top, total, state.acc), ptx.words_of(weights, "float16")


def _rows(values: list[F32]) -> list[list[F32]]:
    """Those of row g, and those of row g + 8."""
    return [[x for i, x in enumerate(values) if i // 2 % 2 == row] for row in range(2)]


def _tree(combine: Callable[[F32, F32], F32], values: list[F32]) -> F32:
    """Of a power of two of values, in steps that need not wait for each other."""
    while len(values) > 1:
        values = [combine(*pair) for pair in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def store_output(p: Problem, b: Block, out: Address, state: State) -> None:
    """Weighted means; zeros where a row has seen nothing."""
    for row in range(2):
        total = _over_columns(operator.add, state.total[row])
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
