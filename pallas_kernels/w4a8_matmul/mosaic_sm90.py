"""The W4A8 matmul on Hopper for many tokens: wgmma with weights in registers.

y [M, N] = x [M, K] @ w [K, N] with int8 x and 4-bit w, N a multiple of 64 and K of 128.

Why it looks as it does. The tensor core multiplies 64 output channels x 32 features, its A operand,
with up to 256 tokens, B. A may lie in registers, and so the weights go where they are expanded: a
thread reads 32 codes, makes eight words of int8 of them (layout.expand), and hands them over; they
never return to shared memory. B must lie in shared memory, K-major and swizzled, which is how the
copy engine (TMA) writes a tile of row-major x: nothing is rearranged before the kernel.

How the work is cut (sm90_tiles.py). A block computes tiles of 64 * row_warpgroups channels x
`tokens`. Blocks stay: block b takes tiles b, b + blocks, ..., tokens first, so that the blocks of a
wave share few weights' rows and x stays in L2; the last round may be cut finer. Where a matrix has
few tiles, k_warpgroups split the chunks of 128 features among themselves and add their int32 sums
in shared memory, which is exact. So do `k_blocks` of a cluster where K is long: two of them with 64
tokens and half of K each expand a weight once, where two with 32 and all of K would both do so.
`cluster` blocks beside each other along N read the same x: each copies a part of it to all of them
(multicast). It pays from several rounds of tiles on.

How the data flows. The first warpgroup does all copies, one lane of each warp every fourth chunk,
through a ring of slots, each a chunk of x and of weights with two barriers: `full` counts the
bytes, `empty` the warps that have done with it, of all blocks of the cluster. The other warpgroups
wait for `full`, multiply, and arrive on `empty`. The ring goes on from tile to tile, so that copies
run ahead of the epilogue.

    producer    wait empty -> expect bytes -> copy x part to the cluster, weights to this block
    consumer    wait full -> weights to registers -> (expand, wgmma) x 4 -> wait -> arrive empty
    exchange    k_warpgroups > 1: sums of a part of the tokens to each    (sm90_exchange.py)
                k_blocks > 1: the same, to each block of the cluster
    epilogue    scale as the reference does, round once, transpose, store (sm90_epilogue.py)

While the tensor core works for one warpgroup, the others read and expand their codes. (Expanding a
step ahead within a warpgroup, or starting its wgmma before the last are done, changed nothing.)
With a `lead` the first is some chunks ahead of the others from the start, so that they do not come
to their epilogues, which use no tensor core, together. The ring bounds it; it renews itself with
every tile.

Bounds. x beyond M or K is zero, by the copy engine, and so adds nothing to the sums (K: where
k_warpgroups do not divide it). Channels beyond N repeat the last tile's; nothing of either is
stored. `layer` is clamped.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import I32
from qserve_jax.pallas_kernels.w4a8_matmul import layout, mosaic_mma
from qserve_jax.pallas_kernels.w4a8_matmul.problem import (
    gather,
)
from qserve_jax.pallas_kernels.w4a8_matmul.sm90_config import (
    check_config,
)
from qserve_jax.pallas_kernels.w4a8_matmul.sm90_epilogue import Epilogue
from qserve_jax.pallas_kernels.w4a8_matmul.sm90_exchange import exchange, exchange_blocks
from qserve_jax.pallas_kernels.w4a8_matmul.sm90_thread import Block, Consumer, WgmmaProblem
from qserve_jax.pallas_kernels.w4a8_matmul.sm90_tiles import (
    PRODUCER_REGISTERS,
    QUARTERS,
    Part,
    Sm90Config,
)
from qserve_jax.pallas_kernels.w4a8_matmul.tuning import chosen_config, chosen_design
from qserve_jax.quantization.qtensor import Array, Int8Activation, W4PerChannel, W4PerGroup

LEAD_BARRIER = 15
"""The named barrier at which the others wait until the first row warpgroup has its lead."""


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
    config: None for `mosaic_mma` where `chosen_design` says so, or else for the tuned one, or else
      the heuristic.

    Raises NotImplementedError on what `problem.gather` refuses; ValueError on a config that cannot
    run.
    """
    arguments: dict[str, Any] = {"bias": bias, "residual": residual, "layer": layer}
    sizes = x.scale.size, *layout.weight_shape(w), isinstance(w, W4PerGroup)
    if config is None and chosen_design(*sizes) == "mma":
        return mosaic_mma.matmul(x, w, **arguments, out_dtype=out_dtype, named="mosaic_sm90")
    if residual is not None and not _adds(residual, out_dtype):
        y = matmul(x, w, **arguments | {"residual": None}, out_dtype=jnp.float32, config=config)
        return (y + residual.astype(jnp.float32)).astype(out_dtype)
    problem, operands = gather("mosaic_sm90", x, w, bias, residual, layer, out_dtype)
    m, n, k, per_group = problem.m, problem.n, problem.k, problem.per_group
    chosen: Sm90Config = config or chosen_config("wgmma", m, n, k, per_group)
    check_config(chosen, m, n, per_group)
    p = WgmmaProblem(**vars(problem), config=chosen)
    y = ptx.launch(
        functools.partial(_body, p, tuple(operands)),
        tuple(operands.values()),
        jax.ShapeDtypeStruct((m, n), out_dtype),
        name=f"w4a8_matmul_{p.kind}_wgmma",
        blocks=p.cut.clusters * chosen.cluster_blocks,
        cluster=chosen.cluster_blocks,
        warpgroups=1 + chosen.warpgroups,
        shared_bytes=p.memory.size + 1024,
        barriers=p.memory.barriers,
        with_context=True,
    )
    return y.reshape(*x.codes.shape[:-1], n)


