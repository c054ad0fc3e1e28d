"""`quantize_params(params, config, stats=...)` in somebody's own training repository."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax import QuantConfig, dequantize_params, quantize_params
from qserve_jax.quantization.transforms import collect_statistics, quantize_with_statistics


def model(params, x):
    """(output, the inputs of its matmuls, by the names of the kernels)"""
    hidden = jax.nn.relu(x @ params["up"]["kernel"])
    return hidden @ params["down"]["kernel"], {"up": x, "down": hidden}


@pytest.fixture
def case(rng):
    mix = rng.standard_normal((128, 128)) * np.linspace(0.1, 2, 128)  # correlated inputs
    x = jnp.asarray(rng.standard_normal((1024, 128)) @ mix, jnp.float32)
    shapes = {"up": (128, 256), "down": (256, 32)}
    params = {
        n: {"kernel": jnp.asarray(rng.standard_normal(s), jnp.float32)} for n, s in shapes.items()
    }
    stats = collect_statistics(lambda p, x: model(p, x)[1], params, [x], hessians=True)
    return params, x, stats


@pytest.mark.parametrize("group_size", [128, -1])
def test_loses_less_than_rounding_on_the_same_grid(case, group_size):
    params, x, stats = case
    config = QuantConfig(group_size=group_size)
    exact, inputs = model(params, x)
    jitted = jax.jit(lambda p, s: quantize_params(p, config, stats=s))
    made = {"stats": jitted(params, stats), "rounded": quantize_params(params, config)}
    for name, kernel in (("up", inputs["up"]), ("down", inputs["down"])):
        error = {
            key: float(
                jnp.square(
                    kernel @ (dequantize_params(q)[name]["kernel"] - params[name]["kernel"])
                ).sum()
            )
            for key, q in made.items()
        }
        assert error["stats"] < 0.7 * error["rounded"]
    a, b = (made[key]["down"]["kernel"] for key in made)
    np.testing.assert_allclose(a.channel_scale, b.channel_scale, rtol=1e-6)
    assert jax.tree.structure(made["stats"]) == jax.tree.structure(made["rounded"])
    same = quantize_with_statistics(params, config, stats)
    jax.tree.map(np.testing.assert_array_equal, same, quantize_params(params, config, stats=stats))
    assert exact.shape == (1024, 32)


def test_statistics_that_do_not_fit(case):
    params, x, stats = case
    other = {"side": params["up"], **params}
    with pytest.raises(ValueError, match="there is no statistic 'side'"):
        quantize_params(other, stats=stats)
    half = {"up": params["up"], "down": {"kernel": params["down"]["kernel"][:128]}}
    with pytest.raises(ValueError, match="collect the statistics of this model"):
        quantize_params(half, stats=stats)
    absmax = collect_statistics(lambda p, x: model(p, x)[1], params, [x])
    with pytest.raises(ValueError, match="with hessians=True"):
        quantize_params(params, stats=absmax)
