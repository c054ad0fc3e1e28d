"""The W4A8 matmul for every NVIDIA GPU from Ampere (sm_80) on, with warp-level mma.sync.

y [M, N] = x [M, K] @ w [K, N] with int8 x and 4-bit w, any M, N a multiple of 64 and K of 128. It
is lowered as sm_80 wherever it runs, so that no instruction is newer (`intrinsics.architecture`).

How the work is cut (mma_config.py). The weights lie in tiles of 16 channels x 128 features in the
order in which a warp reads them (layout.py). A block owns `rows` channels, `tokens` tokens and all
of K. Its warps are k_warps teams of row_warps: a team takes every k_warps-th chunk of 128 features;
in it each warp has row_tiles tiles of its own, and all share the x of the chunk. Large M has one
team and large blocks, so that a weight is read, and made int8, once for up to 128 tokens. Small M
has several teams, so that a short product along N still fills the GPU; their int32 sums are added
in shared memory at the end, which is exact, so the cut changes no result.

How the data flows. A team has a ring of `stages` chunks in shared memory, and waits for no other.
Every thread copies its share by cp.async, 16 bytes at a time: each warp its own tiles, all warps of
the team the x, in the order of memory: [tokens, 128 bytes], where the 16-byte piece p of a token
lies at p ^ (token & 7), so that ldmatrix finds eight tokens in different banks. One barrier per
chunk says both that the chunk has come and that the one before it has been read; the copies of the
chunk `stages` - 1 ahead then go where that one was.

How a tile is multiplied. mma.m16n8k32 takes 16 channels of weights as its A operand and 8 tokens as
B. `layout.expand` makes eight int8 weights of a word (register-level parallelism, QServe section
5.2.3). Per channel the codes themselves go in, and zeros are taken off at the end.

    prologue   first copies, scales to registers
    main loop  wait -> copy ahead -> weights to registers -> expand -> mma for each 8 tokens
    exchange   sums to shared memory, where the rings were
    epilogue   add the teams, scale in float32 in the reference's order, round once, store

Bounds. Blocks that reach beyond N multiply the last tile again and store nothing of it; tokens
beyond M are zeros. `layer` is clamped. So nothing is read outside the arrays.
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
from qserve_jax.pallas_kernels.w4a8_matmul.mma_config import (
    MmaConfig,
    SharedMemory,
    check_config,
    choose_config,
    shared_memory,
)
from qserve_jax.pallas_kernels.w4a8_matmul.problem import Problem, gather, go_to_layer
from qserve_jax.pallas_kernels.w4a8_matmul.tuning import tuned_config
from qserve_jax.quantization.qtensor import Array, Int8Activation, W4PerChannel, W4PerGroup

UNROLL = 4  # rows of the output per turn of the epilogue's loop, to hide latency


@dataclasses.dataclass(frozen=True)
class _Problem(Problem):
    config: MmaConfig

    @property
    def token_tiles(self) -> int:
        return self.config.tokens // 8

    @property
    def token_blocks(self) -> int:
        return -(-self.m // self.config.tokens)

    @property
    def blocks(self) -> int:
        return self.token_blocks * -(-self.n // self.config.rows)

    def acc_slice(self, tile: int, tokens: int) -> slice:
        first = (tile * self.token_tiles + tokens) * 4
        return slice(first, first + 4)

    @functools.cached_property
    def memory(self) -> SharedMemory:
        return shared_memory(self.config, self.per_group)


def matmul(
    x: Int8Activation,
    w: W4PerGroup | W4PerChannel,
    *,
    bias: Array | None = None,
    residual: Array | None = None,
    layer: Array | int | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    config: MmaConfig | None = None,
) -> Array:
    """See `api.w4a8_matmul`. The same float32 operations in the same order as the reference.

    w must be in the layout "mma_w4" (`layout.to_kernel_layout`). out_dtype int32: see `INT32_SUMS`.
    config: None for the tuned one, or else the heuristic.

    Raises NotImplementedError on what `problem.gather` refuses; ValueError on a config that cannot
    run.
    """
    problem, operands = gather("mosaic_mma", x, w, bias, residual, layer, out_dtype)
    m, n, k, per_group = problem.m, problem.n, problem.k, problem.per_group
    tuned = tuned_config("mma", m, n, k, per_group)
    chosen: MmaConfig = config or tuned or choose_config(m, n, k)
    check_config(chosen, k, per_group)
    p = _Problem(**vars(problem), config=chosen)
    y = ptx.launch(
        functools.partial(_body, p, tuple(operands)),
        tuple(operands.values()),
        jax.ShapeDtypeStruct((m, n), out_dtype),
        name=f"w4a8_matmul_{p.kind}_mma",
        blocks=p.blocks,
        warpgroups=chosen.warps // 4,
        shared_bytes=p.memory.size,
        arch=(8, 0),
    )
    return y.reshape(*x.codes.shape[:-1], n)


class _Thread:
    """Where a thread stands in the block, and the addresses it works with."""

    def __init__(self, p: _Problem, refs: dict[str, Any], shared: Any):
        config, memory = p.config, p.memory
        self.index = ptx.thread_index()
        self.warp = self.index // 32
        self.lane = self.index & 31
        self.g, self.c = self.lane >> 2, self.lane & 3
        self.row_warp, self.team = self.warp % config.row_warps, self.warp // config.row_warps
        self.in_team = self.row_warp * 32 + self.lane
        block = ptx.block_index()  # blocks with the same weights follow each other
        self.first_row = block // p.token_blocks * config.rows
        self.first_token = block % p.token_blocks * config.tokens
        # Chunks team, team + k_warps, ...
        self.steps = (p.chunks + config.k_warps - 1 - self.team) // config.k_warps

        self.gmem = {name: ptx.global_address(ref) for name, ref in refs.items()}
        go_to_layer(p, self.gmem)
        self.shared = ptx.shared_address(shared)
        self.x_ring = self.shared + self.team * (config.stages * memory.x_slot)
        self.weight_ring = self.shared + self.warp * (config.stages * memory.weight_slot)
        self.weight_ring = self.weight_ring + memory.weights
        self.x = self._x_source(p)
        lane_offset = self.lane * 16
        self.codes = [
            self._tile_source(p, ptx.constant(r)).advance(lane_offset, 1)
            for r in range(config.row_tiles)
        ]
        scales = self._tile_source(p, ptx.minimum(self.lane >> 1, config.row_tiles - 1))
        self.scales = scales.advance((self.lane & 1) * 16 + 4 * layout.CODE_WORDS, 1)

    def _x_source(self, p: _Problem) -> ptx.Address:
        """The thread's first piece of 16 bytes of x, of the team's first chunk."""
        row = self.gmem["x"].advance(self.first_token + (self.in_team >> 3), p.k)
        return row.advance(self.team * layout.FEATURES + (self.in_team & 7) * 16, 1)

    def _tile_source(self, p: _Problem, r: I32) -> ptx.Address:
        """Tile r of the warp, of the team's first chunk; the last of all for those beyond."""
        tile = self.first_row // layout.ROWS + self.row_warp * p.config.row_tiles + r
        tile = ptx.minimum(tile, p.n // layout.ROWS - 1)
        index = layout.block_index(tile, self.team, p.chunks)
        return self.gmem["w"].advance(index, p.memory.tile_bytes)


def _body(p: _Problem, names: tuple[str, ...], *refs: Any) -> None:
    """The kernel. refs: the operands called `names`, the output, shared memory."""
    *operands, out, shared = refs
    t = _Thread(p, dict(zip(names, operands, strict=True)) | {"out": out}, shared)
    for stage in range(p.config.stages - 1):
        _copy_chunk(p, t, slot=ptx.constant(stage), step=ptx.constant(stage))
    stash = _load_scales(p, t)
    acc = _main_loop(p, t)
    ptx.wait_copies(0)
    ptx.sync_block(p.config.threads)  # no one reads the rings any more, or writes them
    _exchange(p, t, acc, stash)
    ptx.sync_block(p.config.threads)
    _epilogue(p, t)


# Copies


def _copy_chunk(p: _Problem, t: _Thread, slot: I32, step: I32) -> None:
    """Start the copies of the team's chunk `step`, if there is one; a group in any case."""
    with ptx.when(step < t.steps):
        _copy_weights(p, t, slot, step)
        _copy_x(p, t, slot, step)
    ptx.commit_copies()


def _copy_weights(p: _Problem, t: _Thread, slot: I32, step: I32) -> None:
    """The warp's tiles: codes by all lanes, scales by two lanes a tile."""
    tile_bytes = p.memory.tile_bytes
    stride = p.config.k_warps * layout.BLOCKS * tile_bytes
    target = t.weight_ring + slot * p.memory.weight_slot
    for r, codes in enumerate(t.codes):
        source = codes.advance(step, stride)
        for piece in (0, 512):
            offset = r * tile_bytes + piece
            ptx.copy_16_bytes(target + t.lane * 16, source, offset=offset, source_offset=piece)
    if p.per_group:
        with ptx.when(t.lane < 2 * p.config.row_tiles):
            target = target + (t.lane >> 1) * tile_bytes + (t.lane & 1) * 16
            source = t.scales.advance(step, stride)
            ptx.copy_16_bytes(target, source, offset=4 * layout.CODE_WORDS)


def _copy_x(p: _Problem, t: _Thread, slot: I32, step: I32) -> None:
    """The thread's pieces: 8 threads a token."""
    at_once = 4 * p.config.row_warps
    source = t.x.advance(step, p.config.k_warps * layout.FEATURES)
    target = t.x_ring + slot * p.memory.x_slot
    piece = t.in_team & 7
    for start in range(0, p.config.tokens, at_once):
        token = (t.in_team >> 3) + start
        filled: I32 | int = 16
        if p.m % p.config.tokens:
            filled = ptx.select(t.first_token + token < p.m, 16, 0)
        to = target + x_offset(token, piece)
        if start + at_once <= p.config.tokens:
            ptx.copy_16_bytes(to, source, source_offset=start * p.k, filled=filled)
            continue
        with ptx.when(token < p.config.tokens):
            ptx.copy_16_bytes(to, source, source_offset=start * p.k, filled=filled)


def x_offset(token: Any, piece: Any) -> Any:
    """Byte offset of 16 features of a token in a chunk of x in shared memory."""
    return token * layout.FEATURES + ((piece ^ (token & 7)) << 4)


def _load_scales(p: _Problem, t: _Thread) -> dict[str, I32]:
    """Thread i takes what belongs to channel i and to token i, to hide the latency.

    There are at least as many threads as channels and tokens. Beyond, the last one is repeated.
    """
    channel = ptx.minimum(t.first_row + t.index, p.n - 1)
    token = ptx.minimum(t.first_token + t.index, p.m - 1)
    index = {"channel_scale": channel, "scaled_zero": channel, "bias": channel}
    index |= {"x_scale": token, "code_sum": token}
    return {
        name: ptx.load_global(t.gmem[name].advance(index[name], 4))[0]
        for name in index
        if name in t.gmem
    }


# Main loop


def _main_loop(p: _Problem, t: _Thread) -> list[I32]:
    """Multiply all chunks of the team -> the warp's int32 sums, fragments of [tile][8 tokens]."""
    stages, count = p.config.stages, p.config.accumulators

    def step(i: I32, carry: list[I32]) -> list[I32]:
        *acc, slot = carry
        ptx.wait_copies(stages - 2)
        _sync_team(p, t)
        previous = ptx.select(slot.is_(0), stages - 1, slot - 1)
        _copy_chunk(p, t, slot=previous, step=i + (stages - 1))
        _multiply(p, t, slot, acc)
        return [*acc, ptx.select(slot.is_(stages - 1), 0, slot + 1)]

    return ptx.loop(t.steps, [ptx.constant(0)] * (count + 1), step)[:count]


def _sync_team(p: _Problem, t: _Thread) -> None:
    if p.config.row_warps == 1:
        ptx.sync_warp()
    else:
        ptx.sync_block(32 * p.config.row_warps, barrier=t.team + 2)


def _multiply(p: _Problem, t: _Thread, slot: I32, acc: list[I32]) -> None:
    """Add the products of the chunk in a slot to the sums."""
    tiles = _load_weights(p, t, slot)
    x = t.x_ring + slot * p.memory.x_slot
    for h in range(2):  # 64 features each
        a = [_fragments(tile, h) for tile in tiles]
        piece = (t.lane >> 3) + 4 * h
        x_row = x + x_offset(t.lane & 7, piece)
        for first in range(0, p.token_tiles, 2):  # two at a time: more mma that do not wait
            pair = range(first, min(first + 2, p.token_tiles))
            b = {n: ptx.load_matrix(x_row, 8 * layout.FEATURES * n) for n in pair}
            for half in range(2):
                for n in pair:
                    for r, fragments in enumerate(a):
                        where = p.acc_slice(r, n)
                        acc[where] = ptx.mma_s8(acc[where], fragments[half], b[n][2 * half :][:2])


def _load_weights(p: _Problem, t: _Thread, slot: I32) -> list[tuple[list[I32], Any]]:
    """The warp's tiles: codes, eight words a lane, and split scales (None per channel)."""
    tiles = []
    for r in range(p.config.row_tiles):
        base = t.weight_ring + slot * p.memory.weight_slot + r * p.memory.tile_bytes
        words = [
            word for h in range(2) for word in ptx.load_shared(base + t.lane * 16, 512 * h, count=4)
        ]
        scales = None
        if p.per_group:
            scales = layout.split_scales(ptx.load_shared(base + t.g * 4, 4 * layout.CODE_WORDS)[0])
        tiles.append((words, scales))
    return tiles


def _fragments(tile: tuple[list[Any], Any], h: int) -> list[list[Any]]:
    """The A fragments of two mma: of half h, words v = 0, 1 and v = 2, 3."""
    words, scales = tile
    expanded = [layout.expand(word, scales) for word in words[4 * h : 4 * h + 4]]
    return [[*expanded[0], *expanded[1]], [*expanded[2], *expanded[3]]]


# Exchange and epilogue


def _exchange(p: _Problem, t: _Thread, acc: list[I32], stash: dict[str, I32]) -> None:
    """Sums to `partials` [team, token, channel], and scales to where the epilogue reads them."""
    stride = p.memory.partial_stride
    # An accumulator holds fragment rows g, g + 8 and tokens 2 c, 2 c + 1.
    first = t.shared + t.team * (p.config.tokens * stride) + t.c * (2 * stride)
    first = first + t.row_warp * (64 * p.config.row_tiles) + layout.channel_of_row(t.g) * 4
    for r in range(p.config.row_tiles):
        for tokens in range(p.token_tiles):
            for j, value in enumerate(acc[p.acc_slice(r, tokens)]):
                row = layout.channel_of_row(8 * (j // 2))
                offset = (8 * tokens + j % 2) * stride + 64 * r + 4 * row
                ptx.store_shared(first, value, offset)
    for count, offsets in (
        (p.config.rows, _channel_offsets(p)),
        (p.config.tokens, _token_offsets(p)),
    ):
        with ptx.when(t.index < count):
            for name in offsets.keys() & stash.keys():
                ptx.store_shared(t.shared + t.index * 4, stash[name], offsets[name])


def _channel_offsets(p: _Problem) -> dict[str, int]:
    names = ("channel_scale", "scaled_zero", "bias")
    return {name: p.memory.channels + i * 4 * p.config.rows for i, name in enumerate(names)}


def _token_offsets(p: _Problem) -> dict[str, int]:
    names = ("x_scale", "code_sum")
    return {name: p.memory.tokens + i * 4 * p.config.tokens for i, name in enumerate(names)}


def _epilogue(p: _Problem, t: _Thread) -> None:
    """Every thread: four channels beside each other of one token, and on to the next tokens."""
    quads = p.config.rows // 4
    per_token = 1 << (quads - 1).bit_length()  # threads, a power of two: at most 128
    at_once = p.config.threads // per_token
    quad = t.index % per_token
    channel = t.first_row + quad * 4

    def row(name: str, dtype: str, m: I32) -> ptx.Address:
        size = jnp.dtype(dtype).itemsize
        return t.gmem[name].advance(m, p.n * size).advance(channel, size)

    def load_residual(token: I32) -> list[F32]:
        if p.residual is None:
            return []
        m = ptx.minimum(t.first_token + token, p.m - 1)
        return _floats(row("residual", p.residual, m), p.residual)

    def store(token: I32, residual: list[F32]) -> None:
        m = t.first_token + token
        with ptx.when((token < p.config.tokens) & (m < p.m)):
            words = _add_partials(p, t, quad, token)
            if p.out_dtype != "int32":
                words = _scale(p, t, quad, token, words, residual)
            ptx.store_global(row("out", p.out_dtype, m), words)

    def turn(i: I32, _: list[I32]) -> list[I32]:
        tokens = [(i * UNROLL + u) * at_once + t.index // per_token for u in range(UNROLL)]
        residuals = [load_residual(token) for token in tokens]  # first, to be on their way together
        for token, residual in zip(tokens, residuals, strict=True):
            store(token, residual)
        return []

    turns = -(-p.config.tokens // (at_once * UNROLL))
    with ptx.when((quad < quads) & (channel < p.n)):
        ptx.loop(ptx.constant(turns), [], turn)


def _floats(address: ptx.Address, dtype: str) -> list[F32]:
    """Four floats of this type in global memory."""
    if dtype == "float32":
        return ptx.load_global(address, count=4, kind=F32)
    words = ptx.load_global(address, count=2)
    return [half for word in words for half in ptx.unpack_halves(word, dtype)]


def _add_partials(p: _Problem, t: _Thread, quad: I32, token: I32) -> list[I32]:
    """The int32 sums of four channels of a token, over the teams."""
    first = t.shared + token * p.memory.partial_stride + quad * 16
    plane = p.config.tokens * p.memory.partial_stride
    total = ptx.load_shared(first, count=4)
    for team in range(1, p.config.k_warps):
        part = ptx.load_shared(first, team * plane, count=4)
        total = [a + b for a, b in zip(total, part, strict=True)]
    return total


def _scale(
    p: _Problem, t: _Thread, quad: I32, token: I32, sums: list[I32], residual: list[F32]
) -> list[I32]:
    """`reference.epilogue`, bias and residual, operation by operation, then one rounding."""
    at_channel, at_token = _channel_offsets(p), _token_offsets(p)

    def channels(name: str) -> list[F32]:
        return ptx.load_shared(t.shared + quad * 16, at_channel[name], count=4, kind=F32)

    x_scale = ptx.load_shared(t.shared + token * 4, at_token["x_scale"], kind=F32)[0]
    y = [ptx.to_float(s) * scale for s, scale in zip(sums, channels("channel_scale"), strict=True)]
    if not p.per_group:
        code_sum = ptx.to_float(ptx.load_shared(t.shared + token * 4, at_token["code_sum"])[0])
        y = [v - code_sum * zero for v, zero in zip(y, channels("scaled_zero"), strict=True)]
    y = [v * x_scale for v in y]
    if p.bias:
        y = [v + b for v, b in zip(y, channels("bias"), strict=True)]
    if residual:
        y = [v + r for v, r in zip(y, residual, strict=True)]
    if p.out_dtype == "float32":
        return [ptx.float_bits(v) for v in y]
    return [ptx.pack_halves(y[i], y[i + 1], p.out_dtype) for i in (0, 2)]
