"""The matmul of a layer with the residual stream added to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.models.layers import linear
from qserve_jax.pallas_kernels.w4a8_matmul import to_kernel_layout
from tests.pallas_kernels.w4a8_cases import (
    every_kind,
    expected_output,
    lower,
    make_activation,
    make_weight,
    operations,
)


@every_kind
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_an_integer_matmul_adds_the_residual_before_its_one_rounding(per_group, dtype, rng):
    x, w = make_activation(rng, 5, 256), make_weight(per_group, rng, (64, 256))
    residual = jnp.asarray(rng.standard_normal((5, 64)), dtype)
    bias = jnp.asarray(rng.standard_normal(64), dtype)
    with jax.disable_jit():  # no fused multiply-add
        found = linear(x, {"kernel": w, "bias": bias}, layer=None, dtype=dtype, residual=residual)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected_output(x, w, dtype, bias, residual))


def test_a_float_product_is_rounded_and_then_added(rng):
    x, kernel, residual = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for shape in ((5, 64), (64, 32), (5, 32))
    )
    product = linear(x, {"kernel": kernel}, layer=None, dtype=jnp.bfloat16)
    found = linear(x, {"kernel": kernel}, layer=None, dtype=jnp.bfloat16, residual=residual)
    np.testing.assert_array_equal(found, residual + product)


@pytest.mark.parametrize("m", [16, 64])
def test_the_kernel_adds_it_and_xla_does_nothing(m, rng):
    x, w = make_activation(rng, m, 256), to_kernel_layout(make_weight(True, rng, (64, 256)))
    residual = jnp.zeros((m, 64), jnp.bfloat16)

    def run(x, w, residual):
        p = {"kernel": w}
        return linear(
            *(x, p), layer=None, dtype=jnp.bfloat16, residual=residual, backend="mosaic_sm90"
        )

    text = lower(run, x, w, residual)
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
    assert operations(text) <= {"custom_call", "reshape", "convert"}