def _adds(residual: Array, out_dtype: jax.typing.DTypeLike) -> bool:
    """Whether the epilogue does: it moves the residual as it does the output, in half words."""
    return residual.dtype == out_dtype and residual.dtype in (jnp.bfloat16, jnp.float16)


def _body(p: WgmmaProblem, names: tuple[str, ...], context: Any, *refs: Any) -> None:
    """The kernel. refs: the operands called `names`, the output, shared memory, barriers."""
    *operands, out, shared, barriers = refs
    t = Block(p, context, dict(zip(names, operands, strict=True)) | {"out": out}, shared, barriers)
    with ptx.when(t.index.is_(0)):
        for slot in map(ptx.constant, range(p.config.slots)):
            ptx.init_barrier(t.full(slot), arrivals=1)
            warps = 4 * p.config.row_warpgroups * p.config.cluster
            ptx.init_barrier(t.empty(slot), arrivals=warps)
        if p.config.k_blocks > 1:
            for warpgroup in map(ptx.constant, range(p.config.warpgroups)):
                ptx.init_barrier(t.arrived(p, warpgroup), arrivals=1)
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


def _produce(p: WgmmaProblem, t: Block) -> None:
    """The chunks of all tiles one after another, dealt to the four warps: one warp, which starts
    one copy after another, could not keep up."""
    ptx.set_max_registers(PRODUCER_REGISTERS, increase=False)
    chunks = p.steps * p.config.k_warpgroups  # some beyond K, for an even number each
    group_bytes = layout.BLOCKS * p.tile_bytes

    def copy(i: I32, _: list[I32]) -> list[I32]:
        index = i * 4 + t.warp
        slot = index % p.config.slots
        chunk, tile = index % chunks, index // chunks
        if p.config.k_blocks > 1:
            chunk = chunk + ptx.cluster_rank() * chunks
        # The first round, parity 0, finds all slots empty.
        ptx.wait(t.empty(slot), (index // p.config.slots + 1) & 1)
        parts = [t.part(p, tile, r) for r in range(p.config.row_warpgroups)]
        boxes = _boxes(p, parts[0])
        box_bytes = p.memory.x_bytes // p.config.boxes
        ptx.expect_bytes(t.full(slot), boxes * box_bytes + p.memory.weight_bytes)
        _copy_x(p, t, slot, parts[0].token, boxes, chunk)
        target = t.shared + p.memory.weights + slot * p.memory.weight_bytes
        for r, part in enumerate(parts):
            group = ptx.minimum(part.group, p.n // 64 - 1)
            source = t.gmem["w"].advance(group, p.chunks * group_bytes)
            source = source.advance(ptx.minimum(chunk, p.chunks - 1), group_bytes)
            ptx.copy_to_shared(target + r * group_bytes, source, group_bytes, t.full(slot))
        return []

    with ptx.when(t.lane.is_(0)):
        ptx.loop((t.tiles * chunks + 3 - t.warp) // 4, [], copy)
    if p.config.k_blocks > 1:  # all threads of the blocks, see exchange_blocks
        ptx.meet_cluster()


def _boxes(p: WgmmaProblem, part: Part) -> I32 | int:
    """How many boxes of x the tile of this part needs."""
    return part.quarters * p.config.boxes // QUARTERS if p.cut.less_x else p.config.boxes


def _copy_x(p: WgmmaProblem, t: Block, slot: I32, token: I32, boxes: I32 | int, chunk: I32) -> None:
    """Start the copies of this block's boxes of x, the first `boxes` of a tile, to all of the
    cluster."""
    size = p.config.tokens // p.config.boxes
    for i in range(0, p.config.boxes, p.config.cluster):
        box = t.rank + i
        with ptx.when(box < boxes) if p.cut.less_x else contextlib.nullcontext():
            ptx.copy_tile_to_shared(
                t.shared + slot * p.memory.x_bytes + box * (size * layout.FEATURES),
                t.x_map,
                token + box * size,
                chunk * layout.FEATURES,
                t.full(slot),
                blocks=p.config.cluster,
            )


# Consumers


def _consume(p: WgmmaProblem, t: Block) -> None:
    ptx.set_max_registers(p.config.registers, increase=True)
    me = Consumer(p, t)

    if _lead(p):
        with ptx.when(~me.row_group.is_(0)):
            ptx.sync_block(128 * p.config.warpgroups, LEAD_BARRIER)

    def tile(i: I32, ring: list[I32]) -> list[I32]:
        part = t.part(p, i, me.row_group)
        epilogue = Epilogue(p, t, me, i, part)
        acc, ring = _multiply(p, t, me, i, part, ring)
        if p.config.k_blocks > 1:
            ptx.arrive_at_cluster()
        first, acc = exchange(p, t, me, acc)
        if p.config.k_blocks > 1:
            first, acc = exchange_blocks(p, t, me, first, acc)
        epilogue.store(p, t, me, first, acc)
        return ring

    ptx.loop(t.tiles, [ptx.constant(0)] * 2, tile)


def _lead(p: WgmmaProblem) -> int:
    """config.lead, where a tile has so many chunks."""
    return p.config.lead if p.config.lead < p.chunks else 0


def _multiply(
    p: WgmmaProblem, t: Block, me: Consumer, tile: I32, part: Part, ring: list[I32]
) -> tuple[list, list]:
    """One tile's steps -> this warpgroup's int32 sums [64, tokens] and the ring's next stage.

    For every number of tokens that a part may have there is a loop, of which all but one are empty.
    """
    acc = [ptx.constant(0)] * (p.config.tokens // 2)
    for quarters in p.cut.sizes:
        steps = ptx.constant(p.steps)
        if len(p.cut.sizes) > 1:
            steps = ptx.select(part.quarters.is_(quarters), p.steps, 0)
        count = p.config.tokens // 2 * quarters // QUARTERS
        step = functools.partial(_step, p, t, me, tile, part)
        *found, stage, parity = ptx.loop(steps, [*acc[:count], *ring], step)
        acc, ring = [*found, *acc[count:]], [stage, parity]
    return acc, ring


def _step(
    p: WgmmaProblem, t: Block, me: Consumer, tile: I32, part: Part, i: I32, carry: list[I32]
) -> list[I32]:
    """Multiply a chunk: carry is the sums and the ring's stage."""
    *acc, stage, parity = carry
    if lead := _lead(p):
        with ptx.when(tile.is_(0) & i.is_(lead) & me.row_group.is_(0)):
            ptx.arrive_at_block(128 * p.config.warpgroups, LEAD_BARRIER)
    slot = stage * p.config.k_warpgroups + me.k_group
    ptx.wait(t.full(slot), parity)
    codes, scales = _load_weights(p, t, me, slot)
    x = t.shared + slot * p.memory.x_bytes + part.offset * layout.FEATURES
    descriptor = ptx.wgmma_descriptor(x)
    fragments = []
    for s in range(4):
        pair = [layout.expand(word, scales) for word in codes[2 * s : 2 * s + 2]]
        fragments += ptx.wgmma_fence([*pair[0], *pair[1]])
        acc = ptx.wgmma_s8(acc, fragments[-4:], descriptor + 2 * s)
    ptx.wgmma_commit()
    acc = ptx.wgmma_wait(acc, fragments)
    _release(p, t, slot)
    return [*acc, *_next(stage, parity, p.config.stages)]


def _load_weights(p: WgmmaProblem, t: Block, me: Consumer, slot: I32) -> tuple[list[I32], Any]:
    """This warp's 16-row tile of a slot: eight words of codes a lane, and split scales."""
    base = t.shared + p.memory.weights + slot * p.memory.weight_bytes
    base = base + me.row_tile * p.tile_bytes
    codes = [
        word for h in range(2) for word in ptx.load_shared(base + t.lane * 16, 512 * h, count=4)
    ]
    if not p.per_group:
        return codes, None
    return codes, layout.split_scales(ptx.load_shared(base + me.g * 4, 4 * layout.CODE_WORDS)[0])


def _release(p: WgmmaProblem, t: Block, slot: I32) -> None:
    """This warp has done with a slot: the wgmma that read it have been waited for."""
    with ptx.when(t.lane < p.config.cluster):
        if p.config.cluster == 1:
            ptx.arrive(t.empty(slot))
        else:
            ptx.arrive_in_block(t.empty(slot), t.lane)
