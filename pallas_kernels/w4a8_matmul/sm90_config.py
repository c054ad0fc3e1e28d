"""What a config of the wgmma kernel takes, and which ones can run; sm90_rules chooses."""

from __future__ import annotations

import dataclasses

from qserve_jax.pallas_kernels.w4a8_matmul.layout import CODE_WORDS, FEATURES, ROWS, SCALE_WORDS
from qserve_jax.pallas_kernels.w4a8_matmul.sm90_tiles import QUARTERS, SMS, Sm90Config, cut

SHARED_BYTES = 232448
TOKENS = (8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256)
"""What wgmma takes for int8."""


@dataclasses.dataclass(frozen=True)
class SharedMemory:
    """Byte offsets of a block's shared memory, from an address that is a multiple of 1024.

    A slot's x tile [tokens, 128] lies at x + slot * x_bytes, its weights at weights + slot *
    weight_bytes, 16-row tiles of `tile_bytes`. partials: int32 sums on their way between
    warpgroups; where a block has one tile only, they lie where the slots were. incoming: the same
    of other blocks, behind them. columns: what belongs to tokens, [warpgroup, 2 tiles, scale or sum
    of codes, tokens], 4 bytes each.
    """

    x_bytes: int
    weight_bytes: int
    weights: int
    partials: int
    incoming: int
    columns: int
    column_bytes: int
    size: int
    barriers: int


def shared_memory(config: Sm90Config, m: int, n: int, per_group: bool) -> SharedMemory:
    tile = 4 * (CODE_WORDS + (SCALE_WORDS if per_group else 0))
    x_bytes = config.tokens * FEATURES
    weight_bytes = config.rows // ROWS * tile
    weights = config.slots * x_bytes
    end = weights + config.slots * weight_bytes
    partials = 0 if cut(config, m, n).most == 1 else end
    incoming = partials + (config.k_warpgroups - 1) * config.rows * config.tokens * 4
    part = config.part_tokens * config.k_warpgroups * config.rows * 4
    columns = max(end, incoming + (config.k_blocks - 1) * part)
    column_bytes = (1 if per_group else 2) * 4 * config.tokens
    return SharedMemory(
        x_bytes=x_bytes,
        weight_bytes=weight_bytes,
        weights=weights,
        partials=partials,
        incoming=incoming,
        columns=columns,
        column_bytes=column_bytes,
        size=columns + 2 * config.warpgroups * column_bytes,
        barriers=2 * config.slots + (config.warpgroups if config.k_blocks > 1 else 0),
    )


def check_config(config: Sm90Config, m: int, n: int, per_group: bool) -> None:
    """ValueError unless the kernel runs with this config."""
    if rule := _broken_rule(config, m, n, per_group):
        raise ValueError(f"{config} cannot run: {rule}")


def _broken_rule(config: Sm90Config, m: int, n: int, per_group: bool) -> str | None:
    """Four warps copy every fourth chunk, and wait for a slot by the parity of its round. A warp
    must not come two rounds ahead of those that multiply, where the parity is the same again: what
    it waited for four chunks before keeps it from there, with four slots and whole turns of four.
    """
    *sizes, lead, k_blocks = dataclasses.astuple(config)
    if min(*sizes, k_blocks) < 1 or lead < 0:
        return "all fields but lead must be at least 1"
    if config.cluster > 2:
        return "cluster must be 1 or 2: larger ones do not fill the GPU"
    if k_blocks > 4:
        return "k_blocks must be at most 4: larger clusters do not fill the GPU"
    memory = shared_memory(config, m, n, per_group)
    # Mosaic rounds both up to 1024.
    used = _round_up(memory.size + 1024, 1024) + _round_up(8 * memory.barriers, 1024)
    needs = config.tokens // 2 + 44
    least = config.tokens // 2 + 30  # with which ptxas compiles at all
    part = config.tokens // config.k_warpgroups
    for holds, rule in (
        (config.tokens in TOKENS, f"tokens must be one of {TOKENS}"),
        (config.row_warpgroups <= 4, "row_warpgroups must be at most 4"),
        (config.warpgroups <= 6, "row_warpgroups * k_warpgroups must be at most 6"),
        (part % 8 == 0, "tokens must be a multiple of 8 k_warpgroups"),
        (config.tokens % (8 * config.cluster) == 0, "tokens must be a multiple of 8 cluster"),
        (config.k_warpgroups in (1, 2, 4), "k_warpgroups must be 1, 2 or 4, which divide 4"),
        (config.stages >= 2, "stages must be at least 2"),
        (config.last <= QUARTERS, "last must be 1, 2, 3 or 4 quarters"),
        (
            config.last == QUARTERS or config.tokens in (64, 128, 256),
            "last needs tokens of 64, 128 or 256, of which wgmma takes the quarters",
        ),
        (
            config.last != 3 or (config.row_warpgroups, config.cluster) == (2, 1),
            "last = 3 needs 2 row_warpgroups and no cluster",
        ),
        (
            lead == 0 or (config.row_warpgroups > 1 and config.k_warpgroups == 1),
            "lead needs several row_warpgroups and one k_warpgroup",
        ),
        (lead < config.slots, f"lead must be below the {config.slots} chunks in flight"),
        (config.slots >= 4, "k_warpgroups * stages must be at least 4, a slot for each warp"),
        (
            k_blocks == 1 or (config.cluster, config.last, lead) == (1, QUARTERS, 0),
            "k_blocks needs whole tiles, and neither a cluster along N nor a lead",
        ),
        (k_blocks == 1 or part >= 8 * k_blocks, "tokens must be 8 k_warpgroups k_blocks or more"),
        (
            k_blocks == 1 or cut(config, m, n).most == 1,
            f"k_blocks needs tiles for one round of {SMS // k_blocks} clusters at most",
        ),
        (needs <= config.registers, f"needs {needs} registers of {config.registers}"),
        (least <= config.launch_registers, f"needs {least} registers of {config.launch_registers}"),
        (used <= SHARED_BYTES, f"takes {used} bytes of shared memory of {SHARED_BYTES}"),
    ):
        if not holds:
            return rule
    return None


def _round_up(value: int, to: int) -> int:
    return -(-value // to) * to
