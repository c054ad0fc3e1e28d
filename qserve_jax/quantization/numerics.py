"""The arithmetic of scales, zero points and codes, for weights, activations and the KV cache.

Pinned: float32 throughout, quotients correctly rounded, reciprocals computed once, products rounded
to float32 before anything is added. Left alone, compilers move codes at rounding boundaries: they
divide by multiplying with a rounded reciprocal, GPUs divide to within 2 ulp (see `_divide`), a
multiplication and an addition become one fused multiply-add (see `_clip_product`), and a round trip
through float16 is elided (see `_round_to_float16`). With these pinned, codes equal a plain numpy
float32 evaluation bit for bit, on every backend.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qserve_jax.quantization.qtensor import Array, Int8Activation

PROTECTIVE_RANGE = 119.0
"""Level-1 range of progressive quantisation: the largest for which code * s2 + offset never leaves
int8, whatever the group's range (QServe section 4.1; exhaustive test in tests/quantization)."""

MIN_WEIGHT_ABSMAX = 2.0**-119
"""A weight channel below this is coded as exact zero with scale 1. It is the smallest power of two
whose 127th part is still a normal float32: XLA flushes subnormals to zero."""

MIN_ACTIVATION_ABSMAX = 2.0**-100
"""Floor of a token's absmax, so that an all-zero token gets a finite scale and zero codes."""

MIN_KV_SCALE = 2.0**-14
"""Floor of a K/V scale: the smallest normal float16. A constant vector comes back to within half of
it or the rounding to float16, and zero exactly."""

MAX_KV_VALUE = 65504.0
"""Largest float16: scales and centres saturate there instead of becoming infinite."""


def _divide(x: Array | float, y: Array | float) -> Array:
    """x / y in float32, correctly rounded: a float64 quotient rounded to float32 is exactly that
    (Figueroa 1995), even where it was a multiplication by the reciprocal.

    reduce_precision does the rounding, because XLA may skip a conversion to float32 and back.
    """
    x, y = jnp.broadcast_arrays(jnp.float32(x), jnp.float32(y))
    with jax.enable_x64(True):
        quotient = x.astype("float64") / y.astype("float64")
        return jax.lax.reduce_precision(quotient, 8, 23).astype("float32")


def _round_to_float16(x: Array) -> Array:
    """x as float16, saturated instead of infinite.

    Rounded in float32 first, because XLA may skip a conversion to float16 and back: by
    reduce_precision, and by hand below its smallest normal, which reduce_precision flushes.
    """
    x = jnp.clip(x, -MAX_KV_VALUE, MAX_KV_VALUE)
    subnormal = jnp.round(x * 2.0**24) * 2.0**-24
    normal = jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)
    return jnp.where(jnp.abs(x) < 2.0**-14, subnormal, normal).astype(jnp.float16)


def _flush_subnormals(w: Array) -> Array:
    """w as float32, subnormals as zero on every backend (XLA does so on CPU, not on GPU)."""
    w = w.astype(jnp.float32)
    return jnp.where(jnp.abs(w) < jnp.finfo(jnp.float32).tiny, 0, w)


def _clip_product(x: Array, reciprocal: Array, bound: float) -> Array:
    """clip(x * reciprocal, -bound, bound); the clip keeps a following sum from fusing (FMA)."""
    return jnp.clip(x * reciprocal, -bound, bound)


def _symmetric_scale(w: Array, levels: float) -> Array:
    """absmax over the last axis / levels, or 1 where the channel is numerically zero."""
    absmax = jnp.max(jnp.abs(w), axis=-1)
    return jnp.where(absmax < MIN_WEIGHT_ABSMAX, jnp.float32(1), _divide(absmax, levels))


def _asymmetric_codes(x: Array, scale: Array, zero: Array) -> Array:
    """uint4 codes clip(round(x / scale + zero), 0, 15), rounded half to even after the sum."""
    ratio = _clip_product(x, _divide(1, scale), 2 * PROTECTIVE_RANGE)
    return jnp.clip(jnp.round(ratio + zero), 0, 15)


