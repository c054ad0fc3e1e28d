"""Bytes of the paged cache, at the positions that its layout gives; everything else untouched."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.pallas_kernels import append_kv
from qserve_jax.quantization.numerics import quantize_kv
from qserve_jax.quantization.qtensor import KVCache, kv_bytes_per_token

LAYERS, PAGES, HEADS = 2, 3, 2
jitted = jax.jit(append_kv)


def write_token(block, t, k, v, bits, head_dim, page_size):
    """One token's (codes u8[H], scale, centre) of K and V into the block u8[bytes], in place."""
    b = head_dim * bits // 8
    for side, (codes, _, _) in enumerate((k, v)):
        for i, code in enumerate(codes):
            if bits == 4:  # even dimension in the low nibble
                at = side * b * page_size + b * t + i // 2
                keep, shift = (0xF0, 0) if i % 2 == 0 else (0x0F, 4)
                block[at] = (block[at] & keep) | (code << shift)
            else:
                block[side * b * page_size + b * t + i] = code
    halves = np.array([k[1], k[2], v[1], v[2]], np.float16)  # sk, ck, sv, cv
    block[2 * b * page_size + 8 * t :][:8] = halves.view(np.uint8)


def garbage(rng, bits, head_dim, page_size):
    words = page_size * kv_bytes_per_token(head_dim, bits) // 4
    return rng.integers(-(2**31), 2**31, (LAYERS, PAGES, HEADS, words), dtype=np.int32)


def slots_for(page_size):
    """In every page, first and last, out of order; none, and outside the cache on either side."""
    size = PAGES * page_size
    return np.array([size - 1, -1, 0, page_size, size, 2 * page_size - 1, -size, 2**30, -7, 5])


