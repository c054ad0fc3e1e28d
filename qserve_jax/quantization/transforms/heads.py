"""What transforms must know of a model's attention: how many heads, and how they share."""

from __future__ import annotations

from typing import Protocol

import jax.numpy as jnp

from qserve_jax.quantization.transforms.linear import Array


class AttentionConfig(Protocol):
    """The attention's shape; `qserve_jax.models.ModelConfig` is one. Query head n reads KV head
    n // G with G = num_heads / num_kv_heads."""

    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def sliding_window(self) -> int | None: ...


def repeat_heads(x: Array, config: AttentionConfig) -> Array:
    """[..., K, H] of KV heads -> [..., N, H], for each query head that of its KV head."""
    return jnp.repeat(x, config.num_heads // config.num_kv_heads, axis=-2)


def group_max(x: Array, config: AttentionConfig) -> Array:
    """[..., N, H] of query heads -> [..., K, H], the largest of those that share a KV head."""
    group = config.num_heads // config.num_kv_heads
    shape = (*x.shape[:-2], config.num_kv_heads, group, config.head_dim)
    return x.reshape(shape).max(axis=-2)


def flat_heads(x: Array) -> Array:
    """[..., heads, H] -> [..., heads * H]."""
    return x.reshape(*x.shape[:-2], -1)
