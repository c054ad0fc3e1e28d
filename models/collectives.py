"""Tensor parallelism, the exchange: functions on each rank's shard, and what ranks tell each other.

A step exchanges, per layer, the outputs of o and of down (`sum_partial`, [tokens, D] in the model's
dtype), and once the embeddings (`look_up`, the same size) and the logits (`gather`). Where few
tokens meet GPUs of one process, sums are left owed (`Unsummed`) and the norm that comes next adds
them (`add_owed`): a kernel does both over NVLink (pallas_kernels/sum_norm_quantize). Everybody then
has the same logits, bit for bit, and chooses the same tokens. Gathering them costs a rank
4 V (1 - 1/ranks) bytes a row, 33 MB for 128 rows of 128k words on 2: a tenth of a millisecond over
NVLink, where a choice among shards would need a way of its own for every sampling option.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qserve_jax.models.sharding import (
    EXCHANGE,
    P,
    axis_of,
    cache_spec,
    param_specs,
    rank_config,
    shardings,
)
from qserve_jax.pallas_kernels import prepare_for_backend
from qserve_jax.pallas_kernels.backend import usable
from qserve_jax.pallas_kernels.sum_norm_quantize import (
    MAX_RANKS,
    MAX_ROWS,
    WIDTH_MULTIPLE,
    flag_words,
    sum_norm_quantize,
)
from qserve_jax.quantization.qtensor import Array, Int8Activation, KVCache

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Projections that are prepared together."""

SUMS_VARIABLE = "QSERVE_JAX_SUMS"
"""Environment variable: "nccl" keeps every sum an all-reduce; unset or "auto", the kernel where it
can. Read in `prepare_model`."""


class Unsummed(NamedTuple):
    """A residual stream x [..., D] that the ranks' products, [..., D], are still to be added to."""

    x: Array
    partial: Array


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


def add_owed(
    x: Array | Unsummed,
    scale: Array,
    flags: Array | None,
    *,
    axis: str | None,
    eps: float,
    layer: Array | int | None,
    backend: str | None,
) -> tuple[Array, Int8Activation | None]:
    """A residual stream that owes nothing, and its norm in int8 where sums were owed.

    scale: of the norm, [D], or [L, D] and read at `layer`. flags: of `prepare_model`.
    """
    if not isinstance(x, Unsummed):
        return x, None
    assert flags is not None and axis is not None
    layer = layer if scale.ndim == 2 else None
    return sum_norm_quantize(
        x.partial, x.x, scale, flags, axis=axis, eps=eps, layer=layer, backend=backend
    )


def flags_of(params: dict, tokens: int) -> Array | None:
    """The flags of the kernel that adds what is owed, where there are any and it takes so many."""
    exchange = params["layers"].get(EXCHANGE)
    return exchange["flags"] if exchange is not None and tokens <= MAX_ROWS else None


def look_up(
    table: Array, tokens: Array, axis: str | None, *, owed: bool = False
) -> Array | Unsummed:
    """Embeddings [..., D] of tokens i32[...]; table [V, D], or a rank's part of it.

    owed: leave the sum over the ranks, of one that is not zero, to the norm behind.
    """
    if axis is None:
        return table[tokens]
    index = tokens - jax.lax.axis_index(axis) * table.shape[0]
    mine = (index >= 0) & (index < table.shape[0])
    rows = jnp.where(mine[..., None], table[jnp.where(mine, index, 0)], 0)
    return Unsummed(jnp.zeros_like(rows), rows) if owed else jax.lax.psum(rows, axis)


def gather(logits: Array, axis: str | None) -> Array:
    """The logits [..., V] of all ranks' parts of the vocabulary, on every rank."""
    if axis is None:
        return logits
    return jax.lax.all_gather(logits, axis, axis=logits.ndim - 1, tiled=True)


def prepare_model(model: Any, params: dict, *, in_place: bool = False) -> dict:
    """`prepare_for_backend` of a model's params; on a mesh each rank fuses and packs its own parts,
    and unless `why_all_reduce` the layers get the flags by which ranks meet in a kernel.

    Errors as there.
    """
    options = {"backend": model.backend, "act_bits": model.act_bits}
    if model.mesh is None:
        return prepare_for_backend(params, in_place=in_place, **options)
    layers = params["layers"] if in_place else dict(params["layers"])
    if why_all_reduce(model) is None:
        layers[EXCHANGE] = _new_flags(model.mesh)
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


def why_all_reduce(model: Any) -> str | None:
    """Why all sums over a model's ranks are all-reduces; None where the kernel does those of few
    tokens. Raises ValueError on a QSERVE_JAX_SUMS that is neither."""
    wish = os.environ.get(SUMS_VARIABLE) or "auto"
    if wish not in ("auto", "nccl"):
        raise ValueError(f"{SUMS_VARIABLE}={wish!r} is unknown: use auto or nccl")
    mesh, config = model.mesh, model.config
    if wish == "nccl":
        return f"{SUMS_VARIABLE}=nccl"
    if mesh is None or mesh.size > MAX_RANKS:
        return f"the kernel is for 2 to {MAX_RANKS} GPUs"
    if usable(model.backend) == ("reference",):
        return "the backend is the reference"
    if jax.process_count() > 1:
        return f"{jax.process_count()} processes do not see each other's memory"
    if [device.id for device in mesh.devices.flat] != [*range(mesh.size)]:
        return f"the kernel needs the devices 0 to {mesh.size - 1}, in order"
    if config.o_bias or config.mlp_bias:
        return "o or down has a bias"
    if config.hidden_size % WIDTH_MULTIPLE:
        return f"{config.hidden_size} features are no multiple of {WIDTH_MULTIPLE}"
    return None


def _new_flags(mesh: Any) -> dict[str, Array]:
    """Zeros on every device before any of them goes on."""
    zeros = {"flags": np.zeros(mesh.size * flag_words(), np.int32)}
    specs = param_specs({EXCHANGE: zeros}, axis_of(mesh))
    return jax.block_until_ready(jax.device_put(zeros, shardings(specs, mesh)[EXCHANGE]))
