"""`round_level_one`: level 1 rounded to int8 before level 2, as the paper writes."""

import jax
import jax.numpy as jnp
import numpy as np

from qserve_jax.quantization import QuantConfig, dequantize_params, quantize_params
from qserve_jax.quantization.numerics import progressive_grid, quantize_progressive
from qserve_jax.quantization.transforms import ActivationStats, quantize_with_statistics

ROUNDED = QuantConfig(round_level_one=True)


def test_codes_equal_numpys(rng):
    w = rng.standard_normal((32, 256), np.float32)
    codes, s1, s2, offset = map(
        np.asarray, quantize_progressive(jnp.asarray(w), 128, "float32", True)
    )
    u = np.round(np.clip(w * (np.float32(1) / s1)[:, None], -119, 119)).reshape(32, 2, 128)
    low, high = np.minimum(u.min(2), 0), np.maximum(u.max(2), 0)
    scale = np.maximum(np.round((high - low) / np.float32(15)), 1)
    inverse = np.float32(1) / scale
    z = np.clip(np.round(-low * inverse), 0, 15)
    q = np.clip(np.round(u * inverse[..., None] + z[..., None]), 0, 15)
    np.testing.assert_array_equal(codes, q.reshape(32, 256))
    np.testing.assert_array_equal(s2, scale)
    np.testing.assert_array_equal(offset, -z * scale)


def test_is_off_by_default_because_it_is_further_away(rng):
    params = {"kernel": jnp.asarray(rng.standard_normal((1024, 64)), jnp.float32)}

    def error(config):
        kernel = dequantize_params(quantize_params(params, config))["kernel"]
        return float(jnp.sum(jnp.square(kernel - params["kernel"])))

    assert error(QuantConfig()) < error(ROUNDED) < 1.02 * error(QuantConfig())


def test_reaches_gptq(rng):
    w = jnp.asarray(rng.standard_normal((128, 16)), jnp.float32)
    stats = ActivationStats(absmax={}, hessian={"": jnp.eye(128)})
    params = {"kernel": w}
    got, plain = (
        quantize_with_statistics(params, config, stats, name_of=lambda path: "")["kernel"]
        for config in (ROUNDED, QuantConfig())
    )
    scale = progressive_grid(w.T, 128, "float32", True)[2]
    np.testing.assert_array_equal(got.group_scale, scale)
    assert not np.array_equal(got.codes, plain.codes)
    rounded = jax.jit(quantize_params, static_argnums=1)(params, ROUNDED)["kernel"]
    # H is diagonal: no error to pass on. Quotients of whole numbers meet ties, which GPTQ, dividing
    # instead of multiplying by a reciprocal, may round to the other side.
    assert (np.asarray(got.codes) != np.asarray(rounded.codes)).mean() < 0.01
