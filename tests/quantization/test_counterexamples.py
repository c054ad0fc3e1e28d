"""Why level 1 is 8 bits, comes first, and stops at 119."""

import jax.numpy as jnp
import numpy as np

from qserve_jax import QuantConfig, dequantize_params, quantize_params
from qserve_jax.quantization.counterexamples import (
    int4_with_int4_scales,
    int4_with_int8_scales,
    wrap_int8,
)


def weights(rng, spread):
    """Gaussian, each group of 128 of its own size."""
    size = np.exp(spread * rng.standard_normal((256, 8, 1)))
    return jnp.asarray((rng.standard_normal((256, 8, 128)) * size).reshape(256, 1024), jnp.float32)


def error(got, w):
    """Mean squared error over the mean square."""
    return float(jnp.mean(jnp.square(got - w)) / jnp.mean(jnp.square(w)))


def progressive(w):
    return dequantize_params(quantize_params({"kernel": w.T}, QuantConfig()))["kernel"].T


def test_int8_scales_overflow(rng):
    w = weights(rng, 0.0)
    w8, scale = int4_with_int8_scales(w, 128)
    outside = (w8 < -128) | (w8 > 127)
    assert outside.sum() > 100
    wrapped = error(wrap_int8(w8) * scale[:, None], w)
    unwrapped = error(w8 * scale[:, None], w)
    assert wrapped > 1.5 * unwrapped
    assert wrapped > 1.5 * error(progressive(w), w)
    np.testing.assert_array_equal(wrap_int8(jnp.array([128.0, -129.0, 127.0])), [-128, 127, 127])


def test_int4_scales_lose_small_groups(rng):
    w = weights(rng, 1.0)
    small = jnp.abs(w.reshape(256, 8, 128)).max(-1) < 0.1 * jnp.abs(w).max(-1, keepdims=True)
    assert small.mean() > 0.1
    rows = jnp.repeat(small, 128, axis=1)

    def error_of_small_groups(got):
        return float(
            jnp.sum(jnp.where(rows, got - w, 0) ** 2) / jnp.sum(jnp.where(rows, w, 0) ** 2)
        )

    assert error_of_small_groups(int4_with_int4_scales(w, 128)) > 2 * error_of_small_groups(
        progressive(w)
    )
