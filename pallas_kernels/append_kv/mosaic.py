"""RoPE, quantisation and append in one kernel, from sm_80 on.

A warp takes some heads of one token: either queries, which it only rotates, or KV heads, of which
it rotates K, quantises K and V and writes them into the cache. H / 16 lanes share a head; lane i
holds dimensions 8i .. 8i + 7 and H/2 + 8i .. H/2 + 8i + 7, the two halves that RoPE rotates into
each other, so that it needs nothing of another lane for that, and owns whole words of the codes:

    load      16 numbers of a head, and their cosines and sines (f32, made once a step)
    rotate    (x1 cos - x2 sin, x2 cos + x1 sin), rounded to the dtype of k, stored
    range     minimum and maximum over the H / 16 lanes, by exchange
    scale     s = f16((max - min) / (2^bits - 1)), c = f16(min + 2^(bits-1) s)
    codes     round((x - c) * (1 / s)) + 2^(bits-1), clamped; words stored, s and c by lane 0

The codes are those of `numerics.quantize_kv` of the rotated K, bit for bit: divisions round
correctly, nothing is contracted. A warp of which not all heads exist does the last one again, and
writes the same. What has no slot in the cache is rotated and not written.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.append_kv.codes import quantized
from qserve_jax.pallas_kernels.append_kv.places import (
    Halves,
    Lane,
    Operands,
    Place,
    lane_of,
    load,
    operands_of,
    place_of,
    store,
    vectors_of,
)
from qserve_jax.pallas_kernels.append_kv.problem import VECTOR, WARPS, Problem, problem
from qserve_jax.pallas_kernels.intrinsics import F32, I32
from qserve_jax.quantization.qtensor import Array, KVCache


def rope_append(
    qkv: Sequence[Array],
    cos: Array | None,
    sin: Array | None,
    cache: KVCache,
    slot_mapping: Array,
    *,
    center: Array | None,
    layer: Array | int | None,
) -> tuple[Array, Array, Array, KVCache]:
    """See `api.rope_append_kv`."""
    heads = qkv[0].shape[1] - (2 * cache.num_kv_heads if len(qkv) == 1 else 0)
    q, k, v, pages = _call(qkv, heads, [cos, sin, center], cache, slot_mapping, layer)
    return q, k, v, dataclasses.replace(cache, pages=pages)


def append(
    cache: KVCache, k: Array, v: Array, slot_mapping: Array, *, layer: Array | int | None
) -> KVCache:
    """See `api.append_kv`."""
    *_, pages = _call([k, v], 0, [None] * 3, cache, slot_mapping, layer)
    return dataclasses.replace(cache, pages=pages)


def _call(qkv, heads, turn, cache, slots, layer) -> tuple[Any, Any, Any, Array]:
    """q and k rotated, v, and the pages. turn: cos, sin and center, or None for each."""
    p = problem(qkv, heads, turn, cache, layer)
    operands = [*qkv, jnp.asarray(slots, jnp.int32)]
    if layer is not None:
        operands.append(jnp.asarray(layer, jnp.int32).reshape(1))
    operands += [x.astype(jnp.float32) for x in turn if x is not None]

    def rows(count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((p.tokens, count, p.head_dim), qkv[0].dtype)

    out = [rows(p.heads), rows(p.kv_heads)] if p.rotate else []
    out += [rows(p.kv_heads)] if p.fused else []
    *found, pages = ptx.launch(
        functools.partial(_body, p),
        operands,
        out,
        updated=[cache.pages],
        name="rope_append_kv" if p.rotate else "append_kv",
        blocks=math.ceil(p.tokens * p.warps / WARPS),
        warpgroups=WARPS // 4,
        shared_bytes=16,
    )
    q, k = found[:2] if p.rotate else (None, None)
    return q, k, found[-1] if p.fused else qkv[-1], pages


def _body(p: Problem, *refs: Any) -> None:
    """The kernel. refs: the operands of `_call`, pages, outputs, shared memory (not used)."""
    o, t = operands_of(p, [ptx.global_address(ref) for ref in refs[:-1]]), lane_of(p)
    with ptx.when(t.token < p.tokens):
        if p.query_warps:
            ptx.branch(t.part < p.query_warps, lambda: _queries(p, o, t), lambda: _heads(p, o, t))
        else:
            _heads(p, o, t)


def _queries(p: Problem, o: Operands, t: Lane) -> None:
    """Rotate queries."""
    assert o.q is not None and o.q_out is not None
    head = t.head(p, t.part, p.heads)
    words = load(p, o.q.vectors(p, t, head))
    store(o.q_out.vectors(p, t, head), _rotated(p, words, _turn(p, o, t)))


def _heads(p: Problem, o: Operands, t: Lane) -> None:
    """Rotate K, and write K and V into the cache."""
    head = t.head(p, t.part - p.query_warps, p.kv_heads)
    k, v = (load(p, rows.vectors(p, t, head)) for rows in (o.k, o.v))
    if o.k_out is not None:
        k = _rotated(p, k, _turn(p, o, t), _center(p, o, t, head))
        store(o.k_out.vectors(p, t, head), k)
    if o.v_out is not None:
        store(o.v_out.vectors(p, t, head), v)
    place = place_of(p, o, t, head)
    for side, words in enumerate((k, v)):
        _write_side(p, t, place, side, words)


def _turn(p: Problem, o: Operands, t: Lane) -> list[list[F32]]:
    """Cosines and sines of the lane's dimensions."""
    size = 4 * VECTOR
    rows = (table.advance(t.token * p.lanes + t.vector, size) for table in o.turn)
    return [ptx.floats_of(ptx.load_words(row, size), "float32") for row in rows]


