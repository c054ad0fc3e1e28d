"""Activation-aware channel reordering (QServe section 5.3): like salience shares a group.

Inputs of down_proj are sorted by max|X_j|, those of o_proj within each head, and the permutation is
fused into the linears that make them: no gather at runtime.
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
    take_inputs,
    take_outputs,
    update_layers,
)


def reorder_ffn(params: Params, stats: ActivationStats) -> Params:
    """The same function with the hidden channels of each MLP in falling order of max|X_j|."""
    down = params["layers"]["down_proj"]
    absmax = statistic(stats.absmax, "layers/down_proj", down["kernel"].shape[:-1])
    return permute_ffn(params, _falling(absmax))


def permute_ffn(params: Params, order: Array) -> Params:
    """The same function with hidden channel i of the MLPs being what was order[..., i]."""
    layers = params["layers"]
    return update_layers(
        params,
        gate_proj=take_outputs(layers["gate_proj"], order),
        up_proj=take_outputs(layers["up_proj"], order),
        down_proj=take_inputs(layers["down_proj"], order),
    )


def reorder_values(params: Params, config: AttentionConfig, stats: ActivationStats) -> Params:
    """The same function with the channels of each value head in falling order of max|X_j|, the
    largest of the query heads that share it."""
    v, o = params["layers"]["v_proj"], params["layers"]["o_proj"]
    absmax = statistic(stats.absmax, "layers/o_proj", o["kernel"].shape[:-1])
    heads = absmax.reshape(*absmax.shape[:-1], config.num_heads, config.head_dim)
    order = _falling(group_max(heads, config))
    return update_layers(
        params,
        v_proj=take_outputs(v, _in_all_heads(order)),
        o_proj=take_inputs(o, _in_all_heads(repeat_heads(order, config))),
    )


def _falling(x: Array) -> Array:
    return jnp.argsort(x, axis=-1, descending=True, stable=True)


def _in_all_heads(order: Array) -> Array:
    """Orders [..., heads, H] within each head -> one [..., heads * H]."""
    heads, h = order.shape[-2:]
    return flat_heads(order + h * jnp.arange(heads)[:, None])
