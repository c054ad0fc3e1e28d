"""Nibbles, words of the KV cache, and the value of a packed weight."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qserve_jax.quantization import QuantConfig, W4PerChannel, W4PerGroup, packing, quantize_kernel

few = settings(max_examples=25)


def codes(bits, multiple):
    shapes = st.sampled_from([(1, multiple), (3, 4 * multiple)])  # each new shape compiles
    return hnp.arrays(np.uint8, shapes, elements=st.integers(0, 2**bits - 1))


@few
@given(codes(4, 2))
def test_nibbles_round_trip_and_even_k_is_low(q):
    packed = packing.pack_nibbles(jnp.asarray(q))
    assert packed.dtype == jnp.uint8
    np.testing.assert_array_equal(packed, q[:, ::2] + 16 * q[:, 1::2])
    np.testing.assert_array_equal(packing.unpack_nibbles(packed), q)


@few
@given(hnp.arrays(np.uint8, (2, 4)))
def test_every_byte_unpacks_and_packs_to_itself(octets):
    np.testing.assert_array_equal(
        packing.pack_nibbles(packing.unpack_nibbles(jnp.asarray(octets))), octets
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_kv_codes_round_trip_little_endian(bits):
    @few
    @given(codes(bits, 8))
    def check(q):
        words = packing.pack_kv_codes(jnp.asarray(q), bits)
        octets = q if bits == 8 else q[:, ::2] + 16 * q[:, 1::2]
        np.testing.assert_array_equal(words, np.ascontiguousarray(octets).view("<i4"))
        assert words.shape[-1] == packing.code_words(q.shape[-1], bits)
        np.testing.assert_array_equal(packing.unpack_kv_codes(words, bits), q)

    check()


@few
@given(hnp.arrays(np.uint16, (4, 3)))
def test_kv_scales_round_trip_bit_for_bit(raw):
    halves = [jnp.asarray(x.view(np.float16)) for x in raw]
    words = packing.pack_kv_scales(*halves)
    np.testing.assert_array_equal(words, np.ascontiguousarray(raw.T).view("<i4"))
    for half, back in zip(raw, packing.unpack_kv_scales(words), strict=True):
        np.testing.assert_array_equal(np.asarray(back).view(np.uint16), half)


@pytest.mark.parametrize(("bits", "head_dim"), [(4, 64), (8, 64), (4, 8), (8, 24)])
def test_token_word_indices_are_where_split_page_words_reads(bits, head_dim, rng):
    page_size, w = 4, packing.code_words(head_dim, bits)
    tokens = rng.integers(-(2**31), 2**31, (page_size, 2 * w + 2), np.int64).astype(np.int32)
    index = packing.token_word_indices(jnp.arange(page_size), page_size, head_dim, bits)
    assert sorted(index.ravel().tolist()) == list(range(page_size * (2 * w + 2)))
    block = np.zeros(index.size, np.int32)
    block[np.asarray(index)] = tokens
    k, v, scales = packing.split_page_words(jnp.asarray(block), head_dim, bits)
    np.testing.assert_array_equal(k, tokens[:, :w])
    np.testing.assert_array_equal(v, tokens[:, w : 2 * w])
    np.testing.assert_array_equal(scales, tokens[:, 2 * w :])


@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (4, -1), (8, 128)])
def test_dequantize_weight_is_the_equation_of_the_container(bits, group_size, rng):
    w = rng.standard_normal((2, 256, 6)).astype(np.float32)
    config = QuantConfig(weight_bits=bits, group_size=group_size)
    quantized = quantize_kernel(jnp.asarray(w), config)
    q = np.asarray(quantized.codes)
    scale = np.asarray(quantized.channel_scale)[..., None]
    if bits == 4:
        q = np.stack([q & 15, q >> 4], -1).reshape(2, 6, 256)
    expected = q * scale
    if isinstance(quantized, W4PerGroup):
        s2, offset = np.asarray(quantized.group_scale), np.asarray(quantized.group_offset)
        w8 = q.astype(int) * s2.repeat(128, -1) + offset.repeat(128, -1).astype(int)
        np.testing.assert_array_equal(packing.int8_weight(quantized), w8)
        assert packing.int8_weight(quantized).dtype == jnp.int8
        expected = w8.astype(np.float32) * scale
    elif isinstance(quantized, W4PerChannel):
        expected = q * scale - np.asarray(quantized.scaled_zero)[..., None]
    value = packing.dequantize_weight(quantized)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, expected)


def ones_per_group(n):
    w = quantize_kernel(jnp.ones((128, n)))
    assert isinstance(w, W4PerGroup)
    return w


def test_int8_weight_reads_offsets_of_either_sign():
    w = ones_per_group(1)
    codes, scale = jnp.full((1, 64), 0xF0, jnp.uint8), jnp.full((1, 1), 8, jnp.uint8)
    for offset, low, high in ((-120, -120, 0), (-128, -128, -8), (7, 7, 127)):
        group_offset = jnp.full((1, 1), offset, jnp.int8)
        made = dataclasses.replace(w, codes=codes, group_scale=scale, group_offset=group_offset)
        np.testing.assert_array_equal(packing.int8_weight(made), [[low, high] * 64])


def test_kernel_layouts_are_refused():
    w = ones_per_group(2)
    packed = dataclasses.replace(w, layout="sm90")
    with pytest.raises(ValueError, match="layout 'sm90'"):
        packing.dequantize_weight(packed)
