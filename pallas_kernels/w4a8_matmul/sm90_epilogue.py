"""The end of `mosaic_sm90`: from the warpgroups' int32 sums to the output.

They are scaled in float32 in the reference's order, rounded once, transposed and stored.

It is kept short (scales fetched before the sums are there, no predicates for whole tiles): it is
code that a launch meets cold, and at 128 sums a thread each instruction more is there 32 times.
"""

from __future__ import annotations

import contextlib
from typing import Any

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import F32, I32
from qserve_jax.pallas_kernels.w4a8_matmul import layout
from qserve_jax.pallas_kernels.w4a8_matmul.problem import INT32_SUMS
from qserve_jax.pallas_kernels.w4a8_matmul.sm90_thread import Block, Consumer, WgmmaProblem
from qserve_jax.pallas_kernels.w4a8_matmul.sm90_tiles import QUARTERS, Part


class Epilogue:
    """What a tile's sums are scaled with, fetched before the sums are there.

    Per channel in registers; per token in shared memory, a copy for each warpgroup and for each of
    two tiles in turn, so that only the warpgroup waits, once.
    """

    def __init__(self, p: WgmmaProblem, t: Block, me: Consumer, i: I32, part: Part):
        self.row_tile = part.group * 64 + me.warp * layout.ROWS
        self.token, self.quarters = part.token, part.quarters
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

    def _fetch(
        self, p: WgmmaProblem, t: Block, me: Consumer, name: str, first: int, at: int
    ) -> None:
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

    def store(self, p: WgmmaProblem, t: Block, me: Consumer, first: I32 | int, acc: list) -> None:
        """Scale and store the sums of this warp's 16 channels, tokens from `first` of the tile."""
        ptx.wait_all_copies()
        ptx.sync_block(128, (t.warp >> 2) + 5)
        columns = self.columns + (me.c * 2 + first) * 4
        tokens = len(acc) // 4 * 8
        quarter = p.config.tokens // QUARTERS if p.cut.parts else tokens
        with ptx.when(self.row_tile < p.n):
            for start in range(0, tokens, quarter):
                inside = first // quarter + start // quarter < self.quarters
                with ptx.when(inside) if p.cut.parts else contextlib.nullcontext():
                    for j in range(start // 8, (start + quarter) // 8):
                        self._store(p, t, me, columns, first, j, acc[4 * j : 4 * j + 4])

    def _store(
        self, p: WgmmaProblem, t: Block, me: Consumer, columns: I32, first: Any, j: int, sums: list
    ) -> None:
        """Eight tokens, from first + 8 j of the tile on."""
        values = sums
        token = self.token + first + 8 * j
        if p.out_dtype != INT32_SUMS:
            values = self._scaled(p, columns, j, sums)
        if p.residual:
            channel = self.row_tile + me.c * 4
            added = _load_halves(p, t, channel, ptx.minimum(token + me.g, p.m - 1))
            values = [v + r for v, r in zip(values, added, strict=True)]
        if p.out_dtype in (INT32_SUMS, "float32"):
            _store_words(p, t, self.rows, token + me.c * 2, values)
        else:
            _store_halves(p, t, self.row_tile + me.c * 4, token + me.g, values)

    def _scaled(self, p: WgmmaProblem, columns: I32, j: int, sums: list[I32]) -> list[F32]:
        x_scales = ptx.load_shared(columns, 32 * j, count=2, kind=F32)
        code_sums: list[Any] = [None, None]
        if not p.per_group:
            at = 32 * j + 4 * p.config.tokens
            code_sums = [ptx.to_float(v) for v in ptx.load_shared(columns, at, count=2)]
        return [self.scale(i // 2, x_scales[i % 2], code_sums[i % 2], sums[i]) for i in range(4)]


def _store_words(p: WgmmaProblem, t: Block, rows: list[I32], token: I32, values: list) -> None:
    """Four 4-byte values: rows[0] at the token and the next, then rows[1]."""
    for i, value in enumerate(values):
        with ptx.when(token + i % 2 < p.m):
            target = t.gmem["out"].advance(token + i % 2, 4 * p.n).advance(rows[i // 2], 4)
            ptx.store_global(target, [value if isinstance(value, I32) else ptx.float_bits(value)])


def _load_halves(p: WgmmaProblem, t: Block, channel: I32, token: I32) -> list[F32]:
    """The residual, on the way that `_store_halves` goes, backwards."""
    source = t.gmem["residual"].advance(token, 2 * p.n).advance(channel, 2)
    words = [ptx.transpose_halves(word) for word in ptx.load_global(source, count=2)]
    return [half for word in words for half in ptx.unpack_halves(word, p.residual)]


def _store_halves(p: WgmmaProblem, t: Block, channel: I32, token: I32, values: list[F32]) -> None:
    """8 tokens x 16 channels of a warp, transposed: four channels from `channel` on of `token`."""
    pairs = [ptx.pack_halves(values[i], values[i + 1], p.out_dtype) for i in (0, 2)]
    words = [ptx.transpose_halves(pair) for pair in pairs]
    whole = p.m % p.config.tokens == 0
    with contextlib.nullcontext() if whole else ptx.when(token < p.m):
        ptx.store_global(t.gmem["out"].advance(token, 2 * p.n).advance(channel, 2), words)
