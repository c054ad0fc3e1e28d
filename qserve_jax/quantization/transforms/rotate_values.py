"""Rotation of value heads (QuaRot section 4, later QoQ): spread the outliers of o_proj's inputs.

Attention mixes tokens, never the channels of a head, so the head dimension of the values may turn:
v_proj's outputs become v @ r in each KV head, and o_proj's rows undo it in each query head.
"""

from __future__ import annotations

import jax.numpy as jnp

from qserve_jax.quantization.transforms.heads import AttentionConfig
from qserve_jax.quantization.transforms.linear import (
    Array,
    Params,
    in_float32,
    matmul,
    update_layers,
)
from qserve_jax.quantization.transforms.rotation import hadamard_rotation


def rotate_values(params: Params, config: AttentionConfig, r: Array | None = None) -> Params:
    """The same function with every value head, bias included, in the basis r f32[H, H] (v @ r).

    r: orthogonal; None takes `hadamard_rotation(H)`.
    """
    h = config.head_dim
    r = jnp.asarray(hadamard_rotation(h) if r is None else r, jnp.float32)

    def turn_outputs(w: Array) -> Array:  # [..., K * H]
        heads = w.reshape(*w.shape[:-1], -1, h)
        return matmul(heads, r).reshape(w.shape)

    def turn_inputs(w: Array) -> Array:  # [..., N * H, D]
        heads = w.reshape(*w.shape[:-2], -1, h, w.shape[-1])
        return matmul(r.T, heads).reshape(w.shape)

    v, o = params["layers"]["v_proj"], params["layers"]["o_proj"]
    return update_layers(
        params,
        v_proj={name: in_float32(turn_outputs, leaf) for name, leaf in v.items()},
        o_proj={**o, "kernel": in_float32(turn_inputs, o["kernel"])},
    )
