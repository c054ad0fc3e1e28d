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
from qserve_jax.pallas_kernels.intrinsics import F32, I32, Address, Predicate
from qserve_jax.pallas_kernels.page_layout import PageLayout
from qserve_jax.quantization.numerics import MAX_KV_VALUE, MIN_KV_SCALE
from qserve_jax.quantization.qtensor import Array, KVCache

DTYPES = ("bfloat16", "float16", "float32")
HEAD_DIMS = (32, 64, 128, 256)
VECTOR = 8
"""Numbers that a lane reads at once; it has two such vectors of each head."""
WARPS = 4
ROUND_TO_INTEGER = 1.5 * 2.0**23
"""Added to a float32 below 2**22, it leaves the nearest integer in the low bits (ties to even)."""

Halves = list[list[I32]]
"""The words of a lane's two vectors of a head."""


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Sizes that are known when the kernel is built. heads: of queries, 0 where there are none."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    bits: int
    cache_dtype: str
    page_size: int
    num_pages: int
    layers: int | None
    rotate: bool
    centred: bool
    fused: bool

    @property
    def lanes(self) -> int:
        """That share a head."""
        return self.head_dim // (2 * VECTOR)

    @property
    def query_warps(self) -> int:
        """For the queries of a token."""
        return math.ceil(self.heads * self.lanes / 32)

    @property
    def warps(self) -> int:
        """For a token."""
        return self.query_warps + math.ceil(self.kv_heads * self.lanes / 32)

    @property
    def row_bytes(self) -> int:
        """Of a head of a token."""
        return self.head_dim * jnp.dtype(self.dtype).itemsize

    @property
    def page(self) -> PageLayout:
        itemsize = jnp.dtype(self.cache_dtype).itemsize
        return PageLayout(self.page_size, self.head_dim, self.bits, itemsize)


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
    p = _problem(qkv, heads, turn, cache, layer)
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


def _problem(qkv, heads, turn, cache, layer) -> _Problem:
    """Raises NotImplementedError on what the kernel does not take."""
    dtypes, tokens = {x.dtype.name for x in qkv}, qkv[0].shape[0]
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise NotImplementedError(
            f"q, k and v are {sorted(dtypes)}, but the append kernel takes one of {DTYPES}: cast "
            "them or use the reference"
        )
    if cache.head_dim not in HEAD_DIMS:
        raise NotImplementedError(
            f"head_dim={cache.head_dim}, but the append kernel takes {HEAD_DIMS}: use the reference"
        )
    if tokens == 0:
        raise NotImplementedError("no tokens, but the append kernel takes 1 or more")
    return _Problem(
        tokens,
        heads,
        cache.num_kv_heads,
        cache.head_dim,
        dtypes.pop(),
        cache.bits,
        cache.pages.dtype.name,
        cache.page_size,
        cache.num_pages,
        cache.pages.shape[0] if layer is not None else None,
        rotate=turn[0] is not None,
        centred=turn[2] is not None,
        fused=len(qkv) == 1,
    )