def _center(p: Problem, o: Operands, t: Lane, head: I32) -> list[list[F32]] | None:
    """What is to be subtracted from the lane's two vectors of K."""
    if o.center is None:
        return None
    vectors = vectors_of(p, t, o.center.advance(head, 4 * p.head_dim), 4 * p.head_dim)
    return [ptx.floats_of(ptx.load_words(v, 4 * VECTOR), "float32") for v in vectors]


def _rotated(
    p: Problem, words: Halves, turn: list[list[F32]], center: list[list[F32]] | None = None
) -> Halves:
    """RoPE, rotate-half: each half by the other."""
    x1, x2 = (ptx.floats_of(part, p.dtype) for part in words)
    pairs = list(zip(x1, x2, *turn, strict=True))
    low = [a * cos - b * sin for a, b, cos, sin in pairs]
    high = [b * cos + a * sin for a, b, cos, sin in pairs]
    halves = [low, high]
    if center is not None:
        halves = [
            [x - c for x, c in zip(half, part, strict=True)]
            for half, part in zip(halves, center, strict=True)
        ]
    return [ptx.words_of(half, p.dtype) for half in halves]


def _write_side(p: Problem, t: Lane, place: Place, side: int, words: Halves) -> None:
    """K (side 0) or V (1) of a head, as the cache keeps it."""
    values, scales = words, None
    if p.bits < 16:
        values, scales = quantized(p, [ptx.floats_of(part, p.dtype) for part in words])
    elif p.cache_dtype != p.dtype:
        values = [ptx.words_of(ptx.floats_of(part, p.dtype), p.cache_dtype) for part in words]
    size = p.page.side_bytes
    with ptx.when(place.exists):
        row = place.block.advance(side, p.page.values_at).advance(place.offset, size)
        store(vectors_of(p, t, row, size), values)
    if scales is not None:
        with ptx.when(place.exists & t.vector.is_(0)):
            target = place.block.advance(1, p.page.scales_at + 4 * side).advance(place.offset, 8)
            ptx.store_global(target, [scales])
