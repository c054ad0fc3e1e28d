"""What the fused kernels compute, in plain jax.numpy: an operation, then the pinned arithmetic."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qserve_jax.quantization import numerics
from qserve_jax.quantization.qtensor import Array, Int8Activation


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, float32 inside, x's dtype out."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


def silu_mul(gate: Array, up: Array) -> Array:
    """SiLU(gate) * up, in their dtype."""
    return jax.nn.silu(gate) * up


def rms_norm_quantize(
    x: Array, scale: Array, *, eps: float, layer: Array | int | None
) -> Int8Activation:
    scale = scale if layer is None else scale[layer]
    return numerics.quantize_activation(rms_norm(x, scale, eps))


def silu_mul_quantize(gate_up: Array) -> Int8Activation:
    return numerics.quantize_activation(silu_mul(*jnp.split(gate_up, 2, axis=-1)))
