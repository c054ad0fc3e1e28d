"""How the small-M kernel cuts a product into blocks and warps, and what that takes."""

from __future__ import annotations

import dataclasses

from qserve_jax.pallas_kernels.w4a8_matmul.layout import CODE_WORDS, FEATURES, ROWS, SCALE_WORDS

MAX_TOKENS = 64
SHARED_BYTES = 232_448 - 1024  # of a block on Hopper, less what alignment may take
SMS = 132  # of an H100 or H200 SXM; elsewhere the choice is only less even
IN_FLIGHT = 120_000  # bytes of weights on their way to a block: latency times bandwidth, and more
IN_FLIGHT_BESIDE_RING = 60_000  # where x does not fit and needs the room for its own ring
MAX_UNEVEN = 1.03  # steps * k_warps over the chunks of K; the excess is warps that wait at the end


@dataclasses.dataclass(frozen=True)
class SmallMConfig:
    """A block has row_warps * k_warps warps. Chunk: 128 features; tile: 16 rows x 1 chunk.

    row_warps: warps beside each other along N.
    row_tiles: tiles on top of each other per warp (1 or 2); a block has 16 * row_tiles * row_warps
      output channels.
    k_warps: warps with the same rows, which take the chunks of K in turn.
    weight_stages: steps of weights in flight, per warp.
    x_stages: steps of x in shared memory; all of them, or at least 2.
    """

    row_warps: int
    row_tiles: int
    k_warps: int
    weight_stages: int
    x_stages: int

    @property
    def warps(self) -> int:
        """Those that work; the block is filled up to a multiple of four."""
        return self.row_warps * self.k_warps

    @property
    def warpgroups(self) -> int:
        return -(-self.warps // 4)

    @property
    def tiles(self) -> int:
        """Of a block, along N."""
        return self.row_warps * self.row_tiles

    @property
    def rows(self) -> int:
        return ROWS * self.tiles


@dataclasses.dataclass(frozen=True)
class SharedMemory:
    """Byte offsets of a block's shared memory: weight rings, x ring, then what the epilogue reads.

    The rings end as `partials`, int32 [k_warps, 8-token tiles * 8, partial_stride / 4].
    """

    tile_bytes: int
    x_step_bytes: int
    x: int
    partial_stride: int
    channels: int
    tokens: int
    size: int
    barriers: int


def shared_memory(config: SmallMConfig, m: int, per_group: bool) -> SharedMemory:
    """What `config` takes for m tokens."""
    tile = 4 * (CODE_WORDS + (SCALE_WORDS if per_group else 0))
    x_step = config.k_warps * m * FEATURES
    x = config.warps * config.weight_stages * config.row_tiles * tile
    stride = 4 * (config.rows + 4)  # 4 words off, so that the eight tokens of a store spread out
    partials = config.k_warps * 8 * -(-m // 8) * stride
    channels = max(x + config.x_stages * x_step, partials)
    tokens = channels + 3 * 4 * config.rows
    return SharedMemory(
        tile_bytes=tile,
        x_step_bytes=x_step,
        x=x,
        partial_stride=stride,
        channels=channels,
        tokens=tokens,
        size=tokens + 2 * 4 * MAX_TOKENS,
        barriers=config.warps * config.weight_stages + 2 * config.x_stages,
    )


def check_config(config: SmallMConfig, m: int, k: int, per_group: bool) -> None:
    """ValueError unless the kernel runs with this config."""
    steps = -(-k // FEATURES // config.k_warps)
    memory = shared_memory(config, m, per_group)
    used = memory.size + 8 * memory.barriers
    for holds, rule in (
        (min(dataclasses.astuple(config)) >= 1, "all fields must be at least 1"),
        (config.row_tiles <= 2, "row_tiles must be 1 or 2"),
        (config.warps <= 32, "row_warps * k_warps must be at most 32"),
        (config.tiles <= 32, "row_warps * row_tiles must be at most 32"),
        (config.k_warps * FEATURES <= k, f"k_warps must be at most K/128 = {k // FEATURES}"),
        (config.weight_stages <= steps, f"weight_stages must be at most {steps}, the steps"),
        (2 <= config.x_stages <= steps or config.x_stages == steps, f"x_stages: 2 to {steps}"),
        (used <= SHARED_BYTES, f"takes {used} bytes of shared memory of {SHARED_BYTES}"),
    ):
        if not holds:
            raise ValueError(f"{config} cannot run {m=}, {k=}: {rule}")


def choose_config(m: int, n: int, k: int, per_group: bool) -> SmallMConfig:
    """The config for x [m, k] and a weight [k, n], as sweeps on an H200 suggest.

    About one block per SM, in as few waves as can be; then as many warps along K as registers
    allow and as divide it evenly; as many bytes in flight as hide the latency, and all of x in
    shared memory where it fits.

    Raises NotImplementedError where no config fits into shared memory.
    """
    row_warps, row_tiles = _rows(m, n)
    chunks = k // FEATURES
    for k_warps in range(min(_most_k_warps(m, row_warps, row_tiles), chunks), 0, -1):
        steps = -(-chunks // k_warps)
        if steps * k_warps > MAX_UNEVEN * chunks:
            continue
        config = SmallMConfig(row_warps, row_tiles, k_warps, weight_stages=1, x_stages=1)
        if config := _fit(config, m, steps, per_group):
            return config
    raise NotImplementedError(f"mosaic_sm90: {m=}, {n=}, {k=} does not fit in shared memory")


def _rows(m: int, n: int) -> tuple[int, int]:
    """row_warps, row_tiles. Two tiles a warp halve the reads of x; odd counts leave one idle."""
    tiles = n // ROWS
    waves = -(-tiles // (SMS * 28))
    per_block = -(-tiles // (SMS * waves))
    enough = 12 if m <= 16 else 6
    many = per_block > (24 if m <= 32 else 16)
    row_tiles = 2 if many or (per_block >= enough and per_block % 2 == 0) else 1
    return -(-per_block // row_tiles), row_tiles


def _most_k_warps(m: int, row_warps: int, row_tiles: int) -> int:
    """By the registers a thread needs; with many tokens also by the steps of x that fit."""
    if m > 32:
        return max(1, min(4, 12 // row_warps))
    return max(1, (16 if m > 16 else 24 if row_tiles == 1 else 20) // row_warps)


def _fit(config: SmallMConfig, m: int, steps: int, per_group: bool) -> SmallMConfig | None:
    """With the stages that fit: all of x and at least 3 of the weights, or else a ring of x."""
    tiles = config.warps * config.row_tiles
    for in_flight, all_x in ((IN_FLIGHT, True), (IN_FLIGHT_BESIDE_RING, False)):
        most = max(3, round(in_flight / (tiles * 4 * (CODE_WORDS + SCALE_WORDS))))
        least = min(3, steps) if all_x else 1
        for weight_stages in range(min(most, steps), least - 1, -1):
            tried = dataclasses.replace(config, weight_stages=weight_stages)
            tried = dataclasses.replace(tried, x_stages=_x_stages(tried, m, steps, per_group))
            if tried.x_stages >= (steps if all_x else 1):
                return tried
    return None


def _x_stages(config: SmallMConfig, m: int, steps: int, per_group: bool) -> int:
    """As many as fit; 0 where neither all nor two do."""
    one = shared_memory(config, m, per_group)
    if one.size + 8 * one.barriers > SHARED_BYTES:
        return 0
    room = SHARED_BYTES - one.x - (one.size - one.channels) - 8 * one.barriers
    stages = min(steps, room // (one.x_step_bytes + 16))
    return stages if stages == steps or stages >= 2 else 0
