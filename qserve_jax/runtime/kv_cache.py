"""Allocating the paged cache and the pages in it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from qserve_jax.models.config import ModelConfig
from qserve_jax.models.sharding import axis_of, cache_spec, rank_config, ranks_of
from qserve_jax.pallas_kernels.backend import CACHE_DTYPES, is_whole
from qserve_jax.quantization.packing import code_words
from qserve_jax.quantization.qtensor import KVCache, kv_bytes_per_token
from qserve_jax.runtime.device_memory import free_bytes


def init_cache(
    config: ModelConfig,
    *,
    num_pages: int,
    page_size: int = 64,
    kv_bits: int = 4,
    dtype: Any = jnp.bfloat16,
    mesh: Mesh | None = None,
) -> KVCache:
    """A zeroed cache of all layers; see `KVCache` for the layout. On a mesh cut along KV heads.

    dtype is read for 16 bits only, where K and V are stored as they are (float32 models keep 32).
    Raises ValueError when head_dim is not a multiple of 8, kv_bits not 4, 8 or 16, a size not 1 or
    more, or dtype not bfloat16, float16 or float32.
    """
    for name, size in (("num_pages", num_pages), ("page_size", page_size)):
        if not is_whole(size):
            raise ValueError(f"{name}={size!r} is no size: use an integer of 1 or more")
    h = config.head_dim
    if h % 8:
        raise ValueError(f"head_dim={h} is not a multiple of 8: the paged cache cannot hold it")
    if not is_whole(kv_bits) or kv_bits not in (4, 8, 16):
        raise ValueError(f"kv_bits={kv_bits} is not supported: use 4, 8 or 16")
    if kv_bits == 16 and _name(dtype) not in CACHE_DTYPES:
        raise ValueError(f"no cache is of {_name(dtype)}: use one of {', '.join(CACHE_DTYPES)}")
    lead = (config.num_layers, num_pages, config.num_kv_heads)
    place = None if mesh is None else NamedSharding(mesh, cache_spec(axis_of(mesh)))
    if kv_bits == 16:
        return KVCache(jnp.zeros((*lead, 2, page_size, h), dtype, device=place), 16, h)
    words = page_size * (2 * code_words(h, kv_bits) + 2)
    return KVCache(jnp.zeros((*lead, words), jnp.int32, device=place), kv_bits, h)


def _name(dtype: Any) -> str:
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return repr(dtype)


def cache_bytes_per_token(config: ModelConfig, kv_bits: int, dtype: Any = jnp.bfloat16) -> int:
    """Bytes one token takes over all layers and KV heads (Llama-3-8B, 4 bits: 34 816)."""
    itemsize = jnp.dtype(dtype).itemsize
    per_head = kv_bytes_per_token(config.head_dim, kv_bits, itemsize)
    return config.num_layers * config.num_kv_heads * per_head


def default_num_pages(
    config: ModelConfig,
    *,
    page_size: int,
    kv_bits: int,
    dtype: Any,
    max_model_len: int,
    max_num_seqs: int,
    mesh: Mesh | None = None,
) -> int:
    """Pages for max_num_seqs full sequences, or as many as memory leaves room for.

    On devices that report their memory: 90 % of what is free after the weights. Elsewhere: 2 GiB.
    On a mesh each device holds its KV heads of every page, and the fullest one decides.
    """
    wanted = max_num_seqs * -(-max_model_len // page_size)
    free = free_bytes(mesh)
    budget = 2 * 2**30 if free is None else 0.9 * free
    own = rank_config(config, ranks_of(mesh))
    affordable = int(budget // (page_size * cache_bytes_per_token(own, kv_bits, dtype)))
    return max(1, min(wanted, affordable))
