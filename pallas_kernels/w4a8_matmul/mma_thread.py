"""What `mosaic_mma` knows when it is built, and where each of its threads stands."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from qserve_jax.pallas_kernels import intrinsics as ptx
from qserve_jax.pallas_kernels.intrinsics import I32
from qserve_jax.pallas_kernels.w4a8_matmul import layout
from qserve_jax.pallas_kernels.w4a8_matmul.mma_config import MmaConfig, SharedMemory, shared_memory
from qserve_jax.pallas_kernels.w4a8_matmul.problem import Problem, go_to_layer


@dataclasses.dataclass(frozen=True)
class MmaProblem(Problem):
    """The problem, and how it is cut. token_tiles: of 8 tokens, of a block."""

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
        """A warp's sums of one of its tiles and the tokens of one mma, 8 tokens each."""
        first = (tile * self.token_tiles + tokens) * 4
        return slice(first, first + 4)

    @functools.cached_property
    def memory(self) -> SharedMemory:
        return shared_memory(self.config, self.per_group)


class Thread:
    """Where a thread stands in the block, and the addresses it works with."""

    def __init__(self, p: MmaProblem, refs: dict[str, Any], shared: Any):
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

    def _x_source(self, p: MmaProblem) -> ptx.Address:
        """The thread's first piece of 16 bytes of x, of the team's first chunk."""
        row = self.gmem["x"].advance(self.first_token + (self.in_team >> 3), p.k)
        return row.advance(self.team * layout.FEATURES + (self.in_team & 7) * 16, 1)

    def _tile_source(self, p: MmaProblem, r: I32) -> ptx.Address:
        """Tile r of the warp, of the team's first chunk; the last of all for those beyond."""
        tile = self.first_row // layout.ROWS + self.row_warp * p.config.row_tiles + r
        tile = ptx.minimum(tile, p.n // layout.ROWS - 1)
        index = layout.block_index(tile, self.team, p.chunks)
        return self.gmem["w"].advance(index, p.memory.tile_bytes)
