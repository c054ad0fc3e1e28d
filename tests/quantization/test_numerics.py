"""Codes and scales against a plain numpy float32 evaluation of the pinned arithmetic, bit for bit.

The numpy side is written from the method's equations, not from numerics.py: float32 throughout,
reciprocals computed once, every product rounded before a sum, half to even. Two rules for tiny
numbers belong to it: subnormal weights count as zero, and a channel whose absmax (per-channel
4-bit: range) is below 2**-119 is zero with scale 1. (2**-120 would do for the scale of level 1, but
2**-120 / 127 is subnormal and XLA flushes it.)
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.quantization import numerics

F = np.float32
TINY = F(2.0**-119)


def flushed(w):
    w = np.asarray(w, F)
    return np.where(np.abs(w) < F(2.0**-126), F(0), w)


def symmetric_scale(w, levels):
    absmax = np.abs(w).max(-1)
    return np.where(absmax < TINY, F(1), absmax / F(levels))


def spread(x):
    return np.minimum(x.min(-1, keepdims=True), F(0)), np.maximum(x.max(-1, keepdims=True), F(0))


def level_2(u):
    """Unclipped code, s2, z of groups u[..., g]."""
    low, high = spread(u)
    s2 = np.maximum(np.round((high - low) / F(15)), F(1))
    inv = F(1) / s2
    z = np.clip(np.round(-low * inv), 0, 15).astype(F)
    return np.round(u * inv + z), s2, z


def progressive(w, g):
    w = flushed(w)
    s1 = symmetric_scale(w, 119)
    u = np.clip(w * (F(1) / s1)[:, None], F(-119), F(119)).reshape(len(w), -1, g)
    code, s2, z = level_2(u)
    return np.clip(code, 0, 15).reshape(w.shape), s1, s2[..., 0], (-z * s2)[..., 0]


def per_channel(w):
    w = flushed(w)
    low, high = spread(w)
    with np.errstate(over="ignore"):
        span = np.minimum(high - low, np.finfo(F).max)
    s = np.where(span < TINY, F(1), span / F(15))
    inv = F(1) / s
    z = np.clip(np.round(-low * inv), 0, 15).astype(F)
    return np.clip(np.round(w * inv + z), 0, 15), s[:, 0], (z * s)[:, 0]


def int8(w):
    w = flushed(w)
    s = symmetric_scale(w, 127)
    return np.clip(np.round(w * (F(1) / s)[:, None]), -127, 127), s


def weights(kind):
    rng = np.random.default_rng(1)
    normal = rng.standard_normal((64, 512), F)
    edge = TINY * F(2.0) ** np.arange(-12, 20).repeat(2)[:, None].astype(F)
    made = {
        "normal": lambda: rng.standard_normal((2048, 512), F) * F(0.02),
        "heavy tailed": lambda: rng.standard_t(2, (2048, 512)).astype(F),
        "bfloat16 grid": lambda: np.asarray(jnp.asarray(normal, jnp.bfloat16).astype(F)),
        "integer grid": lambda: rng.integers(-119, 120, (64, 512)).astype(F),
        "constant": lambda: np.repeat(np.linspace(-2, 2, 64, dtype=F)[:, None], 512, 1),
        "positive": lambda: np.abs(normal) + F(0.5),
        "negative": lambda: -np.abs(normal) - F(0.5),
        "outlier": lambda: normal * np.where(rng.random((64, 512)) < 0.002, F(1e3), F(1)),
        "zero": lambda: normal * (np.arange(64)[:, None] % 2).astype(F),
        "1e30": lambda: normal * F(1e30),
        "3e38": lambda: np.sign(normal) * np.linspace(1.6e38, 3.4e38, 64, dtype=F)[:, None],
        "1e-30": lambda: normal * F(1e-30),
        "1e-37": lambda: normal * F(1e-37),
        "2**-119": lambda: normal / np.abs(normal).max(-1, keepdims=True) * edge,
        "just below": lambda: np.full((1, 128), np.nextafter(TINY, F(0)), F),
        "just above": lambda: np.full((1, 128), np.nextafter(TINY, F(1)), F),
        "subnormal": lambda: normal * F(1e-39),
    }
    return made[kind]()


KINDS = [
    *("normal", "heavy tailed", "bfloat16 grid", "integer grid", "constant", "positive"),
    *("negative", "outlier", "zero", "1e30", "3e38", "1e-30", "1e-37", "2**-119", "just below"),
    *("just above", "subnormal"),
]
SCHEMES = {
    "progressive": (lambda w: numerics.quantize_progressive(w, 128), lambda w: progressive(w, 128)),
    "per-channel": (numerics.quantize_per_channel, per_channel),
    "int8": (numerics.quantize_int8, int8),
}


def assert_equal(ours, reference):
    for a, b in zip(ours, reference, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_equal_numpy_exactly_eager_and_jitted(scheme, kind):
    ours, reference = SCHEMES[scheme]
    w = weights(kind)
    expected = reference(w)
    assert_equal(ours(jnp.asarray(w)), expected)
    assert_equal(jax.jit(ours)(w), expected)


def test_more_than_two_million_weights_are_compared():
    assert sum(weights(kind).size for kind in KINDS) >= 2_000_000


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_are_read_as_float32(dtype, rng):
    w = jnp.asarray(rng.standard_normal((16, 256), F), dtype)
    assert_equal(numerics.quantize_progressive(w, 128), progressive(np.asarray(w, F), 128))


def integer_ranges(p):
    """One group [low, high, 0, ...] for each pair of integers -p <= low <= 0 <= high <= p."""
    low, high = np.meshgrid(np.arange(-p, 1), np.arange(p + 1), indexing="ij")
    groups = np.zeros((low.size, 128), F)
    groups[:, 0], groups[:, 1] = low.ravel(), high.ravel()
    return groups


def test_w8_never_leaves_int8_for_any_integer_range_at_119():
    groups = integer_ranges(119)
    anchor = np.zeros_like(groups)
    anchor[:, 0] = 119  # makes the level-1 scale 1, so that u is the integers themselves
    quantized = numerics.quantize_progressive(jnp.asarray(np.hstack([groups, anchor])), 128)
    codes, s1, s2, offset = (np.asarray(x, np.int32) for x in quantized)
    assert (s1 == 1).all() and s2.min() == 1 and s2.max() == 16
    products = codes.reshape(-1, 2, 128) * s2[..., None]
    w8 = products + offset[..., None]
    assert products.max() <= 240  # four codes in a word are multiplied without carries
    assert w8.min() >= -121 and w8.max() <= 121


@pytest.mark.parametrize(("p", "overflowing"), [(119, 0), (123, 27), (127, 271)])
def test_a_larger_range_than_119_overflows(p, overflowing):
    code, s2, z = level_2(integer_ranges(p))
    w8 = (np.clip(code, 0, 15) - z) * s2
    assert ((w8 > 127) | (w8 < -128)).any(-1).sum() == overflowing


def test_counterexample_at_123():
    code, s2, z = level_2(np.array([[-119, 121]], F))
    assert (s2.item(), z.item(), ((code - z) * s2)[0, 1]) == (16, 7, 128)


@pytest.mark.parametrize("kind", ["normal", "heavy tailed", "positive", "outlier"])
def test_progressive_error_is_half_a_step_where_not_clipped(kind):
    w = weights(kind)
    quantized = numerics.quantize_progressive(jnp.asarray(w), 128)
    codes, s1, s2, offset = (np.asarray(x, np.float64) for x in quantized)
    step = np.repeat(s1[:, None] * s2, 128, 1)
    value = codes * step + s1[:, None] * np.repeat(offset, 128, 1)
    raw = level_2((w * (F(1) / s1.astype(F))[:, None]).reshape(len(w), -1, 128))[0]
    inside = ((raw >= 0) & (raw <= 15)).reshape(w.shape)
    assert inside.mean() > 0.98
    assert (np.abs(value - w) <= step * 0.50001)[inside].all()


def test_per_channel_error_is_half_a_step_and_one_step_where_clipped():
    w = weights("normal")
    codes, scale, zero = (
        np.asarray(x, np.float64) for x in numerics.quantize_per_channel(jnp.asarray(w))
    )
    error = np.abs(codes * scale[:, None] - zero[:, None] - w) / scale[:, None]
    assert error[(codes > 0) & (codes < 15)].max() <= 0.50001
    assert error.max() <= 1.00001


def test_per_channel_stays_finite_where_the_range_is_beyond_float32():
    for w in (weights("3e38"), np.array([[-1, 1], [-1, 0], [0, 1]], F) * np.finfo(F).max):
        codes, scale, zero = map(np.asarray, numerics.quantize_per_channel(jnp.asarray(w)))
        value = codes * scale[:, None] - zero[:, None]
        assert np.isfinite(value).all() and codes.max() == 15
        assert ((value == 0) | (np.sign(value) == np.sign(w))).all()


def kv(x, bits):
    """Codes, scale, centre; fp16 conversions round to nearest even, saturating at 65504."""
    top, half = F(2**bits - 1), F(2 ** (bits - 1))
    low, high = x.min(-1), x.max(-1)
    with np.errstate(over="ignore"):
        scale = np.clip((high - low) / top, F(2.0**-14), F(65504)).astype(np.float16)
    s = scale.astype(F)
    centre = np.clip(low + half * s, F(-65504), F(65504)).astype(np.float16)
    inv = F(1) / s
    with np.errstate(over="ignore"):
        codes = np.round((x - centre.astype(F)[:, None]) * inv[:, None]) + half
    return np.clip(codes, 0, top), scale, centre


def kv_vectors(kind):
    rng = np.random.default_rng(2)
    normal = rng.standard_normal((2048, 64), F)
    made = {
        "normal": normal * np.exp(rng.standard_normal((2048, 1))).astype(F),
        "offset": normal + F(20) * rng.standard_normal((2048, 1), F),
        "constant": np.repeat(np.linspace(-50, 50, 101, dtype=F)[:, None], 64, 1),
        "zero": np.zeros((2, 64), F),
        "small": normal * F(1e-6),
        "huge": np.full((2, 64), 1e6, F) * np.array([[1], [-1]], F),
        "huge and mixed": normal * F(1e6),
        "largest": np.sign(normal) * np.finfo(F).max,
        "bfloat16": np.asarray(jnp.asarray(normal, jnp.bfloat16).astype(F)),
    }
    return made[kind]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "kind",
    [
        *("normal", "offset", "constant", "zero", "small", "huge", "huge and mixed", "largest"),
        "bfloat16",
    ],
)
def test_kv_equals_numpy_exactly_and_stays_finite(kind, bits):
    x = kv_vectors(kind)
    given = jnp.asarray(x, jnp.bfloat16 if kind == "bfloat16" else jnp.float32)
    ours = numerics.quantize_kv(given, bits)
    assert_equal(ours, kv(x, bits))
    assert_equal(jax.jit(numerics.quantize_kv, static_argnums=1)(given, bits), ours)
    assert [a.dtype for a in ours] == [jnp.uint8, jnp.float16, jnp.float16]
    assert ours[0].max() <= 2**bits - 1  # 16 does not wrap to 0: the maximum keeps the top code
    assert np.isfinite(numerics.dequantize_kv(*ours, bits)).all()


@pytest.mark.parametrize(("bits", "steps"), [(4, 0.51), (8, 0.6)])
def test_kv_error_is_about_half_a_step(bits, steps, rng):
    x = rng.standard_normal((512, 64), F)
    codes, scale, centre = numerics.quantize_kv(x, bits)
    error = np.abs(numerics.dequantize_kv(codes, scale, centre, bits) - x)
    assert (error <= steps * np.asarray(scale, F)[:, None]).all()  # 0.5 and fp16's rounding
    assert codes.min() == 0 and codes.max() == 2**bits - 1


@pytest.mark.parametrize("bits", [4, 8])
def test_kv_constants_come_back_to_fp16_rounding_and_zero_exactly(bits):
    x = kv_vectors("constant")
    back = numerics.dequantize_kv(*numerics.quantize_kv(x, bits), bits)
    assert (np.abs(back - x) <= np.maximum(np.abs(x) * 2.0**-11, 2.0**-15) * 1.001).all()
    zero = kv_vectors("zero")
    assert (numerics.dequantize_kv(*numerics.quantize_kv(zero, bits), bits) == 0).all()


def test_fake_quantize_kv_is_float32_and_16_bits_keep_the_values(rng):
    x = jnp.asarray(rng.standard_normal((3, 64)), jnp.bfloat16)
    expected = numerics.dequantize_kv(*numerics.quantize_kv(x, 4), 4)
    assert_equal([numerics.fake_quantize_kv(x, 4)], [expected])
    assert numerics.fake_quantize_kv(x, 4).dtype == jnp.float32
    assert numerics.fake_quantize_kv(x, 16) is x


def activation(x):
    scale = np.maximum(np.abs(x).max(-1), F(2.0**-100)) / F(127)
    codes = np.clip(np.round(x * (F(1) / scale)[:, None]), -127, 127)
    return codes, scale, codes.sum(-1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_equal_numpy_exactly(dtype, rng):
    scales = np.exp(4 * rng.standard_normal((4096, 1))).astype(F)
    x = jnp.asarray(rng.standard_normal((4096, 96), F) * scales, dtype)
    x = x.at[:2].set(0).at[2].set(1e-35).at[3].set(1e30)
    for quantize in (numerics.quantize_activation, jax.jit(numerics.quantize_activation)):
        ours = quantize(x)
        assert_equal((ours.codes, ours.scale, ours.code_sum), activation(np.asarray(x, F)))
    assert (ours.codes.dtype, ours.code_sum.dtype) == (jnp.int8, jnp.int32)
    assert (ours.codes[:3] == 0).all() and (ours.scale > 0).all() and (ours.codes[3] == 127).all()
