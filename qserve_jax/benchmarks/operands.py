"""Random operands, made on the device: no time goes into transfers and packing.

All scales are powers of two, so that a float32 epilogue is exact in any order of its operations: a
backend's output must equal the reference's bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qserve_jax.pallas_kernels.w4a8_matmul import from_kernel_layout, to_kernel_layout
from qserve_jax.pallas_kernels.w4a8_matmul.layout import CODE_WORDS, FEATURES, ROWS, SCALE_WORDS
from qserve_jax.quantization.qtensor import (
    Array,
    Int8Activation,
    Source,
    W4PerChannel,
    W4PerGroup,
    W8PerChannel,
)

COLD_BYTES = 3 * 128 * 2**20  # three times the L2 of the largest GPU so far, a B200
SOURCE = Source(("stack", "in", "out"), (0,), (0,), "float32")  # a matmul does not read it


class PlainWeights(NamedTuple):
    """One matrix [N, K] as the kernels that we compare with take it."""

    bf16: Array
    int8: W8PerChannel
    fp8: Array


def copies_of(nbytes: int) -> int:
    """How many different weights of this size to go round, so that none is found in the cache."""
    return max(2, -(-COLD_BYTES // nbytes))


@functools.partial(jax.jit, static_argnums=(0, 1))
def make_activation(m: int, k: int) -> Int8Activation:
    """Codes [m, k] of all of -127..127."""
    keys = jax.random.split(jax.random.key(m))
    codes = jax.random.randint(keys[0], (m, k), -127, 128, jnp.int8)
    return Int8Activation(codes, _scales(keys[1], (m,)), codes.astype(jnp.int32).sum(1))


def _scales(key: Array, shape: tuple[int, ...]) -> Array:
    return jnp.where(jax.random.bernoulli(key, shape=shape), 2.0**-10, 2.0**-9)


def first_tokens(host: Any, m: int) -> Any:
    """The first m of arrays [tokens, ...] on the host, on the device: nothing to compile."""
    return jax.device_put(jax.tree.map(lambda leaf: leaf[:m], host))


def make_weight(
    layers: int, n: int, k: int, group_size: int, *, packed: bool = True
) -> W4PerGroup | W4PerChannel:
    """Stacked 4-bit weights [layers, N, K], in the kernels' layout or else canonical.

    group_size: 128, or -1 per channel. Per group every code gives an int8.
    """
    w = _packed_weight(layers, n, k, group_size)
    return w if packed else from_kernel_layout(w)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _packed_weight(layers: int, n: int, k: int, group_size: int) -> Any:
    """Random tiles, in whatever order the layout has them."""
    keys = jax.random.split(jax.random.key(n + k), 3)
    shapes = _packed_shapes(layers, n, k, group_size)
    tiles = layers * (n // ROWS) * (k // FEATURES)
    words = jax.random.bits(keys[0], (tiles, CODE_WORDS), jnp.uint32)
    if group_size == 128:
        words = jnp.concatenate([words, _scale_words(keys[1], (tiles, SCALE_WORDS))], axis=-1)
    codes = jax.lax.bitcast_convert_type(words, jnp.int32).reshape(shapes.codes.shape)
    scale = _scales(keys[2], (layers, n))
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    w = dataclasses.replace(empty, codes=codes, channel_scale=scale)
    return w if group_size == 128 else dataclasses.replace(w, scaled_zero=7.5 * scale)


def _packed_shapes(layers: int, n: int, k: int, group_size: int) -> Any:
    """What packing would give, without the arrays."""

    def canonical() -> Any:
        codes = jnp.zeros((layers, n, k // 2), jnp.uint8)
        scale = jnp.zeros((layers, n))
        if group_size == -1:
            return to_kernel_layout(W4PerChannel(codes, scale, scale, SOURCE))
        groups = jnp.zeros((layers, n, k // group_size), jnp.uint8)
        offset = groups.astype(jnp.int8)
        return to_kernel_layout(W4PerGroup(codes, scale, groups, offset, group_size, SOURCE))

    return jax.eval_shape(canonical)


def _scale_words(key: Array, shape: tuple[int, ...]) -> Array:
    """Two pairs of bytes a word, scale s in 1..16 and offset + 128 = 128 - 8 s + (0..7).

    So code * s + offset lies in -128..119, and its mean near 0.
    """
    bits = jax.random.bits(key, (*shape, 2), jnp.uint32)
    s, low = 1 + (bits & 15), (bits >> 4) & 7
    pair = s | (128 - 8 * s + low) << 8
    return pair[..., 0] | pair[..., 1] << 16


@functools.partial(jax.jit, static_argnums=(0, 1))
def make_plain_weights(n: int, k: int, seed: int) -> PlainWeights:
    """The same random bytes as int8, bf16 and (a sixteenth of them) fp8."""
    octets = jax.random.bits(jax.random.key(seed), (n, k), jnp.uint8)
    codes = jax.lax.bitcast_convert_type(octets, jnp.int8)
    scale = jnp.full((n,), 1e-3)
    fp8 = (codes.astype(jnp.bfloat16) / 16).astype(jnp.float8_e4m3fn)
    return PlainWeights(codes.astype(jnp.bfloat16), W8PerChannel(codes, scale, SOURCE), fp8)
