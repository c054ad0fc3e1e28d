"""After the pages: the sums of warps, of blocks of a cluster or of splits become the output.

Sums relative to different powers of two are added after a rescaling, in a fixed order, so that
launches repeat bit for bit.
"""

from __future__ import annotations

import functools
import operator

import jax.numpy as jnp

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import F32, I32
from qserve_jax.pallas_kernels.paged_attention.decode_config import DecodeConfig
from qserve_jax.pallas_kernels.paged_attention.decode_problem import COLUMNS, Problem
from qserve_jax.pallas_kernels.paged_attention.decode_query import State
from qserve_jax.pallas_kernels.paged_attention.decode_thread import Thread
from qserve_jax.quantization.qtensor import Array

PARTIAL_EXTRA = 4
"""Numbers behind the head_dim sums of a split: exponent, total, and two that keep alignment."""


def merge(p: Problem, config: DecodeConfig, t: Thread, state: State) -> None:
    """The state of every warp to the output, or to the workspace of the splits."""
    state = _add_lanes(state)
    _share_tops(t, state)
    ptx.sync_block(config.threads)
    _share_sums(p, t, state, _block_top(config, t))
    ptx.sync_block(config.threads)
    dims = _dims_each(p, config)
    with ptx.when(t.index < t.block_heads * (p.head_dim // dims)):
        head, first = t.index // (p.head_dim // dims), t.index % (p.head_dim // dims) * dims
        sums, total = _add_warps(config, t, head, first, dims)
        if config.alone:
            _store_output(p, t, head, first, sums, total)
        elif config.cluster == 1:
            _store_partial(p, t, head, first, sums, total)
        else:
            target = t.shared + t.memory.block + head * (4 * p.head_dim) + first * 4
            _store_shared_floats(target, sums)
            with ptx.when(first.is_(0)):
                ptx.store_shared(t.shared + t.memory.block_tops + head * 8, total, 4)
    if config.cluster > 1:
        ptx.sync_cluster()
        _add_cluster(p, config, t)
        ptx.meet_cluster()  # no block may end while another reads its shared memory


def _size(p: Problem) -> int:
    return jnp.dtype(p.q_dtype).itemsize


def _store_output(
    p: Problem, t: Thread, head: I32, first: I32, sums: list[F32], total: F32
) -> None:
    """The dims `first` and on of a query head."""
    row = t.row * p.heads + t.first_head + head
    target = t.gmem["out"].advance(row, p.head_dim * _size(p)).advance(first, _size(p))
    scale = inverse(total)
    ptx.store_words(target, ptx.words_of([s * scale for s in sums], p.q_dtype))


def _store_shared_floats(target: I32, values: list[F32]) -> None:
    for i in range(0, len(values), 4):
        words = [ptx.float_bits(v) for v in values[i : i + 4]]
        ptx.store_shared_words(target, words, 4 * i)


# Of a block


def _add_lanes(state: State) -> State:
    """Totals of all 16 tokens; the tensor core has added the products already."""

    def add(value: F32) -> F32:
        for lanes in (4, 8, 16):
            value = value + ptx.exchange(value, lanes)
        return value

    total, centre = ([add(x) for x in pair] for pair in (state.total, state.centre))
    return State(state.acc, state.top, total, centre)


def _share_tops(t: Thread, state: State) -> None:
    with ptx.when(t.g.is_(0)):
        _store_shared_floats(t.shared + t.memory.tops + t.warp * 64 + t.c * 8, state.top)


def _block_top(config: DecodeConfig, t: Thread) -> list[F32]:
    """Of the lane's two columns, over all warps: the largest exponent."""
    tops = t.shared + t.memory.tops + t.c * 8
    found = [ptx.load_shared(tops, 64 * warp, count=2, kind=F32) for warp in range(config.warps)]
    return [functools.reduce(ptx.float_maximum, column) for column in zip(*found, strict=True)]


def inverse(total: F32) -> F32:
    """1 / total, and 0 where nothing was seen."""
    zero = ptx.constant_float(0)
    return ptx.select_float(total > zero, ptx.reciprocal(total), zero)


def _share_sums(p: Problem, t: Thread, state: State, top: list[F32]) -> None:
    """Each warp's sums, relative to the block's top, to where the ring was, and their totals."""
    stride = t.memory.head_stride
    base = t.shared + t.warp * (COLUMNS * stride) + t.c * (2 * stride) + t.g * (p.head_dim // 2)
    factors = [ptx.exp2(own - block) for own, block in zip(state.top, top, strict=True)]
    with ptx.when(t.c * 2 < t.block_heads):  # the others are padding
        for k, factor in enumerate(factors):
            sums = [(a + state.centre[k]) * factor for a in state.acc[k::2]]
            _store_shared_floats(base + k * stride, sums)
    with ptx.when(t.g.is_(0)):
        totals = [x * factor for x, factor in zip(state.total, factors, strict=True)]
        _store_shared_floats(t.shared + t.memory.tops + t.warp * 64 + t.c * 8 + 32, totals)
    with ptx.when(t.warp.is_(0) & t.g.is_(0)):
        for k in range(2):
            ptx.store_shared(t.shared + t.memory.block_tops + t.c * 16, top[k], 8 * k)


def _dims_each(p: Problem, config: DecodeConfig) -> int:
    """Of the outputs of all query heads, how many a thread adds up: 2, 4 or 8 in a row."""
    heads = min(p.group, COLUMNS)
    return next(n for n in (2, 4, 8) if heads * p.head_dim <= n * config.threads)


def _add_warps(
    config: DecodeConfig, t: Thread, head: I32, first: I32, dims: int
) -> tuple[list[F32], F32]:
    """The dims `first` and on of a head, and its total, over the warps."""
    stride, size = t.memory.head_stride, min(dims, 4)
    source = t.shared + head * stride + first * 4
    totals = t.shared + t.memory.tops + head * 4 + 32
    found = []
    for warp in range(config.warps):
        offsets = range(warp * COLUMNS * stride, warp * COLUMNS * stride + 4 * dims, 4 * size)
        parts = [ptx.load_shared(source, i, count=size, kind=F32) for i in offsets]
        parts.append(ptx.load_shared(totals, 64 * warp, kind=F32))
        found.append([value for part in parts for value in part])
    *sums, total = (functools.reduce(operator.add, column) for column in zip(*found, strict=True))
    return sums, total


# Of a cluster


def _add_cluster(p: Problem, config: DecodeConfig, t: Thread) -> None:
    """Each block adds a part of the dims of all heads, two at a time, and stores it."""
    pairs = p.head_dim // 2 // config.cluster
    for start in range(0, min(p.group, COLUMNS) * pairs, config.threads):
        item = t.index + start
        with ptx.when(item < t.block_heads * pairs):
            head, first = item // pairs, (item % pairs + t.rank * pairs) * 2
            sums, total = _cluster_pair(p, config, t, head, first)
            _store_output(p, t, head, first, sums, total)


def _cluster_pair(
    p: Problem, config: DecodeConfig, t: Thread, head: I32, first: I32
) -> tuple[list[F32], F32]:
    """Two dims of a head, and its total, over the blocks."""
    tops, values = [], []
    for rank in range(config.cluster):
        there = ptx.address_in_block(t.shared + t.memory.block_tops + head * 8, rank)
        tops.append(ptx.load_cluster(there, count=2))
        where = t.shared + t.memory.block + head * (4 * p.head_dim) + first * 4
        values.append(ptx.load_cluster(ptx.address_in_block(where, rank), count=2))
    best = functools.reduce(ptx.float_maximum, (top for top, _ in tops))
    total, sums = ptx.constant_float(0), [ptx.constant_float(0)] * 2
    for (top, part), pair in zip(tops, values, strict=True):
        factor = ptx.exp2(top - best)
        total = ptx.multiply_add(factor, part, total)
        sums = [ptx.multiply_add(factor, v, s) for v, s in zip(pair, sums, strict=True)]
    return sums, total


# Of splits


def _store_partial(
    p: Problem, t: Thread, head: I32, first: I32, sums: list[F32], total: F32
) -> None:
    """To the workspace f32[splits, B, N, H + PARTIAL_EXTRA]."""
    top = ptx.load_shared(t.shared + t.memory.block_tops + head * 8, kind=F32)[0]
    row = (t.split * p.rows + t.row) * p.heads + t.first_head + head
    target = t.gmem["out"].advance(row, 4 * (p.head_dim + PARTIAL_EXTRA))
    ptx.store_words(target.advance(first, 4), [ptx.float_bits(s) for s in sums])
    with ptx.when(first.is_(0)):
        words = [ptx.float_bits(top), ptx.float_bits(total), *[ptx.constant(0)] * 2]
        ptx.store_words(target.advance(p.head_dim, 4), words)


def add_splits(p: Problem, partial: Array) -> Array:
    """f32[splits, B, N, H + PARTIAL_EXTRA] -> [B, N, H], in one XLA fusion."""
    sums, top, total = (
        partial[..., : p.head_dim],
        partial[..., p.head_dim],
        partial[..., p.head_dim + 1],
    )
    factor = jnp.exp2(top - top.max(0))
    total = (total * factor).sum(0)[..., None]
    sums = (sums * factor[..., None]).sum(0)
    return jnp.where(total > 0, sums / jnp.where(total > 0, total, 1), 0).astype(p.q_dtype)
