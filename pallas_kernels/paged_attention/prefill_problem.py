"""What a prefill attention kernel knows besides, and what it refuses."""

from __future__ import annotations

import dataclasses
import functools
import math

from qserve_jax.pallas_kernels.paged_attention.problem import (
    HALVES,
    HEAD_DIMS,
    PAGE,
    AttentionProblem,
    refuse,
)
from qserve_jax.quantization.qtensor import Array, KVCache

TILE = PAGE
"""Keys that are scored at once: a page, or as many new tokens."""
WARPS = 8
ROWS = 16 * WARPS
"""Query rows of a block, 16 a warp: the query heads of a KV head, token by token."""
MARGIN = 8.0
"""How far in powers of two scores may lie above the maximum that weights are relative to."""


@dataclasses.dataclass(frozen=True)
class Problem(AttentionProblem):
    """tokens: new ones a row (T). dtype: of q. full: whether new tokens are attended unquantised;
    then the pages hold what is before them."""

    tokens: int
    dtype: str
    full: bool

    @property
    def tiles(self) -> int:
        """Of 128 query rows, of a KV head of a row of the batch."""
        return math.ceil(self.tokens * self.group / ROWS)

    @property
    def blocks(self) -> int:
        """Of the batch and all KV heads."""
        return self.rows * self.kv_heads * self.tiles

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

    check = functools.partial(refuse, backend, taker="prefill")
    check(f"pages of {cache.page_size} tokens", cache.page_size == PAGE, PAGE)
    check(f"a head_dim of {h}", h in HEAD_DIMS, f"one of {HEAD_DIMS}")
    check(f"q of {q.dtype}", q.dtype.name in HALVES, f"one of {HALVES}")
    check(f"new_k of {new} with q of {q.dtype}", new == q.dtype.name, "one dtype")
    check(f"a 16-bit cache of {stored}", cache.bits < 16 or stored in HALVES, f"one of {HALVES}")
    check(f"a softcap of {softcap}", softcap is None, "none")
    check(f"an sm_scale of {sm_scale}", sm_scale is None or sm_scale > 0, "more than 0")
    check(f"{b} rows", b > 0, "at least 1")
    return Problem(
        rows=b,
        heads=n,
        kv_heads=cache.num_kv_heads,
        head_dim=h,
        bits=cache.bits,
        stored=stored,
        num_pages=cache.num_pages,
        layers=None if layer is None else cache.pages.shape[0],
        width=block_table.shape[1],
        sm_scale=h**-0.5 if sm_scale is None else float(sm_scale),
        window=window,
        tokens=t,
        dtype=q.dtype.name,
        full=full,
    )
