"""What a prefill attention kernel knows when it is built, and what it refuses."""

from __future__ import annotations

import dataclasses
import math

from qserve_jax.quantization.packing import code_words
from qserve_jax.quantization.qtensor import Array, KVCache

HALVES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128)
TILE = 64
"""Keys that are scored at once: a page, or as many new tokens."""
WARPS = 8
ROWS = 16 * WARPS
"""Query rows of a block, 16 a warp: the query heads of a KV head, token by token."""
MINUS_FAR = -1e30
"""A row's maximum before it has seen a key."""
MARGIN = 8.0
"""How far in powers of two scores may lie above the maximum that weights are relative to."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """B rows, T new tokens, N query heads, K KV heads, H head_dim. width: pages of the block table.

    full: whether new tokens are attended unquantised; then the pages hold what is before them.
    stored: the type of a 16-bit cache.
    """

    rows: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    bits: int
    stored: str
    num_pages: int
    layers: int | None
    width: int
    full: bool
    sm_scale: float
    window: int | None

    @property
    def group(self) -> int:
        """Query heads of a KV head (G)."""
        return self.heads // self.kv_heads

    @property
    def tiles(self) -> int:
        """Of 128 query rows, of a KV head of a row of the batch."""
        return math.ceil(self.tokens * self.group / ROWS)

    @property
    def blocks(self) -> int:
        """Of the batch and all KV heads."""
        return self.rows * self.kv_heads * self.tiles

    @property
    def side_bytes(self) -> int:
        """Of K or V of one token in the cache."""
        return 2 * self.head_dim if self.bits == 16 else 4 * code_words(self.head_dim, self.bits)

    @property
    def block_bytes(self) -> int:
        """Of one page of one KV head, K, V and scales."""
        return TILE * (2 * self.side_bytes + (0 if self.bits == 16 else 8))

    @property
    def score_factor(self) -> float:
        """From q @ k to the exponent of two."""
        return self.sm_scale * math.log2(math.e)

    # Shared memory of mosaic_prefill, in bytes: two tiles, of K and V [TILE] rows of halves each.

    @property
    def stride(self) -> int:
        """Of a token. 16 bytes more than it needs, so that 8 rows lie in different banks."""
        return 2 * self.head_dim + 16

    @property
    def values_at(self) -> int:
        return TILE * self.stride

    @property
    def tile_bytes(self) -> int:
        return 2 * TILE * self.stride

    @property
    def shared_bytes(self) -> int:
        return 2 * self.tile_bytes


def problem(
    backend: str,
    q: Array,
    cache: KVCache,
    block_table: Array,
    *,
    new_k: Array | None,
    attends: str,
    layer: Array | int | None,
    sm_scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Problem:
    """Raises NotImplementedError on what the kernel does not take; q is [B, T, N, H]."""
    b, t, n, h = q.shape
    stored, full = cache.pages.dtype.name, attends == "full"
    new = new_k.dtype.name if full and new_k is not None else q.dtype.name

    def refuse(found: str, fits: bool, needs: object) -> None:
        if not fits:
            raise NotImplementedError(f"{backend}: {found}, but prefill takes {needs}")

    refuse(f"pages of {cache.page_size} tokens", cache.page_size == TILE, TILE)
    refuse(f"a head_dim of {h}", h in HEAD_DIMS, f"one of {HEAD_DIMS}")
    refuse(f"q of {q.dtype}", q.dtype.name in HALVES, f"one of {HALVES}")
    refuse(f"new_k of {new} with q of {q.dtype}", new == q.dtype.name, "one dtype")
    refuse(f"a 16-bit cache of {stored}", cache.bits < 16 or stored in HALVES, f"one of {HALVES}")
    refuse(f"a softcap of {softcap}", softcap is None, "none")
    refuse(f"an sm_scale of {sm_scale}", sm_scale is None or sm_scale > 0, "more than 0")
    refuse(f"{b} rows of {cache.num_pages} pages", b * cache.num_pages > 0, "at least 1")
    return Problem(
        *(b, t, n, cache.num_kv_heads, h, q.dtype.name),
        *(cache.bits, stored, cache.num_pages),
        layers=None if layer is None else cache.pages.shape[0],
        width=block_table.shape[1],
        full=full,
        sm_scale=h**-0.5 if sm_scale is None else float(sm_scale),
        window=window,
    )
