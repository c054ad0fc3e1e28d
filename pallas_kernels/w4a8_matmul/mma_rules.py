"""Which config the mosaic_mma kernel takes."""

from __future__ import annotations

from qserve_jax.pallas_kernels.w4a8_matmul.layout import FEATURES
from qserve_jax.pallas_kernels.w4a8_matmul.mma_config import MmaConfig

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
MORE_STAGES = {MmaConfig(2, 4, 2, 32, 3): MmaConfig(2, 4, 2, 32, 4)}
"""What fits without scales of groups, where K is long: 57344 x 8192 in 63 us instead of 82, 10240 x
8192 in 16.4 instead of 17.2; but 28672 x 4096 in 19.2 instead of 18.0."""
LONG_K = 8192
SMS = 132  # of an H100 or H200 SXM, two blocks on each; elsewhere the choice is only less even


def choose_config(m: int, n: int, k: int, per_group: bool) -> MmaConfig:
    """The config for x [m, k] and a weight [k, n]: of the candidates, the one of the least `cost`.

    As few tokens to a block as hold m; from 65 tokens on 64 or 128.
    """
    tokens = (64, 128) if m > 64 else (max(8, 1 << (m - 1).bit_length()),)
    able = [c for c in CANDIDATES if c.tokens in tokens and c.k_warps * FEATURES <= k]
    config = min(able, key=lambda c: cost(c, m, n))
    return config if per_group or k < LONG_K else MORE_STAGES.get(config, config)


def cost(config: MmaConfig, m: int, n: int) -> float:
    """Time for each feature of K, in the time that one byte takes to be loaded by a block.

    Waves of blocks times what a block does: load weights of half a byte and x, and multiply, 25
    products to the byte. Fitted to times on an H200 of which no record is kept. Of the ten products
    in docs/results/h200_tune_w4a8.json it chooses the fastest candidate in four, in the others one
    9 to 23 % slower (N x K of 10240 x 8192, 22016 x 4096, 37888 x 3584): the tuned file has those.
    """
    blocks = -(-n // config.rows) * -(-m // config.tokens)
    full, rest = divmod(blocks, 2 * SMS)
    last = 0 if rest == 0 else 0.7 if rest <= SMS else 1  # a block alone on its SM runs faster
    block = config.rows / 2 + config.tokens + config.rows * config.tokens / 25
    return (full + last) * block
