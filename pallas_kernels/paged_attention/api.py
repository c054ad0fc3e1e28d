"""Checks and dispatch of `paged_attention`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from qserve_jax.pallas_kernels.backend import (
    as_int32,
    check_cache,
    check_floats,
    check_given,
    check_integers,
    check_pages,
    dispatch,
    is_whole,
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
LARGEST = 1e18
"""Of sm_scale and softcap: scores are then smaller than what masks them, and quotients of the two
finite in float32."""


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
    if h != cache.head_dim or n % k or not n:
        raise ValueError(f"q {q.shape} does not fit a cache of {k} heads of {cache.head_dim}")
    if block_table.shape[:1] != (b,) or block_table.ndim != 2 or context_lens.shape != (b,):
        raise ValueError(
            f"block_table {block_table.shape} and context_lens {context_lens.shape} must be "
            f"[B, max_pages] and [B] with B={b}"
        )
    for name, x in (("query_lens", query_lens), ("order", order)):
        if x is not None and x.shape != (b,):
            raise ValueError(f"{name} {x.shape} must be [B] with B={b}")
    shapes = [None if x is None else x.shape for x in (new_k, new_v)]
    may = [(b, t, k, h)] if attends == "full" else [None, (b, t, k, h)]
    if any(shape not in may for shape in shapes):
        raise ValueError(f"{attends=} needs new_k and new_v {may[-1]}, got {shapes}")


def _check_options(sm_scale: Any, window: Any, softcap: Any) -> None:
    if not (sm_scale is None or (_is_number(sm_scale) and abs(sm_scale) <= LARGEST)):
        raise ValueError(
            f"sm_scale={_said(sm_scale)} is no number in -{LARGEST:g}..{LARGEST:g}: "
            "give a Python float, or None"
        )
    if not (window is None or (is_whole(window) and window < 2**31)):
        raise ValueError(
            f"window={_said(window)} is no number of positions: use 1..2**31 - 1 or None"
        )
    if not (softcap is None or (_is_number(softcap) and 1 / LARGEST <= softcap <= LARGEST)):
        raise ValueError(
            f"softcap={_said(softcap)} caps nothing: give a Python float in "
            f"{1 / LARGEST:g}..{LARGEST:g}, or None"
        )


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float | np.integer | np.floating) and not isinstance(x, bool)


def _said(x: Any) -> str:
    """Of what may take several lines only the type."""
    return str(x) if isinstance(x, int | float | complex | str) else type(x).__name__


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
    """Causal attention of new tokens over the paged cache and each other (QServe section 5.3).

    q: float[B, T, N, H], or [B, N, H] for one token each. cache: of K heads of H, see `KVCache`;
      `layer`: i32[], of a stacked one. backend: a kernel to insist on; None: the first that can.
    block_table: i32[B, max_pages], page ids in order, -1 for none (vLLM's).
    context_lens: i32[B], tokens of each sequence, the new ones counted; 0 gives zeros.
    query_lens: i32[B], how many of the T tokens are real (right padding), at most context_lens;
      default min(T, context_lens): one token, or a fresh prompt. Beyond these it is clamped.
    attends: "full" reads new_k, new_v float[B, T, K, H] unquantised, and the pages for the tokens
      before them (QServe's way); "quantized" reads every token, the new ones included, as stored,
      so that the result does not depend on how a prompt was split (append first). new_k and new_v
      must be finite in padding too: 0 * NaN is NaN.
    window: a query sees the last `window` positions, its own included. softcap: tanh cap of scores.
    sm_scale: factor of the scores, default H**-0.5.
    order: i32[B], a permutation, the order in which a kernel takes the rows, see `longest_first`.
      A long batch with one may be cut into other blocks, whose sums round otherwise. Rows that it
      leaves out may hold anything.
    Returns q's shape and dtype. Outputs of padding tokens are finite and meaningless.

    Integers may be of any dtype. The kernels multiply in float16 where several tokens are new or
    the cache has 4 or 8 bits: numbers of q, k and v up to 65504. With one new token the values of
    one V in the cache may span 1900 at 4 bits and 2000 at 8. Beyond these they may return NaN; the
    reference does not.

    Raises ValueError when shapes, dtypes or options do not fit, NotImplementedError where the named
    backend cannot. Page ids out of range are masked, not read; check concrete arrays, query_lens
    and order too, with `validate_paged_inputs`.
    """
    check_given(q=q, block_table=block_table, context_lens=context_lens)
    check_floats(q=q, new_k=new_k, new_v=new_v)
    block_table, context_lens, query_lens, order = as_int32(
        block_table=block_table, context_lens=context_lens, query_lens=query_lens, order=order
    )
    single = q.ndim == 3
    if single:
        q = q[:, None]
        new_k, new_v = (x[:, None] if x is not None and x.ndim == 3 else x for x in (new_k, new_v))
    _check(q, cache, block_table, context_lens, new_k, new_v, query_lens, order, attends, layer)
    _check_options(sm_scale, window, softcap)
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

    context_lens: i32[B]. Once for all layers of a step, outside their scan. Raises ValueError for
    anything else.
    """
    check_given(context_lens=context_lens)
    (lens,) = as_int32(context_lens=context_lens)
    if lens.ndim != 1:
        raise ValueError(f"context_lens {lens.shape} must be [B]")
    return jnp.argsort(-lens).astype(jnp.int32)


def validate_paged_inputs(
    cache: KVCache, block_table, context_lens, query_lens=None, order=None
) -> None:
    """Check concrete page ids and lengths (not traceable), for callers that build their own tables.

    block_table: i32[B, max_pages], context_lens: i32[B]; query_lens, order: i32[B] or None.
    Raises ValueError naming the first sequence whose length its pages cannot hold, whose needed
    page ids lie outside the cache, or whose query_lens is not in 0..context_lens; when order is no
    permutation; or when the cache, shapes or dtypes do not fit.
    """
    check_pages(cache)
    table, lens = _concrete("block_table", block_table), _concrete("context_lens", context_lens)
    if table.ndim != 2 or lens.shape != table.shape[:1]:
        raise ValueError(
            f"block_table {table.shape} and context_lens {lens.shape} must be "
            "[B, max_pages] and [B]"
        )
    check_integers(block_table=table, context_lens=lens)
    for row, (ids, length) in enumerate(zip(table, lens, strict=True)):
        if length < 0:
            raise ValueError(f"sequence {row} has length {length}: use 0 or more")
        needed = -(-int(length) // cache.page_size)
        if needed > len(ids):
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
    _validate_rows(lens, query_lens, order)


def _validate_rows(lens: np.ndarray, query_lens, order) -> None:
    given = {"query_lens": query_lens, "order": order}
    rows = {name: _concrete(name, x) for name, x in given.items() if x is not None}
    for name, x in rows.items():
        if x.shape != lens.shape:
            raise ValueError(f"{name} {x.shape} must be [B] with B={len(lens)}")
    check_integers(**rows)
    counts = rows.get("query_lens", lens)
    for row in np.flatnonzero((counts < 0) | (counts > lens))[:1]:
        raise ValueError(
            f"sequence {row} has query_lens {counts[row]} of length {lens[row]}: use one of "
            f"0..{lens[row]}"
        )
    if "order" in rows and sorted(rows["order"]) != list(range(len(lens))):
        raise ValueError(
            f"order is no permutation of the {len(lens)} rows: use longest_first(context_lens)"
        )


def _concrete(name: str, x: Any) -> np.ndarray:
    try:
        return np.asarray(x)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is ragged or traced: give an array of numbers") from None
