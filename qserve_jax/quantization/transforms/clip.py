"""Weight clipping (QServe section 5.4): narrow each output channel's range where that helps.

A narrower range gives finer steps and clips the largest weights. Tried are the ratios
1 - 0.8 g / 80 for g = 0..80; the best has the least squared error of the linear's output,
dW H dW^T with H = 2 X^T X / n, which is a sum over output channels, so that each has its own.

The paper takes for q and k the error of the attention's output; here all layers take their own
output's, because the former couples all heads' channels and would run the attention 81 times per
channel group.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qserve_jax.quantization.numerics import quantize_per_channel
from qserve_jax.quantization.transforms.linear import Array, matmul

RATIOS = tuple(1 - 0.8 * g / 80 for g in range(81))


@functools.partial(jax.jit, static_argnames="ratios")
def clip_ratios(w: Array, hessian: Array, *, ratios: tuple[float, ...] = RATIOS) -> Array:
    """The best ratio f32[N] of each output channel of w f32[N, K], for per-channel 4-bit weights.

    hessian: f32[K, K]. Of equals the first, the widest.
    """

    def error(ratio):
        codes, scale, scaled_zero = quantize_per_channel(clip_range(w, ratio))
        delta = codes * scale[:, None] - scaled_zero[:, None] - w
        return jnp.sum(matmul(delta, hessian) * delta, axis=-1)

    candidates = jnp.asarray(ratios, jnp.float32)
    return candidates[jnp.argmin(jax.lax.map(error, candidates), axis=0)]


def clip_range(w: Array, ratio: Array | float) -> Array:
    """w f32[N, K] clipped to ratio (f32[N] or one for all) times each channel's own range."""
    ratio = jnp.broadcast_to(ratio, w.shape[:1])[:, None]
    low = jnp.minimum(w.min(axis=-1, keepdims=True), 0)
    high = jnp.maximum(w.max(axis=-1, keepdims=True), 0)
    return jnp.clip(w, ratio * low, ratio * high)
