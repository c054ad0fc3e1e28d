"""How decode attention is cut into blocks; decode_rules chooses.

A worker is a warpgroup with a ring of pages of its own. The workers of a (row, KV head) take its
pages in turn: `warpgroups` in a block, and either `cluster` blocks that add up in each other's
shared memory (Hopper), or `splits` blocks that add up through memory in a second step.
"""

from __future__ import annotations

import dataclasses
import functools

from qserve_jax.pallas_kernels.backend import default_device
from qserve_jax.pallas_kernels.paged_attention.decode_problem import COLUMNS, Problem

SHARED_LIMIT = 232_448
"""Bytes of a block on Hopper."""


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """stages: pages in a worker's ring; see the module for the others."""

    stages: int
    warpgroups: int = 1
    cluster: int = 1
    splits: int = 1

    @property
    def threads(self) -> int:
        return 128 * self.warpgroups

    @property
    def warps(self) -> int:
        return 4 * self.warpgroups

    @property
    def workers(self) -> int:
        return self.warpgroups * self.cluster * self.splits

    @property
    def alone(self) -> bool:
        """Whether a block's sums are the row's."""
        return self.cluster == self.splits == 1


def shared_limit() -> int:
    """Bytes of a block on the GPU that JAX computes on; Hopper's where it computes on none."""
    return getattr(default_device(), "shared_memory_per_block_optin", SHARED_LIMIT)


def check_config(p: Problem, config: DecodeConfig) -> None:
    """Raises ValueError on a config that cannot run."""
    size, limit = shared_memory(p, config).size, shared_limit()
    for wrong, why in (
        (config.stages < 2, "stages must be at least 2"),
        (config.warpgroups not in (1, 2, 4), "warpgroups must be 1, 2 or 4"),
        (config.cluster not in (1, 2, 4, 8), "cluster must be 1, 2, 4 or 8"),
        (config.splits < 1, "splits must be at least 1"),
        (config.cluster > 1 < config.splits, "a cluster has no splits: leave one of the two at 1"),
        (size > limit, f"takes {size} bytes of shared memory, at most {limit}"),
    ):
        if wrong:
            raise ValueError(f"{config} cannot run: {why}")


@dataclasses.dataclass(frozen=True)
class SharedMemory:
    """Offsets in bytes. The ring is first; the sums of all warps lie where it was.

    sums: [warp][query head][head_dim] float32, padded. tops: [warp][maxima of 8, totals of 8].
    block: [query head][head_dim] of the block, then [query head][maximum, total].
    """

    ring: int
    head_stride: int
    tops: int
    block: int
    block_tops: int
    size: int


def shared_memory(p: Problem, config: DecodeConfig) -> SharedMemory:
    return _shared_memory(p.head_dim, p.page.block_bytes, config)


@functools.cache
def _shared_memory(head_dim: int, block_bytes: int, config: DecodeConfig) -> SharedMemory:
    ring = config.stages * block_bytes
    head_stride = 4 * head_dim + 16
    tops = max(config.warpgroups * ring, config.warps * COLUMNS * head_stride)
    block = tops + config.warps * 64
    block_tops = block + (0 if config.cluster == 1 else COLUMNS * 4 * head_dim)
    return SharedMemory(ring, head_stride, tops, block, block_tops, block_tops + 8 * COLUMNS)
