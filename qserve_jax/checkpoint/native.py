"""The project's own checkpoints: a Hugging Face directory whose projections are quantised.

config.json is that of the float model plus `quantization_config`:

    {"quant_method": "qserve_jax", "version": 1, "weight_bits": 4, "group_size": 128,
     "act_bits": 8, "kv_bits": 4, "centered_keys": false, "storage": "safetensors" | "orbax",
     "projections": {"q_proj": {"weight_bits": 4, "group_size": 128}, ...}}

Safetensors hold the float tensors under Hugging Face's names and, for each quantised projection of
each layer, the arrays of its container (quantization/qtensor.py) under the names of its fields, as
in `model.layers.0.mlp.up_proj.codes`. Orbax holds the canonical tree (orbax_io.py).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from qserve_jax.checkpoint.atomic import atomic_folder, copy_companions, write_json, write_shards
from qserve_jax.checkpoint.errors import CheckpointError, listing
from qserve_jax.checkpoint.export import config_to_hf
from qserve_jax.checkpoint.key_table import Target, targets
from qserve_jax.checkpoint.packed import PROJECTIONS, Field, Packing, field_name
from qserve_jax.models.config import ModelConfig, brief
from qserve_jax.models.llama import param_shapes
from qserve_jax.quantization.config import QuantConfig
from qserve_jax.quantization.qtensor import (
    W4PerChannel,
    W4PerGroup,
    W8PerChannel,
    is_quantized,
)

METHOD, VERSION = "qserve_jax", 1
ST_DTYPES = {"uint8": "U8", "int8": "I8", "float32": "F32"}
PARAMS = "params"
"""The folder of a checkpoint that Orbax writes."""
BITS = ("weight_bits", "group_size", "act_bits", "kv_bits")


def save_native(
    path: str | os.PathLike[str],
    params: Mapping[str, Any],
    config: ModelConfig,
    quant_config: QuantConfig,
    *,
    source: Path | None = None,
    progress: bool = False,
) -> None:
    """Write a quantised model to the new directory `path`, which `load_model` reads.

    params: the canonical tree with quantised kernels. Float leaves keep their dtype.
    quant_config: its act_bits and kv_bits are what `load_model` takes by default.
    source: a directory whose tokenizer and generation_config.json are copied, None for none.

    Atomic (atomic.py). Host memory: a shard, 4 GB. Raises CheckpointError where `path` exists, and
    ValueError for a tree that does not fit `config` or is packed for a backend.
    """
    leaves = checked_leaves(params, config)
    hf = native_config(leaves, config, quant_config, "safetensors")
    with atomic_folder(path) as folder:
        copy_companions(source, folder)
        found = native_tensors(leaves, by_layer(config))
        write_shards(folder, tqdm(found, "Writing weights", unit="tensor", disable=not progress))
        write_json(folder / "config.json", hf)


def native_config(
    leaves: Mapping[str, Any], config: ModelConfig, quant_config: QuantConfig, storage: str
) -> dict[str, Any]:
    """The config.json of a native checkpoint. leaves: as of `checked_leaves`."""
    dtype = np.dtype(leaves["embed/embedding"].dtype).name
    return config_to_hf(dataclasses.replace(config, dtype=dtype, centered_keys=False)) | {
        "quantization_config": {
            "quant_method": METHOD,
            "version": VERSION,
            **{key: getattr(quant_config, key) for key in BITS},
            "centered_keys": config.centered_keys,
            "storage": storage,
            "projections": {name: _scheme(leaves[f"layers/{name}/kernel"]) for name in PROJECTIONS},
        }
    }


def _scheme(kernel: Any) -> dict[str, int]:
    if isinstance(kernel, W4PerGroup):
        return {"weight_bits": 4, "group_size": kernel.group_size}
    bits = {W4PerChannel: 4, W8PerChannel: 8}.get(type(kernel), 16)
    return {"weight_bits": bits, "group_size": -1}


def checked_leaves(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """path -> leaf, once every leaf of the config is there, whole, with its shape, and no other.

    Raises ValueError, naming those that are not, also for kernels packed for a backend.
    """
    leaves: dict[str, Any] = flatten_dict(dict(params), sep="/")
    wanted = flatten_dict(param_shapes(config), sep="/")
    found = {path: _float_shape(leaf) for path, leaf in leaves.items()}
    wrong = [
        f"{path} is {found.get(path, 'missing')} instead of {wanted.get(path, 'absent')}"
        for path in sorted({*found, *wanted})
        if found.get(path) != wanted.get(path)
    ]
    if wrong:
        raise ValueError(
            f"params do not fit config: {listing(wrong)}; use the config they have, and the tree "
            "before prepare_for_backend"
        )
    return leaves


def _float_shape(leaf: Any) -> Any:
    """The shape of a leaf; of a container that of the kernel it stands for, [L, K, N]."""
    if not is_quantized(leaf):
        return tuple(leaf.shape)
    if getattr(leaf, "layout", "canonical") != "canonical":
        return f"packed for a backend ({leaf.layout})"
    *lead, n, packed = leaf.codes.shape
    return (*lead, packed * (1 if isinstance(leaf, W8PerChannel) else 2), n)


def by_layer(config: ModelConfig) -> Iterator[tuple[str, Target]]:
    """The Hugging Face tensors of a model, those without a layer first, then layer by layer."""
    found = targets(config).items()
    return iter(sorted(found, key=lambda x: -1 if x[1].layer is None else x[1].layer))


def container_fields(container: Any) -> list[str]:
    """Names of a container's arrays, in the order of its pytree leaves."""
    names = (field.name for field in dataclasses.fields(container))
    return [name for name in names if hasattr(getattr(container, name), "shape")]


