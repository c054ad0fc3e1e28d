"""What a decode attention kernel knows besides, its operands, and what is refused."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from qserve_jax.pallas_kernels.paged_attention.problem import (
    HALVES,
    HEAD_DIMS,
    PAGE,
    AttentionProblem,
    refuse,
)
from qserve_jax.quantization.qtensor import Array, KVCache

FLOATS = (*HALVES, "float32")
COLUMNS = 8
"""Query heads of a KV head that a block takes, the columns of one mma; each of the four warps of a
warpgroup takes 16 tokens of a page, the rows."""

MOST_SOFTCAP = 1e4
"""1 - 2 / (exp(2 x) + 1) loses digits of a small tanh(x): of the output in bf16 the relative error
is 1.9e-3 under this softcap and 4.9e-3 under 1e5."""


@dataclasses.dataclass(frozen=True)
class Problem(AttentionProblem):
    """new: the type of new_k and new_v, None where nothing is attended unquantised. ordered:
    whether rows come in a given order."""

    q_dtype: str
    new: str | None
    ordered: bool
    softcap: float | None

    @property
    def head_blocks(self) -> int:
        """Blocks that a row takes, before it is split: a KV head and up to 8 of its queries."""
        return self.kv_heads * -(-self.group // COLUMNS)

    @property
    def mma_dtype(self) -> str:
        """What the tensor core multiplies: codes are exact in f16, a 16-bit cache as it is."""
        return self.stored if self.bits == 16 else "float16"

    @property
    def splits_query(self) -> bool:
        """Whether q is given to the tensor core as the sum of two: bf16 alone would round it."""
        return self.mma_dtype == "bfloat16" and self.q_dtype != "bfloat16"

    @property
    def score_factor(self) -> float:
        """From q @ k to what exp2 takes; under a softcap to 2 log2(e) x of tanh(x)."""
        return super().score_factor * (1 if self.softcap is None else 2 / self.softcap)


def gather(
    backend: str,
    q: Array,
    cache: KVCache,
    block_table: Array,
    context_lens: Array,
    *,
    new_k: Array | None,
    new_v: Array | None,
    query_lens: Array,
    attends: str,
    layer: Array | int | None,
    sm_scale: float | None,
    window: int | None,
    softcap: float | None,
    order: Array | None,
) -> tuple[Problem, dict[str, Array]]:
    """The problem, and the kernel's operands by name; q is [B, 1, N, H].

    Raises NotImplementedError on several new tokens, another page size than 64, other head sizes
    than 64 and 128, other dtypes than bf16, f16 and f32 (a 16-bit cache: bf16 and f16), a softcap
    above MOST_SOFTCAP.
    """
    b, t, n, h = q.shape
    stored, full = cache.pages.dtype.name, attends == "full"
    new = new_k.dtype.name if full and new_k is not None else None
    refuse(backend, f"{t} new tokens a row", t == 1, "one: use backend='reference' or None")
    refuse(backend, f"pages of {cache.page_size} tokens", cache.page_size == PAGE, f"{PAGE}")
    refuse(backend, f"a head_dim of {h}", h in HEAD_DIMS, f"one of {HEAD_DIMS}")
    refuse(backend, f"q of {q.dtype}", q.dtype.name in FLOATS, f"one of {FLOATS}")
    refuse(backend, f"new_k of {new}", new in (None, *FLOATS), f"one of {FLOATS}")
    is_half = cache.bits != 16 or stored in HALVES
    refuse(backend, f"a 16-bit cache of {stored}", is_half, f"one of {HALVES}")
    is_small = softcap is None or softcap <= MOST_SOFTCAP
    refuse(backend, f"a softcap of {softcap}", is_small, f"up to {MOST_SOFTCAP:g}")
    if block_table.shape[1] == 0:
        block_table = jnp.full((b, 1), -1, jnp.int32)
    operands = {
        "q": q.reshape(b, n, h),
        "pages": cache.pages,
        "table": block_table.astype(jnp.int32),
        "context_lens": context_lens.astype(jnp.int32),
    }
    if new is not None and new_k is not None and new_v is not None:
        operands |= {"new_k": new_k, "new_v": new_v.astype(new_k.dtype)}
        operands["query_lens"] = query_lens.astype(jnp.int32)
    if order is not None:
        operands["order"] = order.astype(jnp.int32)
    if layer is not None:
        operands["layer"] = jnp.asarray(layer, jnp.int32).reshape(1)
    problem = Problem(
        rows=b,
        heads=n,
        kv_heads=cache.num_kv_heads,
        head_dim=h,
        bits=cache.bits,
        stored=stored,
        num_pages=cache.num_pages,
        layers=None if layer is None else cache.pages.shape[0],
        width=block_table.shape[1],
        q_dtype=q.dtype.name,
        new=new,
        ordered=order is not None,
        sm_scale=h**-0.5 if sm_scale is None else float(sm_scale),
        window=window,
        softcap=softcap,
    )
    return problem, operands
