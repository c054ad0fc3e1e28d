"""Where float weights come from, one layer at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from qserve_jax.checkpoint.atomic import COMPANIONS
from qserve_jax.checkpoint.check import check_tensors
from qserve_jax.checkpoint.errors import CheckpointError
from qserve_jax.checkpoint.formats import find_format
from qserve_jax.checkpoint.hf import TensorSpec, read_config, tensor_specs, weight_files
from qserve_jax.checkpoint.key_table import Target, ignored, targets
from qserve_jax.checkpoint.resolve import resolve
from qserve_jax.checkpoint.stream import check_tied_head, read_params
from qserve_jax.models.config import ModelConfig
from qserve_jax.models.llama import param_shapes


class Source(Protocol):
    """A float model. folder: of its tokenizer, None for none. fingerprint: of all its files."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def folder(self) -> Path | None: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def nbytes(self) -> int: ...

    def layer(self, index: int) -> dict[str, Any]:
        """{"layers": ...}: the canonical tree of one layer, float32[1, ...]."""
        ...

    def top(self, name: str) -> dict[str, Any]:
        """One of embed, final_norm and lm_head, in the config's dtype."""
        ...


@dataclasses.dataclass(frozen=True)
class CheckpointSource:
    """A Hugging Face directory of float safetensors; see `open_source` and `Source`."""

    folder: Path
    config: ModelConfig
    specs: Mapping[str, TensorSpec]

    @property
    def nbytes(self) -> int:
        """Of the files with the weights."""
        return sum(file.stat().st_size for file in {spec.file for spec in self.specs.values()})

    @property
    def fingerprint(self) -> str:
        """Of the names, sizes and times of the weights' files, and the content of the others."""
        digest = hashlib.sha256()
        for file in sorted({spec.file for spec in self.specs.values()}):
            stat = file.stat()
            digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        for name in ("config.json", *COMPANIONS):
            if (self.folder / name).is_file():
                digest.update(name.encode() + (self.folder / name).read_bytes())
        return digest.hexdigest()

    def layer(self, index: int) -> dict[str, Any]:
        """See `Source`. Raises CheckpointError for weights that are not finite."""
        shapes = {"layers": param_shapes(one_layer(self.config))["layers"]}
        return self._read(layer_targets(self.config, index), shapes, jnp.float32)

    def top(self, name: str) -> dict[str, Any]:
        """See `Source`."""
        shapes = {name: param_shapes(self.config)[name]}
        return self._read(top_targets(self.config, name), shapes, self.config.dtype)[name]

    def _read(self, chosen: Mapping[str, Target], shapes: Any, dtype: Any) -> dict[str, Any]:
        structs = {
            path: jax.ShapeDtypeStruct(shape, dtype)
            for path, shape in flatten_dict(shapes, sep="/").items()
        }
        return unflatten_dict(read_params(self.specs, chosen, structs), sep="/")


def open_source(path_or_id: str | os.PathLike[str]) -> CheckpointSource:
    """The float checkpoint of a directory or hub id, checked from its headers.

    Raises CheckpointError as `load_model` does, and for a checkpoint that is quantised already.
    """
    folder = resolve(path_or_id)
    stored = find_format(folder)
    if stored is not None:
        raise CheckpointError(
            f"{folder} is quantised already ({stored.name}): name the float checkpoint, or use "
            "convert for another format"
        )
    config = read_config(folder)
    specs = tensor_specs(weight_files(folder))
    check_tensors(folder, specs, targets(config), ignored(config))
    if config.tie_embeddings:
        check_tied_head(specs)
    return CheckpointSource(folder, config, specs)


def one_layer(config: ModelConfig) -> ModelConfig:
    """The config of a model that has one layer only."""
    return dataclasses.replace(config, num_layers=1)


def layer_targets(config: ModelConfig, index: int) -> dict[str, Target]:
    """Hugging Face name -> where it is in a tree of that layer alone."""
    return {
        name: dataclasses.replace(target, layer=0)
        for name, target in targets(config).items()
        if target.layer == index
    }


def top_targets(config: ModelConfig, module: str) -> dict[str, Target]:
    """The same for embed, final_norm or lm_head."""
    found = targets(config).items()
    return {name: target for name, target in found if target.path.startswith(f"{module}/")}
