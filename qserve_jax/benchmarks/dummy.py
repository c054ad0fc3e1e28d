"""Random models, made on the device as they are quantised: there is never a float model.

Weights have the size that keeps activations of order one, as a trained model's; their values mean
nothing.
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
from qserve_jax.quantization import QuantConfig, quantize_params
from qserve_jax.quantization.qtensor import W4PerGroup, W8PerChannel, is_quantized

CODE_STD = 4.6
"""Standard deviation of the codes 0..15, all as likely."""


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
    """A container of these shapes: random codes (and group scales), constant channel scales."""
    keys = jax.random.split(key, 2)
    codes = _bits(shapes.codes.shape, shapes.codes.dtype, keys[0])
    k = shapes.source.in_shape[0]
    scale = shapes.channel_scale
    if isinstance(shapes, W8PerChannel):
        step = k**-0.5 / (CODE_STD * 16)
        made = {}
    elif isinstance(shapes, W4PerGroup):
        step = k**-0.5 / (CODE_STD * 9.7)  # the root mean square of 1..16
        groups = 1 + _bits(shapes.group_scale.shape, jnp.uint8, keys[1]) % 16
        # code * s - 8 s lies in -128..112 for every code.
        made = {"group_scale": groups, "group_offset": (-8 * groups.astype(jnp.int8))}
    else:
        step = k**-0.5 / CODE_STD
        made = {"scaled_zero": jnp.full(scale.shape, 7.5 * step, scale.dtype)}
    channel_scale = jnp.full(scale.shape, step, scale.dtype)
    return dataclasses.replace(shapes, codes=codes, channel_scale=channel_scale, **made)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _bits(shape: tuple[int, ...], dtype: Any, key: jax.Array) -> jax.Array:
    """Random bytes, layer by layer."""
    octets = jax.lax.map(
        lambda key: jax.random.bits(key, shape[1:], jnp.uint8), jax.random.split(key, shape[0])
    )
    return jax.lax.bitcast_convert_type(octets, dtype)
