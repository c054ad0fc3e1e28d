"""Fake-quantised yardsticks beside W4A8KV4: W4A16 (as AWQ and GPTQ store) and W4A4 (as Atom does).

Values are quantised and dequantised at once and multiplied in float: what other formats cost in
accuracy, not in time. Weights are rounded to nearest, without the calibration of those methods;
W4A4 is without Atom's 128 outlier channels in INT8 and its reordering.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax.quantization.params import path_name
from qserve_jax.quantization.qtensor import Array

GROUP = 128


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["kernel"], meta_fields=["group_size", "bits"]
)
@dataclasses.dataclass(frozen=True)
class InputQuantizedKernel:
    """A float kernel [..., K, N] whose input is fake-quantised per group; `models.layers.linear`
    calls it."""

    kernel: Array
    group_size: int
    bits: int

    def __call__(self, x: Array) -> Array:
        """x [..., K] -> f32[..., N]."""
        x = fake_quantize_symmetric(x, self.group_size, self.bits).astype(x.dtype)
        kernel = self.kernel.astype(x.dtype)
        return jnp.dot(x, kernel, precision="highest", preferred_element_type=jnp.float32)


def fake_quantize_symmetric(x: Array, group_size: int, bits: int) -> Array:
    """f32 like x [..., K]: scale = absmax / (2**(bits-1) - 1) of each group along K, codes rounded
    to nearest. K that is no multiple of the group is one group."""
    groups = _grouped(x, group_size)
    top = 2.0 ** (bits - 1) - 1
    scale = jnp.max(jnp.abs(groups), axis=-1, keepdims=True) / top
    scale = jnp.where(scale > 0, scale, 1)
    return (jnp.clip(jnp.round(groups / scale), -top, top) * scale).reshape(x.shape)


def fake_quantize_asymmetric(x: Array, group_size: int, bits: int) -> Array:
    """f32 like x [..., K]: scale = (max - min) / (2**bits - 1) of each group along K, the range
    widened to contain zero, integer zero point. K that is no multiple of the group is one group."""
    groups = _grouped(x, group_size)
    low = jnp.minimum(jnp.min(groups, axis=-1, keepdims=True), 0)
    high = jnp.maximum(jnp.max(groups, axis=-1, keepdims=True), 0)
    top = 2.0**bits - 1
    scale = jnp.where(high > low, (high - low) / top, 1)
    zero = jnp.round(-low / scale)
    codes = jnp.clip(jnp.round(groups / scale) + zero, 0, top)
    return ((codes - zero) * scale).reshape(x.shape)


def _grouped(x: Array, group_size: int) -> Array:
    k = x.shape[-1]
    size = group_size if k % group_size == 0 else k
    return x.astype(jnp.float32).reshape(*x.shape[:-1], k // size, size)


def w4a16_params(params: Any) -> Any:
    """The tree with every `kernel` [..., K, N] as 4-bit asymmetric groups of 128 return it."""
    return _map_kernels(
        lambda w: _along_inputs(fake_quantize_asymmetric, w, GROUP, 4).astype(w.dtype), params
    )


def w4a4_params(params: Any) -> Any:
    """The tree with every `kernel` [..., K, N] as 4-bit symmetric groups of 128 return it, and the
    same done to its input."""

    def quantize(w: Array) -> InputQuantizedKernel:
        w = _along_inputs(fake_quantize_symmetric, w, GROUP, 4).astype(w.dtype)
        return InputQuantizedKernel(w, GROUP, 4)

    return _map_kernels(quantize, params)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _along_inputs(function: Callable[..., Array], w: Array, group_size: int, bits: int) -> Array:
    return function(w.mT, group_size, bits).mT


def _map_kernels(function: Callable[[Array], Any], params: Any) -> Any:
    """`function` of every leaf named kernel, others as they are."""

    def one(path: Any, leaf: Any) -> Any:
        return function(leaf) if path_name(path).endswith("kernel") else leaf

    return jax.tree_util.tree_map_with_path(one, params)
