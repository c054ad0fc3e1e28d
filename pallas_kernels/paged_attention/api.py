"""Checks and dispatch of `paged_attention`."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from qserve_jax.pallas_kernels.backend import (
    check_cache,
    check_floats,
    check_integers,
    dispatch,
    usable,
)
from qserve_jax.pallas_kernels.paged_attention import reference
from qserve_jax.quantization.qtensor import Array, KVCache


def _mosaic_sm90(q: Array, *args: Any, **kwargs: Any) -> Array:
    """Imported when it is asked for: what it stands on is JAX's for GPUs."""
    from qserve_jax.pallas_kernels.paged_attention import mosaic_prefill, mosaic_sm90

    if q.shape[1] > 1:
        return mosaic_prefill.attention("mosaic_sm90", q, *args, **kwargs)
    return mosaic_sm90.decode(q, *args, **kwargs)


def _mosaic_mma(q: Array, *args: Any, **kwargs: Any) -> Array:
    from qserve_jax.pallas_kernels.paged_attention import mosaic_mma, mosaic_prefill

    if q.shape[1] > 1:
        return mosaic_prefill.attention("mosaic_mma", q, *args, **kwargs)
    return mosaic_mma.decode(q, *args, **kwargs)


def _reference(*args: Any, order: Array | None, **kwargs: Any) -> Array:
    return reference.paged_attention(*args, **kwargs)


ATTENTION_BACKENDS = {
    "mosaic_sm90": _mosaic_sm90,
    "mosaic_mma": _mosaic_mma,
    "reference": _reference,
}
ATTENDS = ("full", "quantized")


def _check(
    q, cache, block_table, context_lens, new_k, new_v, query_lens, order, attends, layer
) -> None:
    if attends not in ATTENDS:
        raise ValueError(f"attends={attends!r} is unknown: use one of {ATTENDS}")
    if q.ndim != 4:
        raise ValueError(f"q has shape {q.shape}: it must be [B, T, N, H] or [B, N, H]")
    check_cache(cache, layer)
    b, t, n, h = q.shape
    k = cache.num_kv_heads
    if h != cache.head_dim or n % k:
        raise ValueError(f"q {q.shape} does not fit a cache of {k} heads of {cache.head_dim}")
    if block_table.shape[:1] != (b,) or block_table.ndim != 2 or context_lens.shape != (b,):
        raise ValueError(
            f"block_table {block_table.shape} and context_lens {context_lens.shape} must be "
            f"[B, max_pages] and [B] with B={b}"
        )
    for name, x in (("query_lens", query_lens), ("order", order)):
        if x is not None and x.shape != (b,):
            raise ValueError(f"{name} {x.shape} must be [B] with B={b}")
    if attends == "full":
        shapes = [None if x is None else x.shape for x in (new_k, new_v)]
        if shapes != [(b, t, k, h)] * 2:
            raise ValueError(f"attends='full' needs new_k and new_v {(b, t, k, h)}, got {shapes}")
        check_floats(new_k=new_k, new_v=new_v)
    check_floats(q=q)
    check_integers(
        block_table=block_table, context_lens=context_lens, query_lens=query_lens, order=order
    )


def _check_options(window: int | None, softcap: float | None) -> None:
    fits = isinstance(window, int | np.integer) and 0 < window < 2**31
    if window is not None and not fits:
        raise ValueError(f"window={window} is no number of positions: use 1..2**31 - 1 or None")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap} caps nothing: use one above 0, or None")


def paged_attention(
    q: Array,
    cache: KVCache,
    block_table: Array,
    context_lens: Array,
    *,
    new_k: Array | None = None,
    new_v: Array | None = None,
    query_lens: Array | None = None,
    attends: str = "full",
    layer: Array | int | None = None,
    sm_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    order: Array | None = None,
    backend: str | None = None,
) -> Array:
    """Causal attention of new tokens over the paged cache and each other.

    q: float[B, T, N, H], or [B, N, H] for one token each.
    block_table: i32[B, max_pages], page ids in order, -1 for none (vLLM's).
    context_lens: i32[B], tokens of each sequence, the new ones counted; 0 gives zeros.
    query_lens: i32[B], how many of the T tokens are real (right padding), at most context_lens;
      default min(T, context_lens): one token, or a fresh prompt.
    attends: "full" reads new_k, new_v float[B, T, K, H] unquantised, and the pages for the tokens
      before them (QServe's way); "quantized" reads every token, the new ones included, as stored,
      so that the result does not depend on how a prompt was split (append first). new_k and new_v
      must be finite in padding too: 0 * NaN is NaN.
    window: a query sees the last `window` positions, its own included. softcap: tanh cap of scores.
    sm_scale: factor of the scores, default H**-0.5.
    order: i32[B], a permutation, the order in which a kernel takes the rows, see `longest_first`;
      it changes no result.
    Returns q's shape and dtype. Outputs of padding tokens are finite and meaningless.

    Raises ValueError when shapes, dtypes or options do not fit. Page ids out of range are masked,
    not read; check concrete arrays with `validate_paged_inputs`.
    """
    single = q.ndim == 3
    if single:
        q = q[:, None]
        new_k, new_v = (x[:, None] if x is not None and x.ndim == 3 else x for x in (new_k, new_v))
    _check(q, cache, block_table, context_lens, new_k, new_v, query_lens, order, attends, layer)
    _check_options(window, softcap)
    if query_lens is None:
        query_lens = jnp.minimum(context_lens, q.shape[1])
    op = "paged_attention" if q.shape[1] == 1 else "prefill_attention"
    names = [name for name in usable(backend) if name in ATTENTION_BACKENDS]
    out = dispatch(
        op,
        {name: ATTENTION_BACKENDS[name] for name in names},
        backend,
        q,
        cache,
        block_table,
        context_lens,
        new_k=new_k,
        new_v=new_v,
        query_lens=query_lens,
        attends=attends,
        layer=layer,
        sm_scale=sm_scale,
        window=window,
        softcap=softcap,
        order=order,
    )
    return out[:, 0] if single else out


def longest_first(context_lens: Array) -> Array:
    """The `order` i32[B] of rows by length, longest first: a ragged batch then ends together.

    Once for all layers of a step, outside their scan.
    """
    return jnp.argsort(-context_lens).astype(jnp.int32)


def validate_paged_inputs(cache: KVCache, block_table, context_lens) -> None:
    """Check concrete page ids and lengths (not traceable), for callers that build their own tables.

    block_table: i32[B, max_pages], context_lens: i32[B].
    Raises ValueError naming the first sequence whose length its pages cannot hold, or whose needed
    page ids lie outside the cache; or when shapes or dtypes do not fit.
    """
    table, lens = np.asarray(block_table), np.asarray(context_lens)
    if table.ndim != 2 or lens.shape != table.shape[:1]:
        raise ValueError(
            f"block_table {table.shape} and context_lens {lens.shape} must be "
            "[B, max_pages] and [B]"
        )
    check_integers(block_table=table, context_lens=lens)
    for row, (ids, length) in enumerate(zip(table, lens, strict=True)):
        needed = -(-int(length) // cache.page_size)
        if length < 0 or needed > len(ids):
            raise ValueError(
                f"sequence {row} has length {length} but its block table holds "
                f"{len(ids)} pages of {cache.page_size} tokens: widen it"
            )
        used = ids[:needed]
        bad = used[(used < 0) | (used >= cache.num_pages)]
        if bad.size:
            raise ValueError(
                f"sequence {row} names page {bad[0]} within its {length} tokens but the cache has "
                f"pages 0..{cache.num_pages - 1}: allocate it"
            )
