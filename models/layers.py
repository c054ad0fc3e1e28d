"""The pieces of a decoder layer, as plain functions of arrays and parameter dicts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax.pallas_kernels import quantized_matmul
from qserve_jax.pallas_kernels.w4a8_matmul import from_kernel_layout, take_layer
from qserve_jax.quantization.numerics import quantize_activation
from qserve_jax.quantization.packing import dequantize_weight
from qserve_jax.quantization.qtensor import Array, Int8Activation, is_quantized

Params = dict[str, Any]


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, float32 inside, x's dtype out."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


def quantize_input(x: Array, act_bits: int, *kernels: object) -> Array | Int8Activation:
    """x as the matmuls with `kernels` want it: int8 per token where they are quantised."""
    if act_bits == 8 and any(is_quantized(kernel) for kernel in kernels):
        return quantize_activation(x)
    return x


def linear(
    x: Array | Int8Activation,
    p: Params,
    *,
    layer: Array | int | None,
    dtype: jax.typing.DTypeLike,
    backend: str | None = None,
) -> Array:
    """x [..., K] @ kernel [K, N] (+ bias [N]) -> dtype[..., N].

    A quantised kernel is stacked and read at `layer`; with int8 x it is an integer matmul, with
    float x it is dequantised first (w4a16). A float kernel is this layer's own.
    """
    kernel, bias = p["kernel"], p.get("bias")
    if isinstance(x, Int8Activation):
        return quantized_matmul(x, kernel, bias=bias, layer=layer, out_dtype=dtype, backend=backend)
    if is_quantized(kernel):
        kernel = dequantize_weight(from_kernel_layout(take_layer(kernel, layer))).T
    y = jnp.dot(x, kernel.astype(dtype), precision="highest", preferred_element_type=jnp.float32)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(dtype)


def projections(
    x: Array, p: Params, names: tuple[str, ...], fused: str, *, act_bits: int, **kwargs: Any
) -> list[Array]:
    """Several projections of one input, which is quantised once; one matmul where they are fused.

    Returns one array [..., N_i] per name, or a single [..., sum N_i] from a fused kernel.
    """
    present = [p[name] for name in ([fused] if fused in p else names)]
    x_in = quantize_input(x, act_bits, *(part["kernel"] for part in present))
    return [linear(x_in if is_quantized(q["kernel"]) else x, q, **kwargs) for q in present]


def split_in_place(layers: Params) -> tuple[Params, Params]:
    """Split stacked layer parameters [L, ...] for a scan: (scanned, in_place).

    Float leaves are scanned, each step getting its slice. Quantised containers stay whole and are
    read at a layer index, so that kernels stream them from where they lie. Each half has None where
    the other has a leaf.
    """
    scanned = jax.tree.map(lambda w: None if is_quantized(w) else w, layers, is_leaf=is_quantized)
    in_place = jax.tree.map(lambda w: w if is_quantized(w) else None, layers, is_leaf=is_quantized)
    return scanned, in_place


def join_in_place(scanned: Params, in_place: Params) -> Params:
    """Undo `split_in_place` for one layer."""
    return jax.tree.map(
        lambda s, w: w if s is None else s, scanned, in_place, is_leaf=lambda leaf: leaf is None
    )
