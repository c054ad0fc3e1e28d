"""How the mosaic_mma kernel cuts a product into blocks and warps, and what that takes."""

from __future__ import annotations

import dataclasses

from qserve_jax.pallas_kernels.w4a8_matmul.layout import CODE_WORDS, FEATURES, ROWS, SCALE_WORDS

SHARED_BYTES = 99 * 1024 - 1024  # of a block on sm_86 and sm_89, less what alignment may take


@dataclasses.dataclass(frozen=True)
class MmaConfig:
    """A block has k_warps teams of row_warps warps. Chunk: 128 features; tile: 16 rows x 1 chunk.

    row_warps: warps of a team, beside each other along N.
    row_tiles: tiles on top of each other per warp; a block has 16 * row_tiles * row_warps channels.
    k_warps: teams with the same rows and tokens, which take the chunks of K in turn.
    tokens: of a block, a multiple of 8.
    stages: chunks in a team's ring, one of which is multiplied while the others are on their way.
    """

    row_warps: int
    row_tiles: int
    k_warps: int
    tokens: int
    stages: int

    @property
    def warps(self) -> int:
        return self.row_warps * self.k_warps

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def tiles(self) -> int:
        """Of a block, along N."""
        return self.row_warps * self.row_tiles

    @property
    def rows(self) -> int:
        return ROWS * self.tiles

    @property
    def accumulators(self) -> int:
        """Registers of a thread that hold sums."""
        return self.row_tiles * self.tokens // 8 * 4


@dataclasses.dataclass(frozen=True)
class SharedMemory:
    """Byte offsets of a block's shared memory: rings of x and of weights, then the scales.

    The rings end as `partials`, int32 [k_warps, tokens, partial_stride / 4].
    """

    tile_bytes: int
    x_slot: int
    weights: int
    weight_slot: int
    partial_stride: int
    channels: int
    tokens: int
    size: int


def shared_memory(config: MmaConfig, per_group: bool) -> SharedMemory:
    tile = 4 * (CODE_WORDS + (SCALE_WORDS if per_group else 0))
    x_slot = config.tokens * FEATURES
    weights = config.k_warps * config.stages * x_slot
    stride = 4 * (config.rows + 4)  # 4 words off, so that the tokens of a store spread out
    rings = weights + config.k_warps * config.stages * config.tiles * tile
    channels = max(rings, config.k_warps * config.tokens * stride)
    tokens = channels + 3 * 4 * config.rows
    return SharedMemory(
        tile_bytes=tile,
        x_slot=x_slot,
        weights=weights,
        weight_slot=config.row_tiles * tile,
        partial_stride=stride,
        channels=channels,
        tokens=tokens,
        size=tokens + 2 * 4 * config.tokens,
    )


def check_config(config: MmaConfig, k: int, per_group: bool) -> None:
    """ValueError unless the kernel runs with this config."""
    used = shared_memory(config, per_group).size
    registers = 128 if config.threads <= 256 else 64  # of 255 or 128 that a thread may have
    for holds, rule in (
        (min(dataclasses.astuple(config)) >= 1, "all fields must be at least 1"),
        (config.warps in (4, 8, 12, 16), "row_warps * k_warps must be 4, 8, 12 or 16"),
        (config.k_warps * FEATURES <= k, f"k_warps must be at most K/128 = {k // FEATURES}"),
        (config.k_warps <= 14, "k_warps must be at most 14, the barriers there are"),
        (config.tokens % 8 == 0, "tokens must be a multiple of 8"),
        (config.stages >= 2, "stages must be at least 2"),
        (config.row_tiles <= 4, "row_tiles must be at most 4"),
        (
            max(config.rows, config.tokens) <= config.threads,
            f"channels and tokens must be at most {config.threads}, the threads",
        ),
        (
            config.accumulators <= registers,
            f"a thread would hold {config.accumulators} sums of at most {registers}",
        ),
        (used <= SHARED_BYTES, f"takes {used} bytes of shared memory of {SHARED_BYTES}"),
    ):
        if not holds:
            raise ValueError(f"{config} cannot run {k=}: {rule}")


CANDIDATES = (  # the fastest of each number of rows and tokens; all fit into SHARED_BYTES
    *[MmaConfig(1, 1, 8, tokens, 3) for tokens in (8, 16)],
    *[MmaConfig(1, 2, 4, tokens, 4) for tokens in (8, 16)],
    *[MmaConfig(2, 2, 4, tokens, 3) for tokens in (8, 16)],
    *[MmaConfig(1, 2, 4, 32, 3), MmaConfig(2, 2, 2, 32, 4), MmaConfig(2, 4, 2, 32, 3)],
    *[MmaConfig(1, 2, 4, 64, 2), MmaConfig(2, 2, 2, 64, 3), MmaConfig(2, 4, 2, 64, 2)],
    MmaConfig(4, 2, 1, 128, 3),
    *[MmaConfig(4, 2, 1, tokens, 4) for tokens in (8, 16, 32)],  # fast at 16; for any K
    MmaConfig(4, 2, 1, 64, 3),
)
SMS = 132  # of an H100 or H200 SXM, two blocks on each; elsewhere the choice is only less even


def choose_config(m: int, n: int, k: int) -> MmaConfig:
    """The config for x [m, k] and a weight [k, n]: of the candidates, the one of the least `cost`.

    As few tokens to a block as hold m; from 65 tokens on 64 or 128.
    """
    tokens = (64, 128) if m > 64 else (max(8, 1 << (m - 1).bit_length()),)
    able = [c for c in CANDIDATES if c.tokens in tokens and c.k_warps * FEATURES <= k]
    return min(able, key=lambda c: cost(c, m, n))


def cost(config: MmaConfig, m: int, n: int) -> float:
    """Time for each feature of K, in the time that one byte takes to be loaded by a block.

    Waves of blocks times what a block does: load weights of half a byte and x, and multiply, 25
    products to the byte. Fitted to times on an H200: of 25 products with M 1..4096 it chooses the
    fastest candidate that was timed, or one at most 3 % slower.
    """
    blocks = -(-n // config.rows) * -(-m // config.tokens)
    full, rest = divmod(blocks, 2 * SMS)
    last = 0 if rest == 0 else 0.7 if rest <= SMS else 1  # a block alone on its SM runs faster
    block = config.rows / 2 + config.tokens + config.rows * config.tokens / 25
    return (full + last) * block
