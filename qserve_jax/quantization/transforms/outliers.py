"""Outliers put into a float model without changing its function: what QoQ must undo.

For tests and tables. Large language models have such outliers by themselves, small ones do not.
Each is a function of the canonical tree; `channels` are i32[...] indices, c the outliers' size.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from qserve_jax.quantization.transforms.calibration import ActivationStats, statistic
from qserve_jax.quantization.transforms.heads import AttentionConfig, flat_heads, repeat_heads
from qserve_jax.quantization.transforms.linear import (
    Array,
    Params,
    scale_inputs,
    scale_outputs,
    update_layers,
)
from qserve_jax.quantization.transforms.reorder import permute_ffn
from qserve_jax.quantization.transforms.rotation import rotate
from qserve_jax.quantization.transforms.smooth_attention import apply_scales


def key_outliers(params: Params, config: AttentionConfig, c: float, pairs: int, seed=0) -> Params:
    """(a) `pairs` random rotary pairs of each KV head: keys times c, queries times 1/c."""
    rng = np.random.default_rng(seed)
    n_layers = params["layers"]["k_proj"]["kernel"].shape[0]
    half = config.head_dim // 2
    shape = (n_layers, config.num_kv_heads, half)
    s = np.where(_some(rng, shape, pairs), 1 / c, 1.0)
    return apply_scales(params, config, jnp.asarray(np.concatenate([s, s], axis=-1), jnp.float32))


def residual_outliers(params: Params, direction: Array) -> Params:
    """(b) norms folded and the residual stream turned so that `direction` f32[D] is channel 0.

    By the reflection that swaps the two, which leaves all other directions where they were.
    """
    unit = np.asarray(direction, np.float64)
    q = np.eye(len(unit))
    difference = unit / np.linalg.norm(unit) - q[0]
    norm = np.linalg.norm(difference)
    if norm > 1e-12:
        q = q - 2 * np.outer(difference, difference) / norm**2
    return rotate(params, jnp.asarray(q, jnp.float32))


def value_outliers(
    params: Params, config: AttentionConfig, c: float, channels: int, seed=0
) -> Params:
    """(c) `channels` random channels of each value head times c, their rows of o_proj times 1/c."""
    rng = np.random.default_rng(seed)
    v, o = params["layers"]["v_proj"], params["layers"]["o_proj"]
    shape = (v["kernel"].shape[0], config.num_kv_heads, config.head_dim)
    s = jnp.asarray(np.where(_some(rng, shape, channels), c, 1.0), jnp.float32)
    return update_layers(
        params,
        v_proj=scale_outputs(v, flat_heads(s)),
        o_proj=scale_inputs(o, 1 / flat_heads(repeat_heads(s, config))),
    )


def hidden_outliers(params: Params, c: float, channels: int, seed=0) -> Params:
    """(c) `channels` random hidden channels of each MLP times c, their down_proj rows times 1/c."""
    rng = np.random.default_rng(seed)
    shape = params["layers"]["down_proj"]["kernel"].shape[:-1]
    return _scale_hidden(params, np.where(_some(rng, shape, channels), c, 1.0))


def salient_groups(
    params: Params, stats: ActivationStats, c: float, channels: int = 128, group_size: int = 128
) -> Params:
    """(d) the hidden channels of the largest activations times c and their down_proj rows times
    1/c; then spread evenly over all groups, the worst order there is.

    Sorted by activation, `channels` (a multiple of group_size) fill groups of their own.
    """
    shape = params["layers"]["down_proj"]["kernel"].shape[:-1]
    absmax = np.asarray(statistic(stats.absmax, "layers/down_proj", shape))
    falling = np.argsort(-absmax, axis=-1)
    s = np.ones(shape)
    np.put_along_axis(s, falling[:, :channels], c, axis=-1)
    groups = shape[-1] // group_size
    spread = np.arange(shape[-1]).reshape(group_size, groups).T.reshape(-1)
    return permute_ffn(_scale_hidden(params, s), jnp.asarray(falling[:, spread]))


def _scale_hidden(params: Params, scales: np.ndarray) -> Params:
    s = jnp.asarray(scales, jnp.float32)
    layers = params["layers"]
    return update_layers(
        params,
        up_proj=scale_outputs(layers["up_proj"], s),
        down_proj=scale_inputs(layers["down_proj"], 1 / s),
    )


def _some(rng: np.random.Generator, shape: tuple[int, ...], count: int) -> np.ndarray:
    """bool[shape], `count` random ones true along the last axis."""
    return np.argsort(rng.random(shape), axis=-1) < count
