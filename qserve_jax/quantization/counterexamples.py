"""Two-level schemes that QServe rejects (section 4.1), to show why.

Nothing uses them but tests and tables. Both quantise a group of g weights to 4 bits first, with a
float scale per group, and then these scales, per channel. The order is what is wrong: the second
quantisation rounds scales that the codes were already taken against.
"""

from __future__ import annotations

import jax.numpy as jnp

from qserve_jax.quantization.qtensor import Array


def int4_with_int8_scales(w: Array, group_size: int) -> tuple[Array, Array]:
    """INT4 codes, then INT8 group scales (as VSQuant and DGQ): w f32[N, K] -> (w8, channel_scale).

    w8 f32[N, K] = (code - zero) * s8 is what an INT8 tensor core would be given, before it wraps.
    channel_scale f32[N] makes the channel's largest weight 127, so that all would fit if s8 were
    not rounded. With s8 rounded up some do not: the range has no protection.
    """
    codes, scale = _int4_groups(w, group_size)
    channel_scale = jnp.abs(w).max(axis=-1) / 127
    s8 = jnp.clip(jnp.round(scale / channel_scale[:, None]), 1, 127)
    return (codes * s8[..., None]).reshape(w.shape), channel_scale


def wrap_int8(x: Array) -> Array:
    """Whole numbers as an int8 register holds them."""
    return (x + 128) % 256 - 128


def int4_with_int4_scales(w: Array, group_size: int) -> Array:
    """INT4 codes, then INT4 group scales: w f32[N, K] -> its dequantised f32[N, K].

    The level-1 scale is a fifteenth of the largest group scale: groups of small weights get scales
    that are off by up to half of it.
    """
    codes, scale = _int4_groups(w, group_size)
    channel_scale = scale.max(axis=-1, keepdims=True) / 15
    s4 = jnp.clip(jnp.round(scale / channel_scale), 1, 15)
    return (codes * (s4 * channel_scale)[..., None]).reshape(w.shape)


def _int4_groups(w: Array, group_size: int) -> tuple[Array, Array]:
    """(code - zero f32[N, K/g, g], scale f32[N, K/g]) of asymmetric 4 bits per group."""
    groups = w.reshape(w.shape[0], -1, group_size)
    low = jnp.minimum(groups.min(axis=-1), 0)
    high = jnp.maximum(groups.max(axis=-1), 0)
    scale = (high - low) / 15
    zero = jnp.round(-low / scale)[..., None]
    codes = jnp.clip(jnp.round(groups / scale[..., None] + zero), 0, 15)
    return codes - zero, scale
