"""Recipes on random tiny models of two families; each outlier is undone by its transform."""

import dataclasses
from contextlib import nullcontext as nothing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.models import CausalLM, ModelConfig, init_params
from qserve_jax.models.calibration import Calibrator
from qserve_jax.quantization.qtensor import W4PerChannel, W4PerGroup
from qserve_jax.quantization.recipes import (
    RECIPES,
    Recipe,
    find_recipe,
    quantize_with_recipe,
    transform_with_recipe,
)
from qserve_jax.quantization.transforms.outliers import (
    hidden_outliers,
    key_outliers,
    residual_outliers,
    salient_groups,
    value_outliers,
)

FAMILIES = {
    "qwen2": {"qkv_bias": True, "num_heads": 7, "num_kv_heads": 1, "intermediate_size": 168},
    "qwen3": {"qk_norm": True, "head_dim": 64},
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 32)))
apply = jax.jit(
    lambda model, params: model.apply({"params": params}, TOKENS, kv_bits=16), static_argnums=0
)


def make(**changes):
    sizes = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 64,
        "tie_embeddings": True,
    }
    config = ModelConfig(**{**sizes, **changes})
    rng = np.random.default_rng(0)

    def leaf(path, w):
        normal = rng.standard_normal(w.shape).astype(np.float32)
        return {"scale": 1 + 0.2 * normal, "bias": 0.2 * normal}.get(path[-1].key, 4 * w)

    params = jax.tree_util.tree_map_with_path(leaf, init_params(jax.random.key(0), config))
    return config, params, Calibrator(CausalLM(config), [TOKENS])


def logits(config, params, act_bits=16):
    config = dataclasses.replace(config, tie_embeddings="lm_head" not in params)
    return np.asarray(apply(CausalLM(config, act_bits=act_bits), params))


def difference(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


FEW = [("qwen2", "qoq-g128"), ("qwen3", "qoq-per-channel")]
OTHERS = [(family, name) for name in RECIPES for family in FAMILIES if (family, name) not in FEW]


@pytest.mark.parametrize(
    ("family", "name"), [*FEW, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)]
)
def test_recipes_on_families(family, name):
    config, params, calibration = make(**FAMILIES[family])
    exact = logits(config, params)
    moved = transform_with_recipe(config, params, calibration, name)
    assert difference(logits(config, moved), exact) < 1e-5
    per_channel = find_recipe(name).quant.group_size == -1
    odd = family == "qwen2" and not per_channel
    warns = pytest.warns(UserWarning, match="K=168 is not a multiple") if odd else nothing()
    with warns:
        quantized = quantize_with_recipe(config, params, calibration, name)
    kernels = quantized["layers"]
    kind = W4PerChannel if per_channel else W4PerGroup
    assert isinstance(kernels["q_proj"]["kernel"], kind)
    fallen = W4PerChannel if family == "qwen2" else kind  # K = 168: no groups of 128
    assert isinstance(kernels["down_proj"]["kernel"], fallen)
    rounded = quantize_with_recipe(config, params, calibration, "rtn-per-channel")
    error = np.square(logits(config, quantized) - exact).mean()
    limit = 0.7 if find_recipe(name).gptq else 1.3  # random weights have no outliers to undo
    assert error < limit * np.square(logits(config, rounded) - exact).mean()


def test_outliers_leave_the_float_model_alone():
    config, params, calibration = make()
    exact = logits(config, params)
    stats = calibration.statistics(params)
    direction = np.random.default_rng(1).standard_normal(128)
    for injected in (
        key_outliers(params, config, 16, 2),
        residual_outliers(params, jnp.asarray(direction)),
        value_outliers(params, config, 16, 4),
        hidden_outliers(params, 16, 20),
        salient_groups(params, stats, 16),
    ):
        assert difference(logits(config, injected), exact) < 1e-5


def test_each_transform_undoes_its_outliers():
    config, params, calibration = make()

    def maxima(p, name):
        return np.asarray(calibration.statistics(p).absmax[name])

    injected = key_outliers(params, config, 16, 2)
    peak = lambda x: (x.max(-1) / np.median(x, -1)).mean()  # noqa: E731
    before, broken = (peak(maxima(p, "layers/keys")) for p in (params, injected))
    recipe = Recipe(smooth_keys=1.0)
    mended = transform_with_recipe(config, injected, calibration, recipe)
    assert broken > 3 * before and peak(maxima(mended, "layers/keys")) < before
    smooth = Recipe(smooth_outputs=0.05)
    for injected in (hidden_outliers(params, 16, 20), value_outliers(params, config, 16, 4)):
        healed = [transform_with_recipe(config, p, calibration, smooth) for p in (params, injected)]
        for name in ("o_proj", "v_proj", "up_proj", "down_proj"):
            a, b = (np.asarray(p["layers"][name]["kernel"]) for p in healed)
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)  # c leaves no trace
    stats = calibration.statistics(params)
    spread = maxima(salient_groups(params, stats, 16), "layers/down_proj").reshape(2, 2, 128)
    assert (spread.max(-1).min(-1) > 0.3 * spread.max(-1).max(-1)).all()  # in both groups


def test_recipe_names():
    assert find_recipe("qoq-g128").reorder and not find_recipe("qoq-g128").clip
    assert (
        find_recipe("qoq-per-channel").clip
        and find_recipe("qoq-per-channel").quant.group_size == -1
    )
    assert not find_recipe("qoq-g128-no-gptq").gptq and len(RECIPES) == 16
    with pytest.raises(ValueError, match="recipe 'qoc' is unknown: use one of qoq-g128"):
        find_recipe("qoc")
