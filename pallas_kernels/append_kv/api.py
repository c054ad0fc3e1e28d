"""Checks and dispatch of `append_kv`."""

from __future__ import annotations

from qserve_jax.pallas_kernels.append_kv import reference
from qserve_jax.pallas_kernels.backend import check_layer, dispatch
from qserve_jax.quantization.qtensor import Array, KVCache

APPEND_BACKENDS = {"reference": reference.append}


def append_kv(
    cache: KVCache,
    k: Array,
    v: Array,
    slot_mapping: Array,
    *,
    layer: Array | int | None = None,
    backend: str | None = None,
) -> KVCache:
    """Write tokens into the cache, quantised to its bits (QServe section 4.2; K after RoPE).

    k, v: float[tokens, K, H]; slot_mapping: i32[tokens], slot = page * page_size + offset.
    A slot of -1, or one outside the cache, writes nothing. Two tokens must not share a slot.
    layer: the layer of a stacked cache. Donate the cache to have it updated in place.

    Raises ValueError when shapes do not fit, or on a layer that the cache does not have.
    """
    expected = (slot_mapping.shape[0], cache.num_kv_heads, cache.head_dim)
    if k.shape != expected or v.shape != expected:
        raise ValueError(f"k {k.shape} and v {v.shape} must be [tokens, K, H] = {expected}")
    check_layer(layer, "cache pages", cache.pages.shape, cache.stacked)
    return dispatch("append_kv", APPEND_BACKENDS, backend, cache, k, v, slot_mapping, layer=layer)