def native_tensors(
    leaves: Mapping[str, Any], named: Iterable[tuple[str, Target]]
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array on the host) of every tensor in the file, one after the other.

    named: Hugging Face names and where in `leaves` (by path) they are."""
    for name, target in named:
        leaf = leaves[target.path]
        if not is_quantized(leaf):
            yield name, float_tensor(leaf, target)
            continue
        for field in container_fields(leaf):
            yield field_name(name, field), np.asarray(getattr(leaf, field)[target.layer])


def float_tensor(leaf: Any, target: Target) -> np.ndarray:
    """One Hugging Face tensor on the host: this layer's slice, kernels from [K, N] to [N, K]."""
    tensor = np.asarray(leaf if target.layer is None else leaf[target.layer])
    return tensor.T if target.is_kernel else tensor


def read_native_config(hf: Mapping[str, Any]) -> tuple[QuantConfig, dict[str, dict[str, int]], str]:
    """(config, projection -> {weight_bits, group_size}, storage) of a `quantization_config`.

    Raises CheckpointError for what this version does not know.
    """
    stored = hf["quantization_config"]
    cure = "use a checkpoint that this version of qserve_jax has written"
    if stored.get("version") != VERSION:
        shown = brief(stored.get("version"))
        raise CheckpointError(f"quantization_config version {shown} is not {VERSION}: {cure}")
    try:
        quant_config = QuantConfig(**{key: stored[key] for key in BITS})
        schemes = {name: dict(stored["projections"][name]) for name in PROJECTIONS}
        for scheme in schemes.values():
            QuantConfig(**scheme, act_bits=16)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"quantization_config is malformed ({error!r:.200}): {cure}"
        ) from None
    storage = stored.get("storage", "safetensors")
    if storage not in ("safetensors", "orbax"):
        raise CheckpointError(f"quantization_config storage {brief(storage)} is unknown: {cure}")
    return quant_config, schemes, storage


def read_centered_keys(hf: Mapping[str, Any]) -> bool:
    """Whether keys are centred (transforms/center_keys.py); older files do not say: they are not.

    Raises CheckpointError where it is no boolean.
    """
    centered = hf["quantization_config"].get("centered_keys", False)
    if not isinstance(centered, bool):
        shown = brief(centered)
        raise CheckpointError(f"quantization_config centered_keys {shown} is not true or false")
    return centered


def native_packings(shapes: Mapping[str, Any]) -> dict[str, Packing]:
    """How each quantised projection lies in a file. shapes: path -> leaf of ShapeDtypeStructs."""
    return {
        path: Packing(
            tuple(_field(leaf, name) for name in container_fields(leaf)), _as_they_are, True
        )
        for path, leaf in shapes.items()
        if is_quantized(leaf)
    }


def _field(container: Any, name: str) -> Field:
    array = getattr(container, name)
    return Field(name, array.shape[1:], (ST_DTYPES[array.dtype.name],))


def _as_they_are(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    return arrays
