"""Which config the wgmma kernel takes: of those that can run, one of the least estimated time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from qserve_jax.pallas_kernels.w4a8_matmul.layout import FEATURES
from qserve_jax.pallas_kernels.w4a8_matmul.sm90_config import TOKENS, check_config
from qserve_jax.pallas_kernels.w4a8_matmul.sm90_tiles import (
    QUARTERS,
    SMS,
    Sm90Config,
    cut,
    grid,
)

SHAPES = ((4, 1), (3, 1), (2, 2), (1, 4))
LARGE_SHAPES = ((2, 1),)
"""Warpgroups along N and along K that are tried, and those above 128 tokens."""
MOST_CUTS = 8
"""M is cut into at most so many tiles more than it has to be."""
MANY_ROUNDS = 3.5
"""From so many on, x is read by clusters of two."""

# Microseconds, fitted to 350 times of 15 sizes and M = 32 to 1024 on an H200: 5 % off (one sigma).
START = 2.3
TILE = 1.1
EXPAND = {True: 0.088, False: 0.061}
"""A chunk's weights of 64 channels to 8 bits, by four warpgroups: groups of 128, or per channel."""
MULTIPLY = 0.00114
"""The same chunk times one token, at the peak of the tensor core."""
TOGETHER = 1.16
"""Chunks of several tiles whose sums several warpgroups share: they meet, and have fewer slots."""
EPILOGUE = 0.0033
"""Of 64 channels and one token."""
FINER = 1.035
"""What a last round takes that is cut finer, beside its share of a whole one."""
MEMORY = 3.85e6
"""Bytes a microsecond."""


def choose_config(m: int, n: int, k: int, per_group: bool) -> Sm90Config:
    """The config for x [m, k] and a weight [k, n]; of equals the one of the larger tiles."""
    able = _candidates(m, n, per_group)
    return min(able, key=lambda c: round(estimate(c, m, n, k, per_group), 1))


def estimate(config: Sm90Config, m: int, n: int, k: int, per_group: bool) -> float:
    """Microseconds: rounds of tiles, the last one perhaps cut finer, or what memory takes."""
    c = cut(config, m, n)
    last = config.tokens * c.last / QUARTERS if c.parts else 0
    chunks = k / FEATURES * (TOGETHER if c.most > 1 and config.k_warpgroups > 1 else 1)
    compute = c.rounds * _tile(config, config.tokens, chunks, per_group)
    compute += FINER * _tile(config, last, chunks, per_group) if last else 0
    weights = n * k * (0.5 + (2 / 128 if per_group else 0))
    return START + max(compute, TILE + (weights + 2 * m * n) / MEMORY)


def _tile(config: Sm90Config, tokens: float, chunks: float, per_group: bool) -> float:
    """Expanding the weights and multiplying overlap, better the more warpgroups there are."""
    expand = EXPAND[per_group] * (4 / config.warpgroups) ** (1 / 3)
    chunk = math.hypot(expand, MULTIPLY * tokens)
    return config.row_warpgroups * (chunks * chunk + EPILOGUE * tokens) + TILE


def _candidates(m: int, n: int, per_group: bool) -> Iterator[Sm90Config]:
    """M cut evenly in several ways, with the most stages that fit, and every last round."""
    fewest = -(-m // max(TOKENS))
    sizes = {_tokens(-(-m // cuts)) for cuts in range(fewest, fewest + MOST_CUTS)}
    for tokens in sorted(sizes, reverse=True):
        for shape in SHAPES if tokens <= 128 else LARGE_SHAPES:
            config = _with_stages(tokens, *shape, m, n, per_group)
            if config is not None:
                cuts = (dataclasses.replace(config, last=last) for last in range(QUARTERS, 0, -1))
                yield from (c for c in cuts if _can_run(c, m, n, per_group))


def _tokens(least: int) -> int:
    """Of a tile that has so many."""
    return min(size for size in TOKENS if size % 32 == 0 and size >= least)


def _with_stages(
    tokens: int, row_warpgroups: int, k_warpgroups: int, m: int, n: int, per_group: bool
) -> Sm90Config | None:
    """With the most stages that fit; None where not even two do."""
    for stages in range(min(12, 16 // k_warpgroups), 1, -1):
        config = Sm90Config(tokens, row_warpgroups, k_warpgroups, stages, cluster=1)
        if tokens == 256 and grid(config, m, n)[1] >= MANY_ROUNDS * SMS:
            config = dataclasses.replace(config, cluster=2)
        if _can_run(config, m, n, per_group):
            return config
    return None


def _can_run(config: Sm90Config, m: int, n: int, per_group: bool) -> bool:
    try:
        check_config(config, m, n, per_group)
    except ValueError:
        return False
    return True
