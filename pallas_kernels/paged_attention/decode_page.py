"""One page: scores, weights, and their sums with V. A warp takes 16 of its 64 tokens.

The softmax is taken online (FlashAttention), in powers of two, with a lazy maximum: weights are
relative to 2**top, and top only follows where a weight is more than 2**MARGIN above the largest
that top was set for. Then all that was summed is rescaled, which few pages make necessary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import F32, I32, Predicate
from qserve_jax.pallas_kernels.paged_attention import decode_codes as codes
from qserve_jax.pallas_kernels.paged_attention.decode_problem import Problem
from qserve_jax.pallas_kernels.paged_attention.decode_query import LIFT, Query, State, finish_score
from qserve_jax.pallas_kernels.paged_attention.decode_thread import Thread, Work
from qserve_jax.pallas_kernels.paged_attention.problem import PAGE

MARGIN = 4.0


class Lane:
    """Offsets within a page's block of what a lane reads."""

    def __init__(self, p: Problem, t: Thread):
        side, first = p.page.side_bytes, t.quarter * 16
        self.row = first + codes.row_of_tile(t.g)  # and 8 further: its rows of the scores
        pair = t.c * 2
        self.columns = [first + codes.row_of_tile(pair + i) for i in range(2)]  # and 8 further
        self.keys = self.row * side + t.c * min(16, side // 4)
        self.values = [token * side + t.g * (side // 8) for token in self.columns]
        self.scales = self.row * 8


@dataclasses.dataclass
class Seen:
    """Which tokens are, of those a lane has: two rows of the scores; of V two columns, and those 8
    further."""

    rows: list[Predicate]
    columns: list[list[Predicate]]


def seen_tokens(p: Problem, t: Thread, work: Work, lane: Lane, i: I32, exists: Predicate) -> Seen:
    """Of the worker's i-th page; none where its id is outside the cache."""
    start = (t.first_page + t.worker + i * t.workers) * PAGE
    left = ptx.select(exists, work.end - start, 0)  # tokens from the page's start
    before = t.first - start

    def seen(token: I32) -> Predicate:
        inside = token < left
        return inside if p.window is None else inside & (token > before - 1)

    rows = [seen(lane.row + 8 * j) for j in range(2)]
    if p.bits != 16:  # masked scales are enough: codes are never NaN
        return Seen(rows, [])
    return Seen(rows, [[seen(token + 8 * j) for token in lane.columns] for j in range(2)])


def load_keys(p: Problem, lane: Lane, block: I32) -> list[list[I32]]:
    """The lane's words of K of its two tokens."""
    side = p.page.side_bytes
    size = min(4, side // 16)
    starts = range(0, side, 16 * size)
    return [
        [
            word
            for start in starts
            for word in ptx.load_shared(block + lane.keys, 8 * side * j + start, count=size)
        ]
        for j in range(2)
    ]


def load_scales(p: Problem, lane: Lane, block: I32) -> list[list[I32]]:
    """(sk, ck) and (sv, cv) of the lane's two tokens."""
    return [
        ptx.load_shared(block + lane.scales, p.page.scales_at + 64 * j, count=2)
        for j in range(0 if p.bits == 16 else 2)
    ]


def load_values(p: Problem, lane: Lane, block: I32) -> list[list[list[list[I32]]]]:
    """[piece][two tokens | those 8 further][first, second]: up to four words of V."""
    side = p.page.side_bytes
    size = min(4, side // 32)
    return [
        [
            [
                ptx.load_shared(
                    block + values,
                    p.page.values_at + 8 * side * j + 4 * start,
                    count=size,
                )
                for values in lane.values
            ]
            for j in range(2)
        ]
        for start in range(0, side // 32, size)
    ]


def key_products(p: Problem, query: Query, keys: list[list[I32]]) -> list[F32]:
    """q @ (code - half) of the lane's rows g, g + 8 and columns 2 c, 2 c + 1."""
    chains = [[query.starts[i % 2] for i in range(4)], [ptx.constant_float(0)] * 4]
    pairs = zip(*(codes.KEYS[p.bits](words) for words in keys), strict=True)
    for i, ((low, high), parts) in enumerate(zip(pairs, query.fragments, strict=True)):
        a = (low[0], high[0], low[1], high[1])
        for part in parts:  # two chains of sums: an mma need not wait for the last
            chains[i % 2] = ptx.mma_halves(chains[i % 2], a, part, p.mma_dtype)
    return [a + b for a, b in zip(*chains, strict=True)]


def scores(
    p: Problem,
    query: Query,
    products: list[F32],
    scales: list[list[F32]],
    seen: Seen,
    minus: list[F32],
) -> list[F32]:
    """log2 of the weights, plus `minus` of each column; -inf where not seen."""
    out = []
    for i, product in enumerate(products):
        row, column = i // 2, i % 2
        factor = scales[row][0] if scales else ptx.constant_float(p.score_factor)
        if p.softcap is None:
            rest = minus[column]
            if scales:
                rest = ptx.multiply_add(scales[row][1], query.sums[column], rest)
            y = ptx.multiply_add(factor, product, rest)
        else:
            scaled = product * factor
            if scales:
                scaled = ptx.multiply_add(scales[row][1], query.sums[column], scaled)
            y = finish_score(p, scaled, minus[column])
        out.append(ptx.select_float(seen.rows[row], y, ptx.constant_float(float("-inf"))))
    return out


def follow_top(
    p: Problem, state: State, relative: list[F32], score: Callable[[list[F32]], list[F32]]
) -> tuple[State, list[F32]]:
    """Where a score is far above top: top follows, and all that was summed is rescaled."""
    lift = LIFT[p.bits]
    above = functools.reduce(ptx.float_maximum, relative) > ptx.constant_float(lift + MARGIN)

    def rescaled() -> list[F32]:
        zero = ptx.constant_float(0)
        raw = score([zero] * 2)
        top = []
        for column in range(2):
            best = ptx.float_maximum(raw[column], raw[2 + column])
            for lanes in (4, 8, 16):
                best = ptx.float_maximum(best, ptx.exchange(best, lanes))
            top.append(ptx.float_maximum(best - ptx.constant_float(lift), state.top[column]))
        shrink = [ptx.exp2(old - new) for old, new in zip(state.top, top, strict=True)]
        moved = State(
            [a * shrink[i % 2] for i, a in enumerate(state.acc)],
            top,
            [x * s for x, s in zip(state.total, shrink, strict=True)],
            [x * s for x, s in zip(state.centre, shrink, strict=True)],
        )
        return [*moved.registers(), *(y - top[i % 2] for i, y in enumerate(raw))]

    found = ptx.branch_values(ptx.any_lane(above), [*state.registers(), *relative], rescaled)
    return State.of(found[:-4]), found[-4:]


def weigh(
    state: State, relative: list[F32], value_scales: list[list[F32]]
) -> tuple[State, list[F32]]:
    """Weights times V's scales; their totals are added to the state."""
    total, centre, weights = list(state.total), list(state.centre), []
    for i, y in enumerate(relative):
        row, column = i // 2, i % 2
        weight = ptx.exp2(y)
        total[column] = total[column] + weight
        if value_scales:
            scale, middle = value_scales[row]
            centre[column] = ptx.multiply_add(weight, middle, centre[column])
            weight = weight * scale
        weights.append(weight)
    return State(state.acc, state.top, total, centre), weights


def weight_fragments(p: Problem, weights: list[F32]) -> list[list[I32]]:
    """Weights [16 tokens, 8 columns] as operand B: transposed; for bf16 as a sum of two."""
    words = ptx.words_of(weights, p.mma_dtype)
    parts = [words]
    if p.mma_dtype == "bfloat16":
        near = ptx.floats_of(words, p.mma_dtype)
        rest = [w - n for w, n in zip(weights, near, strict=True)]
        parts.append(ptx.words_of(rest, p.mma_dtype))
    return [[ptx.transpose_halves(word) for word in part] for part in parts]


def add_values(
    p: Problem,
    acc: list[F32],
    piece: int,
    values: list[list[list[I32]]],
    seen: Seen,
    weights: list[list[I32]],
) -> None:
    """acc += V @ weights for the dims of a piece of V, in place."""
    if seen.columns:  # 0 * NaN is NaN
        values = [
            [
                [ptx.select(is_seen, word, 0) for word in words]
                for words, is_seen in zip(half, halves_seen, strict=True)
            ]
            for half, halves_seen in zip(values, seen.columns, strict=True)
        ]
    near, far = (codes.VALUES[p.bits](first, second) for first, second in values)
    first = 4 * piece * len(near) // 2
    for i in range(0, len(near), 2):
        where = slice(first + 2 * i, first + 2 * i + 4)
        a = (near[i], near[i + 1], far[i], far[i + 1])
        for part in weights:
            acc[where] = ptx.mma_halves(acc[where], a, part, p.mma_dtype)


def unpack_scales(
    p: Problem, words: list[list[I32]], seen: Seen
) -> tuple[list[list[F32]], list[list[F32]]]:
    """(score_factor * sk, ck) and (sv, cv) of two tokens; zeros for V where it is not seen."""
    keys, values = [], []
    for (k, v), is_seen in zip(words, seen.rows[: len(words)], strict=True):
        scale, centre = ptx.unpack_halves(k, "float16")
        keys.append([scale * ptx.constant_float(p.score_factor), centre])
        values.append(list(ptx.unpack_halves(ptx.select(is_seen, v, 0), "float16")))
    return keys, values
