"""Shapes and bytes of the paged cache, how many pages there are, and who has which."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from qserve_jax.models import ModelConfig
from qserve_jax.quantization.qtensor import KVCache, nbytes
from qserve_jax.runtime.kv_cache import cache_bytes_per_token, default_num_pages, init_cache
from qserve_jax.runtime.page_table import PagePool

LLAMA_3_8B = ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128, 8192)


def config(head_dim=64):
    return ModelConfig("llama", 64, 64, 64, 3, 4, 2, head_dim, 64)


@pytest.mark.parametrize(
    "bits, shape",
    [(4, (3, 5, 2, 16 * 18)), (8, (3, 5, 2, 16 * 34)), (16, (3, 5, 2, 2, 16, 64))],
)
def test_init_cache(bits, shape):
    cache = init_cache(config(), num_pages=5, page_size=16, kv_bits=bits)
    assert cache.pages.shape == shape and not cache.pages.any()
    assert cache.pages.dtype == (jnp.bfloat16 if bits == 16 else jnp.int32)
    assert (cache.bits, cache.head_dim, cache.stacked) == (bits, 64, True)
    assert (cache.num_pages, cache.num_kv_heads, cache.page_size) == (5, 2, 16)
    one = KVCache(cache.pages[0], bits, 64)
    assert (one.num_pages, one.num_kv_heads, one.page_size) == (5, 2, 16) and not one.stacked


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("head_dim", [8, 128])
@pytest.mark.parametrize(
    "bits, dtype", [(4, jnp.bfloat16), (8, jnp.bfloat16), (16, jnp.bfloat16), (16, jnp.float32)]
)
def test_bytes(bits, dtype, head_dim, page_size):
    """For each token and KV head 2 * H * bits / 8 bytes of codes, and below 16 bits four fp16."""
    c = config(head_dim)
    cache = jax.eval_shape(
        lambda: init_cache(c, num_pages=5, page_size=page_size, kv_bits=bits, dtype=dtype)
    )
    width = jnp.dtype(dtype).itemsize if bits == 16 else bits / 8
    per_token = 3 * 2 * (2 * head_dim * width + (8 if bits < 16 else 0))
    assert cache_bytes_per_token(c, bits, dtype) == per_token
    assert nbytes(cache) == 5 * page_size * per_token


@pytest.mark.parametrize("bits, expected", [(4, 34816), (8, 67584), (16, 131072)])
def test_bytes_of_llama_3_8b(bits, expected):
    assert cache_bytes_per_token(LLAMA_3_8B, bits) == expected


def test_refusals():
    with pytest.raises(ValueError, match="head_dim=12 is not a multiple of 8"):
        init_cache(config(12), num_pages=1)
    with pytest.raises(ValueError, match="kv_bits=5 is not supported: use 4, 8 or 16"):
        init_cache(config(), num_pages=1, kv_bits=5)
    wrong: Any
    for wrong in (0, -1, 1.5, "4", True):
        with pytest.raises(ValueError, match=f"num_pages={wrong!r} is no size: use an integer of"):
            init_cache(config(), num_pages=wrong)
        with pytest.raises(ValueError, match=f"page_size={wrong!r} is no size"):
            init_cache(config(), num_pages=1, page_size=wrong)
    for wrong, name in (("foo", "'foo'"), (jnp.int32, "int32"), ("float8_e4m3fn", "float8_e4m3fn")):
        with pytest.raises(ValueError, match=f"no cache is of {name}: use one of bfloat16, flo"):
            init_cache(config(), num_pages=1, kv_bits=16, dtype=wrong)


class Device:
    def __init__(self, stats):
        self.memory_stats = lambda: stats


def pages(monkeypatch, stats, max_num_seqs, others=()):
    """On one device, or on a mesh with the others."""
    devices = [Device(found) for found in (stats, *others)]
    mesh: Any = SimpleNamespace(size=len(devices), local_devices=devices) if others else None
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    return default_num_pages(
        LLAMA_3_8B,
        page_size=64,
        kv_bits=4,
        dtype=jnp.bfloat16,
        max_model_len=1000,
        max_num_seqs=max_num_seqs,
        mesh=mesh,
    )


def test_default_num_pages(monkeypatch):
    page = 64 * 34816
    roomy = {"bytes_limit": 2000 * page, "bytes_in_use": 1000 * page}
    assert pages(monkeypatch, roomy, 3) == 3 * 16  # 1000 tokens are 16 pages
    assert pages(monkeypatch, roomy, 10**4) == 900
    full = {"bytes_limit": 1000 * page, "bytes_in_use": 1000 * page}
    assert pages(monkeypatch, full, 3) == 1
    assert pages(monkeypatch, None, 10**4) == 2 * 2**30 // page
    # Two devices hold half of each page, and the one with less room decides.
    assert pages(monkeypatch, roomy, 10**4, [roomy]) == 1800
    fuller = roomy | {"bytes_in_use": 1500 * page}
    assert pages(monkeypatch, roomy, 10**4, [fuller]) == 900
    assert pages(monkeypatch, None, 10**4, [None]) == 2 * 2**30 // (page // 2)


def test_page_pool():
    pool = PagePool(5, 16)
    assert [pool.pages_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    first, second = pool.allocate(2), pool.allocate(3)
    assert first is not None and second is not None
    assert sorted(first + second) == [0, 1, 2, 3, 4] and pool.free_pages == 0
    assert pool.allocate(1) is None and pool.allocate(0) == []
    pool.release(first)
    assert pool.allocate(3) is None and pool.free_pages == 2  # a refusal takes nothing
    assert pool.allocate(2) == first
