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
    exchange   sums to shared memory, where the rings were            (mma_epilogue.py)
    epilogue   add the teams, scale in float32 in the reference's order, round once, store

Bounds. Blocks that reach beyond N multiply the last tile again and store nothing of it; tokens
beyond M are zeros. `layer` is clamped. So nothing is read outside the arrays.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import I32
from qserve_jax.pallas_kernels.w4a8_matmul import layout
from qserve_jax.pallas_kernels.w4a8_matmul.mma_config import MmaConfig, check_config
from qserve_jax.pallas_kernels.w4a8_matmul.mma_epilogue import epilogue, exchange, load_scales
from qserve_jax.pallas_kernels.w4a8_matmul.mma_thread import MmaProblem, Thread
from qserve_jax.pallas_kernels.w4a8_matmul.problem import gather
from qserve_jax.pallas_kernels.w4a8_matmul.tuning import chosen_config
from qserve_jax.quantization.qtensor import Array, Int8Activation, W4PerChannel, W4PerGroup


def matmul(
    x: Int8Activation,
    w: W4PerGroup | W4PerChannel,
    *,
    bias: Array | None = None,
    residual: Array | None = None,
    layer: Array | int | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    config: MmaConfig | None = None,
    named: str = "mosaic_mma",
) -> Array:
    """See `api.w4a8_matmul`. The same float32 operations in the same order as the reference.

    w must be in the layout "mma_w4" (`layout.to_kernel_layout`). out_dtype int32: see `INT32_SUMS`.
    config: None for the tuned one, or else the heuristic. named: the backend that refusals name.

    Raises NotImplementedError on what `problem.gather` refuses; ValueError on a config that cannot
    run.
    """
    problem, operands = gather(named, x, w, bias, residual, layer, out_dtype)
    m, n, k, per_group = problem.m, problem.n, problem.k, problem.per_group
    chosen: MmaConfig = config or chosen_config("mma", m, n, k, per_group)
    check_config(chosen, k, per_group)
    p = MmaProblem(**vars(problem), config=chosen)
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


def _body(p: MmaProblem, names: tuple[str, ...], *refs: Any) -> None:
    """The kernel. refs: the operands called `names`, the output, shared memory."""
    *operands, out, shared = refs
    t = Thread(p, dict(zip(names, operands, strict=True)) | {"out": out}, shared)
    for stage in range(p.config.stages - 1):
        _copy_chunk(p, t, slot=ptx.constant(stage), step=ptx.constant(stage))
    stash = load_scales(p, t)
    acc = _main_loop(p, t)
    ptx.wait_copies(0)
    ptx.sync_block(p.config.threads)  # no one reads the rings any more, or writes them
    exchange(p, t, acc, stash)
    ptx.sync_block(p.config.threads)
    epilogue(p, t)


# Copies


def _copy_chunk(p: MmaProblem, t: Thread, slot: I32, step: I32) -> None:
    """Start the copies of the team's chunk `step`, if there is one; a group in any case."""
    with ptx.when(step < t.steps):
        _copy_weights(p, t, slot, step)
        _copy_x(p, t, slot, step)
    ptx.commit_copies()


def _copy_weights(p: MmaProblem, t: Thread, slot: I32, step: I32) -> None:
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


def _copy_x(p: MmaProblem, t: Thread, slot: I32, step: I32) -> None:
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


# Main loop


def _main_loop(p: MmaProblem, t: Thread) -> list[I32]:
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


def _sync_team(p: MmaProblem, t: Thread) -> None:
    if p.config.row_warps == 1:
        ptx.sync_warp()
    else:
        ptx.sync_block(32 * p.config.row_warps, barrier=t.team + 2)


def _multiply(p: MmaProblem, t: Thread, slot: I32, acc: list[I32]) -> None:
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


def _load_weights(p: MmaProblem, t: Thread, slot: I32) -> list[tuple[list[I32], Any]]:
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
