"""Before the pages: the queries as operands of the tensor core, and the new token."""

from __future__ import annotations

import dataclasses
from typing import Any

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import F32, I32
from qserve_jax.pallas_kernels.paged_attention import decode_codes as codes
from qserve_jax.pallas_kernels.paged_attention.decode_problem import COLUMNS, Problem
from qserve_jax.pallas_kernels.paged_attention.decode_thread import Thread, Work
from qserve_jax.pallas_kernels.paged_attention.problem import LOG2E, LOWEST

LIFT = {4: 5.0, 8: 9.0, 16: 9.0}
"""log2 of the largest weight when top was last set. f16 has 16 bits above 1 and 14 below: weights
times V's scales, (max - min) / (2**bits - 1), are to be in the middle, the small ones too."""


@dataclasses.dataclass
class Query:
    """fragments: of each mma over K, [high and, where q is split, low part], two words each.

    Of the lane's two columns of the scores: starts, what they begin with to take the codes' offset
    off, and sums, score_factor times the sum of q, which the centres of K are multiplied with.
    """

    fragments: list[list[tuple[I32, I32]]]
    starts: list[F32]
    sums: list[F32]

    def registers(self) -> list[Any]:
        words = [word for parts in self.fragments for part in parts for word in part]
        return [*words, *self.starts, *self.sums]

    @staticmethod
    def of(p: Problem, registers: list[Any]) -> Query:
        *words, a, b, c, d = registers
        parts = list(zip(words[::2], words[1::2], strict=True))
        each = 2 if p.splits_query else 1
        fragments = [parts[i : i + each] for i in range(0, len(parts), each)]
        return Query(fragments, [a, b], [c, d])


@dataclasses.dataclass
class State:
    """Sums over the tokens so far of this warp, relative to 2**top; total and centre of this lane.

    acc: of mma i over V, see decode_codes; of columns 2 c and 2 c + 1. top, total, centre: for
    these two columns the exponent (for FlashAttention's m), the sum of the weights (l), and of
    weights times V's centres.
    """

    acc: list[F32]
    top: list[F32]
    total: list[F32]
    centre: list[F32]

    def registers(self) -> list[F32]:
        return [*self.acc, *self.top, *self.total, *self.centre]

    @staticmethod
    def of(registers: list[F32]) -> State:
        *acc, a, b, c, d, e, f = registers
        return State(acc, [a, b], [c, d], [e, f])


def load_row(ref: ptx.Address, index: I32, first: I32, count: int, h: int, dtype: str) -> list[I32]:
    """Of row `index` of [.., h] the words of the numbers first .. first + count - 1."""
    size = _size(dtype)
    return ptx.load_words(ref.advance(index, h * size).advance(first, size), count * size)


