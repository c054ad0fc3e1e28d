"""What the kernel computes, by XLA's collectives and in plain jax.numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qserve_jax.pallas_kernels.quantize_activation import reference
from qserve_jax.quantization.qtensor import Array, Int8Activation


def add_ranks(partial: Array, residual: Array, axis: str) -> Array:
    """residual + the ranks' partials, added in float32 by rank, then rounded once."""
    parts = jax.lax.all_gather(partial, axis).astype(jnp.float32)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return (total + residual.astype(jnp.float32)).astype(residual.dtype)


def sum_norm_quantize(
    partial: Array,
    residual: Array,
    scale: Array,
    *,
    axis: str,
    eps: float,
    layer: Array | int | None,
) -> tuple[Array, Int8Activation]:
    x = add_ranks(partial, residual, axis)
    return x, reference.rms_norm_quantize(x, scale, eps=eps, layer=layer)