@dataclasses.dataclass(frozen=True)
class _Lane:
    """Where a lane stands: its warp's token and part of the token's heads; its head among those of
    the warp, and its first vector of the head."""

    token: I32
    part: I32
    group: I32
    vector: I32

    def head(self, p: _Problem, part: I32, count: int) -> I32:
        """Of `count`, the last one where there are no more."""
        return ptx.minimum(part * (32 // p.lanes) + self.group, count - 1)


def _lane(p: _Problem) -> _Lane:
    warp, lane = ptx.block_index() * WARPS + ptx.warp_index(), ptx.thread_index() & 31
    return _Lane(warp // p.warps, warp % p.warps, lane // p.lanes, lane % p.lanes)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Heads of all tokens in memory: `stride` heads a token, of which these begin at `first`."""

    address: Address
    stride: int
    first: int = 0

    def vectors(self, p: _Problem, t: _Lane, head: I32) -> list[Address]:
        """Of this lane's token."""
        row = self.address.advance(t.token * self.stride + head + self.first, p.row_bytes)
        return _vectors(p, t, row, p.row_bytes)


def _vectors(p: _Problem, t: _Lane, row: Address, size: int) -> list[Address]:
    """The lane's two vectors of a head that takes `size` bytes."""
    first = row.advance(t.vector, size // (2 * p.lanes))
    return [first, first.advance(1, size // 2)]


@dataclasses.dataclass(frozen=True)
class _Operands:
    """Those of `_call`; those of the kernel that it does not have are None."""

    q: _Rows | None
    k: _Rows
    v: _Rows
    slots: Address
    layer: Address | None
    turn: list[Address]
    center: Address | None
    pages: Address
    q_out: _Rows | None
    k_out: _Rows | None
    v_out: _Rows | None


def _operands(p: _Problem, addresses: list[Address]) -> _Operands:
    take = iter(addresses)
    if p.fused:
        stride, both = p.heads + 2 * p.kv_heads, next(take)
        q, k, v = (_Rows(both, stride, n) for n in (0, p.heads, p.heads + p.kv_heads))
    else:
        q = _Rows(next(take), p.heads) if p.heads else None
        k, v = (_Rows(next(take), p.kv_heads) for _ in range(2))
    return _Operands(
        *(q, k, v),
        slots=next(take),
        layer=None if p.layers is None else next(take),
        turn=[next(take), next(take)] if p.rotate else [],
        center=next(take) if p.centred else None,
        pages=next(take),
        q_out=_Rows(next(take), p.heads) if p.rotate else None,
        k_out=_Rows(next(take), p.kv_heads) if p.rotate else None,
        v_out=_Rows(next(take), p.kv_heads) if p.fused else None,
    )


def _body(p: _Problem, *refs: Any) -> None:
    """The kernel. refs: the operands of `_call`, pages, outputs, shared memory (not used)."""
    o, t = _operands(p, [ptx.global_address(ref) for ref in refs[:-1]]), _lane(p)
    with ptx.when(t.token < p.tokens):
        if p.query_warps:
            ptx.branch(t.part < p.query_warps, lambda: _queries(p, o, t), lambda: _heads(p, o, t))
        else:
            _heads(p, o, t)


def _queries(p: _Problem, o: _Operands, t: _Lane) -> None:
    """Rotate queries."""
    assert o.q is not None and o.q_out is not None
    head = t.head(p, t.part, p.heads)
    words = _load(p, o.q.vectors(p, t, head))
    _store(o.q_out.vectors(p, t, head), _rotated(p, words, _turn(p, o, t)))


def _heads(p: _Problem, o: _Operands, t: _Lane) -> None:
    """Rotate K, and write K and V into the cache."""
    head = t.head(p, t.part - p.query_warps, p.kv_heads)
    k, v = (_load(p, rows.vectors(p, t, head)) for rows in (o.k, o.v))
    if o.k_out is not None:
        k = _rotated(p, k, _turn(p, o, t), _center(p, o, t, head))
        _store(o.k_out.vectors(p, t, head), k)
    if o.v_out is not None:
        _store(o.v_out.vectors(p, t, head), v)
    place = _place(p, o, t, head)
    for side, words in enumerate((k, v)):
        _write_side(p, t, place, side, words)


def _load(p: _Problem, vectors: list[Address]) -> Halves:
    return [ptx.load_words(vector, p.row_bytes // (2 * p.lanes)) for vector in vectors]


def _store(vectors: list[Address], words: Halves) -> None:
    for vector, part in zip(vectors, words, strict=True):
        ptx.store_words(vector, part)


def _turn(p: _Problem, o: _Operands, t: _Lane) -> list[list[F32]]:
    """Cosines and sines of the lane's dimensions."""
    size = 4 * VECTOR
    rows = (table.advance(t.token * p.lanes + t.vector, size) for table in o.turn)
    return [ptx.floats_of(ptx.load_words(row, size), "float32") for row in rows]


def _center(p: _Problem, o: _Operands, t: _Lane, head: I32) -> list[list[F32]] | None:
    """What is to be subtracted from the lane's two vectors of K."""
    if o.center is None:
        return None
    vectors = _vectors(p, t, o.center.advance(head, 4 * p.head_dim), 4 * p.head_dim)
    return [ptx.floats_of(ptx.load_words(v, 4 * VECTOR), "float32") for v in vectors]


def _rotated(
    p: _Problem, words: Halves, turn: list[list[F32]], center: list[list[F32]] | None = None
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


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a token goes: its (page, head) block, and which token there; whether anywhere."""

    exists: Predicate
    block: Address
    offset: I32


def _place(p: _Problem, o: _Operands, t: _Lane, head: I32) -> _Place:
    slot = ptx.load_global(o.slots.advance(t.token, 4))[0]
    page = slot // p.page_size
    exists = ~(slot < 0) & (page < p.num_pages)
    index = page
    if o.layer is not None:
        assert p.layers is not None
        layer = ptx.load_global(o.layer)[0]
        layer = ptx.select(layer < 0, layer + p.layers, layer)  # as an index of XLA
        exists &= ~(layer < 0) & (layer < p.layers)
        index += layer * p.num_pages
    block = o.pages.advance(index * p.kv_heads + head, p.page.block_bytes)
    return _Place(exists, block, slot % p.page_size)


def _write_side(p: _Problem, t: _Lane, place: _Place, side: int, words: Halves) -> None:
    """K (side 0) or V (1) of a head, as the cache keeps it."""
    values, scales = words, None
    if p.bits < 16:
        values, scales = _quantized(p, [ptx.floats_of(part, p.dtype) for part in words])
    elif p.cache_dtype != p.dtype:
        values = [ptx.words_of(ptx.floats_of(part, p.dtype), p.cache_dtype) for part in words]
    size = p.page.side_bytes
    with ptx.when(place.exists):
        row = place.block.advance(side, p.page.values_at).advance(place.offset, size)
        _store(_vectors(p, t, row, size), values)
    if scales is not None:
        with ptx.when(place.exists & t.vector.is_(0)):
            target = place.block.advance(1, p.page.scales_at + 4 * side).advance(place.offset, 8)
            ptx.store_global(target, [scales])


def _quantized(p: _Problem, halves: list[list[F32]]) -> tuple[Halves, I32]:
    """Words of the codes, and scale and centre in one word: `numerics.quantize_kv`."""
    half, top = 2 ** (p.bits - 1), 2**p.bits - 1
    low, high = _range(p, [x for part in halves for x in part])
    scale = _bounded((high - low) / ptx.constant_float(top), MIN_KV_SCALE, MAX_KV_VALUE)
    exact = _as_halves(scale, scale)[1][0]
    centre = low + exact * ptx.constant_float(half)
    word, (_, centre) = _as_halves(exact, _bounded(centre, -MAX_KV_VALUE, MAX_KV_VALUE))
    inverse = ptx.constant_float(1) / exact
    return [_codes(p, [(x - centre) * inverse for x in part]) for part in halves], word


def _range(p: _Problem, values: list[F32]) -> tuple[F32, F32]:
    """Minimum and maximum over the lanes of a head."""
    low = functools.reduce(ptx.float_minimum, values)
    high = functools.reduce(ptx.float_maximum, values)
    for lanes in (1, 2, 4, 8):
        if lanes < p.lanes:
            low = ptx.float_minimum(low, ptx.exchange(low, lanes))
            high = ptx.float_maximum(high, ptx.exchange(high, lanes))
    return low, high


def _bounded(x: F32, low: float, high: float) -> F32:
    least = ptx.float_maximum(x, ptx.constant_float(low))
    return ptx.float_minimum(least, ptx.constant_float(high))


def _as_halves(low: F32, high: F32) -> tuple[I32, tuple[F32, F32]]:
    """Two numbers rounded to float16: their word, and their values."""
    word = ptx.pack_halves(low, high, "float16")
    return word, ptx.unpack_halves(word, "float16")


def _codes(p: _Problem, steps: list[F32]) -> list[I32]:
    """Words of clip(round(step) + 2^(bits-1), 0, 2^bits - 1)."""
    half, top = 2 ** (p.bits - 1), 2**p.bits - 1
    shift = ptx.constant_float(ROUND_TO_INTEGER + half)
    bits = [ptx.float_bits(_bounded(x, -half, top - half) + shift) for x in steps]
    if p.bits == 8:
        return [ptx.low_bytes(*bits[:4]), ptx.low_bytes(*bits[4:])]
    return [ptx.low_bytes(*bits[::2]) | ptx.low_bytes(*bits[1::2]) << 4]
