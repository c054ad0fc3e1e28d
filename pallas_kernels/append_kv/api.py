"""Checks and dispatch of `append_kv` and `rope_append_kv`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qserve_jax.pallas_kernels.append_kv import reference
from qserve_jax.pallas_kernels.backend import (
    as_int32,
    check_cache,
    check_floats,
    check_given,
    dispatch,
    usable,
)
from qserve_jax.quantization.qtensor import Array, KVCache


def _mosaic() -> Any:
    """One kernel for both Mosaic backends, from sm_80 on."""
    from qserve_jax.pallas_kernels.append_kv import mosaic

    return mosaic


APPEND_BACKENDS = {"mosaic_sm90": _mosaic, "mosaic_mma": _mosaic, "reference": lambda: reference}
"""Backend -> what gives the module that has `append` and `rope_append`."""


def _run(function: str, backend: str | None, *args: Any, **kwargs: Any) -> Any:
    """The first backend that can."""

    def implementation(name: str) -> Any:
        return lambda *a, **k: getattr(APPEND_BACKENDS[name](), function)(*a, **k)

    there = {name: implementation(name) for name in usable(backend)}
    return dispatch("append_kv", there, backend, *args, **kwargs)


def _slots(slot_mapping: Array) -> Array:
    check_given(slot_mapping=slot_mapping)
    (slots,) = as_int32(slot_mapping=slot_mapping)
    if slots.ndim != 1:
        raise ValueError(f"slot_mapping {slots.shape} must be [tokens]: reshape it")
    return slots


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
    Scales and centres of 4 and 8 bits saturate at numerics.MAX_KV_VALUE, 65504, so that values
    beyond it come back as others; a float16 cache holds them as infinity.
    cache: see `KVCache`. layer: i32[] of a stacked cache. Donate the cache to have it updated in
      place. backend: a kernel to insist on; None takes the first that can.
    Returns the cache. Under shard_map the kernels need check_vma=False; else the reference runs.

    Raises ValueError when shapes or dtypes do not fit, or on a layer that the cache does not have,
    NotImplementedError where the named backend cannot.
    """
    check_cache(cache, layer)
    check_given(k=k, v=v)
    check_floats(k=k, v=v)
    slots = _slots(slot_mapping)
    expected = (slots.shape[0], cache.num_kv_heads, cache.head_dim)
    if k.shape != expected or v.shape != expected:
        raise ValueError(
            f"k {k.shape} and v {v.shape} must be [tokens, K, H] = {expected}, with the "
            f"{slots.shape[0]} tokens of slot_mapping and the heads of the cache"
        )
    return _run("append", backend, cache, k, v, slots, layer=layer)


def rope_append_kv(
    qkv: Sequence[Array],
    cos: Array,
    sin: Array,
    cache: KVCache,
    slot_mapping: Array,
    *,
    center: Array | None = None,
    layer: Array | int | None = None,
    backend: str | None = None,
) -> tuple[Array, Array, Array, KVCache]:
    """Rotate q and k to their positions, and append k and v (QServe section 4.2 and 5.1).

    qkv: [q, k, v] float[tokens, N, H], [tokens, K, H] twice, or one float[tokens, N + 2K, H] as a
      fused projection gives it.
    cos, sin: f32[tokens, H/2] of each token's angles; dimension i turns with i + H/2 (rotate-half).
    center: f32[K, H], subtracted from the rotated k (transforms/center_keys.py).
    slot_mapping, cache, layer, backend: as in `append_kv`; tokens without a slot are rotated too.
    Returns q [tokens, N, H], k, v [tokens, K, H] (q and k rotated, rounded to their dtype) and the
    cache. What is stored is `append_kv` of these k and v bit for bit. Backends may round q and k
    the other way, because XLA contracts a product and a sum where it likes.

    Raises ValueError and NotImplementedError as `append_kv` does.
    """
    check_cache(cache, layer)
    slots = _slots(slot_mapping)
    tokens, kv_heads, h = slots.shape[0], cache.num_kv_heads, cache.head_dim
    if not isinstance(qkv, Sequence):
        raise ValueError(f"qkv is a {type(qkv).__name__}: give [q, k, v], or [qkv] of one")
    given = {f"qkv[{i}]": x for i, x in enumerate(qkv)} | {"cos": cos, "sin": sin}
    check_given(**given)
    check_floats(**given, center=center)
    shapes = [x.shape for x in qkv]
    first = shapes[0] if shapes else ()
    heads = (first[1] if len(first) == 3 else 0) - (2 * kv_heads if len(qkv) == 1 else 0)
    rows = [heads, kv_heads, kv_heads] if len(qkv) == 3 else [heads + 2 * kv_heads]
    if heads < 1 or shapes != [(tokens, count, h) for count in rows]:
        raise ValueError(
            f"q, k and v {shapes} must be [tokens, N, H] and twice [tokens, K, H], or one "
            f"[tokens, N + 2K, H], with tokens={tokens}, K={kv_heads}, H={h}"
        )
    if cos.shape != (tokens, h // 2) or sin.shape != cos.shape:
        raise ValueError(f"cos {cos.shape} and sin {sin.shape} must be {(tokens, h // 2)}")
    if center is not None and center.shape != (kv_heads, h):
        raise ValueError(f"center {center.shape} must be [K, H] = {(kv_heads, h)}")
    options = {"center": center, "layer": layer}
    return _run("rope_append", backend, qkv, cos, sin, cache, slots, **options)
