"""Random models, made on the device as they are quantised: there is never a float model.

Weights are normal and have the size that keeps activations of order one, as a trained model's;
their values mean nothing. That they are normal matters for speed: what a multiplication draws, and
so the clock under the power limit, depends on its bits.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qserve_jax.checkpoint import LoadedModel
from qserve_jax.models import CausalLM, ModelConfig, param_shapes
from qserve_jax.models.sharding import (
    P,
    axis_of,
    check_ranks,
    even_config,
    leaf_specs,
    shardings,
)
from qserve_jax.pallas_kernels.w4a8_matmul.layout import weight_shape
from qserve_jax.quantization import QuantConfig, quantize_params
from qserve_jax.quantization.numerics import PROTECTIVE_RANGE, quantize_progressive
from qserve_jax.quantization.packing import pack_nibbles
from qserve_jax.quantization.qtensor import W4PerChannel, W4PerGroup, W8PerChannel, is_quantized

LARGEST = 3.7
"""Of some thousand normal numbers, in standard deviations: what fills a channel's range."""


def dummy_model(
    config: ModelConfig,
    quant_config: QuantConfig,
    *,
    dtype: Any = jnp.bfloat16,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> LoadedModel:
    """A random model of these sizes, quantised as `quant_config` says, without a tokenizer.

    dtype: of activations, embeddings, head and whatever is not quantised. mesh: of the devices that
    share the model, each of which makes its part.
    Raises ValueError for heads that the devices cannot share.
    """
    vocab_size = config.vocab_size
    if mesh is not None:
        check_ranks(
            config, mesh.size, quant_config.group_size if quant_config.weight_bits == 4 else -1
        )
        config = even_config(config, mesh.size)
    floats = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        param_shapes(config),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    shapes = jax.eval_shape(functools.partial(quantize_params, config=quant_config), floats)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=is_quantized)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    make = _leaf if mesh is None else functools.partial(_on_ranks, mesh)
    made = [make(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True)]
    params = treedef.unflatten(made)
    config = dataclasses.replace(config, vocab_size=vocab_size)
    model = CausalLM(config, act_bits=quant_config.act_bits, mesh=mesh)
    return LoadedModel(model, params, config, None, quant_config, Path("dummy"), "dummy")


def _on_ranks(mesh: Mesh, path: Any, leaf: Any, key: jax.Array) -> Any:
    """`_leaf` over a mesh; each rank draws its own."""
    axis = axis_of(mesh)
    specs = leaf_specs(path, leaf, axis)
    own = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(place.shard_shape(x.shape), x.dtype),
        leaf,
        shardings(specs, mesh),
    )

    def make(key: jax.Array) -> Any:
        return _leaf(path, own, jax.random.fold_in(key, jax.lax.axis_index(axis)))

    made = jax.shard_map(make, mesh=mesh, in_specs=P(), out_specs=specs, check_vma=False)
    return jax.block_until_ready(jax.jit(made)(key))


def _leaf(path: Any, leaf: Any, key: jax.Array) -> Any:
    """Waits for it, so that no two leaves' temporaries are in memory together."""
    if is_quantized(leaf):
        return jax.block_until_ready(_container(leaf, key))
    name = path[-1].key
    if name in ("scale", "bias"):
        return jnp.full(leaf.shape, name == "scale", leaf.dtype)
    # Kernels are [L, K, N], the embedding and the head [V, D].
    std = leaf.shape[-2] ** -0.5 if name == "kernel" else 0.02
    return jax.block_until_ready(_normal(leaf.shape, leaf.dtype, std, key))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _normal(shape: tuple[int, ...], dtype: Any, std: float, key: jax.Array) -> jax.Array:
    return jax.lax.map(
        lambda key: std * jax.random.normal(key, shape[1:], dtype), jax.random.split(key, shape[0])
    )


def _container(shapes: Any, key: jax.Array) -> Any:
    """A container of these shapes: codes of normal weights, constant channel scales."""
    kind, group_size = type(shapes), getattr(shapes, "group_size", -1)
    levels = {W4PerGroup: PROTECTIVE_RANGE, W4PerChannel: 7.5, W8PerChannel: 127}[kind]
    step = shapes.source.in_shape[0] ** -0.5 * LARGEST / levels
    made = _layers(kind, (shapes.codes.shape[0], *weight_shape(shapes)), group_size, key)
    scale = jnp.full(shapes.channel_scale.shape, step, shapes.channel_scale.dtype)
    if kind is W4PerChannel:
        made["scaled_zero"] = 7.5 * scale
    return dataclasses.replace(shapes, channel_scale=scale, **made)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _layers(kind: Any, shape: tuple[int, int, int], group_size: int, key: jax.Array) -> dict:
    """Codes, and group scales, of [L, N, K] random weights, layer by layer."""

    def layer(key: jax.Array) -> dict:
        w = jax.random.normal(key, shape[1:]) / LARGEST
        if kind is W8PerChannel:
            return {"codes": jnp.clip(jnp.round(127 * w), -127, 127).astype(jnp.int8)}
        if kind is W4PerChannel:
            codes = jnp.clip(jnp.round(7.5 * w + 7.5), 0, 15)
            return {"codes": pack_nibbles(codes.astype(jnp.uint8))}
        w = jnp.clip(w, -1, 1).at[:, 0].set(1)  # so the channel's scale is the constant one
        codes, _, scale, offset = quantize_progressive(w, group_size)
        return {"codes": pack_nibbles(codes), "group_scale": scale, "group_offset": offset}

    return jax.lax.map(layer, jax.random.split(key, shape[0]))