def _range_with_zero(x: Array) -> tuple[Array, Array]:
    """(min, max) over the last axis, widened to contain zero; keeps the axis."""
    low = jnp.minimum(jnp.min(x, axis=-1, keepdims=True), 0)
    high = jnp.maximum(jnp.max(x, axis=-1, keepdims=True), 0)
    return low, high


def _as_stored(scale: Array, scale_dtype: str) -> Array:
    """A weight scale as `scale_dtype` holds it, in float32; in float16 at least 2**-24."""
    if scale_dtype == "float32":
        return scale
    return jnp.maximum(_round_to_float16(scale).astype(jnp.float32), 2.0**-24)


def quantize_progressive(
    w: Array, group_size: int, scale_dtype: str = "float32", round_level_one: bool = False
) -> tuple[Array, Array, Array, Array]:
    """Two-level 4-bit weights (QServe section 4.1, equations 4-7).

    w: float[..., N, K], K a multiple of group_size.
    Level 1: s1 = absmax / 119, u = clip(w / s1, -119, 119), rounded if round_level_one.
    Level 2, per group: s2 = max(1, round((max u - min u) / 15)),
    z = clip(round(-min u / s2), 0, 15), code = clip(round(u / s2 + z), 0, 15).
    scale_dtype: what s1 is rounded to before anything is coded with it, float32 or float16.
    Returns codes u8[..., N, K], channel_scale f32[..., N], group_scale u8[..., N, K/g],
    group_offset i8[..., N, K/g] = -z * s2.
    """
    u, channel_scale, scale, zero = progressive_grid(w, group_size, scale_dtype, round_level_one)
    groups = u.reshape(*scale.shape, group_size)
    codes = _asymmetric_codes(groups, scale[..., None], zero[..., None]).reshape(w.shape)
    return (
        codes.astype(jnp.uint8),
        channel_scale,
        scale.astype(jnp.uint8),
        (-zero * scale).astype(jnp.int8),
    )


