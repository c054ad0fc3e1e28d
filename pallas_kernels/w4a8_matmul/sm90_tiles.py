"""How the wgmma kernel's work is cut: which block computes what, and in which round.

Blocks stay: cluster b of C takes tiles b, b + C, ..., tokens first. Where the tiles do not come out
even, the last round leaves blocks without one, and takes as long as a whole one. `last` cuts its
tiles finer, so that it takes as many quarters of the time (K stays whole, so that no sums have to
be added between blocks; where one round does not fill the GPU, `k_blocks` cuts K instead):

    2, 1  a tile goes to two, or four, blocks: each has a half, or a quarter, of its tokens
    3     three tiles beside each other go to four blocks: of their six groups of 64 channels each
          block has one with all tokens, and half of the tokens of another

28672 x 4096 with 256 tokens: 224 tiles of 128 channels are 132 and 92; with last = 3 the 92 go to
124 blocks, and the product takes 1.75 rounds instead of 2.

The formulas of places take numbers and the kernel's registers alike.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

SMS = 132
REGISTERS = 65536
PRODUCER_REGISTERS = 24
QUARTERS = 4
"""Of the tokens of a tile."""


@dataclasses.dataclass(frozen=True)
class Sm90Config:
    """A block has row_warpgroups * k_warpgroups that multiply, and one that copies.

    tokens: of a tile; each warpgroup has sums of 64 output channels x tokens.
    row_warpgroups: beside each other along N; a block's tile has 64 * row_warpgroups channels.
    k_warpgroups: with the same channels; they take the chunks of 128 features in turn.
    stages: steps of k_warpgroups chunks in flight.
    cluster: blocks beside each other along N that share the copies of x.
    last: quarters of a tile that a block computes in the last round, see sm90_tiles; 4 is whole.
    lead: chunks that the first row warpgroup is ahead of the others from the start, so that one's
      epilogue runs beside the other's wgmma. The heuristic leaves it at 0.
    k_blocks: blocks of a cluster that have a tile together, each some of the chunks; they add their
      int32 sums in each other's shared memory. The heuristic takes 1 or 2.
    """

    tokens: int
    row_warpgroups: int
    k_warpgroups: int
    stages: int
    cluster: int
    last: int = QUARTERS
    lead: int = 0
    k_blocks: int = 1

    @property
    def cluster_blocks(self) -> int:
        """Beside each other along N, or along K."""
        return self.cluster * self.k_blocks

    @property
    def warpgroups(self) -> int:
        """Those that multiply."""
        return self.row_warpgroups * self.k_warpgroups

    @property
    def rows(self) -> int:
        return 64 * self.row_warpgroups

    @property
    def slots(self) -> int:
        """Chunks in flight."""
        return self.stages * self.k_warpgroups

    @property
    def part_tokens(self) -> int:
        """That each of the k_blocks adds up, of a warpgroup's: the least eights that are enough."""
        return 8 * -(-self.tokens // (8 * self.k_warpgroups * self.k_blocks))

    @property
    def boxes(self) -> int:
        """Parts of x of a slot that are copied apart: by the blocks of the cluster, or as few as
        the last round needs."""
        return max(self.cluster, QUARTERS // self.last)

    @property
    def registers(self) -> int:
        """Of a thread that multiplies, after the one that copies has given its own away."""
        given = self.launch_registers * (self.warpgroups + 1) - PRODUCER_REGISTERS
        return min(given // self.warpgroups // 8 * 8, 240)

    @property
    def launch_registers(self) -> int:
        """Of every thread; ptxas allocates no more for the code of any."""
        return min(REGISTERS // (128 * (self.warpgroups + 1)) // 8 * 8, 248)


@dataclasses.dataclass(frozen=True)
class Cut:
    """whole: tiles that are computed as they are, in `rounds` rounds; then `parts` finer ones, one
    for each of the first clusters (0 where last is 4). All but config.cluster is of all clusters.
    """

    clusters: int
    token_tiles: int
    whole: int
    rounds: int
    parts: int
    last: int

    @property
    def most(self) -> int:
        """Tiles of a block, whole or not, at most."""
        return self.rounds + (self.parts > 0)

    @property
    def less_x(self) -> bool:
        """Whether a part needs not all tokens; with last = 3 one of its warpgroups does."""
        return self.last < 3

    @property
    def quarters(self) -> int:
        """How long all rounds take, in quarters of a whole one."""
        return self.rounds * QUARTERS + (self.last if self.parts else 0)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Quarters of a tile's tokens that a warpgroup may have."""
        last = {QUARTERS: (), 3: (2,), 2: (2,), 1: (1,)}[self.last]
        return (QUARTERS, *last) if self.rounds or self.last >= 3 else last


class Part(NamedTuple):
    """What a warpgroup computes: 64 channels from 64 * group on, tokens from `token` on, so many
    quarters of a tile's tokens. offset: of those in the x tile that its block copies, in tokens.
    """

    token: Any
    group: Any
    offset: Any
    quarters: Any


def grid(config: Sm90Config, m: int, n: int) -> tuple[int, int]:
    """Clusters, and whole tiles of a cluster (token tiles x groups of blocks along N) for them."""
    tiles = -(-m // config.tokens) * -(-n // (config.rows * config.cluster))
    return min(SMS // config.cluster_blocks, tiles), tiles


def cut(config: Sm90Config, m: int, n: int) -> Cut:
    """Whole tiles only where config.last has no blocks for its parts, or triples of tiles differ
    in tokens."""
    clusters, tiles = grid(config, m, n)
    token_tiles = -(-m // config.tokens)
    most = SMS // config.cluster_blocks
    rounds, rest = divmod(tiles, most)
    if config.last == 3:
        # Of a triple that is not whole, one part for each of its groups: the first tiles' alone.
        triples, more = divmod(rest // token_tiles, 3)
        parts = token_tiles * (4 * triples + 2 * more)
        fits = rest % token_tiles == 0
    else:
        parts = rest * QUARTERS // config.last
        fits = config.last < QUARTERS
    if not fits or not 0 < parts <= most:
        return Cut(clusters, token_tiles, tiles, -(-tiles // clusters), 0, QUARTERS)
    return Cut(most if rounds else parts, token_tiles, tiles - rest, rounds, parts, config.last)


def whole_tile(config: Sm90Config, c: Cut, tile: Any, rank: Any, row_group: Any) -> Part:
    """Of the row_group-th warpgroups of the rank-th block of the cluster that has the tile.
    Channels may begin beyond N."""
    group = (tile // c.token_tiles * config.cluster + rank) * config.row_warpgroups + row_group
    return Part(tile % c.token_tiles * config.tokens, group, 0, QUARTERS)


def last_part(config: Sm90Config, c: Cut, part: Any, rank: Any, row_group: Any) -> Part:
    """The same of one of the last round's parts."""
    if c.last == 3:
        block = part // c.token_tiles
        first = c.whole // c.token_tiles * 2 + block // 4 * 6  # of six groups for four blocks
        turn = block % 4
        offset = row_group * (turn % 2) * (config.tokens // 2)
        token = part % c.token_tiles * config.tokens + offset
        group = first + turn + row_group * (4 + turn // 2 - turn)
        return Part(token, group, offset, QUARTERS - 2 * row_group)
    pieces = QUARTERS // c.last
    tile = whole_tile(config, c, c.whole + part // pieces, rank, row_group)
    token = tile.token + part % pieces * (config.tokens // pieces)
    return Part(token, tile.group, 0, c.last)
