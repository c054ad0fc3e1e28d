"""Which config the wgmma kernel takes: of those that can run, one of the least estimated time."""

from __future__ import annotations

import dataclasses
import itertools
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
SHAPES_ALONG_K = ((2, 2), (1, 4), (4, 1), (3, 1), (2, 1), (1, 2))
"""Warpgroups along N and along K that are tried, and those above 128 tokens, or with k_blocks."""
MOST_CUTS = 8
"""M is cut into at most so many tiles more than it has to be."""
PAIRS = ((32, 2), (64, 4), (128, 2), (256, 2))
"""Tokens and k_warpgroups of tiles of 64 channels that two blocks may have together, all tokens in
one tile. In trials few others with k_blocks were faster, and none of 64 channels by more than 2 %;
tiles of 128 were, by 5 and 6 % at M = 128, K = 28672 and 29568, where the rules take no pair."""
GAIN = {True: 0.95, False: 0.977}
"""Of the time without k_blocks, at most, for a pair to be taken, with groups of 128 or per channel:
so of all trials up to M = 128 the faster is."""
ROOM = {2: 66, 3: 38, 4: 28}
"""Clusters of so many blocks along K that an H200 ran at once. Each lies in one group of SMs, which
three and four do not divide: 44 and 32 of them took two rounds."""
BUSY = 0.65
"""Of the SMs, at least, that configs along K are to use for the tuner to try them."""
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
# Where two blocks have a tile of 64 channels together, fitted to 22 times of 4 sizes: 2 % off.
FETCH = 0.077
"""A chunk, by one stage: nobody has brought its weights into the L2, and more stages hide it."""
MEET = 0.0015
"""Of one token and warpgroup: its sums go to the other warpgroups, and then to the other block."""


def choose_config(m: int, n: int, k: int, per_group: bool) -> Sm90Config:
    """The config for x [m, k] and a weight [k, n]; of equals the one of the larger tiles."""

    def us(config: Sm90Config) -> float:
        return estimate(config, m, n, k, per_group)

    best = _whole_k_config(m, n, k, per_group)
    fitting = [pair for pair in PAIRS if pair[0] >= m][:1]
    pairs = (_with_stages(tokens, 1, shared, m, n, per_group, 2) for tokens, shared in fitting)
    return min((c for c in pairs if c and us(c) < GAIN[per_group] * us(best)), key=us, default=best)


def _whole_k_config(m: int, n: int, k: int, per_group: bool) -> Sm90Config:
    able = _candidates(m, n, per_group)
    return min(able, key=lambda c: round(estimate(c, m, n, k, per_group), 1))


def estimate(config: Sm90Config, m: int, n: int, k: int, per_group: bool) -> float:
    """Microseconds: rounds of tiles, the last one perhaps cut finer, or what memory takes."""
    c = cut(config, m, n)
    last = config.tokens * c.last / QUARTERS if c.parts else 0
    chunks = k / FEATURES / config.k_blocks
    chunks *= TOGETHER if c.most > 1 and config.k_warpgroups > 1 else 1
    compute = c.rounds * _tile(config, config.tokens, chunks, per_group)
    if config.k_blocks > 1:
        compute += FETCH / config.stages * chunks + MEET * config.tokens * config.warpgroups
    compute += FINER * _tile(config, last, chunks, per_group) if last else 0
    weights = n * k * (0.5 + (2 / 128 if per_group else 0))
    return START + max(compute, TILE + (weights + 2 * m * n) / MEMORY)


def _tile(config: Sm90Config, tokens: float, chunks: float, per_group: bool) -> float:
    """Expanding the weights and multiplying overlap, better the more warpgroups there are."""
    expand = EXPAND[per_group] * (4 / config.warpgroups) ** (1 / 3)
    chunk = math.hypot(expand, MULTIPLY * tokens)
    return config.row_warpgroups * (chunks * chunk + EPILOGUE * tokens) + TILE


def other_configs(m: int, n: int, k: int, per_group: bool) -> list[Sm90Config]:
    """What the tuner tries beside the choice: the best without k_blocks, and those with them whose
    tiles fill the GPU and are computed at once."""
    found = [_whole_k_config(m, n, k, per_group)]
    for k_blocks, tokens, shape in itertools.product(ROOM, _sizes(m), SHAPES_ALONG_K):
        tiles = -(-m // tokens) * -(-n // (64 * shape[0]))
        if BUSY * SMS <= tiles * k_blocks and tiles <= ROOM[k_blocks]:
            config = _with_stages(tokens, *shape, m, n, per_group, k_blocks)
            found += [config] if config else []
    return found


def _sizes(m: int) -> list[int]:
    """Tokens of a tile, the most first: M cut evenly in several ways."""
    fewest = -(-m // max(TOKENS))
    sizes = {_tokens(-(-m // cuts)) for cuts in range(fewest, fewest + MOST_CUTS)}
    return sorted(sizes, reverse=True)


def _candidates(m: int, n: int, per_group: bool) -> Iterator[Sm90Config]:
    """M cut evenly in several ways, with the most stages that fit, and every last round."""
    for tokens in _sizes(m):
        for shape in SHAPES if tokens <= 128 else LARGE_SHAPES:
            config = _with_stages(tokens, *shape, m, n, per_group)
            if config is not None:
                cuts = (dataclasses.replace(config, last=last) for last in range(QUARTERS, 0, -1))
                yield from (c for c in cuts if _can_run(c, m, n, per_group))


def _tokens(least: int) -> int:
    """Of a tile that has so many."""
    return min(size for size in TOKENS if size % 32 == 0 and size >= least)


def _with_stages(
    tokens: int,
    row_warpgroups: int,
    k_warpgroups: int,
    m: int,
    n: int,
    per_group: bool,
    k_blocks: int = 1,
) -> Sm90Config | None:
    """With the most stages that fit; None where not even two do."""
    for stages in range(min(12, 16 // k_warpgroups), 1, -1):
        config = Sm90Config(
            tokens, row_warpgroups, k_warpgroups, stages, cluster=1, k_blocks=k_blocks
        )
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
