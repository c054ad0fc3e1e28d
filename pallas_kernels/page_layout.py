"""Where things lie in a page of the cache (`KVCache`): what append writes, attention reads."""

from __future__ import annotations

import dataclasses

from qserve_jax.quantization.packing import code_words
from qserve_jax.quantization.qtensor import kv_bytes_per_token


@dataclasses.dataclass(frozen=True)
class PageLayout:
    """Bytes of one KV head's block of a page: K of all tokens, V of them, and, of a quantised
    cache, their scales, (sk, ck, sv, cv) in float16 for each.

    size: tokens. itemsize: of a 16-bit cache's dtype.
    """

    size: int
    head_dim: int
    bits: int
    itemsize: int = 2

    @property
    def side_bytes(self) -> int:
        """Of K or V of one token."""
        if self.bits == 16:
            return self.head_dim * self.itemsize
        return 4 * code_words(self.head_dim, self.bits)

    @property
    def values_at(self) -> int:
        """Where V begins."""
        return self.size * self.side_bytes

    @property
    def scales_at(self) -> int:
        """Where scales begin, 8 bytes a token."""
        return 2 * self.values_at

    @property
    def block_bytes(self) -> int:
        """Of it all."""
        return self.size * kv_bytes_per_token(self.head_dim, self.bits, self.itemsize)
