"""Tensor parallelism, the exchange: functions on each rank's shard, and what ranks tell each other.

A step exchanges, per layer, the outputs of o and of down (`sum_partial`, [tokens, D] in the model's
dtype), and once the embeddings (`look_up`, the same size) and the logits (`gather`). Everybody then
has the same logits, bit for bit, and chooses the same tokens. Gathering them costs a rank
4 V (1 - 1/ranks) bytes a row, 33 MB for 128 rows of 128k words on 2: a tenth of a millisecond over
NVLink, where a choice among shards would need a way of its own for every sampling option.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax.models.sharding import (
    P,
    axis_of,
    cache_spec,
    param_specs,
    rank_config,
)
from qserve_jax.pallas_kernels import prepare_for_backend
from qserve_jax.quantization.qtensor import Array, KVCache

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Projections that are prepared together."""


def on_ranks(
    model: Any, body: Callable[..., Any], params: Any, cache: KVCache | None, *arrays: Any
) -> tuple[Any, Array]:
    """body(model, params, cache, *arrays) -> (cache, logits [..., V]) of a model on `model.mesh`.

    Each rank calls it with its part of params and cache, all of the arrays and a model of its size.
    """
    if model.mesh is None:
        return body(model, params, cache, *arrays)
    mesh, axis = model.mesh, axis_of(model.mesh)
    config = rank_config(model.config, mesh.size)
    local = model.clone(parent=None, config=config, mesh=None, axis=axis)
    pages = cache_spec(axis)
    filled, refill = _without_empty(params)
    cache, logits = jax.shard_map(
        lambda filled, *rest: body(local, refill(filled), *rest),
        mesh=mesh,
        in_specs=(param_specs(filled, axis), pages, *[P()] * len(arrays)),
        out_specs=(pages, P()),
        check_vma=False,
    )(filled, cache, *arrays)
    return cache, logits[..., : model.config.vocab_size]


def _without_empty(params: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The tree with None for arrays of no elements, and what puts them back.

    XLA of jaxlib 0.11.2 crashes where one enters a `shard_map` in a loop (Shardy takes it for a
    constant, and then finds no sharding); packed containers have some.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    filled = jax.tree.map(lambda x: x if x.size else None, params)

    def refill(filled: Any) -> Any:
        return jax.tree.map(
            lambda shape, x: jnp.zeros(shape.shape, shape.dtype) if x is None else x, shapes, filled
        )

    return filled, refill


def sum_partial(partial: Array, axis: str, *added: Array | None) -> Array:
    """The ranks' partial products [..., N] summed, plus bias and residual -> partial's dtype.

    What is added comes after the sum, in float32, before the one rounding.
    """
    y = jax.lax.psum(partial, axis).astype(jnp.float32)
    for x in added:
        y = y if x is None else y + x.astype(jnp.float32)
    return y.astype(partial.dtype)


def look_up(table: Array, tokens: Array, axis: str | None) -> Array:
    """Embeddings [..., D] of tokens i32[...]; table [V, D], or a rank's part of it."""
    if axis is None:
        return table[tokens]
    index = tokens - jax.lax.axis_index(axis) * table.shape[0]
    mine = (index >= 0) & (index < table.shape[0])
    rows = table[jnp.where(mine, index, 0)]
    return jax.lax.psum(jnp.where(mine[..., None], rows, 0), axis)  # one rank's, exactly


def gather(logits: Array, axis: str | None) -> Array:
    """The logits [..., V] of all ranks' parts of the vocabulary, on every rank."""
    if axis is None:
        return logits
    return jax.lax.all_gather(logits, axis, axis=logits.ndim - 1, tiled=True)


def prepare_model(model: Any, params: dict, *, in_place: bool = False) -> dict:
    """`prepare_for_backend` of a model's params; on a mesh each rank fuses and packs its own parts.

    Errors as there.
    """
    options = {"backend": model.backend, "act_bits": model.act_bits}
    if model.mesh is None:
        return prepare_for_backend(params, in_place=in_place, **options)
    layers = params["layers"] if in_place else dict(params["layers"])
    prepare = functools.partial(prepare_for_backend, **options)
    for names in GROUPS:
        if all(name in layers for name in names):
            _prepare_group(model.mesh, prepare, layers, names)
    return params if in_place else {**params, "layers": layers}


def _prepare_group(mesh: Any, prepare: Callable, layers: dict, names: tuple[str, ...]) -> None:
    """Replace projections by what they are prepared to; the parts are dropped once they are."""
    tree = {"layers": {name: layers[name] for name in names}}
    axis = axis_of(mesh)
    specs = param_specs(tree, axis)
    local = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype), tree
    )
    made = jax.eval_shape(prepare, local)
    if jax.tree.structure(made) == jax.tree.structure(local):
        return
    prepared = jax.jit(
        jax.shard_map(
            prepare,
            mesh=mesh,
            in_specs=(specs,),
            out_specs=param_specs(made, axis),
            check_vma=False,
        )
    )(tree)
    for name in names:
        del layers[name]
    layers.update(jax.block_until_ready(prepared)["layers"])
