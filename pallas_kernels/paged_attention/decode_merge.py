"""After the pages: the sums of warps, of blocks of a cluster and of splits become the output.

Sums relative to different powers of two are added after a rescaling, in a fixed order, so that
launches repeat bit for bit.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import F32, I32, Address
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
    top, total = _block_tops(config, t)
    _share_sums(p, config, t, state, top, total)
    ptx.sync_block(config.threads)
    per_head = p.head_dim // 8
    with ptx.when(t.index < t.block_heads * per_head):
        head, part = t.index // per_head, t.index % per_head
        sums = _add_warps(config, t, head, part)
        if config.alone:
            row = _output_row(p, t, t.gmem["out"], head)
            ptx.store_words(row.advance(part * 8, _size(p)), ptx.words_of(sums, p.q_dtype))
        elif config.splits > 1:
            _store_partial(p, t, head, part, sums)
        else:
            target = t.shared + t.memory.block + head * (4 * p.head_dim) + part * 32
            _store_shared_floats(target, sums)
    if config.cluster > 1:
        ptx.sync_cluster()
        _add_cluster(p, config, t)
        ptx.sync_cluster()  # no block may end while another reads its shared memory


def _size(p: Problem) -> int:
    return jnp.dtype(p.q_dtype).itemsize


def _output_row(p: Problem, t: Thread, out: Address, head: I32) -> Address:
    return out.advance(t.row * p.heads + t.first_head + head, p.head_dim * _size(p))


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
    tops = t.shared + t.memory.tops + t.warp * 64 + t.c * 8
    with ptx.when(t.g.is_(0)):
        for k in range(2):
            ptx.store_shared(tops, state.top[k], 4 * k)
            ptx.store_shared(tops, state.total[k], 32 + 4 * k)


def _block_tops(config: DecodeConfig, t: Thread) -> tuple[list[F32], list[F32]]:
    """Of the lane's two columns, over all warps: the largest exponent, and the total."""
    tops = t.shared + t.memory.tops + t.c * 8
    largest, totals = [], []
    for k in range(2):
        top, total = (
            [
                ptx.load_shared(tops, 64 * warp + offset + 4 * k, kind=F32)[0]
                for warp in range(config.warps)
            ]
            for offset in (0, 32)
        )
        best, together = functools.reduce(ptx.float_maximum, top), ptx.constant_float(0)
        for a, b in zip(top, total, strict=True):
            together = ptx.multiply_add(ptx.exp2(a - best), b, together)
        largest.append(best)
        totals.append(together)
    return largest, totals


def inverse(total: F32) -> F32:
    """1 / total, and 0 where nothing was seen."""
    zero = ptx.constant_float(0)
    return ptx.select_float(total > zero, ptx.reciprocal(total), zero)


def _share_sums(
    p: Problem, config: DecodeConfig, t: Thread, state: State, top: list[F32], total: list[F32]
) -> None:
    """Each warp's sums, relative to the block's top, to where the ring was; divided by the total
    where no other block has a part in it."""
    stride = t.memory.head_stride
    base = t.shared + t.warp * (COLUMNS * stride) + t.c * (2 * stride) + t.g * (p.head_dim // 2)
    for k in range(2):
        factor = ptx.exp2(state.top[k] - top[k])
        factor = factor * inverse(total[k]) if config.alone else factor
        sums = [(a + state.centre[k]) * factor for a in state.acc[k::2]]
        _store_shared_floats(base + k * stride, sums)
    if config.alone:
        return
    with ptx.when(t.warp.is_(0) & t.g.is_(0)):
        for k in range(2):
            target = t.shared + t.memory.block_tops + t.c * 16 + 8 * k
            ptx.store_shared(target, top[k])
            ptx.store_shared(target, total[k], 4)


def _add_warps(config: DecodeConfig, t: Thread, head: I32, part: I32) -> list[F32]:
    """Eight dims of a head, over the warps."""
    stride = t.memory.head_stride
    source = t.shared + head * stride + part * 32
    sums: list[F32] = []
    for warp in range(config.warps):
        values = [
            value
            for half in (0, 16)
            for value in ptx.load_shared(source, warp * COLUMNS * stride + half, count=4, kind=F32)
        ]
        sums = [a + b for a, b in zip(sums, values, strict=True)] if sums else values
    return sums


# Of a cluster


def _add_cluster(p: Problem, config: DecodeConfig, t: Thread) -> None:
    """Each block adds a part of the dims of all heads, two at a time, and stores it."""
    pairs = p.head_dim // 2 // config.cluster
    for start in range(0, min(p.group, COLUMNS) * pairs, config.threads):
        item = t.index + start
        with ptx.when(item < t.block_heads * pairs):
            head, pair = item // pairs, item % pairs + t.rank * pairs
            sums = _cluster_pair(p, config, t, head, pair)
            row = _output_row(p, t, t.gmem["out"], head)
            ptx.store_words(row.advance(pair * 2, _size(p)), ptx.words_of(sums, p.q_dtype))


def _cluster_pair(p: Problem, config: DecodeConfig, t: Thread, head: I32, pair: I32) -> list[F32]:
    tops, values = [], []
    for rank in range(config.cluster):
        there = ptx.address_in_block(t.shared + t.memory.block_tops + head * 8, rank)
        tops.append(ptx.load_cluster(there, count=2))
        where = t.shared + t.memory.block + head * (4 * p.head_dim) + pair * 8
        values.append(ptx.load_cluster(ptx.address_in_block(where, rank), count=2))
    best = functools.reduce(ptx.float_maximum, (top for top, _ in tops))
    total, sums = ptx.constant_float(0), [ptx.constant_float(0)] * 2
    for (top, part), pair_values in zip(tops, values, strict=True):
        factor = ptx.exp2(top - best)
        total = ptx.multiply_add(factor, part, total)
        sums = [ptx.multiply_add(factor, v, s) for v, s in zip(pair_values, sums, strict=True)]
    scale = inverse(total)
    return [s * scale for s in sums]


# Of splits


def _store_partial(p: Problem, t: Thread, head: I32, part: I32, sums: list[F32]) -> None:
    """To the workspace f32[splits, B, N, H + PARTIAL_EXTRA]."""
    row = (t.split * p.rows + t.row) * p.heads + t.first_head + head
    target = t.gmem["out"].advance(row, 4 * (p.head_dim + PARTIAL_EXTRA))
    ptx.store_words(target.advance(part * 8, 4), [ptx.float_bits(s) for s in sums])
    with ptx.when(part.is_(0)):
        tops = ptx.load_shared(t.shared + t.memory.block_tops + head * 8, count=2)
        zeros = [ptx.constant(0)] * 2
        ptx.store_words(target.advance(p.head_dim, 4), [*tops, *zeros])


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
