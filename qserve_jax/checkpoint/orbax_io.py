"""Quantised parameter trees in and out of Orbax, and native checkpoints stored by it.

Orbax knows arrays and dicts. A container becomes a dict of its arrays; what is static about it goes
beside the arrays as JSON, so that a checkpoint tells by itself what tree it holds.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from qserve_jax.checkpoint.atomic import atomic_folder, copy_companions, write_json
from qserve_jax.checkpoint.errors import CheckpointError, first_line
from qserve_jax.checkpoint.native import PARAMS, checked_leaves, container_fields, native_config
from qserve_jax.models.config import ModelConfig
from qserve_jax.quantization.config import QuantConfig
from qserve_jax.quantization.qtensor import QUANTIZED_WEIGHTS, Source, is_quantized

CHUNK_BYTES = 2**20
"""Arrays are stored in chunks of this size at most, so that a device that holds a part of one reads
little else."""
KINDS = {kind.__name__: kind for kind in QUANTIZED_WEIGHTS}


def save_orbax(path: str | os.PathLike[str], params: Mapping[str, Any]) -> None:
    """Write any tree of nested dicts (names without "/") of arrays and quantised containers.

    path: a directory that does not exist yet; Orbax makes it there whole or not at all. Arrays may
    be sharded. Raises ValueError where `path` exists.
    """
    leaves = flatten_dict(dict(params), sep="/")
    arrays = {key: _arrays(leaf) if is_quantized(leaf) else leaf for key, leaf in leaves.items()}
    static = {key: _static(leaf) for key, leaf in leaves.items() if is_quantized(leaf)}
    tree = unflatten_dict(arrays, sep="/")
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    args = ocp.args.Composite(
        arrays=ocp.args.StandardSave(tree, save_args=chunks),
        containers=ocp.args.JsonSave(static),
    )
    folder = Path(path).absolute()
    if folder.exists():
        raise CheckpointError(f"{folder} exists already: choose another output, or remove it")
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(folder, args=args)
    except (OSError, ValueError, RuntimeError) as error:  # a full disk's are several, and long
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise CheckpointError(
            f"{folder} cannot be written ({os.strerror(errno.ENOSPC)}): make room there, or choose "
            "another output"
        ) from None


def abstract_orbax(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tree that `save_orbax` wrote, a ShapeDtypeStruct for each array; reads no weights.

    Raises CheckpointError for what it did not write, or not to the end.
    """
    folder = Path(path).absolute()
    try:
        with _checkpointer() as checkpointer:
            static = checkpointer.restore(
                folder, args=ocp.args.Composite(containers=ocp.args.JsonRestore())
            ).containers
            found: Any = checkpointer.metadata(folder).item_metadata.arrays.tree
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} is no tree that save_orbax has written to its end ({first_line(error)}): "
            "write it again"
        ) from None
    leaves: Any = flatten_dict(found, sep="/")
    shapes = {key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for key, leaf in leaves.items()}
    tree: dict[str, Any] = {}
    for key, meta in static.items():
        tree[key] = _container(meta, lambda field, key=key: shapes.pop(f"{key}/{field}"))
    return unflatten_dict(tree | shapes, sep="/")


def load_orbax(
    path: str | os.PathLike[str], like: Mapping[str, Any] | None = None, *, pad: bool = False
) -> Any:
    """The tree that `save_orbax` wrote.

    like: the tree of `abstract_orbax`, with a sharding in each ShapeDtypeStruct (and another float
      dtype where wished); each device then reads its part of an array. None: all on the first
      device. To place every array in the same way:

        like = jax.tree.map(lambda x: x.update(sharding=sharding), abstract_orbax(path))

    pad: fill arrays that are larger in `like` with zeros at the end of each axis; then nothing
      checks the shapes.

    Raises CheckpointError as `abstract_orbax` does.
    """
    abstract = dict(abstract_orbax(path) if like is None else like)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaves: Any = flatten_dict(abstract, sep="/")
    wanted = {key: _arrays(leaf) if is_quantized(leaf) else leaf for key, leaf in leaves.items()}
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or place), wanted
    )
    restore = ocp.args.StandardRestore(unflatten_dict(placed, sep="/"), strict=not pad)
    args = ocp.args.Composite(arrays=restore)
    with _checkpointer() as checkpointer:
        found = checkpointer.restore(Path(path).absolute(), args=args).arrays
    arrays: Any = flatten_dict(found, sep="/")
    restored = {
        key: _refilled(leaf, {name: arrays[f"{key}/{name}"] for name in container_fields(leaf)})
        if is_quantized(leaf)
        else arrays[key]
        for key, leaf in leaves.items()
    }
    return unflatten_dict(restored, sep="/")


def save_native_orbax(
    path: str | os.PathLike[str],
    params: Mapping[str, Any],
    config: ModelConfig,
    quant_config: QuantConfig,
    *,
    source: Path | None = None,
) -> None:
    """As `native.save_native`, with the canonical tree stored by Orbax in the folder `params`."""
    hf = native_config(checked_leaves(params, config), config, quant_config, "orbax")
    with atomic_folder(path) as folder:
        copy_companions(source, folder)
        save_orbax(folder / PARAMS, params)
        write_json(folder / "config.json", hf)


def _checkpointer() -> ocp.Checkpointer:
    items = {"arrays": ocp.StandardCheckpointHandler(), "containers": ocp.JsonCheckpointHandler()}
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**items))


def _arrays(container: Any) -> dict[str, Any]:
    return {name: getattr(container, name) for name in container_fields(container)}


def _static(container: Any) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(container)}
    values = {name: getattr(container, name) for name in fields - {*container_fields(container)}}
    values["source"] = dataclasses.asdict(container.source)
    return {"kind": type(container).__name__, **values}


def _container(meta: Mapping[str, Any], array: Any) -> Any:
    """A container of `_static`'s description; array: field name -> its array."""
    values = dict(meta)
    kind = KINDS[values.pop("kind")]
    source = values.pop("source")
    values["source"] = Source(
        roles=tuple(source["roles"]),
        in_shape=tuple(source["in_shape"]),
        out_shape=tuple(source["out_shape"]),
        dtype=source["dtype"],
    )
    names = [f.name for f in dataclasses.fields(kind) if f.name not in values]
    return kind(**values, **{name: array(name) for name in names})


def _refilled(container: Any, arrays: Mapping[str, Any]) -> Any:
    return dataclasses.replace(container, **arrays)
