"""How decode attention is cut into blocks, by rules that read shapes only, so also under jit."""

from __future__ import annotations

from qserve_jax.pallas_kernels.paged_attention.decode_config import (
    DecodeConfig,
    shared_limit,
    shared_memory,
)
from qserve_jax.pallas_kernels.paged_attention.decode_problem import Problem
from qserve_jax.pallas_kernels.paged_attention.problem import PAGE, SMS

FEW_BLOCKS = 2 * SMS
"""With fewer (row, KV head) than this a row is worth splitting."""
ONE_ROUND = 4 * SMS
"""With no more they all run at once, and none is left for the SM that is ready first."""
RING_BYTES = 26_112
"""Pages under way for each worker: three of 4 bits and head_dim 128, four workers an SM."""
PAGES_EACH = 2
"""Pages that a block should have at least, where the table is that wide."""
WARPGROUP_PAGES = {2: 8, 4: 32}
"""Pages that a block should have for so many warpgroups: with fewer, adding up costs more."""
SPLIT_PAGES = 16
"""Pages that a split should have at least: below, adding up through memory costs more."""
UNEVEN_PAGES = 32
"""From so many on, a longest row may leave an SM with much to do when the others have ended."""


def choose_config(p: Problem, *, clusters: bool) -> DecodeConfig:
    """clusters: whether the GPU has them."""
    stages = min(6, max(3, round(RING_BYTES / p.page.block_bytes)))
    pages = p.width if p.window is None else min(p.width, -(-p.window // PAGE) + 1)
    blocks = p.rows * p.head_blocks
    cluster, splits = _spread(max(1, SMS // max(blocks, 1)), pages, clusters)
    blocks *= cluster * splits
    wanted = 1 if blocks >= FEW_BLOCKS else -(-2 * FEW_BLOCKS // max(blocks, 1))
    if p.ordered and FEW_BLOCKS <= blocks <= ONE_ROUND and pages >= UNEVEN_PAGES:
        wanted = 2  # two rounds, longest first
    mine = pages // (cluster * splits)
    for warpgroups in (4, 2):
        config = DecodeConfig(stages, warpgroups, cluster, splits)
        enough = wanted >= warpgroups and mine >= WARPGROUP_PAGES[warpgroups]
        if enough and _fits(p, config):
            return config
    most = DecodeConfig(stages, 1, cluster, splits)
    return most if _fits(p, most) else DecodeConfig(2, 1, cluster, splits)


def _fits(p: Problem, config: DecodeConfig) -> bool:
    return shared_memory(p, config).size <= shared_limit()


def _spread(room: int, pages: int, clusters: bool) -> tuple[int, int]:
    """Blocks of a cluster, and splits, for the pages of a row, of which `room` blocks run at once.

    A cluster adds up in the same launch, and splits in another: they are for more than a cluster.
    """
    cluster = _power_of_two(min(8, room, pages // PAGES_EACH)) if clusters else 1
    splits = min(room, pages // SPLIT_PAGES)
    return (1, splits) if splits >= 2 * cluster else (cluster, 1)


def _power_of_two(limit: int) -> int:
    return 1 << max(limit, 1).bit_length() - 1
