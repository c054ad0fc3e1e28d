"""What every attention kernel knows when it is built, of one new token or of many."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from qserve_jax.pallas_kernels.page_layout import PageLayout
from qserve_jax.quantization.qtensor import Array

HALVES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128)
PAGE = 64
"""Tokens a page."""
SMS = 132
"""Of the GPU that all is cut for. Others are filled as well, or nearly."""
LOG2E = math.log2(math.e)
LOWEST = -1e30
"""A maximum of nothing: exp2 of two of them apart is 1, which -inf would make NaN."""


@dataclasses.dataclass(frozen=True)
class AttentionProblem:
    """B rows, N query heads, K KV heads, H head_dim.

    stored: the type of a 16-bit cache. width: pages of the block table.
    """

    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    bits: int
    stored: str
    num_pages: int
    layers: int | None
    width: int
    sm_scale: float
    window: int | None

    @property
    def group(self) -> int:
        """Query heads of a KV head (G)."""
        return self.heads // self.kv_heads

    @property
    def page(self) -> PageLayout:
        return PageLayout(PAGE, self.head_dim, self.bits)

    @property
    def score_factor(self) -> float:
        """From q @ k to the exponent of two."""
        return self.sm_scale * LOG2E


def refuse(backend: str, found: str, fits: bool, needs: object, taker: str = "the kernel") -> None:
    """Raises NotImplementedError, unless it fits."""
    if not fits:
        raise NotImplementedError(f"{backend}: {found}, but {taker} takes {needs}")


def real_tokens(query_lens: Array, context_lens: Array, tokens: int) -> Array:
    """query_lens in 0..min(tokens, context_lens): how many of the new tokens are read."""
    return jnp.maximum(jnp.minimum(query_lens, jnp.minimum(context_lens, tokens)), 0)
