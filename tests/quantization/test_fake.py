"""Fake quantisation equals quantisation, and gradients pass straight through it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qserve_jax import QuantConfig, dequantize_params, fake_quantize_params, quantize_params
from qserve_jax.quantization import FLAX_RULES, MAXTEXT_RULES

CONFIGS = [
    QuantConfig(),
    QuantConfig(group_size=-1),
    QuantConfig.preset("w8a8kv8"),
    QuantConfig.preset("w16a16kv16"),
]


def tree(rng, dtype=jnp.float32):
    shapes = {"dense": (256, 6), "stack": (3, 128, 4)}
    params = {
        name: {"kernel": jnp.asarray(rng.normal(size=s), dtype)} for name, s in shapes.items()
    }
    return params | {"norm": {"scale": jnp.ones(6, dtype)}}


@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda config: f"{config.precision}{config.group_size}"
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_quantisation_exactly(rng, config, dtype):
    params = tree(rng, dtype)
    expected = dequantize_params(quantize_params(params, config))
    for fake in (fake_quantize_params, jax.jit(fake_quantize_params, static_argnums=1)):
        found = fake(params, config)
        assert jax.tree.structure(found) == jax.tree.structure(params)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert a.dtype == dtype
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("config", CONFIGS[:3], ids=lambda config: config.precision)
def test_gradient_is_that_at_the_quantised_weights(rng, config):
    params, x = tree(rng), jnp.asarray(rng.normal(size=(5, 256)))

    def loss(p):
        return ((x @ p["dense"]["kernel"] * p["norm"]["scale"]) ** 2).sum() + sum(
            (w**3).sum() for w in jax.tree.leaves(p["stack"])
        )

    found = jax.jit(jax.grad(lambda p: loss(fake_quantize_params(p, config))))(params)
    expected = jax.grad(loss)(dequantize_params(quantize_params(params, config)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_under_vmap_scan_and_forward_mode(rng):
    w = jnp.asarray(rng.normal(size=(3, 128, 4)), jnp.float32)
    expected = fake_quantize_params({"kernel": w})["kernel"]
    mapped = jax.vmap(lambda k: fake_quantize_params({"kernel": k})["kernel"])(w)
    np.testing.assert_array_equal(mapped, expected)
    _, scanned = jax.lax.scan(lambda c, k: (c, fake_quantize_params({"kernel": k})["kernel"]), 0, w)
    np.testing.assert_array_equal(scanned, expected)
    _, tangent = jax.jvp(lambda k: fake_quantize_params({"kernel": k})["kernel"], (w,), (2 * w,))
    np.testing.assert_array_equal(tangent, 2 * w)


def test_rules_and_warnings_are_those_of_quantize_params(rng):
    attention = {"query": {"kernel": jnp.asarray(rng.normal(size=(128, 2, 8)), jnp.float32)}}
    expected = dequantize_params(quantize_params(attention, rules=FLAX_RULES))["query"]["kernel"]
    found = fake_quantize_params(attention, QuantConfig(), FLAX_RULES)["query"]["kernel"]
    np.testing.assert_array_equal(found, expected)
    scanned = {"mlp": {"kernel": jnp.asarray(rng.normal(size=(128, 3, 8)), jnp.float32)}}
    expected = dequantize_params(quantize_params(scanned, rules=MAXTEXT_RULES))["mlp"]["kernel"]
    found = fake_quantize_params(scanned, rules=MAXTEXT_RULES)["mlp"]["kernel"]
    np.testing.assert_array_equal(found, expected)
    with pytest.warns(UserWarning, match="K=100 is not a multiple of group_size=128"):
        fake_quantize_params({"kernel": jnp.ones((100, 4))})
    with pytest.raises(ValueError, match="K=100 is not a multiple"):
        fake_quantize_params({"kernel": jnp.ones((100, 4))}, strict=True)


def test_training_through_it_beats_rounding_afterwards(rng):
    """4-bit per channel regression: the loss after quantisation falls when training sees it."""
    config = QuantConfig(group_size=-1)
    x = jnp.asarray(
        rng.normal(size=(512, 32)) @ rng.normal(size=(32, 32)), jnp.float32
    )  # correlated
    y = x @ jnp.asarray(rng.normal(size=(32, 8)), jnp.float32)
    loss = lambda p: ((x @ p["kernel"] - y) ** 2).mean()  # noqa: E731
    aware = lambda p: loss(fake_quantize_params(p, config))  # noqa: E731
    optimizer = optax.sgd(optax.cosine_decay_schedule(1e-3, 300))

    @jax.jit
    def step(carry, _):
        p, state = carry
        updates, state = optimizer.update(jax.grad(aware)(p), state)
        return (optax.apply_updates(p, updates), state), aware(p)

    start = {"kernel": jnp.linalg.lstsq(x, y)[0]}  # the float optimum
    _, losses = jax.lax.scan(step, (start, optimizer.init(start)), length=300)
    assert float(loss(start)) < 1e-4 * float(losses[0])
    assert float(losses[-1]) < 0.75 * float(losses[0])  # measured: 0.64
