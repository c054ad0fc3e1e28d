"""Transforms that must not change a float model's logits, on every family; and what they do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.models.calibration import attention_heads
from qserve_jax.quantization.transforms import (
    center_keys,
    fold_norms,
    hadamard_rotation,
    reorder_ffn,
    reorder_values,
    rotate,
    rotate_values,
    search_smooth_attention,
    smooth_attention,
    smooth_down,
    smooth_values,
)
from qserve_jax.quantization.transforms.rotation import hadamard

TOLERANCE = 1e-5


def same(case, params):
    assert case.same_function(params) < TOLERANCE


def test_fold_norms(case):
    folded = jax.jit(fold_norms)(case.params)
    same(case, folded)
    for name in ("attn_norm", "mlp_norm"):
        assert (folded["layers"][name]["scale"] == 1).all()
    assert (folded["final_norm"]["scale"] == 1).all()


def test_rotate(case):
    rotated = jax.jit(rotate)(case.params)
    same(case, rotated)
    d = case.config.hidden_size
    want = case.params["embed"]["embedding"] @ hadamard_rotation(d)
    np.testing.assert_allclose(rotated["embed"]["embedding"], want, atol=1e-4)


def test_rotation_in_parts_is_the_rotation(case):
    parts = {}
    for name in case.params:
        if name != "embed":
            keep = {name: case.params[name]}
            if name == "final_norm":
                keep["lm_head"] = case.params.get("lm_head", case.params["embed"])
            parts |= {k: v for k, v in rotate(keep).items() if k == name or name == "final_norm"}
    parts["embed"] = rotate({"embed": case.params["embed"]})["embed"]
    whole = rotate(case.params)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5), parts["layers"], whole["layers"]
    )


def test_smooth_attention(case):
    stats = case.stats()
    for alpha in (0.5, 1.0):
        transform = jax.jit(smooth_attention, static_argnums=(1, 3))
        smoothed = transform(case.params, case.config, stats, alpha)
        same(case, smoothed)
    keys = case.stats(smoothed).absmax["layers/keys"]
    pairs = jnp.maximum(*jnp.split(keys, 2, axis=-1))
    if case.config.qk_norm:  # one scale for all heads: the largest head is flat
        pairs = pairs.max(axis=1)
    np.testing.assert_allclose(pairs, 1, rtol=1e-4)  # alpha = 1 flattens the maxima


def test_search_smooth_attention(case):
    heads = attention_heads(case.model)(case.params, case.tokens)
    smoothed = search_smooth_attention(case.params, case.config, case.stats(), heads)
    same(case, smoothed)


def test_heads_of_another_model_are_refused(case):
    heads = attention_heads(case.model)(case.params, case.tokens)
    for keys in (heads["layers/keys"][:1], heads["layers/keys"][..., :-2]):
        with pytest.raises(ValueError, match="keys have .* but k_proj has .*: collect the heads"):
            center_keys(case.params, {"layers/keys": keys})


def test_center_keys(case):
    heads = attention_heads(case.model)(case.params, case.tokens)
    centered = jax.jit(center_keys)(case.params, heads)
    same(case, centered)
    center = centered["layers"]["key_center"]["center"]
    assert np.abs(center).max() > 0.1
    keys = attention_heads(case.model)(centered, case.tokens)["layers/keys"]
    np.testing.assert_allclose(keys, heads["layers/keys"] - center[:, None, None], atol=1e-4)
    np.testing.assert_allclose(keys.mean((1, 2)), 0, atol=1e-5)
    smoothed = smooth_attention(centered, case.config, case.stats(centered))
    same(case, smoothed)  # which scales the centre too
    again = center_keys(smoothed, attention_heads(case.model)(smoothed, case.tokens))
    centers = (tree["layers"]["key_center"]["center"] for tree in (smoothed, again))
    np.testing.assert_allclose(*centers, atol=1e-5)


def test_smooth_down_and_values(case):
    stats = case.stats()
    smoothed = jax.jit(smooth_down, static_argnums=2)(case.params, stats, 0.0)
    same(case, smoothed)
    rows = jnp.abs(smoothed["layers"]["down_proj"]["kernel"]).max(-1)
    np.testing.assert_allclose(rows, 1, rtol=1e-5)  # alpha = 0 evens out the weights
    smoothed = jax.jit(smooth_values, static_argnums=(1, 3))(case.params, case.config, stats, 0.5)
    same(case, smoothed)
    assert not np.allclose(
        smoothed["layers"]["v_proj"]["kernel"], case.params["layers"]["v_proj"]["kernel"]
    )


def test_reorder(case):
    stats = case.stats()
    ordered = jax.jit(reorder_ffn)(case.params, stats)
    same(case, ordered)
    after = np.asarray(case.stats(ordered).absmax["layers/down_proj"])
    assert (np.diff(after, axis=-1) <= 1e-5).all()
    ordered = jax.jit(reorder_values, static_argnums=1)(case.params, case.config, stats)
    same(case, ordered)
    n_kv, h = case.config.num_kv_heads, case.config.head_dim
    after = np.asarray(case.stats(ordered).absmax["layers/o_proj"]).reshape(2, n_kv, -1, h).max(2)
    assert (np.diff(after, axis=-1) <= 1e-5).all()


def test_rotate_values(case):
    """Value heads v @ r, and what o_proj reads accordingly: each query head the same r."""
    rotated = jax.jit(rotate_values, static_argnums=1)(case.params, case.config)
    same(case, rotated)
    before, after = (
        np.asarray(attention_heads(case.model)(p, case.tokens)["layers/values"])
        for p in (case.params, rotated)
    )
    # Of the first layer, which reads the same input.
    r = hadamard_rotation(case.config.head_dim)
    np.testing.assert_allclose(after[0], before[0] @ r, atol=1e-5 * np.abs(before[0]).max())
    assert not np.allclose(after[0], before[0], atol=0.1)


def test_rotate_values_spreads_an_outlier(make):
    case = make(num_heads=4, num_kv_heads=1)
    v = case.params["layers"]["v_proj"]["kernel"]
    case.params["layers"]["v_proj"]["kernel"] = v.at[:, :, 3].multiply(50)
    absmax = [
        case.stats(p).absmax["layers/o_proj"]
        for p in (case.params, rotate_values(case.params, case.config))
    ]
    peak = [float((x.max(-1) / jnp.median(x, axis=-1)).max()) for x in absmax]
    assert peak[0] > 20 and peak[1] < 3


def test_dtype_is_kept(make):
    case = make(qkv_bias=True, tie_embeddings=True)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), case.params)
    stats = case.stats()
    for transformed in (
        rotate(half),
        smooth_attention(half, case.config, stats),
        smooth_down(half, stats),
        reorder_ffn(half, stats),
        rotate_values(half, case.config),
    ):
        assert {w.dtype.name for w in jax.tree.leaves(transformed)} == {"bfloat16"}


def test_statistics_of_another_model(make):
    other = make(intermediate_size=136, num_kv_heads=4)
    case = make()
    for transform in (
        lambda s: smooth_attention(case.params, case.config, s),
        lambda s: smooth_down(case.params, s),
        lambda s: reorder_ffn(case.params, s),
    ):
        with pytest.raises(ValueError, match="collect the statistics of this model"):
            transform(other.stats())


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 28, 36, 40, 52, 60, 108, 140, 896])
def test_hadamard(n):
    h = hadamard(n)
    assert h is not None and set(np.unique(h)) <= {-1.0, 1.0}
    assert np.array_equal(h @ h.T, n * np.eye(n))


@pytest.mark.parametrize("n", [6, 18, 156, 172])
def test_other_sizes_get_a_flat_orthogonal_matrix(n):
    q = hadamard_rotation(n)
    np.testing.assert_allclose(q @ q.T, np.eye(n), atol=1e-12)
    assert np.abs(q).max() <= np.sqrt(2 / n) + 1e-12
