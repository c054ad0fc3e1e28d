"""What `mosaic_sm90` knows when it is built, and where each of its threads stands."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import I32
from qserve_jax.pallas_kernels.w4a8_matmul import layout
from qserve_jax.pallas_kernels.w4a8_matmul.problem import Problem, go_to_layer
from qserve_jax.pallas_kernels.w4a8_matmul.sm90_config import (
    SharedMemory,
    shared_memory,
)
from qserve_jax.pallas_kernels.w4a8_matmul.sm90_tiles import (
    Cut,
    Part,
    Sm90Config,
    cut,
    last_part,
    whole_tile,
)


@dataclasses.dataclass(frozen=True)
class WgmmaProblem(Problem):
    config: Sm90Config

    @property
    def steps(self) -> int:
        """Of k_warpgroups chunks, of a block."""
        return -(-self.chunks // (self.config.k_warpgroups * self.config.k_blocks))

    @functools.cached_property
    def cut(self) -> Cut:
        return cut(self.config, self.m, self.n)

    @functools.cached_property
    def memory(self) -> SharedMemory:
        return shared_memory(self.config, self.m, self.n, self.per_group)


class Block:
    """Where a thread stands, and the addresses it works with."""

    def __init__(
        self, p: WgmmaProblem, context: Any, refs: dict[str, Any], shared: Any, barriers: Any
    ):
        self.index = ptx.thread_index()
        self.warp = ptx.warp_index()
        self.lane = self.index & 31
        self.rank = ptx.cluster_rank() if p.config.cluster > 1 else ptx.constant(0)
        self.first_tile = ptx.block_index() // p.config.cluster_blocks
        self.tiles = self.count_tiles(p)
        self.gmem = {name: ptx.global_address(ref) for name, ref in refs.items()}
        go_to_layer(p, self.gmem)
        box = (p.config.tokens // p.config.boxes, layout.FEATURES)
        self.x_map = ptx.tensor_map(context, refs["x"], box)
        self.shared = (ptx.shared_address(shared) + 1023) & 0xFFFFFC00
        self._full = ptx.shared_address(barriers)
        self._empty = self._full + 8 * p.config.slots

    def full(self, slot: I32) -> I32:
        return self._full + slot * 8

    def empty(self, slot: I32) -> I32:
        return self._empty + slot * 8

    def arrived(self, p: WgmmaProblem, warpgroup: I32) -> I32:
        """For what other blocks send to a warpgroup that multiplies."""
        return self._empty + 8 * p.config.slots + warpgroup * 8

    def count_tiles(self, p: WgmmaProblem) -> I32:
        """Of this block, whole or not."""
        if p.cut.parts:
            return ptx.select(self.first_tile < p.cut.parts, p.cut.rounds + 1, p.cut.rounds)
        return (p.cut.whole + p.cut.clusters - 1 - self.first_tile) // p.cut.clusters

    def part(self, p: WgmmaProblem, i: I32, row_group: I32 | int) -> Part:
        """What a row group of this block computes of its i-th tile."""
        tile = self.first_tile + i * p.cut.clusters
        whole = whole_tile(p.config, p.cut, tile, self.rank, row_group)
        if not p.cut.parts:
            return whole
        part = last_part(p.config, p.cut, self.first_tile, self.rank, row_group)
        is_last = i.is_(p.cut.rounds)
        return Part(*(ptx.select(is_last, *pair) for pair in zip(part, whole, strict=True)))


class Consumer:
    """A thread's place among those that multiply."""

    def __init__(self, p: WgmmaProblem, t: Block):
        group = (t.warp >> 2) - 1
        self.row_group = group % p.config.row_warpgroups
        self.k_group = group // p.config.row_warpgroups
        self.thread = t.index & 127
        self.warp = t.warp & 3
        self.g, self.c = t.lane >> 2, t.lane & 3
        # Of the block's 16-row tiles, the one of this warp.
        self.row_tile = self.row_group * 4 + self.warp
