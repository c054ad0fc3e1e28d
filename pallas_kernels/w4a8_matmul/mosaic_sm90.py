"""The small-M W4A8 matmul on Hopper: up to 64 tokens, bound by the bandwidth of the weights.

y [M, N] = x [M, K] @ w [K, N] with int8 x and 4-bit w, N a multiple of 64 and K of 128.

What limits it. With few tokens each weight is used a few times, so the kernel can at best take the
time in which the codes stream from memory. To get near that, many bytes must always be under way,
nothing may make a stream wait, and the work between two copies must be short.

How the work is cut (config.py). The weights lie in tiles of 16 channels x 128 features, packed in
the order in which a warp reads them (layout.py), 1024 bytes of codes and 32 of scales. About one
block runs per SM. A block owns `rows` output channels and all of K; its warps are a grid:
`row_warps` of them lie beside each other along N, and `k_warps` share the same rows and take the
chunks of 128 features in turn. The int32 sums of the latter are added in shared memory at the end;
that is exact, so the cut changes no result.

How the data flows. Every warp has its own ring of `weight_stages` slots in shared memory. Lane 0
starts one bulk copy per tile; the copy engine writes the slot and counts the bytes on the slot's
mbarrier; the warp waits for that, takes the slot into registers and at once starts the copy that
refills it. No warp waits for another one's weights. The activations are shared by the block, in a
ring of `x_stages` steps, each `k_warps` chunks: mostly all of x, copied once; otherwise thread 0
refills a slot when all warps have arrived on its `x_empty` barrier.

How a tile is multiplied. The tensor core's mma.m16n8k32 takes the weights as its A operand, 16
channels, and 8 tokens as B. One AND, or a shift and an AND, takes four codes out of a word; one
multiplication and one addition make them int8 weights, `layout.expand` (register-level parallelism,
QServe section 5.2.3). Per channel the codes themselves go in, and zeros are taken off at the end.

    prologue   barriers, first copies of weights and x, scales to registers
    main loop  wait -> weights to registers -> refill -> expand -> mma for each 8 tokens
    exchange   sums to shared memory, where the rings were
    epilogue   add the k_warps, scale in float32 in the reference's order, round once, store

The slot-release race. The compiler does not wait for outstanding reads of shared memory before a
barrier arrival or a refilling copy, which go through another proxy; without the fence by every lane
before the release (`fence_shared_reads`), the refill can overtake the reads, and a few outputs per
launch are wrong.

Bounds. Blocks that reach beyond N multiply the last tile again and store nothing of it; tokens
beyond M repeat the last one. `layer` is clamped. So nothing is read outside the arrays.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import F32, I32
from qserve_jax.pallas_kernels.w4a8_matmul import layout
from qserve_jax.pallas_kernels.w4a8_matmul.config import (
    MAX_TOKENS,
    SharedMemory,
    SmallMConfig,
    check_config,
    choose_config,
    shared_memory,
)
from qserve_jax.quantization.qtensor import Array, Int8Activation, W4PerChannel, W4PerGroup

OUT_DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Sizes and choices that are known when the kernel is built."""

    m: int
    n: int
    k: int
    layers: int | None
    per_group: bool
    bias: bool
    out_dtype: str
    config: SmallMConfig

    @property
    def chunks(self) -> int:
        return self.k // layout.FEATURES

    @property
    def steps(self) -> int:
        return -(-self.chunks // self.config.k_warps)

    @property
    def x_resident(self) -> bool:
        """All of x fits: it is one copy on one barrier, awaited once."""
        return self.config.x_stages == self.steps

    @property
    def token_tiles(self) -> int:
        return -(-self.m // 8)

    @property
    def acc_sets(self) -> int:
        """Independent sums, so that an mma need not wait for the one before it."""
        return 2 if self.token_tiles * self.config.row_tiles <= 2 else 1

    @property
    def acc_registers(self) -> int:
        return self.acc_sets * self.config.row_tiles * self.token_tiles * 4

    def acc_slice(self, set_: int, tile: int, tokens: int) -> slice:
        first = ((set_ * self.config.row_tiles + tile) * self.token_tiles + tokens) * 4
        return slice(first, first + 4)

    @functools.cached_property
    def memory(self) -> SharedMemory:
        return shared_memory(self.config, self.m, self.per_group)


def matmul(
    x: Int8Activation,
    w: W4PerGroup | W4PerChannel,
    *,
    bias: Array | None,
    residual: Array | None,
    layer: Array | int | None,
    out_dtype: jax.typing.DTypeLike,
    config: SmallMConfig | None = None,
) -> Array:
    """See `api.w4a8_matmul`. The same float32 operations in the same order as the reference.

    w must be in the layout "mma_sm90" (`layout.to_kernel_layout`). config: None for the heuristic.

    Raises NotImplementedError on another layout, no or more than 64 tokens, and other output types
    than bf16, f16 and f32; ValueError on a config that cannot run.
    """
    if residual is not None:  # added in float32 before the one rounding
        y = matmul(
            x, w, bias=bias, residual=None, layer=layer, out_dtype=jnp.float32, config=config
        )
        return (y + residual.astype(jnp.float32)).astype(out_dtype)
    name = jnp.dtype(out_dtype).name
    if name not in OUT_DTYPES:
        raise NotImplementedError(f"mosaic_sm90: out_dtype {name} is none of {OUT_DTYPES}")
    return _call(x, w, bias, layer, name, config)


def int32_sums(
    x: Int8Activation,
    w: W4PerGroup | W4PerChannel,
    *,
    layer: Array | int | None = None,
    config: SmallMConfig | None = None,
) -> Array:
    """The sums before the epilogue, i32[..., N], for tests: per channel those of the codes."""
    return _call(x, w, None, layer, "int32", config)


def _call(
    x: Int8Activation,
    w: W4PerGroup | W4PerChannel,
    bias: Array | None,
    layer: Array | int | None,
    out_dtype: str,
    config: SmallMConfig | None,
) -> Array:
    *lead, k = x.codes.shape
    codes = x.codes.reshape(-1, k)
    m, n = codes.shape[0], layout.weight_shape(w)[0]
    if w.layout != layout.LAYOUT:
        raise NotImplementedError(
            f"mosaic_sm90: layout {w.layout!r} is not {layout.LAYOUT!r}: use prepare_for_backend"
        )
    if not 1 <= m <= MAX_TOKENS:
        raise NotImplementedError(f"mosaic_sm90: {m} tokens, but 1..{MAX_TOKENS} are supported")
    per_group = isinstance(w, W4PerGroup)
    config = config or choose_config(m, n, k, per_group)
    check_config(config, m, k, per_group)
    layers = None if layer is None else w.codes.shape[0]
    problem = _Problem(m, n, k, layers, per_group, bias is not None, out_dtype, config)
    operands = {
        "x": layout.pack_activation(codes),
        "w": w.codes,
        "channel_scale": w.channel_scale,
        "x_scale": x.scale.reshape(m),
    }
    if isinstance(w, W4PerChannel):
        operands |= {"scaled_zero": w.scaled_zero, "code_sum": x.code_sum.reshape(m)}
    if bias is not None:
        operands["bias"] = bias.astype(jnp.float32)
    if layer is not None:
        operands["layer"] = jnp.asarray(layer, jnp.int32).reshape(1)
    y = ptx.launch(
        functools.partial(_body, problem, tuple(operands)),
        tuple(operands.values()),
        jax.ShapeDtypeStruct((m, n), out_dtype),
        name=f"w4a8_matmul_{'g128' if per_group else 'channel'}_sm90",
        blocks=-(-n // config.rows),
        warpgroups=config.warpgroups,
        shared_bytes=problem.memory.size,
        barriers=problem.memory.barriers,
    )
    return y.reshape(*lead, n)


class _Thread:
    """Where a thread stands in the block, and the addresses it works with."""

    def __init__(self, p: _Problem, refs: dict[str, Any], shared: Any, barriers: Any):
        config, memory = p.config, p.memory
        self.index = ptx.thread_index()
        self.warp = ptx.warp_index()
        self.lane = self.index & 31
        self.g, self.c = self.lane >> 2, self.lane & 3
        self.row_warp, self.k_warp = self.warp % config.row_warps, self.warp // config.row_warps
        self.first_row = ptx.block_index() * config.rows
        self.is_lane0, self.is_thread0 = self.lane.is_(0), self.index.is_(0)
        # Chunks k_warp, k_warp + k_warps, ...; warps that only fill up the block get none.
        own = (p.chunks + config.k_warps - 1 - self.k_warp) // config.k_warps
        self.steps = ptx.select(self.warp < config.warps, own, 0)

        self.gmem = {name: ptx.global_address(ref) for name, ref in refs.items()}
        if p.layers is not None:
            self._go_to_layer(p)
        self.shared = ptx.shared_address(shared)
        self.ring = self.shared + self.warp * (
            config.weight_stages * config.row_tiles * memory.tile_bytes
        )
        base = ptx.shared_address(barriers)
        self._weight_full = base + self.warp * (8 * config.weight_stages)
        self._x_full = base + 8 * config.warps * config.weight_stages
        self._x_empty = self._x_full + 8 * config.x_stages

    def _go_to_layer(self, p: _Problem) -> None:
        """Moves the addresses of stacked arrays to the layer, which counts from the end below 0."""
        assert p.layers is not None
        layer = ptx.load_global(self.gmem["layer"])[0]
        layer = ptx.select(layer < 0, layer + p.layers, layer)
        layer = ptx.minimum(ptx.maximum(layer, 0), p.layers - 1)
        weight_bytes = p.n // layout.ROWS * p.chunks * p.memory.tile_bytes
        strides = {"w": weight_bytes, "channel_scale": 4 * p.n, "scaled_zero": 4 * p.n}
        for name in strides.keys() & self.gmem.keys():
            self.gmem[name] = self.gmem[name].advance(layer, strides[name])

    def weight_full(self, slot: I32) -> I32:
        return self._weight_full + slot * 8

    def x_full(self, slot: I32) -> I32:
        return self._x_full + slot * 8

    def x_empty(self, slot: I32) -> I32:
        return self._x_empty + slot * 8


def _body(p: _Problem, names: tuple[str, ...], *refs: Any) -> None:
    """The kernel. refs: the operands called `names`, the output, shared memory, barriers."""
    *operands, out, shared, barriers = refs
    refs_by_name = dict(zip(names, operands, strict=True)) | {"out": out}
    t = _Thread(p, refs_by_name, shared, barriers)
    threads = 128 * p.config.warpgroups

    _start(p, t)
    stash = _load_scales(p, t)
    ptx.sync_block(threads)  # the barriers of x are initialised
    acc = _main_loop(p, t)
    ptx.sync_block(threads)  # no one reads the rings any more
    _exchange(p, t, acc, stash)
    ptx.sync_block(threads)
    _epilogue(p, t)


# Prologue


def _start(p: _Problem, t: _Thread) -> None:
    """Initialise the barriers and start the first copies; every warp its own weights."""
    config = p.config
    stages = [ptx.constant(s) for s in range(max(config.weight_stages, config.x_stages))]
    with ptx.when(t.is_lane0 & (t.warp < config.warps)):
        for slot in stages[: config.weight_stages]:
            ptx.init_barrier(t.weight_full(slot), arrivals=1)
        with ptx.when(t.is_thread0):
            for slot in stages[: config.x_stages]:
                ptx.init_barrier(t.x_full(slot), arrivals=1)
                ptx.init_barrier(t.x_empty(slot), arrivals=config.warps)
        ptx.publish_barriers()
        for slot in stages[: config.weight_stages]:
            with ptx.when(slot < t.steps):
                _copy_weights(p, t, slot, step=slot)
        with ptx.when(t.is_thread0):
            if p.x_resident:
                _copy_x(p, t, stages[0], step=stages[0], chunks=p.chunks)
            else:
                for slot in stages[: config.x_stages]:
                    _copy_x(p, t, slot, step=slot, chunks=_chunks_of_step(p, slot))


def _copy_weights(p: _Problem, t: _Thread, slot: I32, step: I32) -> None:
    """Start the copy of a step's tiles of this warp."""
    config, tile_bytes = p.config, p.memory.tile_bytes
    stage_bytes = config.row_tiles * tile_bytes
    full = t.weight_full(slot)
    chunk = step * config.k_warps + t.k_warp
    ptx.expect_bytes(full, stage_bytes)
    for i in range(config.row_tiles):
        tile = ptx.block_index() * config.tiles + t.row_warp * config.row_tiles + i
        tile = ptx.minimum(tile, p.n // layout.ROWS - 1)
        source = t.gmem["w"].advance(tile, p.chunks * tile_bytes).advance(chunk, tile_bytes)
        ptx.copy_to_shared(t.ring + slot * stage_bytes + i * tile_bytes, source, tile_bytes, full)


def _chunks_of_step(p: _Problem, step: I32) -> I32:
    """k_warps, and what is left in the last step."""
    return ptx.minimum(p.chunks - step * p.config.k_warps, p.config.k_warps)


def _copy_x(p: _Problem, t: _Thread, slot: I32, step: I32, chunks: I32 | int) -> None:
    """Start the copy of x from a step on, for the whole block, to a slot and those after it."""
    memory, chunk_bytes = p.memory, p.m * layout.FEATURES
    source = t.gmem["x"].advance(step, memory.x_step_bytes)
    target = t.shared + memory.x + slot * memory.x_step_bytes
    ptx.expect_bytes(t.x_full(slot), chunks * chunk_bytes)
    ptx.copy_to_shared(target, source, chunks * chunk_bytes, t.x_full(slot))


def _load_scales(p: _Problem, t: _Thread) -> dict[str, I32]:
    """Thread i takes what belongs to channel i and to token i, to hide the latency.

    There are at least as many threads as channels and tokens. Beyond, the last one is repeated.
    """
    channel = ptx.minimum(t.first_row + ptx.minimum(t.index, p.config.rows - 1), p.n - 1)
    token = ptx.minimum(t.index, p.m - 1)
    index = {"channel_scale": channel, "scaled_zero": channel, "bias": channel}
    index |= {"x_scale": token, "code_sum": token}
    return {
        name: ptx.load_global(t.gmem[name].advance(index[name], 4))[0]
        for name in index.keys() & t.gmem.keys()
    }


# Main loop


def _main_loop(p: _Problem, t: _Thread) -> list[I32]:
    """Multiply all steps of this warp -> its int32 sums, fragments of [row tile][8 tokens]."""
    config = p.config
    count = p.acc_registers

    def step(i: I32, carry: list[I32]) -> list[I32]:
        acc, (slot, parity, x_slot, x_parity) = carry[:count], carry[count:]
        if p.x_resident:
            x_slot = i
        else:
            ptx.wait(t.x_full(x_slot), x_parity)
        ptx.wait(t.weight_full(slot), parity)
        tiles = _load_weights(p, t, slot)
        load_x = _x_loader(p, t, x_slot)
        _release_weights(p, t, slot, i)
        for h in range(2):
            set_ = h % p.acc_sets
            a = [_fragments(tile, h) for tile in tiles]
            for tokens in range(p.token_tiles):
                b = load_x(tokens, h)
                for r, fragments in enumerate(a):
                    where = p.acc_slice(set_, r, tokens)
                    for half in range(2):
                        acc[where] = ptx.mma_s8(acc[where], fragments[half], b[2 * half :][:2])
        _release_x(p, t, x_slot, x_parity, i)
        ring = _next(slot, parity, config.weight_stages)
        return [*acc, *ring, *_next(x_slot, x_parity, config.x_stages)]

    zeros = [ptx.constant(0)] * (count + 4)
    if p.x_resident:
        ptx.wait(t.x_full(zeros[0]), parity=zeros[0])
    acc = ptx.loop(t.steps, zeros, step)[:count]
    if p.acc_sets == 1:
        return acc
    return [a + b for a, b in zip(acc[: count // 2], acc[count // 2 :], strict=True)]


def _next(slot: I32, parity: I32, stages: int) -> tuple[I32, I32]:
    """The next slot of a ring; the parity turns with every round."""
    wraps = (slot + 1).is_(stages)
    return ptx.select(wraps, 0, slot + 1), ptx.select(wraps, parity ^ 1, parity)


def _load_weights(p: _Problem, t: _Thread, slot: I32) -> list[tuple[list[I32], Any]]:
    """A slot's codes, eight words a lane and tile, and split scales (None per channel)."""
    tile_bytes = p.memory.tile_bytes
    stage = t.ring + slot * (p.config.row_tiles * tile_bytes)
    tiles = []
    for r in range(p.config.row_tiles):
        base = stage + r * tile_bytes
        words = [
            word for h in range(2) for word in ptx.load_shared(base + t.lane * 16, 512 * h, count=4)
        ]
        scales = None
        if p.per_group:
            scales = layout.split_scales(ptx.load_shared(base + t.g * 4, 4 * layout.CODE_WORDS)[0])
        tiles.append((words, scales))
    return tiles


def _fragments(tile: tuple[list[I32], Any], h: int) -> list[list[I32]]:
    """The A fragments of two mma: of half h, words v = 0, 1 and v = 2, 3."""
    words, scales = tile
    expanded = [layout.expand(word, scales) for word in words[4 * h : 4 * h + 4]]
    return [[*expanded[0], *expanded[1]], [*expanded[2], *expanded[3]]]


def _x_loader(p: _Problem, t: _Thread, x_slot: I32) -> Any:
    """load(8-token tile, h) -> four words: B fragments of two mma. Up to 16 tokens read at once."""
    base = t.shared + p.memory.x + x_slot * p.memory.x_step_bytes
    base = base + t.k_warp * (p.m * layout.FEATURES)

    def load(tokens: int, h: int) -> list[I32]:
        token = ptx.minimum(t.g + 8 * tokens, p.m - 1)
        return ptx.load_shared(base + layout.activation_offset(token, t.c, h), count=4)

    if p.token_tiles > 2:
        return load
    early = {(i, h): load(i, h) for h in range(2) for i in range(p.token_tiles)}
    return lambda tokens, h: early[tokens, h]


def _release_weights(p: _Problem, t: _Thread, slot: I32, i: I32) -> None:
    """The slot's words are in registers: refill it with the step `weight_stages` ahead."""
    stages = p.config.weight_stages
    if stages >= p.steps:
        return
    ptx.fence_shared_reads()
    ptx.sync_warp()
    with ptx.when(t.is_lane0 & (i + stages < t.steps)):
        _copy_weights(p, t, slot, step=i + stages)


def _release_x(p: _Problem, t: _Thread, x_slot: I32, x_parity: I32, i: I32) -> None:
    """Arrive on this slot's `x_empty`; thread 0 refills the slot before it, used a step ago."""
    stages = p.config.x_stages
    if p.x_resident:
        return
    ptx.fence_shared_reads()
    ptx.sync_warp()
    with ptx.when(t.is_lane0):
        ptx.arrive(t.x_empty(x_slot))
    with ptx.when(t.is_thread0 & (i > 0) & (i + (stages - 1) < p.steps)):
        first = x_slot.is_(0)
        previous = ptx.select(first, stages - 1, x_slot - 1)
        ptx.wait(t.x_empty(previous), ptx.select(first, x_parity ^ 1, x_parity))
        step = i + (stages - 1)
        _copy_x(p, t, previous, step, _chunks_of_step(p, step))


# Exchange and epilogue


def _exchange(p: _Problem, t: _Thread, acc: list[I32], stash: dict[str, I32]) -> None:
    """Sums to `partials` [k_warp, token, row], and the scales to where the epilogue reads them."""
    memory, config = p.memory, p.config
    plane = 8 * p.token_tiles * memory.partial_stride
    # An accumulator holds rows g, g + 8 and tokens 2 c, 2 c + 1.
    first = t.shared + t.k_warp * plane + t.c * (2 * memory.partial_stride)
    first = first + t.row_warp * (64 * config.row_tiles) + t.g * 4
    with ptx.when(t.warp < config.warps):
        for r in range(config.row_tiles):
            for tokens in range(p.token_tiles):
                for j, value in enumerate(acc[p.acc_slice(0, r, tokens)]):
                    offset = (8 * tokens + j % 2) * memory.partial_stride + 64 * r + 32 * (j // 2)
                    ptx.store_shared(first, value, offset)
    with ptx.when(t.index < config.rows):
        for name, offset in _channel_offsets(p).items():
            if name in stash:
                ptx.store_shared(t.shared + t.index * 4, stash[name], offset)
    with ptx.when(t.index < MAX_TOKENS):
        for name, offset in _token_offsets(p).items():
            if name in stash:
                ptx.store_shared(t.shared + t.index * 4, stash[name], offset)


def _channel_offsets(p: _Problem) -> dict[str, int]:
    names = ("channel_scale", "scaled_zero", "bias")
    return {name: p.memory.channels + i * 4 * p.config.rows for i, name in enumerate(names)}


def _token_offsets(p: _Problem) -> dict[str, int]:
    names = ("x_scale", "code_sum")
    return {name: p.memory.tokens + i * 4 * MAX_TOKENS for i, name in enumerate(names)}


def _epilogue(p: _Problem, t: _Thread) -> None:
    """Every thread: four channels beside each other of one token, and on to the next tokens."""
    quads = p.config.rows // 4
    per_token = 1 << (quads - 1).bit_length()  # threads, a power of two: at most 128
    at_once = 128 * p.config.warpgroups // per_token
    quad, token = t.index % per_token, t.index // per_token
    channel = t.first_row + quad * 4
    for start in range(0, p.m, at_once):
        m = token + start
        with ptx.when((quad < quads) & (channel < p.n) & (m < p.m)):
            sums = _add_partials(p, t, quad, m)
            words = sums if p.out_dtype == "int32" else _scale(p, t, quad, m, sums)
            out = t.gmem["out"].advance(m * p.n + channel, jnp.dtype(p.out_dtype).itemsize)
            ptx.store_global(out, words)


def _add_partials(p: _Problem, t: _Thread, quad: I32, m: I32) -> list[I32]:
    plane = 8 * p.token_tiles * p.memory.partial_stride
    address = t.shared + m * p.memory.partial_stride + quad * 16
    parts = [ptx.load_shared(address, i * plane, count=4) for i in range(p.config.k_warps)]
    return [functools.reduce(lambda a, b: a + b, column) for column in zip(*parts, strict=True)]


def _scale(p: _Problem, t: _Thread, quad: I32, m: I32, sums: list[I32]) -> list[I32]:
    """`reference.epilogue` and the bias, operation by operation, then one rounding."""
    at_channel, at_token = _channel_offsets(p), _token_offsets(p)

    def channels(name: str) -> list[F32]:
        return ptx.load_shared(t.shared + quad * 16, at_channel[name], count=4, kind=F32)

    x_scale = ptx.load_shared(t.shared + m * 4, at_token["x_scale"], kind=F32)[0]
    y = [ptx.to_float(s) * scale for s, scale in zip(sums, channels("channel_scale"), strict=True)]
    if not p.per_group:
        code_sum = ptx.to_float(ptx.load_shared(t.shared + m * 4, at_token["code_sum"])[0])
        y = [v - code_sum * zero for v, zero in zip(y, channels("scaled_zero"), strict=True)]
    y = [v * x_scale for v in y]
    if p.bias:
        y = [v + b for v, b in zip(y, channels("bias"), strict=True)]
    if p.out_dtype == "float32":
        return [ptx.float_bits(v) for v in y]
    return [ptx.pack_halves(y[i], y[i + 1], p.out_dtype) for i in (0, 2)]
