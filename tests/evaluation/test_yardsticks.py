"""The yardsticks against independent numpy, and in the model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.evaluation.candidates import COMPARISONS, comparison
from qserve_jax.evaluation.yardsticks import (
    InputQuantizedKernel,
    fake_quantize_asymmetric,
    fake_quantize_symmetric,
    w4a4_params,
    w4a16_params,
)
from qserve_jax.models import CausalLM, ModelConfig, RopeConfig, init_params
from qserve_jax.quantization import QuantConfig, W4PerGroup

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=64,
    hidden_size=256,
    intermediate_size=192,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_position_embeddings=32,
    rms_norm_eps=1e-5,
    rope=RopeConfig(),
    tie_embeddings=True,
)


def symmetric(x, group):
    out = np.empty_like(x)
    for start in range(0, len(x), group):
        part = x[start : start + group]
        scale = np.abs(part).max() / 7 or 1
        out[start : start + group] = np.rint(part / scale) * scale
    return out


def asymmetric(x, group):
    out = np.empty_like(x)
    for start in range(0, len(x), group):
        part = x[start : start + group]
        low, high = min(part.min(), 0), max(part.max(), 0)
        scale = (high - low) / 15 or 1
        zero = np.rint(-low / scale)
        out[start : start + group] = (np.clip(np.rint(part / scale) + zero, 0, 15) - zero) * scale
    return out


@pytest.mark.parametrize("k, group", [(256, 128), (192, 192), (8, 4)])
def test_equal_numpy(rng, k, group):
    x = rng.normal(size=(5, k)).astype(np.float32) + np.array([[0], [3], [-3], [0.1], [0]])
    x[4] = 0
    for ours, numpys in (
        (fake_quantize_symmetric, symmetric),
        (fake_quantize_asymmetric, asymmetric),
    ):
        expected = np.stack([numpys(row, group) for row in x])
        np.testing.assert_allclose(ours(jnp.asarray(x), group, 4), expected, rtol=1e-5, atol=1e-6)


def test_k_that_is_no_multiple_of_the_group_is_one_group(rng):
    x = jnp.asarray(rng.normal(size=(3, 192)))
    np.testing.assert_array_equal(
        fake_quantize_symmetric(x, 128, 4), fake_quantize_symmetric(x, 192, 4)
    )


def test_weights_are_grouped_along_their_inputs(rng):
    w = rng.normal(size=(2, 256, 3)).astype(np.float32)  # layers, K, N
    tree = {"q_proj": {"kernel": jnp.asarray(w)}, "norm": {"scale": jnp.ones(3)}}
    w4a16 = w4a16_params(tree)
    expected = np.stack([[asymmetric(w[i, :, n], 128) for n in range(3)] for i in range(2)])
    np.testing.assert_allclose(
        w4a16["q_proj"]["kernel"], expected.transpose(0, 2, 1), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(w4a16["norm"]["scale"], 1)
    kernel = w4a4_params(tree)["q_proj"]["kernel"]
    expected = np.stack([[symmetric(w[i, :, n], 128) for n in range(3)] for i in range(2)])
    np.testing.assert_allclose(kernel.kernel, expected.transpose(0, 2, 1), rtol=1e-5, atol=1e-6)


def test_w4a4_model_is_the_float_model_with_quantised_inputs(monkeypatch):
    """Through the scan over layers: equal to a float model whose every matmul input is rounded."""
    params = init_params(jax.random.key(0), CONFIG)
    params = jax.tree.map(lambda w: 20 * w if w.ndim == 3 else w, params)
    tokens = jnp.arange(12).reshape(1, 12)
    model = CausalLM(CONFIG)
    found: Any = model.apply({"params": w4a4_params(params)}, tokens)

    from qserve_jax.models import layers

    plain = jax.tree.map(
        lambda leaf: leaf.kernel if isinstance(leaf, InputQuantizedKernel) else leaf,
        w4a4_params(params),
        is_leaf=lambda leaf: isinstance(leaf, InputQuantizedKernel),
    )
    only_weights: Any = model.apply({"params": plain}, tokens)
    real = layers.linear
    monkeypatch.setattr(
        layers,
        "linear",
        lambda x, p, **kwargs: real(fake_quantize_symmetric(x, 128, 4), p, **kwargs),
    )
    monkeypatch.setattr("qserve_jax.models.llama.linear", layers.linear)
    expected: Any = model.apply({"params": plain}, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(expected - only_weights)).max() > 0.1


def test_comparisons(demo):
    config = QuantConfig.preset("w4a8kv8")
    made = {name: comparison(name, demo, config) for name in COMPARISONS}
    assert {name: c.kv_bits for name, c in made.items()} == {
        "float": 16,
        "rtn": 8,
        "w4a16": 16,
        "w4a4": 4,
    }
    assert made["float"].params is demo.params
    assert made["rtn"].name == "W4A8KV8 g128 RTN" and made["rtn"].model.act_bits == 8
    assert isinstance(made["rtn"].params["layers"]["q_proj"]["kernel"], W4PerGroup)
    with pytest.raises(ValueError, match="comparison 'w3' is unknown: use one of float, rtn"):
        comparison("w3", demo, config)
