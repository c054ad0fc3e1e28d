"""What the append kernel knows when it is built, and what it refuses."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from qserve_jax.pallas_kernels.page_layout import PageLayout

DTYPES = ("bfloat16", "float16", "float32")
HEAD_DIMS = (32, 64, 128, 256)
VECTOR = 8
"""Numbers that a lane reads at once; it has two such vectors of each head."""
WARPS = 4
"""Of a block."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes that are known when the kernel is built. heads: of queries, 0 where there are none."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    bits: int
    cache_dtype: str
    page_size: int
    num_pages: int
    layers: int | None
    rotate: bool
    centred: bool
    fused: bool

    @property
    def lanes(self) -> int:
        """That share a head."""
        return self.head_dim // (2 * VECTOR)

    @property
    def query_warps(self) -> int:
        """For the queries of a token."""
        return math.ceil(self.heads * self.lanes / 32)

    @property
    def warps(self) -> int:
        """For a token."""
        return self.query_warps + math.ceil(self.kv_heads * self.lanes / 32)

    @property
    def row_bytes(self) -> int:
        """Of a head of a token."""
        return self.head_dim * jnp.dtype(self.dtype).itemsize

    @property
    def page(self) -> PageLayout:
        itemsize = jnp.dtype(self.cache_dtype).itemsize
        return PageLayout(self.page_size, self.head_dim, self.bits, itemsize)


def problem(qkv, heads, turn, cache, layer) -> Problem:
    """Raises NotImplementedError on what the kernel does not take."""
    dtypes, tokens = {x.dtype.name for x in qkv}, qkv[0].shape[0]
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise NotImplementedError(
            f"q, k and v are {sorted(dtypes)}, but the append kernel takes one of {DTYPES}: cast "
            "them or use the reference"
        )
    if cache.head_dim not in HEAD_DIMS:
        raise NotImplementedError(
            f"head_dim={cache.head_dim}, but the append kernel takes {HEAD_DIMS}: use the reference"
        )
    if tokens == 0:
        raise NotImplementedError("no tokens, but the append kernel takes 1 or more")
    return Problem(
        tokens,
        heads,
        cache.num_kv_heads,
        cache.head_dim,
        dtypes.pop(),
        cache.bits,
        cache.pages.dtype.name,
        cache.page_size,
        cache.num_pages,
        cache.pages.shape[0] if layer is not None else None,
        rotate=turn[0] is not None,
        centred=turn[2] is not None,
        fused=len(qkv) == 1,
    )
