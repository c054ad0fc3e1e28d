"""Block-output smoothing (QServe section 5.2): equalise the channels between two linear layers.

The inputs of down_proj are divided by s and its rows multiplied; the division is fused into
up_proj, whose output enters the product with SiLU(gate) linearly. Likewise o_proj and v_proj, with
one s per channel of a KV head.
"""

from __future__ import annotations

import jax.numpy as jnp

from qserve_jax.quantization.transforms.calibration import ActivationStats, statistic
from qserve_jax.quantization.transforms.heads import (
    AttentionConfig,
    flat_heads,
    group_max,
    repeat_heads,
)
from qserve_jax.quantization.transforms.linear import (
    Array,
    Params,
    scale_inputs,
    scale_outputs,
    update_layers,
)

SMALLEST = 1e-5
"""Of a layer's largest maximum: what smaller ones count as."""


def smooth_down(params: Params, stats: ActivationStats, alpha: float = 0.05) -> Params:
    """The same function with up_proj's outputs divided by s, down_proj's rows multiplied.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), X the inputs of down_proj (`layers/down_proj`).
    alpha near 0 suits 4-bit weights beside 8-bit activations: it evens out the weights' rows.
    """
    up, down = params["layers"]["up_proj"], params["layers"]["down_proj"]
    x, w = _maxima(down, stats, "layers/down_proj")
    s = _scales(x, w, alpha)
    return update_layers(params, up_proj=scale_outputs(up, 1 / s), down_proj=scale_inputs(down, s))


def smooth_values(
    params: Params, config: AttentionConfig, stats: ActivationStats, alpha: float = 0.05
) -> Params:
    """The same for v_proj's outputs and o_proj's rows (`layers/o_proj`), maxima taken over the
    query heads that share a KV head."""
    v, o = params["layers"]["v_proj"], params["layers"]["o_proj"]
    x, w = (_per_kv_head(m, config) for m in _maxima(o, stats, "layers/o_proj"))
    s = _scales(x, w, alpha)
    return update_layers(
        params,
        v_proj=scale_outputs(v, 1 / flat_heads(s)),
        o_proj=scale_inputs(o, flat_heads(repeat_heads(s, config))),
    )


def _maxima(p: Params, stats: ActivationStats, name: str) -> tuple[Array, Array]:
    """max|X_j| and max|W_j| of each input of a linear layer, [..., K]."""
    kernel = p["kernel"].astype(jnp.float32)
    return statistic(stats.absmax, name, kernel.shape[:-1]), jnp.abs(kernel).max(axis=-1)


def _per_kv_head(x: Array, config: AttentionConfig) -> Array:
    return group_max(x.reshape(*x.shape[:-1], config.num_heads, config.head_dim), config)


def _scales(x: Array, w: Array, alpha: float) -> Array:
    return _floored(x) ** alpha / _floored(w) ** (1 - alpha)


def _floored(x: Array) -> Array:
    axes = tuple(range(1, x.ndim)) if x.ndim > 1 else None
    top = x.max(axis=axes, keepdims=True)
    return jnp.where(top > 0, jnp.maximum(x, SMALLEST * top), 1.0)
