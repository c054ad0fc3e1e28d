"""Bit packing: nibbles of weight codes, and the 32-bit words of one token in the KV cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qserve_jax.quantization.qtensor import Array, QuantizedWeight, W4PerGroup, W8PerChannel


def pack_nibbles(codes: Array) -> Array:
    """u8[..., K] with values 0..15 -> u8[..., K/2]; even k in the low nibble. K must be even."""
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_nibbles(packed: Array) -> Array:
    """u8[..., K/2] -> u8[..., K], the inverse of `pack_nibbles`."""
    pairs = jnp.stack([packed & 15, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def int8_weight(w: W4PerGroup) -> Array:
    """The int8 weights i8[..., N, K] of level 1: code * group_scale + group_offset.

    The product may wrap in int8 (240 > 127); it wraps back in the sum, which fits.
    """
    codes = unpack_nibbles(w.codes).astype(jnp.int8)
    groups = codes.reshape(*w.group_scale.shape, w.group_size)
    scale = w.group_scale.astype(jnp.int8)[..., None]
    return (groups * scale + w.group_offset[..., None]).reshape(codes.shape)


def dequantize_weight(w: QuantizedWeight) -> Array:
    """The float value f32[..., N, K] of a quantised weight, by the equation of its container.

    ValueError where the codes are packed for a kernel (layout other than "canonical").
    """
    if not isinstance(w, W8PerChannel) and w.layout != "canonical":
        raise ValueError(
            f"layout {w.layout!r} is a kernel's, not canonical: apply from_kernel_layout of "
            "qserve_jax.pallas_kernels.w4a8_matmul first"
        )
    if isinstance(w, W4PerGroup):
        return int8_weight(w) * w.channel_scale[..., None]
    if isinstance(w, W8PerChannel):
        return w.codes * w.channel_scale[..., None]
    return unpack_nibbles(w.codes) * w.channel_scale[..., None] - w.scaled_zero[..., None]


def code_words(head_dim: int, bits: int) -> int:
    """32-bit words of codes that one token takes per head and side (K or V) in the cache."""
    return head_dim * bits // 32


def pack_kv_codes(codes: Array, bits: int) -> Array:
    """Codes u8[..., H] -> i32[..., H * bits / 32], little-endian: dim 0 in the lowest bits."""
    octets = pack_nibbles(codes) if bits == 4 else codes
    words = (*octets.shape[:-1], octets.shape[-1] // 4, 4)
    return jax.lax.bitcast_convert_type(octets.reshape(words), jnp.int32)


def unpack_kv_codes(words: Array, bits: int) -> Array:
    """i32[..., W] -> codes u8[..., 32 * W / bits], the inverse of `pack_kv_codes`."""
    octets = jax.lax.bitcast_convert_type(words, jnp.uint8)
    octets = octets.reshape(*words.shape[:-1], 4 * words.shape[-1])
    return unpack_nibbles(octets) if bits == 4 else octets


def pack_kv_scales(k_scale: Array, k_centre: Array, v_scale: Array, v_centre: Array) -> Array:
    """Four f16[...] -> i32[..., 2], in the order (sk, ck, sv, cv)."""
    halves = jnp.stack([k_scale, k_centre, v_scale, v_centre], axis=-1)
    return jax.lax.bitcast_convert_type(halves.reshape(*halves.shape[:-1], 2, 2), jnp.int32)


def unpack_kv_scales(words: Array) -> tuple[Array, Array, Array, Array]:
    """i32[..., 2] -> (sk, ck, sv, cv), each f16[...]."""
    halves = jax.lax.bitcast_convert_type(words, jnp.float16)
    return halves[..., 0, 0], halves[..., 0, 1], halves[..., 1, 0], halves[..., 1, 1]


def split_page_words(words: Array, head_dim: int, bits: int) -> tuple[Array, Array, Array]:
    """A (page, head) block i32[..., W] -> K, V words i32[..., S_p, w], scales i32[..., S_p, 2]."""
    w = code_words(head_dim, bits)
    page_size = words.shape[-1] // (2 * w + 2)
    k, v, scales = jnp.split(words, [page_size * w, 2 * page_size * w], axis=-1)
    lead = (*words.shape[:-1], page_size)
    return k.reshape(*lead, w), v.reshape(*lead, w), scales.reshape(*lead, 2)


def token_word_indices(offset: Array, page_size: int, head_dim: int, bits: int) -> Array:
    """Where a token's words lie in its (page, head) block: offset i32[...] -> i32[..., 2w + 2].

    The order is that of a token's own words: K codes, V codes, scales.
    """
    w = code_words(head_dim, bits)
    i, j = jnp.arange(w), jnp.arange(2)
    offset = offset[..., None]
    k = offset * w + i
    return jnp.concatenate([k, page_size * w + k, 2 * page_size * w + 2 * offset + j], axis=-1)