@pytest.mark.parametrize("head_dim, page_size", [(8, 8), (64, 64), (128, 8)])
@pytest.mark.parametrize("bits", [4, 8])
def test_bytes(bits, head_dim, page_size, rng):
    pages = garbage(rng, bits, head_dim, page_size)
    slots = slots_for(page_size)
    # K and V differ, and so do their scales by token and head.
    spread = rng.uniform(0.1, 30, (2, len(slots), HEADS, 1))
    k, v = (rng.standard_normal((2, len(slots), HEADS, head_dim)) * spread).astype(np.float32)
    expected = pages.view(np.uint8).copy()
    k_parts, v_parts = (list(map(np.asarray, quantize_kv(jnp.asarray(x), bits))) for x in (k, v))
    for i, slot in enumerate(slots):
        if not 0 <= slot < PAGES * page_size:
            continue
        for head in range(HEADS):
            one_k, one_v = ([part[i, head] for part in parts] for parts in (k_parts, v_parts))
            block = expected[1, slot // page_size, head]
            write_token(block, slot % page_size, one_k, one_v, bits, head_dim, page_size)
    cache = KVCache(jnp.asarray(pages), bits, head_dim)
    assert cache.page_size == page_size
    slots = jnp.asarray(slots, jnp.int32)
    written = jitted(cache, jnp.asarray(k), jnp.asarray(v), slots, layer=jnp.int32(1))
    assert (written.bits, written.head_dim) == (bits, head_dim)
    np.testing.assert_array_equal(np.asarray(written.pages).view(np.uint8), expected)
    assert (expected != pages.view(np.uint8)).any()


@pytest.mark.parametrize("bits", [4, 16])
def test_one_layer_alone(bits, rng):
    """A cache without the layer axis, against the same layer of a stacked one."""
    shape = (PAGES, HEADS, 2, 8, 8) if bits == 16 else (PAGES, HEADS, 8 * 16 // 4)
    one = KVCache(jnp.zeros(shape, jnp.float32 if bits == 16 else jnp.int32), bits, 8)
    stacked = KVCache(jnp.stack([one.pages] * 2), bits, 8)
    k, v = jnp.asarray(rng.standard_normal((2, 10, HEADS, 8)), jnp.float32)
    slots = jnp.asarray(slots_for(8), jnp.int32)
    got, both = jitted(one, k, v, slots), jitted(stacked, k, v, slots, layer=0)
    np.testing.assert_array_equal(got.pages, both.pages[0])
    assert got.pages.any() and not both.pages[1].any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_16_bits_stores_what_it_gets(dtype, rng):
    pages = rng.standard_normal((LAYERS, PAGES, HEADS, 2, 8, 16)).astype(dtype)
    slots = slots_for(8)
    k, v = rng.standard_normal((2, len(slots), HEADS, 16)).astype(np.float32)
    expected = pages.copy()
    for i, slot in enumerate(slots):
        if 0 <= slot < PAGES * 8:
            expected[0, slot // 8, :, 0, slot % 8] = k[i].astype(dtype)
            expected[0, slot // 8, :, 1, slot % 8] = v[i].astype(dtype)
    cache = KVCache(jnp.asarray(pages), 16, 16)
    written = jitted(cache, jnp.asarray(k), jnp.asarray(v), jnp.asarray(slots), layer=0)
    assert written.pages.dtype == dtype
    np.testing.assert_array_equal(written.pages, expected)


@pytest.mark.parametrize("bits", [4, 16])
def test_donated_cache_is_updated_in_place(bits, rng):
    shape = (64, HEADS, 2, 8, 16) if bits == 16 else (64, HEADS, 8 * 24 // 4)
    pages = jnp.zeros((LAYERS, *shape), jnp.bfloat16 if bits == 16 else jnp.int32)
    before, size = pages.unsafe_buffer_pointer(), pages.nbytes
    k, v = jnp.asarray(rng.standard_normal((2, 1, HEADS, 16)), jnp.float32)
    append = jax.jit(append_kv, donate_argnames="cache")
    compiled = append.lower(KVCache(pages, bits, 16), k, v, jnp.array([9]), layer=1).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size / 8
    written = append(KVCache(pages, bits, 16), k, v, jnp.array([9]), layer=1)
    assert written.pages.unsafe_buffer_pointer() == before and pages.is_deleted()


def test_errors():
    cache = KVCache(jnp.zeros((2, 3, 2, 8 * 24 // 4), jnp.int32), 4, 16)
    good, slots = jnp.zeros((5, 2, 16)), jnp.zeros(5, jnp.int32)
    with pytest.raises(ValueError, match=r"k \(5, 1, 16\) and v .* must be .* = \(5, 2, 16\)"):
        append_kv(cache, good[:, :1], good, slots, layer=0)
    with pytest.raises(ValueError, match=r"v \(4, 2, 16\) must be .* = \(5, 2, 16\)"):
        append_kv(cache, good, good[:4], slots, layer=0)
    with pytest.raises(ValueError, match=r"cache pages of shape \(2, 3, 2, 48\) .* layer=None"):
        append_kv(cache, good, good, slots)
    with pytest.raises(
        ValueError, match=r"layer=9 but the cache pages have layers 0\.\.1: use one"
    ):
        append_kv(cache, good, good, slots, layer=9)
    with pytest.raises(ValueError, match=r"slot_mapping \(5, 1\) must be \[tokens\]: reshape it"):
        append_kv(cache, good, good, slots[:, None], layer=0)
    with pytest.raises(ValueError, match="slot_mapping is float32, which is no integer: cast it"):
        append_kv(cache, good, good, slots.astype(jnp.float32), layer=0)
    with pytest.raises(ValueError, match="v is int32, which is no float: cast it to bfloat16"):
        append_kv(cache, good, good.astype(jnp.int32), slots, layer=0)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64"])
def test_slots_of_any_integer(dtype):
    """Of pages that have more tokens than the dtype numbers; a slot of int64 does not wrap."""
    cache, k = KVCache(jnp.zeros((2, 1, 2, 300, 8)), 16, 8), jnp.ones((2, 1, 8))
    slots = np.array([5, 2**32 + 6 if dtype == "int64" else 100], dtype)
    written = append_kv(cache, k, k, slots)  # pyright: ignore[reportArgumentType]
    found = np.argwhere(np.asarray(written.pages)[:, 0, 0, :, 0])
    assert found.tolist() == ([[0, 5]] if dtype == "int64" else [[0, 5], [0, 100]])


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_no_tokens_write_nothing(bits):
    shape = (3, 2, 2, 8, 16) if bits == 16 else (3, 2, 8 * kv_bytes_per_token(16, bits) // 4)
    pages = jnp.ones(shape, jnp.float32 if bits == 16 else jnp.int32)
    none = jnp.zeros((0, 2, 16))
    written = append_kv(KVCache(pages, bits, 16), none, none, jnp.zeros(0, jnp.int32))
    np.testing.assert_array_equal(written.pages, pages)