def progressive_grid(
    w: Array, group_size: int, scale_dtype: str = "float32", round_level_one: bool = False
) -> tuple[Array, Array, Array, Array]:
    """The grid of `quantize_progressive`: u f32[..., N, K], channel_scale f32[..., N] and, per
    group, scale and zero f32[..., N, K/g] (whole numbers)."""
    w = _flush_subnormals(w)
    channel_scale = _as_stored(_symmetric_scale(w, PROTECTIVE_RANGE), scale_dtype)
    u = _clip_product(w, _divide(1, channel_scale)[..., None], PROTECTIVE_RANGE)
    u = jnp.round(u) if round_level_one else u
    groups = u.reshape(*u.shape[:-1], u.shape[-1] // group_size, group_size)
    low, high = _range_with_zero(groups)
    scale = jnp.maximum(jnp.round(_divide(high - low, 15)), 1)
    zero = jnp.clip(jnp.round(-low * _divide(1, scale)), 0, 15)
    return u, channel_scale, scale[..., 0], zero[..., 0]


def quantize_per_channel(w: Array, scale_dtype: str = "float32") -> tuple[Array, Array, Array]:
    """Asymmetric 4-bit weights, one scale and integer zero point per output channel.

    w: float[..., N, K]. scale = (max - min) / 15 with the range widened to contain zero,
    z = clip(round(-min / scale), 0, 15), code = clip(round(w / scale + z), 0, 15).
    A range beyond float32 counts as the largest float32, so that code * scale stays finite.
    scale_dtype: what scale and z * scale are rounded to, float32 or float16.
    Returns codes u8[..., N, K], channel_scale f32[..., N], scaled_zero f32[..., N] = z * scale.
    """
    scale, zero = per_channel_grid(w, scale_dtype)
    codes = _asymmetric_codes(_flush_subnormals(w), scale[..., None], zero[..., None])
    return codes.astype(jnp.uint8), scale, scaled_zeros(scale, zero, scale_dtype)


def scaled_zeros(scale: Array, zero: Array, scale_dtype: str = "float32") -> Array:
    """zero * scale as a per-channel container holds it."""
    product = zero * scale
    if scale_dtype == "float16":
        product = _round_to_float16(product).astype(jnp.float32)
    return product


def per_channel_grid(w: Array, scale_dtype: str = "float32") -> tuple[Array, Array]:
    """The grid of `quantize_per_channel`: scale and zero (a whole number), f32[..., N]."""
    low, high = _range_with_zero(_flush_subnormals(w))
    span = jnp.minimum(high - low, jnp.finfo(jnp.float32).max)
    scale = jnp.where(span < MIN_WEIGHT_ABSMAX, jnp.float32(1), _divide(span, 15))
    scale = _as_stored(scale, scale_dtype)
    zero = jnp.clip(jnp.round(-low * _divide(1, scale)), 0, 15)
    return scale[..., 0], zero[..., 0]


def quantize_int8(w: Array) -> tuple[Array, Array]:
    """Symmetric 8-bit weights: scale = absmax / 127 per output channel, code = round(w / scale).

    w: float[..., N, K]. Returns codes i8[..., N, K], channel_scale f32[..., N].
    """
    w = _flush_subnormals(w)
    scale = _symmetric_scale(w, 127)
    codes = jnp.clip(jnp.round(w * _divide(1, scale)[..., None]), -127, 127)
    return codes.astype(jnp.int8), scale


def quantize_activation(x: Array) -> Int8Activation:
    """Per-token dynamic 8-bit activations (QServe section 4.1): scale = absmax / 127.

    x: float[..., K]. A token whose absmax is below MIN_ACTIVATION_ABSMAX uses that floor.
    """
    x = x.astype(jnp.float32)
    absmax = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), MIN_ACTIVATION_ABSMAX)
    scale = _divide(absmax, 127)
    codes = jnp.clip(jnp.round(x * _divide(1, scale)[..., None]), -127, 127).astype(jnp.int8)
    return Int8Activation(codes, scale, jnp.sum(codes, axis=-1, dtype=jnp.int32))


def quantize_kv(x: Array, bits: int) -> tuple[Array, Array, Array]:
    """Per-token, per-head asymmetric K or V (QServe section 4.2), for 4 or 8 bits.

    x: float[..., H]. scale = fp16((max - min) / (2**bits - 1)), floored at MIN_KV_SCALE;
    centre = fp16(min + 2**(bits-1) * scale); codes are taken against the *rounded* fp16 scale and
    centre and clamped, so that no value wraps. value = (code - 2**(bits-1)) * scale + centre.
    Returns codes u8[..., H], scale f16[...], centre f16[...].
    """
    x = x.astype(jnp.float32)
    low, high = jnp.min(x, axis=-1), jnp.max(x, axis=-1)
    half, top = 2.0 ** (bits - 1), 2.0**bits - 1
    scale = _round_to_float16(jnp.maximum(_divide(high - low, top), MIN_KV_SCALE))
    exact = scale.astype(jnp.float32)
    centre = _round_to_float16(low + half * exact)
    offset = x - centre.astype(jnp.float32)[..., None]
    codes = jnp.round(offset * _divide(1, exact)[..., None]) + half
    return jnp.clip(codes, 0, top).astype(jnp.uint8), scale, centre


def dequantize_kv(codes: Array, scale: Array, centre: Array, bits: int) -> Array:
    """f32[..., H] = (codes - 2**(bits-1)) * scale + centre, the inverse of `quantize_kv`."""
    offset = codes.astype(jnp.float32) - 2.0 ** (bits - 1)
    return offset * scale.astype(jnp.float32)[..., None] + centre.astype(jnp.float32)[..., None]


def fake_quantize_kv(x: Array, bits: int) -> Array:
    """x float[..., H] as a cache of `bits` returns it, f32[..., H]; 16 bits return x itself."""
    return x if bits == 16 else dequantize_kv(*quantize_kv(x, bits), bits)
