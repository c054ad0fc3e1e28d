"""How decode attention is cut into blocks, by rules that read shapes only, so also under jit.

They follow sweeps over all cuts on an H200, see docs/paged_attention.md.
"""

from __future__ import annotations

import math

from qserve_jax.pallas_kernels.paged_attention.decode_config import (
    DecodeConfig,
    shared_limit,
    shared_memory,
)
from qserve_jax.pallas_kernels.paged_attention.decode_problem import Problem
from qserve_jax.pallas_kernels.paged_attention.problem import PAGE, SMS

STAGES = 3
"""Pages of a worker that are under way: with more no size was 2 % faster, some 8 % slower."""
FEW_BLOCKS = 2 * SMS
"""With fewer (row, KV head) than this a row is worth several workers."""
ONE_ROUND = 4 * SMS
"""With no more they all run at once, and none is left for the SM that is ready first."""
PAGES_EACH = 2
"""Pages that a block of a cluster should have at least, where the table is that wide."""
WARPGROUP_PAGES = {2: 8, 4: 32}
"""Pages that a block should have for so many warpgroups: with fewer, adding up costs more."""
UNEVEN_PAGES = 32
"""From so many on, a longest row may leave an SM with much to do when the others have ended."""


def choose_config(p: Problem, *, clusters: bool) -> DecodeConfig:
    """clusters: whether the GPU has them."""
    pages = p.width if p.window is None else min(p.width, -(-p.window // PAGE) + 1)
    rows = p.rows * p.head_blocks
    uneven = p.ordered and pages >= UNEVEN_PAGES
    cluster, splits = _spread(SMS // max(rows, 1), pages, clusters)
    if clusters and uneven and SMS < 2 * rows <= 2 * FEW_BLOCKS:
        cluster, splits = 2, 1  # no SM has a longest row alone
    blocks = max(rows * cluster * splits, 1)
    wanted = 1 if blocks >= FEW_BLOCKS else -(-2 * FEW_BLOCKS // blocks)
    if uneven and cluster == 1 and FEW_BLOCKS <= blocks <= ONE_ROUND:
        wanted = 2  # two rounds, longest first
    mine = pages // (cluster * splits)
    for warpgroups in (4, 2):
        config = DecodeConfig(STAGES, warpgroups, cluster, splits)
        enough = wanted >= warpgroups and mine >= WARPGROUP_PAGES[warpgroups]
        if enough and _fits(p, config):
            return config
    most = DecodeConfig(STAGES, 1, cluster, splits)
    return most if _fits(p, most) else DecodeConfig(2, 1, cluster, splits)


def _fits(p: Problem, config: DecodeConfig) -> bool:
    return shared_memory(p, config).size <= shared_limit()


def _spread(room: int, pages: int, clusters: bool) -> tuple[int, int]:
    """Blocks of a cluster, and splits, for the pages of a row; SMs are enough for `room` blocks.

    A cluster adds up in the same launch, splits in another. But four or eight blocks must find a
    place in one part of the GPU, so that clusters that would fill it run in two rounds.
    """
    splits = min(room, math.isqrt(pages))
    cluster = 1
    if clusters and room > 1:
        cluster = _power_of_two(min(8, max(room // 2, 2), pages // PAGES_EACH))
    return (1, splits) if splits >= 2 * cluster else (cluster, 1)


def _power_of_two(limit: int) -> int:
    return 1 << max(limit, 1).bit_length() - 1
