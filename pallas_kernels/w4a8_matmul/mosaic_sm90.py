"""The W4A8 matmul on Hopper for many tokens: wgmma with weights in registers.

y [M, N] = x [M, K] @ w [K, N] with int8 x and 4-bit w, N a multiple of 64 and K of 128.

Why it looks as it does. The tensor core multiplies 64 output channels x 32 features, its A operand,
with up to 256 tokens, B. A may lie in registers, and so the weights go where they are expanded: a
thread reads 32 codes, makes eight words of int8 of them (layout.expand), and hands them over; they
never return to shared memory. B must lie in shared memory, K-major and swizzled, which is how the
copy engine (TMA) writes a tile of row-major x: nothing is rearranged before the kernel.

How the work is cut (sm90_config.py). A block computes tiles of 64 * row_warpgroups channels x
`tokens`. Blocks stay: block b takes tiles b, b + blocks, ..., tokens first, so that the blocks of a
wave share few weights' rows and x stays in L2. Where a matrix has few tiles, k_warpgroups split the
chunks of 128 features among themselves and add their int32 sums in shared memory, which is exact.
`cluster` blocks beside each other along N read the same x: each copies a part of it to all of them
(multicast). It pays from several rounds of tiles on.

How the data flows. The first warpgroup does all copies, one lane of each warp every fourth chunk,
through a ring of slots, each a chunk of x and of weights with two barriers: `full` counts the
bytes, `empty` the warps that have done with it, of all blocks of the cluster. The other warpgroups
wait for `full`, multiply, and arrive on `empty`. The ring goes on from tile to tile, so that copies
run ahead of the epilogue.

    producer    wait empty -> expect bytes -> copy x part to the cluster, weights to this block
    consumer    wait full -> weights to registers -> (expand, wgmma) x 4 -> wait -> arrive empty
    exchange    k_warpgroups > 1: sums of a part of the tokens to each warpgroup
    epilogue    scale in float32 in the reference's order, round once, transpose, store

The epilogue is kept short (scales fetched beforehand, no predicates for whole tiles): it is code
that a launch meets cold, and at 128 sums a thread each instruction more is there 32 times.

While the tensor core works for one warpgroup, the others read and expand their codes. (Expanding a
step ahead within a warpgroup, or starting its wgmma before the last are done, changed nothing.)

Bounds. x beyond M or K is zero, by the copy engine, and so adds nothing to the sums (K: where
k_warpgroups do not divide it). Channels beyond N repeat the last tile's; nothing of either is
stored. `layer` is clamped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import F32, I32
from qserve_jax.pallas_kernels.w4a8_matmul import layout, mosaic_mma
from qserve_jax.pallas_kernels.w4a8_matmul.problem import (
    INT32_SUMS,
    Problem,
    gather,
    go_to_layer,
)
from qserve_jax.pallas_kernels.w4a8_matmul.sm90_config import (
    PRODUCER_REGISTERS,
    SharedMemory,
    Sm90Config,
    check_config,
    choose_config,
    grid,
    shared_memory,
)
from qserve_jax.pallas_kernels.w4a8_matmul.tuning import tuned_config
from qserve_jax.quantization.qtensor import Array, Int8Activation, W4PerChannel, W4PerGroup

MMA_TOKENS = 32
"""Up to so many, mma.sync is faster: wgmma takes 64 channels at least, and so fewer blocks."""


@dataclasses.dataclass(frozen=True)
class _Problem(Problem):
    config: Sm90Config

    @property
    def steps(self) -> int:
        return -(-self.chunks // self.config.k_warpgroups)

    @property
    def token_tiles(self) -> int:
        return -(-self.m // self.config.tokens)

    @property
    def clusters(self) -> int:
        return grid(self.config, self.m, self.n)[0]

    @property
    def tiles(self) -> int:
        """Of all clusters, see sm90_config.grid."""
        return grid(self.config, self.m, self.n)[1]

    @functools.cached_property
    def memory(self) -> SharedMemory:
        return shared_memory(self.config, self.m, self.n, self.per_group)


def matmul(
    x: Int8Activation,
    w: W4PerGroup | W4PerChannel,
    *,
    bias: Array | None = None,
    residual: Array | None = None,
    layer: Array | int | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    config: Sm90Config | None = None,
) -> Array:
    """See `api.w4a8_matmul`. The same float32 operations in the same order as the reference.

    w must be in the layout "mma_w4" (`layout.to_kernel_layout`). out_dtype int32: see `INT32_SUMS`.
    config: None for `mosaic_mma` up to MMA_TOKENS, beyond that for the tuned one, or else the
      heuristic.

    Raises NotImplementedError on what `problem.gather` refuses; ValueError on a config that cannot
    run.
    """
    arguments: dict[str, Any] = {"bias": bias, "residual": residual, "layer": layer}
    if config is None and x.scale.size <= MMA_TOKENS:
        return mosaic_mma.matmul(x, w, **arguments, out_dtype=out_dtype)
    if residual is not None and not _adds(residual, out_dtype):
        y = matmul(x, w, **arguments | {"residual": None}, out_dtype=jnp.float32, config=config)
        return (y + residual.astype(jnp.float32)).astype(out_dtype)
    problem, operands = gather("mosaic_sm90", x, w, bias, residual, layer, out_dtype)
    m, n, k, per_group = problem.m, problem.n, problem.k, problem.per_group
    tuned = tuned_config("wgmma", m, n, k, per_group)
    chosen: Sm90Config = config or tuned or choose_config(m, n, k, per_group)
    check_config(chosen, m, n, per_group)
    p = _Problem(**vars(problem), config=chosen)
    y = ptx.launch(
        functools.partial(_body, p, tuple(operands)),
        tuple(operands.values()),
        jax.ShapeDtypeStruct((m, n), out_dtype),
        name=f"w4a8_matmul_{p.kind}_wgmma",
        blocks=p.clusters * chosen.cluster,
        cluster=chosen.cluster,
        warpgroups=1 + chosen.warpgroups,
        shared_bytes=p.memory.size + 1024,
        barriers=p.memory.barriers,
        with_context=True,
    )
    return y.reshape(*x.codes.shape[:-1], n)


def _adds(residual: Array, out_dtype: jax.typing.DTypeLike) -> bool:
    """Whether the epilogue does: it moves the residual as it does the output, in half words."""
    return residual.dtype == out_dtype and residual.dtype in (jnp.bfloat16, jnp.float16)


class _Block:
    """Where a thread stands, and the addresses it works with."""

    def __init__(self, p: _Problem, context: Any, refs: dict[str, Any], shared: Any, barriers: Any):
        self.index = ptx.thread_index()
        self.warp = ptx.warp_index()
        self.lane = self.index & 31
        self.rank = ptx.cluster_rank() if p.config.cluster > 1 else ptx.constant(0)
        self.first_tile = ptx.block_index() // p.config.cluster
        count = (p.tiles + p.clusters - 1 - self.first_tile) // p.clusters
        self.tiles = count
        self.gmem = {name: ptx.global_address(ref) for name, ref in refs.items()}
        go_to_layer(p, self.gmem)
        box = (p.config.tokens // p.config.cluster, layout.FEATURES)
        self.x_map = ptx.tensor_map(context, refs["x"], box)
        self.shared = (ptx.shared_address(shared) + 1023) & 0xFFFFFC00
        self._full = ptx.shared_address(barriers)
        self._empty = self._full + 8 * p.config.slots

    def full(self, slot: I32) -> I32:
        return self._full + slot * 8

    def empty(self, slot: I32) -> I32:
        return self._empty + slot * 8

    def tile(self, p: _Problem, i: I32) -> tuple[I32, I32]:
        """First token and first channel of this block's i-th tile; channels may begin beyond N."""
        tile = self.first_tile + i * p.clusters
        group = (tile // p.token_tiles) * p.config.cluster + self.rank
        return (tile % p.token_tiles) * p.config.tokens, group * p.config.rows


def _body(p: _Problem, names: tuple[str, ...], context: Any, *refs: Any) -> None:
    """The kernel. refs: the operands called `names`, the output, shared memory, barriers."""
    *operands, out, shared, barriers = refs
    t = _Block(p, context, dict(zip(names, operands, strict=True)) | {"out": out}, shared, barriers)
    with ptx.when(t.index.is_(0)):
        for slot in map(ptx.constant, range(p.config.slots)):
            ptx.init_barrier(t.full(slot), arrivals=1)
            warps = 4 * p.config.row_warpgroups * p.config.cluster
            ptx.init_barrier(t.empty(slot), arrivals=warps)
        ptx.publish_barriers()
    if p.config.cluster > 1:
        ptx.sync_cluster()
    else:
        ptx.sync_block(128 * (1 + p.config.warpgroups))
    ptx.branch(t.warp < 4, lambda: _produce(p, t), lambda: _consume(p, t))
    if p.config.cluster > 1:  # no block may end while another writes to its shared memory
        ptx.sync_cluster()


def _next(slot: I32, parity: I32, stages: int) -> tuple[I32, I32]:
    """The next stage of a ring; the parity turns with every round."""
    wraps = (slot + 1).is_(stages)
    return ptx.select(wraps, 0, slot + 1), ptx.select(wraps, parity ^ 1, parity)


# Producer


def _produce(p: _Problem, t: _Block) -> None:
    """The chunks of all tiles one after another, dealt to the four warps: one warp, which starts
    one copy after another, could not keep up."""
    ptx.set_max_registers(PRODUCER_REGISTERS, increase=False)
    chunks = p.steps * p.config.k_warpgroups  # some beyond K, for an even number each
    group_bytes = layout.BLOCKS * p.tile_bytes

    def copy(i: I32, _: list[I32]) -> list[I32]:
        index = i * 4 + t.warp
        slot = index % p.config.slots
        chunk = index % chunks
        token, channel = t.tile(p, index // chunks)
        # The first round, parity 0, finds all slots empty.
        ptx.wait(t.empty(slot), (index // p.config.slots + 1) & 1)
        ptx.expect_bytes(t.full(slot), p.memory.x_bytes + p.memory.weight_bytes)
        _copy_x(p, t, slot, token, chunk)
        target = t.shared + p.memory.weights + slot * p.memory.weight_bytes
        for r in range(p.config.row_warpgroups):
            group = ptx.minimum(channel // 64 + r, p.n // 64 - 1)
            source = t.gmem["w"].advance(group, p.chunks * group_bytes)
            source = source.advance(ptx.minimum(chunk, p.chunks - 1), group_bytes)
            ptx.copy_to_shared(target + r * group_bytes, source, group_bytes, t.full(slot))
        return []

    with ptx.when(t.lane.is_(0)):
        ptx.loop((t.tiles * chunks + 3 - t.warp) // 4, [], copy)


def _copy_x(p: _Problem, t: _Block, slot: I32, token: I32, chunk: I32) -> None:
    """Start the copy of this block's part of x to all of the cluster."""
    part = p.config.tokens // p.config.cluster
    target = t.shared + slot * p.memory.x_bytes + t.rank * (part * layout.FEATURES)
    ptx.copy_tile_to_shared(
        target,
        t.x_map,
        token + t.rank * part,
        chunk * layout.FEATURES,
        t.full(slot),
        blocks=p.config.cluster,
    )


# Consumers


class _Consumer:
    """A thread's place among those that multiply."""

    def __init__(self, p: _Problem, t: _Block):
        group = (t.warp >> 2) - 1
        self.row_group = group % p.config.row_warpgroups
        self.k_group = group // p.config.row_warpgroups
        self.thread = t.index & 127
        self.warp = t.warp & 3
        self.g, self.c = t.lane >> 2, t.lane & 3
        # Of the block's 16-row tiles, the one of this warp.
        self.row_tile = self.row_group * 4 + self.warp


def _consume(p: _Problem, t: _Block) -> None:
    ptx.set_max_registers(p.config.registers, increase=True)
    me = _Consumer(p, t)

    def tile(i: I32, ring: list[I32]) -> list[I32]:
        epilogue = _Epilogue(p, t, me, i, *t.tile(p, i))
        acc, ring = _multiply(p, t, me, ring)
        first, acc = _exchange(p, t, me, acc)
        epilogue.store(p, t, me, first, acc)
        return ring

    ptx.loop(t.tiles, [ptx.constant(0)] * 2, tile)


def _multiply(p: _Problem, t: _Block, me: _Consumer, ring: list[I32]) -> tuple[list, list]:
    """One tile's steps -> this warpgroup's int32 sums [64, tokens] and the ring's next stage."""
    count = p.config.tokens // 2

    def step(_: I32, carry: list[I32]) -> list[I32]:
        acc, (stage, parity) = carry[:count], carry[count:]
        slot = stage * p.config.k_warpgroups + me.k_group
        ptx.wait(t.full(slot), parity)
        codes, scales = _load_weights(p, t, me, slot)
        descriptor = ptx.wgmma_descriptor(t.shared + slot * p.memory.x_bytes)
        fragments = []
        for s in range(4):
            pair = [layout.expand(word, scales) for word in codes[2 * s : 2 * s + 2]]
            fragments += ptx.wgmma_fence([*pair[0], *pair[1]])
            acc = ptx.wgmma_s8(acc, fragments[-4:], descriptor + 2 * s)
        ptx.wgmma_commit()
        acc = ptx.wgmma_wait(acc, fragments)
        _release(p, t, slot)
        return [*acc, *_next(stage, parity, p.config.stages)]

    zeros = [ptx.constant(0)] * count
    carry = ptx.loop(ptx.constant(p.steps), [*zeros, *ring], step)
    return carry[:count], carry[count:]


def _load_weights(p: _Problem, t: _Block, me: _Consumer, slot: I32) -> tuple[list[I32], Any]:
    """This warp's 16-row tile of a slot: eight words of codes a lane, and split scales."""
    base = t.shared + p.memory.weights + slot * p.memory.weight_bytes
    base = base + me.row_tile * p.tile_bytes
    codes = [
        word for h in range(2) for word in ptx.load_shared(base + t.lane * 16, 512 * h, count=4)
    ]
    if not p.per_group:
        return codes, None
    return codes, layout.split_scales(ptx.load_shared(base + me.g * 4, 4 * layout.CODE_WORDS)[0])


def _release(p: _Problem, t: _Block, slot: I32) -> None:
    """This warp has done with a slot: the wgmma that read it have been waited for."""
    with ptx.when(t.lane < p.config.cluster):
        if p.config.cluster == 1:
            ptx.arrive(t.empty(slot))
        else:
            ptx.arrive_in_block(t.empty(slot), t.lane)


def _exchange(p: _Problem, t: _Block, me: _Consumer, acc: list[I32]) -> tuple[I32 | int, list[I32]]:
    """Add the k_warpgroups: each gets the sums of a part of the tokens -> its first token, sums.

    A thread holds the same channels and tokens in each of them, so that words go from thread to
    thread. partials: [row group][to][from, but itself][word / 4][thread], 16 bytes each.
    """
    parts = p.config.k_warpgroups
    if parts == 1:
        return 0, acc
    size = len(acc) // parts
    vectors = size // 4
    base = t.shared + p.memory.partials + me.row_group * (parts * (parts - 1) * vectors * 2048)
    base = base + me.thread * 16
    barrier = me.row_group + 2
    if p.memory.partials == 0:  # where others may still read their slots
        ptx.sync_block(128 * p.config.warpgroups)
    for to in range(parts):
        with ptx.when(~me.k_group.is_(to)):
            # Senders are numbered without the receiver.
            sender = me.k_group - ptx.select(ptx.constant(to) < me.k_group, 1, 0)
            target = base + (sender + to * (parts - 1)) * (vectors * 2048)
            for v in range(vectors):
                words = acc[to * size + 4 * v : to * size + 4 * v + 4]
                ptx.store_shared_words(target, words, 2048 * v)
    ptx.sync_block(128 * parts, barrier)
    mine = [
        functools.reduce(
            lambda kept, part: ptx.select(me.k_group.is_(part), acc[part * size + i], kept),
            range(1, parts),
            acc[i],
        )
        for i in range(size)
    ]
    for sender in range(parts - 1):
        source = base + (me.k_group * (parts - 1) + sender) * (vectors * 2048)
        for v in range(vectors):
            for i, word in enumerate(ptx.load_shared(source, 2048 * v, count=4)):
                mine[4 * v + i] = mine[4 * v + i] + word
    ptx.sync_block(128 * parts, barrier)  # before the next tile's sums
    return me.k_group * (p.config.tokens // parts), mine


# Epilogue


class _Epilogue:
    """What a tile's sums are scaled with, fetched before the sums are there.

    Per channel in registers; per token in shared memory, a copy for each warpgroup and for each of
    two tiles in turn, so that only the warpgroup waits, once.
    """

    def __init__(self, p: _Problem, t: _Block, me: _Consumer, i: I32, token: I32, channel: I32):
        self.row_tile = channel + me.row_tile * layout.ROWS
        self.token = token
        self.rows = [self.row_tile + layout.channel_of_row(me.g + r) for r in (0, 8)]
        inside = [ptx.minimum(row, p.n - 1) for row in self.rows]
        self.per_row = {
            name: [ptx.load_global(t.gmem[name].advance(row, 4), kind=F32)[0] for row in inside]
            for name in ("channel_scale", "scaled_zero", "bias")
            if name in t.gmem
        }
        group = (t.warp >> 2) - 1
        self.columns = t.shared + p.memory.columns
        self.columns = self.columns + (group * 2 + (i & 1)) * p.memory.column_bytes
        names = ("x_scale",) if p.per_group else ("x_scale", "code_sum")
        for position, name in enumerate(names):
            for first in range(0, p.config.tokens, 128):
                self._fetch(p, t, me, name, first, position * 4 * p.config.tokens)

    def _fetch(self, p: _Problem, t: _Block, me: _Consumer, name: str, first: int, at: int) -> None:
        """A word of a token for each thread; beyond M the last one is repeated."""
        with ptx.when(me.thread + first < p.config.tokens):
            token = ptx.minimum(self.token + me.thread + first, p.m - 1)
            target = self.columns + (me.thread + first) * 4
            ptx.copy_4_bytes(target + at, t.gmem[name].advance(token, 4))

    def scale(self, r: int, x_scale: F32, code_sum: F32 | None, total: I32) -> F32:
        """Row r of two: the epilogue of reference.py, operation by operation."""
        y = ptx.to_float(total) * self.per_row["channel_scale"][r]
        if code_sum is not None:
            y = y - code_sum * self.per_row["scaled_zero"][r]
        y = y * x_scale
        return y + self.per_row["bias"][r] if "bias" in self.per_row else y

    def store(self, p: _Problem, t: _Block, me: _Consumer, first: I32 | int, acc: list) -> None:
        """Scale and store the sums of this warp's 16 channels, tokens from `first` of the tile."""
        ptx.wait_all_copies()
        ptx.sync_block(128, (t.warp >> 2) + 5)
        columns = self.columns + (me.c * 2 + first) * 4
        with ptx.when(self.row_tile < p.n):
            for j in range(len(acc) // 4):
                values = acc[4 * j : 4 * j + 4]
                token = self.token + first + 8 * j
                if p.out_dtype != INT32_SUMS:
                    values = self._scaled(p, columns, j, values)
                if p.residual:
                    channel = self.row_tile + me.c * 4
                    added = _load_halves(p, t, channel, ptx.minimum(token + me.g, p.m - 1))
                    values = [v + r for v, r in zip(values, added, strict=True)]
                if p.out_dtype in (INT32_SUMS, "float32"):
                    _store_words(p, t, self.rows, token + me.c * 2, values)
                else:
                    _store_halves(p, t, self.row_tile + me.c * 4, token + me.g, values)

    def _scaled(self, p: _Problem, columns: I32, j: int, sums: list[I32]) -> list[F32]:
        x_scales = ptx.load_shared(columns, 32 * j, count=2, kind=F32)
        code_sums: list[Any] = [None, None]
        if not p.per_group:
            at = 32 * j + 4 * p.config.tokens
            code_sums = [ptx.to_float(v) for v in ptx.load_shared(columns, at, count=2)]
        return [self.scale(i // 2, x_scales[i % 2], code_sums[i % 2], sums[i]) for i in range(4)]


def _store_words(p: _Problem, t: _Block, rows: list[I32], token: I32, values: list) -> None:
    """Four 4-byte values: rows[0] at the token and the next, then rows[1]."""
    for i, value in enumerate(values):
        with ptx.when(token + i % 2 < p.m):
            target = t.gmem["out"].advance(token + i % 2, 4 * p.n).advance(rows[i // 2], 4)
            ptx.store_global(target, [value if isinstance(value, I32) else ptx.float_bits(value)])


def _load_halves(p: _Problem, t: _Block, channel: I32, token: I32) -> list[F32]:
    """The residual, on the way that `_store_halves` goes, backwards."""
    source = t.gmem["residual"].advance(token, 2 * p.n).advance(channel, 2)
    words = [ptx.transpose_halves(word) for word in ptx.load_global(source, count=2)]
    return [half for word in words for half in ptx.unpack_halves(word, p.residual)]


def _store_halves(p: _Problem, t: _Block, channel: I32, token: I32, values: list[F32]) -> None:
    """8 tokens x 16 channels of a warp, transposed: four channels from `channel` on of `token`."""
    pairs = [ptx.pack_halves(values[i], values[i + 1], p.out_dtype) for i in (0, 2)]
    words = [ptx.transpose_halves(pair) for pair in pairs]
    whole = p.m % p.config.tokens == 0
    with contextlib.nullcontext() if whole else ptx.when(token < p.m):
        ptx.store_global(t.gmem["out"].advance(token, 2 * p.n).advance(channel, 2), words)
