"""The pieces of a decoder layer, as plain functions of arrays and parameter dicts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax.models.collectives import Unsummed, sum_partial
from qserve_jax.models.sharding import EXCHANGE
from qserve_jax.pallas_kernels import quantized_matmul
from qserve_jax.pallas_kernels.quantize_activation import (
    quantize_activation,
    rms_norm,
    rms_norm_quantize,
    silu_mul,
    silu_mul_quantize,
)
from qserve_jax.pallas_kernels.w4a8_matmul import from_kernel_layout, take_layer
from qserve_jax.quantization.packing import dequantize_weight
from qserve_jax.quantization.qtensor import Array, Int8Activation, is_quantized

Params = dict[str, Any]


INPUT_NORMS = ("attn_norm", "mlp_norm")
"""The norms whose output is nothing but the input of projections."""


def wants_int8(act_bits: int, *kernels: object) -> bool:
    """Whether some of the matmuls with `kernels` take int8 activations."""
    return act_bits == 8 and any(is_quantized(kernel) for kernel in kernels)


def quantize_input(
    x: Array, act_bits: int, *kernels: object, backend: str | None = None
) -> Array | Int8Activation:
    """x as the matmuls with `kernels` want it: int8 per token where they are quantised."""
    return quantize_activation(x, backend=backend) if wants_int8(act_bits, *kernels) else x


def normalized_projections(
    x: Array,
    scale: Array,
    eps: float,
    p: Params,
    names: tuple[str, ...],
    fused: str,
    *,
    act_bits: int,
    layer: Array | int | None,
    normed: Int8Activation | None = None,
    backend: str | None = None,
    **kwargs: Any,
) -> list[Array]:
    """`projections` of rms_norm(x, scale, eps), which one kernel normalises and quantises.

    scale: [K], or [L, K] and read at `layer`. normed: what that kernel gives, where it is known.
    """
    scale_layer = layer if scale.ndim == 2 else None
    y = rms_norm(x, scale if scale_layer is None else scale[scale_layer], eps)
    y_in = y
    if wants_int8(act_bits, *(part["kernel"] for part in projection_parts(p, names, fused))):
        y_in = normed
        if y_in is None:
            y_in = rms_norm_quantize(x, scale, eps=eps, layer=scale_layer, backend=backend)
    return projections(
        y, p, names, fused, act_bits=act_bits, x_in=y_in, layer=layer, backend=backend, **kwargs
    )


def silu_mul_input(
    gate_up: list[Array], act_bits: int, kernel: object, *, backend: str | None = None
) -> Array | Int8Activation:
    """SiLU(gate) * up as the matmul with `kernel` wants it, of [gate, up] or [both, side by side].

    Side by side, one kernel multiplies and quantises.
    """
    if len(gate_up) == 1 and wants_int8(act_bits, kernel):
        return silu_mul_quantize(gate_up[0], backend=backend)
    return quantize_input(silu_mul(*split_gate_up(gate_up)), act_bits, kernel, backend=backend)


def split_gate_up(gate_up: list[Array]) -> list[Array]:
    """[gate, up] of [gate, up] or [both, side by side]."""
    return gate_up if len(gate_up) == 2 else jnp.split(gate_up[0], 2, axis=-1)


def linear(
    x: Array | Int8Activation,
    p: Params,
    *,
    layer: Array | int | None,
    dtype: jax.typing.DTypeLike,
    residual: Array | None = None,
    backend: str | None = None,
    axis: str | None = None,
    owed: bool = False,
) -> Any:
    """x [..., K] @ kernel [K, N] (+ bias [N]) (+ residual [..., N]) -> dtype[..., N].

    Of an integer matmul the residual is added in float32, before the one rounding; of others after
    the product is rounded, as in transformers.
    A quantised kernel is stacked and read at `layer`; with int8 x it is an integer matmul, with
    float x it is dequantised first (w4a16). A float kernel is this layer's own. A kernel that can
    be called computes the product itself, float[..., K] -> [..., N]: a pytree whose arrays are this
    layer's, the hook for experiments (qserve_jax/evaluation/yardsticks.py).
    axis: of a mesh whose devices each hold a part of K: of x, quantised for itself, and the kernel.
    Their products, scaled and in `dtype`, are summed before bias and residual are added.
    owed: leave the sum to the norm behind, and return an `Unsummed`; of a kernel without bias.
    """
    kernel, bias = p["kernel"], p.get("bias")
    if axis is not None:
        own = {"layer": layer, "dtype": dtype, "backend": backend}
        partial = linear(x, {"kernel": kernel}, **own)
        if owed and residual is not None:
            return Unsummed(residual, partial)
        return sum_partial(partial, axis, bias, residual)
    if isinstance(x, Int8Activation):
        added = {"bias": bias, "residual": residual}
        return quantized_matmul(x, kernel, **added, layer=layer, out_dtype=dtype, backend=backend)
    y = _float_product(x, kernel, layer, dtype)
    y = (y if bias is None else y + bias.astype(jnp.float32)).astype(dtype)
    return y if residual is None else residual + y


def _float_product(x: Array, kernel: Any, layer: Any, dtype: Any) -> Any:
    """x [..., K] @ kernel [K, N] -> f32[..., N], the kernel dequantised where it is a container."""
    if callable(kernel):
        return kernel(x)
    if is_quantized(kernel):
        kernel = dequantize_weight(from_kernel_layout(take_layer(kernel, layer))).T
    kernel = kernel.astype(dtype)
    return jnp.dot(x, kernel, precision="highest", preferred_element_type=jnp.float32)


def projection_parts(p: Params, names: tuple[str, ...], fused: str) -> list[Params]:
    """The parameters of several projections of one input, or of the one they are fused to."""
    return [p[name] for name in ([fused] if fused in p else names)]


def projections(
    x: Array,
    p: Params,
    names: tuple[str, ...],
    fused: str,
    *,
    act_bits: int,
    x_in: Array | Int8Activation | None = None,
    **kwargs: Any,
) -> list[Array]:
    """Several projections of one input, which is quantised once; one matmul where they are fused.

    x_in: x as quantised projections take it, where the caller has it.
    Returns one array [..., N_i] per name, or a single [..., sum N_i] from a fused kernel.
    """
    present = projection_parts(p, names, fused)
    if x_in is None:
        x_in = quantize_input(x, act_bits, *(part["kernel"] for part in present))
    return [linear(x_in if is_quantized(q["kernel"]) else x, q, **kwargs) for q in present]


def split_in_place(layers: Params) -> tuple[Params, Params]:
    """Split stacked layer parameters [L, ...] for a scan: (scanned, in_place).

    Float leaves are scanned, each step getting its slice. Quantised containers, and the scales of
    the norms that are quantised with their input, stay whole and are read at a layer index, so that
    kernels stream them from where they lie; so do the flags of sums over ranks. Each half has None
    where the other has a leaf.
    """
    quantized = any(map(is_quantized, jax.tree.leaves(layers, is_leaf=is_quantized)))
    whole = {name: name == EXCHANGE or (quantized and name in INPUT_NORMS) for name in layers}

    def half(keep: bool) -> Params:
        return {
            name: jax.tree.map(
                lambda w, name=name: w if (whole[name] or is_quantized(w)) == keep else None,
                part,
                is_leaf=is_quantized,
            )
            for name, part in layers.items()
        }

    return half(False), half(True)


def join_in_place(scanned: Params, in_place: Params) -> Params:
    """Undo `split_in_place` for one layer."""
    return jax.tree.map(
        lambda s, w: w if s is None else s, scanned, in_place, is_leaf=lambda leaf: leaf is None
    )