def ask_query(p: Problem, t: Thread) -> list[list[I32]]:
    """Lane (g, c): of the query of column g the dims that it reads of K, in the same order."""
    row = t.row * p.heads + t.head_of_column(t.g)
    at_once = min(16, p.page.side_bytes // 4)  # bytes of K that a lane reads
    dims = at_once * 8 // p.bits
    return [
        load_row(t.gmem["q"], row, t.c * dims + start, dims, p.head_dim, p.q_dtype)
        for start in range(0, p.head_dim, 4 * dims)
    ]


def make_query(p: Problem, t: Thread, work: Work, asked: list[list[I32]]) -> Query:
    """Of what `ask_query` has loaded, where the worker has pages: behind a branch, ptxas leaves it
    after the copies, which should not wait for it."""
    count = p.head_dim // 4 * (2 if p.splits_query else 1)
    nothing = [*[ptx.constant(0)] * (count // 2), *[ptx.constant_float(0)] * 4]
    made = ptx.branch_values(work.count > 0, nothing, lambda: _query(p, t, asked).registers())
    return Query.of(p, made)


def _query(p: Problem, t: Thread, asked: list[list[I32]]) -> Query:
    fragments, total, correction = [], ptx.constant_float(0), ptx.constant_float(0)
    for words in asked:
        if p.group % COLUMNS:
            # Zeros for columns without a query head, which would repeat the last one's. No result
            # depends on it, as nothing of theirs is stored; kernels were measured with it.
            words = [ptx.select(t.g < t.block_heads, w, 0) for w in words]
        values = ptx.floats_of(words, p.q_dtype)
        for eight in (values[i : i + 8] for i in range(0, len(values), 8)):
            for order, factor, offset in codes.query_order(p.bits):
                parts, rounded = _fragments(p, [eight[i] for i in order], factor)
                fragments.append(parts)
                total = ptx.multiply_add(rounded, ptx.constant_float(1 / factor), total)
                correction = ptx.multiply_add(rounded, ptx.constant_float(-offset), correction)
    if p.bits == 16:
        zero = ptx.constant_float(0)
        return Query(fragments, [zero] * 2, [zero] * 2)
    for lanes in (1, 2):
        total = total + ptx.exchange(total, lanes)
        correction = correction + ptx.exchange(correction, lanes)
    total = total * ptx.constant_float(p.score_factor)
    return Query(fragments, of_columns(t, correction), of_columns(t, total))


def _fragments(p: Problem, values: list[F32], factor: float) -> tuple[list[tuple[I32, I32]], F32]:
    """Four numbers of q, times a factor, in two words (and what these leave), and their sum."""
    if factor != 1:
        values = [v * ptx.constant_float(factor) for v in values]
    words = ptx.words_of(values, p.mma_dtype)
    near = ptx.floats_of(words, p.mma_dtype)
    parts = [(words[0], words[1])]
    if p.splits_query:
        rest = ptx.words_of([v - n for v, n in zip(values, near, strict=True)], p.mma_dtype)
        parts.append((rest[0], rest[1]))
    return parts, (near[0] + near[1]) + (near[2] + near[3])


def of_columns(t: Thread, value: F32) -> list[F32]:
    """The values of columns 2 c and 2 c + 1, of which every lane (column, any) holds its own's."""
    return [ptx.value_of_lane(value, t.c * 8 + 4 * k) for k in range(2)]


def finish_score(p: Problem, scaled: F32, minus: F32) -> F32:
    """From score_factor times q @ k to log2 of the weight, plus `minus`."""
    if p.softcap is None:
        return scaled + minus
    one = ptx.constant_float(1)
    tanh = ptx.multiply_add(ptx.constant_float(-2), ptx.reciprocal(ptx.exp2(scaled) + one), one)
    return ptx.multiply_add(tanh, ptx.constant_float(p.softcap * LOG2E), minus)


def ask_new_token(p: Problem, t: Thread) -> list[I32]:
    """Of the new token, in the first warp of the first worker: words of q, of k and of v."""
    if p.new is None:
        return []
    h, part = p.head_dim, p.head_dim // 4
    token = t.row * p.kv_heads + t.kv_head
    row = t.row * p.heads + t.head_of_column(t.g)

    def load() -> list[I32]:
        assert p.new is not None
        q = load_row(t.gmem["q"], row, t.c * part, part, h, p.q_dtype)
        k = load_row(t.gmem["new_k"], token, t.c * part, part, h, p.new)
        return [*q, *k, *load_row(t.gmem["new_v"], token, t.g * (h // 8), h // 8, h, p.new)]

    size = part * _size(p.q_dtype) + (part + h // 8) * _size(p.new)
    nothing = [ptx.constant(0)] * (size // 4)
    return ptx.branch_values(t.worker.is_(0) & t.quarter.is_(0), nothing, load)


def _size(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def start_state(p: Problem, t: Thread, work: Work, asked: list[I32]) -> State:
    """Nothing; in the first warp of the first worker the new token, where it is to be seen."""
    zero, lowest = ptx.constant_float(0), ptx.constant_float(LOWEST)
    empty = State([zero] * (p.head_dim // 4), [lowest] * 2, [zero] * 2, [zero] * 2)
    if work.has_new is None:
        return empty
    mine = work.has_new & t.worker.is_(0) & t.quarter.is_(0)
    found = ptx.branch_values(mine, empty.registers(), lambda: _new_token(p, t, asked).registers())
    return State.of(found)


def _new_token(p: Problem, t: Thread, asked: list[I32]) -> State:
    """The state after one token, in float32."""
    assert p.new is not None
    part = p.head_dim // 4
    count = part * _size(p.q_dtype) // 4
    q, rest = ptx.floats_of(asked[:count], p.q_dtype), ptx.floats_of(asked[count:], p.new)
    k, v = rest[:part], rest[part:]
    score = ptx.constant_float(0)
    for a, b in zip(q, k, strict=True):
        score = ptx.multiply_add(a, b, score)
    for lanes in (1, 2):
        score = score + ptx.exchange(score, lanes)
    lift = ptx.constant_float(-LIFT[p.bits])
    top = finish_score(p, score * ptx.constant_float(p.score_factor), lift)
    zero, weight = ptx.constant_float(0), ptx.constant_float(2.0 ** LIFT[p.bits])
    acc = [value * weight for value in v for _ in range(2)]
    total = ptx.select_float(t.g.is_(0), weight, zero)
    return State(acc, of_columns(t, top), [total] * 2, [zero] * 2)
