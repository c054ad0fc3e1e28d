"""K = 18944 = 148 * 128, Qwen2.5-7B's MLP, and its D = 3584 = 28 * 128: no powers of two."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.quantization import QuantConfig, quantization_report, quantize_params
from qserve_jax.quantization.qtensor import W4PerGroup
from qserve_jax.quantization.transforms import (
    ActivationStats,
    gptq_codes,
    hadamard_rotation,
    quantize_with_statistics,
    reorder_ffn,
    smooth_down,
)
from qserve_jax.quantization.transforms.rotation import hadamard

K, D = 18944, 16


@pytest.fixture
def mlp(rng):
    """(params, statistics): one MLP of that width, D = 16."""
    shapes = {"gate_proj": (1, D, K), "up_proj": (1, D, K), "down_proj": (1, K, D)}
    layers = {
        name: {"kernel": jnp.asarray(rng.standard_normal(s), jnp.float32)}
        for name, s in shapes.items()
    }
    absmax = jnp.asarray(rng.random((1, K)) + 0.1, jnp.float32)
    return {"layers": layers}, ActivationStats({"layers/down_proj": absmax}, {})


def output(params, x):
    w = {name: np.asarray(p["kernel"][0], np.float64) for name, p in params["layers"].items()}
    gate, up = x @ w["gate_proj"], x @ w["up_proj"]
    return (gate / (1 + np.exp(-gate)) * up) @ w["down_proj"]


def test_reordering_and_smoothing_keep_the_function(mlp, rng):
    params, stats = mlp
    x = rng.standard_normal((3, D))
    exact = output(params, x)
    for moved in (reorder_ffn(params, stats), smooth_down(params, stats)):
        assert np.abs(output(moved, x) - exact).max() < 1e-5 * np.abs(exact).max()
        assert not np.array_equal(
            moved["layers"]["down_proj"]["kernel"], params["layers"]["down_proj"]["kernel"]
        )


def test_groups_of_a_wide_kernel(mlp):
    kernel = quantize_params(mlp[0]["layers"]["down_proj"])["kernel"]
    assert isinstance(kernel, W4PerGroup) and kernel.group_scale.shape == (1, D, 148)


def test_gptq_of_a_wide_kernel_by_shape():
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    codes = jax.eval_shape(gptq_codes, struct((D, K)), struct((K, K)), *[struct((D, 148))] * 2)
    assert codes.shape == (D, K)
    hessian: Any = struct((1, K, K))
    stats = ActivationStats({}, {"layers/down_proj": hessian})
    params = {"layers": {"down_proj": {"kernel": struct((1, K, D))}}}
    quantized = jax.eval_shape(
        lambda p, s: quantize_with_statistics(p, QuantConfig(), s), params, stats
    )
    assert quantized["layers"]["down_proj"]["kernel"].codes.shape == (1, D, K // 2)


def test_gptq_of_a_hundred_and_forty_eight_groups(rng):
    """The same number of groups, of 2: each weight meets its own group's grid."""
    k = 296
    x = rng.standard_normal((2 * k, k)).astype(np.float32)
    u = rng.standard_normal((8, k)).astype(np.float32)
    spread = (1 + np.arange(148) / 148).astype(np.float32)
    scale = np.broadcast_to(0.3 * spread, (8, 148))
    zero = np.full((8, 148), 7, np.float32)
    hessian = 2 * x.T @ x / len(x)
    codes = gptq_codes(*map(jnp.asarray, (u, hessian, scale, zero))).astype(jnp.float32)
    wide = np.repeat(scale, 2, axis=1)
    rounded = np.clip(np.round(u / wide + 7), 0, 15)
    error = [np.square(x @ ((c - 7) * wide - u).T).sum() for c in (codes, rounded)]
    assert error[0] < 0.8 * error[1]


def test_rotation_of_qwens_width():
    """3584 = 2^7 * 28, where 28 is of Paley's second kind, as is 148."""
    q = hadamard_rotation(3584)
    assert np.abs(np.abs(q) - 3584**-0.5).max() < 1e-15
    rows = q[::112]
    np.testing.assert_allclose(q @ rows.T, np.eye(3584)[:, ::112], atol=1e-12)
    h = hadamard(148)
    assert h is not None and np.array_equal(h @ h.T, 148 * np.eye(148))


@pytest.mark.parametrize("k", [18944 + 64, 172])
def test_other_widths_fall_to_one_scale_per_channel(k):
    params = {"kernel": jax.ShapeDtypeStruct((k, 4), jnp.float32)}
    with pytest.warns(UserWarning, match=f"kernel .K={k} is not a multiple of group_size=128"):
        made = jax.eval_shape(quantize_params, params)["kernel"]
    assert made.scaled_zero.shape == (4,)
    (row,) = quantization_report(params).rows
    assert row.scheme == "w4 per-channel"
