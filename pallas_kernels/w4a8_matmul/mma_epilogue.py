"""The end of `mosaic_mma`: from the warps' int32 sums to the output.

    load_scales  before the main loop: scales, zeros, bias to registers
    exchange     sums and scales to shared memory
    epilogue     add the teams, scale, round once, store

It goes through shared memory because an accumulator is spread over a warp as the tensor core wants
it, while a store should have channels beside each other, and because the teams' sums meet there.
"""

from __future__ import annotations

import jax.numpy as jnp

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import F32, I32
from qserve_jax.pallas_kernels.w4a8_matmul import layout
from qserve_jax.pallas_kernels.w4a8_matmul.mma_thread import MmaProblem, Thread
from qserve_jax.pallas_kernels.w4a8_matmul.problem import INT32_SUMS

UNROLL = 4  # rows of the output per turn of the epilogue's loop, to hide latency


def load_scales(p: MmaProblem, t: Thread) -> dict[str, I32]:
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


def exchange(p: MmaProblem, t: Thread, acc: list[I32], stash: dict[str, I32]) -> None:
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
            for name, offset in offsets.items():
                if name in stash:
                    ptx.store_shared(t.shared + t.index * 4, stash[name], offset)


def _channel_offsets(p: MmaProblem) -> dict[str, int]:
    names = ("channel_scale", "scaled_zero", "bias")
    return {name: p.memory.channels + i * 4 * p.config.rows for i, name in enumerate(names)}


def _token_offsets(p: MmaProblem) -> dict[str, int]:
    names = ("x_scale", "code_sum")
    return {name: p.memory.tokens + i * 4 * p.config.tokens for i, name in enumerate(names)}


def epilogue(p: MmaProblem, t: Thread) -> None:
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
            if p.out_dtype != INT32_SUMS:
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


def _add_partials(p: MmaProblem, t: Thread, quad: I32, token: I32) -> list[I32]:
    """The int32 sums of four channels of a token, over the teams."""
    first = t.shared + token * p.memory.partial_stride + quad * 16
    plane = p.config.tokens * p.memory.partial_stride
    total = ptx.load_shared(first, count=4)
    for team in range(1, p.config.k_warps):
        part = ptx.load_shared(first, team * plane, count=4)
        total = [a + b for a, b in zip(total, part, strict=True)]
    return total


def _scale(
    p: MmaProblem, t: Thread, quad: I32, token: I32, sums: list[I32], residual: list[F32]
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
