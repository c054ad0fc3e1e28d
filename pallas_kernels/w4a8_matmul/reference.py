"""Integer-exact matmuls in plain XLA. M tokens, K contraction, N out features.

The product is an int8 x int8 -> int32 dot; scales enter once, in a float32 epilogue.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qserve_jax.quantization.packing import int8_weight, unpack_nibbles
from qserve_jax.quantization.qtensor import (
    Array,
    Int8Activation,
    QuantizedWeight,
    W4PerChannel,
    W4PerGroup,
    W8PerChannel,
)


def int8_weights(w: QuantizedWeight) -> Array:
    """The integers that meet the activations' codes on the tensor cores: i8[..., N, K].

    NotImplementedError where the codes are packed for another backend.
    """
    if isinstance(w, W8PerChannel):
        return w.codes
    if w.layout != "canonical":
        raise NotImplementedError(f"the reference backend cannot read layout {w.layout!r}")
    return int8_weight(w) if isinstance(w, W4PerGroup) else unpack_nibbles(w.codes).astype(jnp.int8)


def int8_dot(x: Array, w: Array) -> Array:
    """i8[..., K] x i8[N, K] -> i32[..., N], exact for K up to 65 536."""
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.int32)


def epilogue(acc: Array, x: Int8Activation, w: QuantizedWeight) -> Array:
    """int32 sums -> f32[..., N].

    per group, 8-bit: y = acc * s_w * s_x
    per channel:      y = (acc * s_w - (sum of x's codes) * s_w * zero) * s_x
    """
    y = acc.astype(jnp.float32) * w.channel_scale
    if isinstance(w, W4PerChannel):
        y -= x.code_sum.astype(jnp.float32)[..., None] * w.scaled_zero
    return y * x.scale[..., None]


def matmul(
    x: Int8Activation,
    w: W4PerGroup | W4PerChannel | W8PerChannel,
    *,
    bias: Array | None,
    residual: Array | None,
    layer: Array | int | None,
    out_dtype: jax.typing.DTypeLike,
) -> Array:
    """See `api.w4a8_matmul`; takes 8-bit weights too."""
    if layer is not None:
        w = jax.tree.map(lambda leaf: leaf[layer], w)
    sums = int8_dot(x.codes, int8_weights(w))
    if jnp.dtype(out_dtype) == jnp.int32:
        return sums
    y = epilogue(sums, x, w)
    if bias is not None:
        y += bias.astype(jnp.float32)
    if residual is not None:
        y += residual.astype(jnp.float32)
    return y.astype(out_dtype)
