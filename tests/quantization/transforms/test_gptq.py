import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax import QuantConfig, dequantize_params
from qserve_jax.quantization import quantize_params
from qserve_jax.quantization.numerics import per_channel_grid, progressive_grid
from qserve_jax.quantization.packing import unpack_nibbles
from qserve_jax.quantization.transforms import (
    ActivationStats,
    clip_range,
    clip_ratios,
    gptq_codes,
    quantize_with_statistics,
)
from qserve_jax.quantization.transforms.clip import RATIOS


def plain_gptq(u, hessian, scale, zero, bound=np.inf, damp=0.01):
    """The algorithm as published, float64, one column at a time, by the inverse Hessian itself."""
    u, hessian = u.astype(np.float64).copy(), hessian.astype(np.float64).copy()
    k = u.shape[1]
    group = k // scale.shape[1]
    dead = np.diag(hessian) == 0
    order = np.argsort(-np.diag(hessian), kind="stable")
    mean = np.diag(hessian).mean()
    hessian[dead, dead] = mean
    hessian[np.arange(k), np.arange(k)] += damp * mean
    u[:, dead] = 0
    codes = np.zeros(u.shape)
    left = list(order)
    while left:
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        j = left[0]
        s, z = scale[:, j // group], zero[:, j // group]
        codes[:, j] = np.clip(np.rint(np.clip(u[:, j], -bound, bound) / s + z), 0, 15)
        error = (u[:, j] - (codes[:, j] - z) * s) / inverse[0, 0]
        u[:, left] -= np.outer(error, inverse[0])
        left = left[1:]
    return codes


def inputs(rng, n, k):
    """Weights, and the Hessian of correlated inputs with a dead channel."""
    x = rng.standard_normal((4 * k, k)) @ rng.standard_normal((k, k)) * rng.uniform(0.1, 2, k)
    x[:, 3] = 0
    return rng.standard_normal((n, k)).astype(np.float32), (2 * x.T @ x / len(x)).astype(np.float32)


@pytest.mark.parametrize(("k", "group", "block"), [(48, 16, 16), (40, 8, 128), (40, 40, 16)])
def test_equals_the_plain_algorithm(rng, k, group, block):
    w, hessian = inputs(rng, 12, k)
    if group < k:
        u, _, scale, zero = map(np.asarray, progressive_grid(jnp.asarray(w), group))
        bound = 119.0
    else:
        scale, zero = (np.asarray(x)[:, None] for x in per_channel_grid(jnp.asarray(w)))
        u, bound = w, None
    got = gptq_codes(u, hessian, scale, zero, bound=bound, block=block)
    want = plain_gptq(u, hessian, scale, zero, np.inf if bound is None else bound)
    assert np.array_equal(got, want)


@pytest.mark.parametrize("group_size", [128, -1])
def test_less_output_error_than_rounding(rng, group_size):
    w, hessian = inputs(rng, 64, 256)
    params, stats = {"a": {"kernel": jnp.asarray(w.T)}}, ActivationStats({}, {"a": hessian})
    config = QuantConfig(group_size=group_size)

    def error(quantized):
        delta = np.asarray(dequantize_params(quantized)["a"]["kernel"]).T - w
        return np.sum((delta @ hessian) * delta)

    rounded = error(quantize_params(params, config))
    assert error(quantize_with_statistics(params, config, stats)) < 0.5 * rounded
    same = quantize_with_statistics(params, config, stats, gptq=False)
    jax.tree.map(np.testing.assert_array_equal, same, quantize_params(params, config))
    if group_size == -1:
        clipped = quantize_with_statistics(params, config, stats, gptq=False, clip=True)
        assert error(clipped) < 0.97 * rounded


def test_codes_stay_in_int8_where_correction_overshoots(rng):
    """Strongly correlated inputs move columns far outside the range; the invariant must hold."""
    k = 256
    x = rng.standard_normal((512, 1)) + 0.02 * rng.standard_normal((512, k))
    hessian = jnp.asarray(2 * x.T @ x / 512, jnp.float32)
    w = jnp.asarray(rng.standard_normal((64, k)) * rng.choice([0.01, 1], k), jnp.float32)
    stats = ActivationStats({}, {"a": hessian})
    q = quantize_with_statistics({"a": {"kernel": w.T}}, QuantConfig(), stats)["a"]["kernel"]
    codes = np.asarray(unpack_nibbles(q.codes), int).reshape(64, 2, 128)
    w8 = (
        codes * np.asarray(q.group_scale, int)[..., None]
        + np.asarray(q.group_offset, int)[..., None]
    )
    assert w8.min() >= -128 and w8.max() <= 127


@pytest.mark.parametrize("broken", ["indefinite", "inf", "nan"])
def test_a_hessian_without_a_factor_leaves_round_to_nearest(rng, broken):
    """And no codes of NaN: a sum that float32 cannot hold must not spoil the weights."""
    w = rng.standard_normal((8, 128)).astype(np.float32)
    hessian = np.ones((128, 128), np.float32) - 0.5 * np.eye(128, dtype=np.float32)
    if broken != "indefinite":
        hessian[5, 7] = hessian[7, 5] = float(broken)
    params = {"a": {"kernel": jnp.asarray(w.T)}}
    stats = ActivationStats({}, {"a": jnp.asarray(hessian)})
    for config in (QuantConfig(), QuantConfig(group_size=-1)):
        got = quantize_with_statistics(params, config, stats)
        jax.tree.map(np.testing.assert_array_equal, got, quantize_params(params, config))


def test_stacks_are_layers_apart(rng):
    pairs = [inputs(rng, 16, 128) for _ in range(2)]
    w, hessian = (np.stack(x) for x in zip(*pairs, strict=True))
    params = {"layers": {"up_proj": {"kernel": jnp.asarray(np.swapaxes(w, 1, 2))}}}
    stats = ActivationStats({}, {"layers/gate_proj": jnp.asarray(hessian)})
    together = jax.jit(quantize_with_statistics, static_argnums=1)(params, QuantConfig(), stats)
    for i in range(2):
        one = {"gate_proj": {"kernel": jnp.asarray(w[i].T)}}
        apart = quantize_with_statistics(
            one, QuantConfig(), ActivationStats({}, {"gate_proj": jnp.asarray(hessian[i])})
        )
        got = together["layers"]["up_proj"]["kernel"].codes[i]
        assert np.mean(np.asarray(got) == np.asarray(apart["gate_proj"]["kernel"].codes)) > 0.999


def test_clip_ratio_is_the_best_of_the_grid(rng):
    w, hessian = inputs(rng, 8, 32)
    w[0, 0] = 9  # an outlier that is worth clipping
    ratios = np.asarray(clip_ratios(w, hessian))

    def error(row, ratio):
        x = np.clip(w[row], ratio * min(w[row].min(), 0), ratio * max(w[row].max(), 0))
        s = (max(x.max(), 0) - min(x.min(), 0)) / 15
        z = np.clip(np.rint(-min(x.min(), 0) / s), 0, 15)
        delta = (np.clip(np.rint(x / s + z), 0, 15) - z) * s - w[row]
        return delta @ hessian.astype(np.float64) @ delta

    for row in range(8):
        best = min(error(row, ratio) for ratio in RATIOS)
        assert error(row, ratios[row]) <= best * (1 + 1e-4)
    assert (ratios < 1).any() and len(RATIOS) == 81 and RATIOS[80] == pytest.approx(0.2)
    np.testing.assert_array_equal(clip_range(jnp.asarray(w), 1.0), w)


def test_refusals(rng):
    params = {"a": {"kernel": jnp.zeros((128, 4))}}
    with pytest.raises(ValueError, match="no statistic 'a'"):
        quantize_with_statistics(params, QuantConfig(), ActivationStats({}, {}))
    with pytest.raises(ValueError, match=r"is \[8, 8\] but the weights need \[128, 128\]"):
        stats = ActivationStats({}, {"a": jnp.eye(8)})
        quantize_with_statistics(params, QuantConfig(), stats)
