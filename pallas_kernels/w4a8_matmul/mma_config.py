"""How the mosaic_mma kernel cuts a product into blocks and warps, and what that takes; mma_rules
chooses."""

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
