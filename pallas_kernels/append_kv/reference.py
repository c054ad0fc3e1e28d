"""RoPE, and append as XLA scatters. A token owns whole 32-bit words, so nothing is read first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from qserve_jax.quantization.numerics import quantize_kv
from qserve_jax.quantization.packing import pack_kv_codes, pack_kv_scales, token_word_indices
from qserve_jax.quantization.qtensor import Array, KVCache


def token_words(k: Array, v: Array, bits: int) -> Array:
    """k, v float[tokens, K, H] -> i32[tokens, K, 2w + 2]: K codes, V codes, scales."""
    k_codes, *k_scales = quantize_kv(k, bits)
    v_codes, *v_scales = quantize_kv(v, bits)
    scales = pack_kv_scales(*k_scales, *v_scales)
    return jnp.concatenate([pack_kv_codes(k_codes, bits), pack_kv_codes(v_codes, bits), scales], -1)


def append(
    cache: KVCache, k: Array, v: Array, slot_mapping: Array, *, layer: Array | int | None
) -> KVCache:
    """See `api.append_kv`."""
    size = cache.page_size
    # Scatters drop pages past the end; a negative one would count from there.
    page = jnp.where(slot_mapping >= 0, slot_mapping // size, cache.num_pages)[:, None, None]
    offset = slot_mapping % size
    head = jnp.arange(cache.num_kv_heads)[None, :, None]
    at_layer = () if layer is None else (layer,)
    if cache.bits == 16:
        side = jnp.arange(2)[None, None, :]
        values = jnp.stack([k, v], axis=2).astype(cache.pages.dtype)
        index = (*at_layer, page, head, side, offset[:, None, None])
    else:
        values = token_words(k, v, cache.bits)
        words = token_word_indices(offset, size, cache.head_dim, cache.bits)
        index = (*at_layer, page, head, words[:, None, :])
    pages = cache.pages.at[index].set(values, mode="drop")
    return dataclasses.replace(cache, pages=pages)


def rotate(x: Array, cos: Array, sin: Array, center: Array | None = None) -> Array:
    """RoPE, rotate-half: dimensions i and i + H/2 of x [..., heads, H] are turned into each other
    by cos, sin f32[..., H/2] of the token; then center f32[heads, H] is subtracted. In float32,
    rounded once to the dtype of x."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return (rotated if center is None else rotated - center).astype(x.dtype)


def split_heads(qkv: Sequence[Array], kv_heads: int) -> tuple[Array, Array, Array]:
    """q [..., N, H], k and v [..., K, H] of [q, k, v], or of one [..., N + 2K, H]."""
    if len(qkv) == 1:
        heads = qkv[0].shape[-2] - 2 * kv_heads
        qkv = jnp.split(qkv[0], [heads, heads + kv_heads], axis=-2)
    q, k, v = qkv
    return q, k, v


def rope_append(
    qkv: Sequence[Array],
    cos: Array,
    sin: Array,
    cache: KVCache,
    slot_mapping: Array,
    *,
    center: Array | None,
    layer: Array | int | None,
) -> tuple[Array, Array, Array, KVCache]:
    """See `api.rope_append_kv`."""
    q, k, v = split_heads(qkv, cache.num_kv_heads)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin, center)
    return q, k, v, append(cache, k, v, slot_mapping, layer=layer)
