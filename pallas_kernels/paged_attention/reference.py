"""Attention in plain XLA, float32 inside. Gathers the pages a batch needs and dequantises them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax.pallas_kernels.paged_attention.problem import real_tokens
from qserve_jax.quantization.numerics import dequantize_kv
from qserve_jax.quantization.packing import split_page_words, unpack_kv_codes, unpack_kv_scales
from qserve_jax.quantization.qtensor import Array, KVCache

MASKED = -1e30
QUERY_BLOCK = 512
"""Queries scored at once: bounds the rows of the score matrix, whatever the prompt's length."""


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    q_positions: Array,
    k_positions: Array,
    k_valid: Array,
    sm_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Array:
    """Causal attention by position. A query with nothing to see gets zeros.

    q [B, T, N, H], k and v [B, S, K, H], q_positions i32[B, T], k_positions i32[B, S],
    k_valid bool[B, S]; query head n reads KV head n // G. A key is seen when it is valid, not
    after the query, and (with a window) less than `window` positions before it.
    Returns q's shape and dtype; float32 inside. Invalid keys and values may hold anything, NaN
    included, also where gradients are taken.
    """
    b, _, n, h = q.shape
    heads = k.shape[2]
    group = n // heads
    scale = h**-0.5 if sm_scale is None else sm_scale
    k, v = (jnp.where(k_valid[:, :, None, None], x.astype(jnp.float32), 0) for x in (k, v))

    def one_block(block):
        queries, positions = block
        length = queries.shape[1]
        # Queries of one KV head are rows of one matmul, [B, K, T * G, H]. Sizes are spelt out,
        # because a -1 cannot be inferred where B is 0.
        rows = queries.astype(jnp.float32).reshape(b, length, heads, group, h) * scale
        rows = jnp.swapaxes(rows, 1, 2).reshape(b, heads, length * group, h)
        scores = jnp.einsum("BKMH,BSKH->BKMS", rows, k, precision="highest")
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        distance = positions[:, :, None] - k_positions[:, None, :]
        seen = k_valid[:, None, :] & (distance >= 0)
        if window is not None:
            seen &= distance < window
        seen = jnp.repeat(seen, group, axis=1)[:, None]
        weights, total = _weigh(scores, seen)
        out = jnp.einsum("BKMS,BSKH->BKMH", weights, v, precision="highest") / total
        out = out.reshape(b, heads, length, group, h)
        return jnp.swapaxes(out, 1, 2).reshape(b, length, n, h)

    return _by_blocks(one_block, q, q_positions)


def _weigh(scores: Array, seen: Array) -> tuple[Array, Array]:
    """Weights relative to the largest, zeros where nothing is seen, and what to divide by."""
    scores = jnp.where(seen, scores, MASKED)
    top = scores.max(-1, keepdims=True, initial=-jnp.inf)  # S may be 0
    weights = jnp.where(seen, jnp.exp(scores - top), 0)
    total = weights.sum(-1, keepdims=True)
    return weights, jnp.where(total > 0, total, 1)  # a query that sees nothing


def _by_blocks(one_block: Callable[[Any], Array], q: Array, q_positions: Array) -> Array:
    """one_block((queries, positions)) for QUERY_BLOCK queries after the other, in q's dtype."""
    b, t, n, h = q.shape
    if t <= QUERY_BLOCK:
        return one_block((q, q_positions)).astype(q.dtype)
    padding = -t % QUERY_BLOCK

    def split(x):  # [B, T, ...] -> [blocks, B, QUERY_BLOCK, ...]
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        blocks = (b, (t + padding) // QUERY_BLOCK, QUERY_BLOCK, *x.shape[2:])
        return jnp.moveaxis(x.reshape(blocks), 1, 0)

    out = jax.lax.map(one_block, (split(q), split(q_positions)))
    return jnp.moveaxis(out, 0, 1).reshape(b, t + padding, n, h)[:, :t].astype(q.dtype)


def read_pages(
    cache: KVCache, block_table: Array, *, layer: Array | int | None
) -> tuple[Array, Array]:
    """The cached K and V of each sequence, dequantised: float[B, max_pages * S_p, K, H] each.

    Entries of block_table outside the cache read page 0; the caller masks them.
    """
    valid = (block_table >= 0) & (block_table < cache.num_pages)
    table = jnp.where(valid, block_table, 0)
    blocks = cache.pages[table] if layer is None else cache.pages[layer, table]
    b, pages = table.shape
    shape = (b, pages * cache.page_size, cache.num_kv_heads, cache.head_dim)
    if cache.bits == 16:  # [B, pages, K, 2, S_p, H]
        k, v = blocks[:, :, :, 0], blocks[:, :, :, 1]
    else:  # [B, pages, K, words]
        k_words, v_words, scale_words = split_page_words(blocks, cache.head_dim, cache.bits)
        k_scale, k_centre, v_scale, v_centre = unpack_kv_scales(scale_words)
        k = dequantize_kv(unpack_kv_codes(k_words, cache.bits), k_scale, k_centre, cache.bits)
        v = dequantize_kv(unpack_kv_codes(v_words, cache.bits), v_scale, v_centre, cache.bits)
    k, v = (jnp.swapaxes(x, 2, 3).reshape(shape) for x in (k, v))  # from [B, pages, K, S_p, H]
    return k, v


def paged_attention(
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
) -> Array:
    """See `api.paged_attention`; q is [B, T, N, H]."""
    b, t = q.shape[:2]
    query_lens = real_tokens(query_lens, context_lens, t)
    start = (context_lens - query_lens)[:, None]
    q_positions = start + jnp.arange(t)
    k, v = read_pages(cache, block_table, layer=layer)
    k_positions = jnp.broadcast_to(jnp.arange(k.shape[1]), k.shape[:2])
    page_valid = jnp.repeat(
        (block_table >= 0) & (block_table < cache.num_pages), cache.page_size, axis=1
    )
    if attends == "quantized":
        k_valid = page_valid & (k_positions < context_lens[:, None])
    else:
        assert new_k is not None and new_v is not None  # the api checks
        # In float32: a bfloat16 cache must not round the new tokens of a float32 model.
        k = jnp.concatenate([k, new_k.astype(jnp.float32)], axis=1)
        v = jnp.concatenate([v, new_v.astype(jnp.float32)], axis=1)
        new_valid = (jnp.arange(t) < query_lens[:, None]) & (q_positions >= 0)
        k_valid = jnp.concatenate([page_valid & (k_positions < start), new_valid], axis=1)
        k_positions = jnp.concatenate([k_positions, q_positions], axis=1)
    return attend(
        q,
        k,
        v,
        q_positions=q_positions,
        k_positions=k_positions,
        k_valid=k_valid,
        sm_scale=sm_scale,
        window=window,
        softcap=softcap,
    )
