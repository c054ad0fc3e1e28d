"""`scale_dtype="float16"`: scales are rounded before coding, so that the codes fit them."""

import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.quantization import QuantConfig, dequantize_kernel, quantize_kernel
from qserve_jax.quantization.numerics import quantize_per_channel, quantize_progressive


def weights(rng):
    w = rng.standard_normal((64, 256), np.float32) * 0.02
    w[3] = 0
    w[4] *= 1e-3  # scales below the smallest normal float16
    return w


def test_progressive_codes_equal_numpys_with_the_rounded_scale(rng):
    w = weights(rng)
    codes, s1, s2, offset = map(np.asarray, quantize_progressive(jnp.asarray(w), 128, "float16"))
    absmax = np.abs(w).max(1)
    expected = np.where(absmax == 0, np.float32(1), absmax / np.float32(119)).astype(np.float16)
    np.testing.assert_array_equal(s1, expected.astype(np.float32))
    u = np.clip(w * (np.float32(1) / s1)[:, None], -119, 119).reshape(64, 2, 128)
    low, high = np.minimum(u.min(2), 0), np.maximum(u.max(2), 0)
    scale = np.maximum(np.round((high - low) / np.float32(15)), 1)
    z = np.clip(np.round(-low * (np.float32(1) / scale)), 0, 15)
    q = np.clip(np.round(u * (np.float32(1) / scale)[..., None] + z[..., None]), 0, 15)
    np.testing.assert_array_equal(codes, q.reshape(64, 256))
    np.testing.assert_array_equal(s2, scale)
    np.testing.assert_array_equal(offset, -z * scale)
    w8 = codes.reshape(64, 2, 128).astype(int) * s2[..., None] + offset[..., None]
    assert w8.min() >= -128 and w8.max() <= 127


def test_per_channel_scales_and_zeros_are_float16(rng):
    w = weights(rng)
    for array in quantize_per_channel(jnp.asarray(w), "float16")[1:]:
        np.testing.assert_array_equal(array, np.asarray(array).astype(np.float16))
        assert array.dtype == jnp.float32


@pytest.mark.parametrize("group_size", [-1, 128])
def test_rounding_costs_next_to_nothing(rng, group_size):
    w = weights(rng)[5:].T
    errors = {}
    for dtype in ("float32", "float16"):
        config = QuantConfig(group_size=group_size, scale_dtype=dtype)
        errors[dtype] = np.linalg.norm(
            dequantize_kernel(quantize_kernel(jnp.asarray(w), config)) - w
        )
    assert errors["float16"] != errors["float32"]
    assert errors["float16"] < 1.01 * errors["float32"]


def test_other_names_are_refused():
    with pytest.raises(ValueError, match="scale_dtype='bfloat16' is not supported"):
        QuantConfig(scale_dtype="bfloat16")
