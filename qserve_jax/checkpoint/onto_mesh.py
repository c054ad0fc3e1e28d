"""Checkpoints onto a mesh: each device gets its part, and reads no more of the files than that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from qserve_jax.checkpoint.errors import CheckpointError, listing
from qserve_jax.checkpoint.hf import TensorSpec
from qserve_jax.checkpoint.key_table import targets
from qserve_jax.checkpoint.stream import read_params
from qserve_jax.models.config import ModelConfig
from qserve_jax.models.sharding import (
    KEYS,
    axis_of,
    checkpoint_part,
    param_specs,
    shardings,
)


def read_onto_mesh(
    specs: Mapping[str, TensorSpec],
    config: ModelConfig,
    shapes: Mapping[str, Any],
    mesh: Mesh,
    **options: Any,
) -> dict[str, Any]:
    """`read_params`, rank by rank, as one tree of arrays over the mesh.

    config: of the checkpoint. shapes: the tree of its `even_config`. options: as of `read_params`.
    With several processes each reads for its own devices.
    """
    places = shardings(param_specs(shapes, axis_of(mesh)), mesh)
    own = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(place.shard_shape(x.shape), x.dtype), shapes, places
    )
    parts = []
    for rank, device in enumerate(mesh.devices.flat):
        if device.process_index != jax.process_index():
            continue
        with jax.default_device(device):
            parts.append(
                read_params(
                    specs,
                    targets(config),
                    flatten_dict(own, sep="/"),
                    part_of=lambda target, rank=rank: checkpoint_part(
                        config, target.path, target.shape, rank, mesh.size
                    ),
                    **options,
                )
            )
    joined = jax.tree.map(
        lambda x, place, *arrays: jax.make_array_from_single_device_arrays(
            x.shape, place, list(arrays)
        ),
        flatten_dict(dict(shapes), sep="/"),
        flatten_dict(places, sep="/"),
        *parts,
    )
    return unflatten_dict(joined, sep="/")


def orbax_onto_mesh(
    path: Path, stored: Mapping[str, Any], shapes: Mapping[str, Any], mesh: Mesh
) -> dict[str, Any]:
    """The tree that `save_orbax` wrote over the mesh; Orbax appends the zeros.

    stored: the shapes that must be in the files. shapes: those of the `even_config`.
    Raises CheckpointError where the files hold others.
    """
    from qserve_jax.checkpoint.orbax_io import abstract_orbax, load_orbax  # a second to import

    _check_stored(path, abstract_orbax(path), stored)
    places = shardings(param_specs(shapes, axis_of(mesh)), mesh)
    read = _map_leaves(lambda name, *of: _place_to_read(name, mesh, *of), stored, shapes, places)
    found = load_orbax(path, read, pad=True)
    return _map_leaves(lambda _, *of: _as_placed(mesh, *of), found, shapes, places)


def _check_stored(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    # Dtypes may differ: Orbax converts.
    shapes = [
        {jax.tree_util.keystr(k): x.shape for k, x in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (found, wanted)
    ]
    wrong = sorted(k for k in shapes[0] | shapes[1] if shapes[0].get(k) != shapes[1].get(k))
    if wrong:
        raise CheckpointError(
            f"{path} and config.json do not fit together in {listing(wrong)}: use those of the "
            "same checkpoint"
        )


def _place_to_read(name: str, mesh: Mesh, stored: Any, even: Any, place: NamedSharding) -> Any:
    """The shape to ask Orbax for: the even one, or the stored one where heads are repeated."""
    repeats = even.shape != stored.shape and name.split("/")[-2] in KEYS
    if not repeats:
        return even.update(sharding=place)
    # One part for each KV head, on all ranks that share it.
    cut = next(i for i, name in enumerate(place.spec) if name is not None)
    copies = even.shape[cut] // stored.shape[cut]
    grid = Mesh(mesh.devices.reshape(-1, copies), ("heads", "copies"))
    spec = jax.sharding.PartitionSpec(*[None] * cut, "heads")
    return stored.update(sharding=NamedSharding(grid, spec))


def _as_placed(mesh: Mesh, found: jax.Array, even: Any, place: NamedSharding) -> jax.Array:
    """The array with the sharding of our mesh; its parts lie there already."""
    if found.shape == even.shape:
        return found
    shards = {shard.device: shard.data for shard in found.addressable_shards}
    here = [shards[d] for d in mesh.devices.flat if d in shards]
    return jax.make_array_from_single_device_arrays(even.shape, place, here)


def _map_leaves(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """function(path of the canonical leaf, array, ...) for every array of the containers too."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    rest = [jax.tree.leaves(other) for other in others]
    return treedef.unflatten(
        function("/".join(str(k.key) for k in path if hasattr(k, "key")), leaf, *of)
        for (path, leaf), *of in zip(leaves, *rest, strict=True)
    )
