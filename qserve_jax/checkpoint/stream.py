"""Tensors from files to the device, a block of rows at a time, quantised on the way."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from qserve_jax.checkpoint.errors import CheckpointError
from qserve_jax.checkpoint.hf import TensorSpec, read_rows
from qserve_jax.checkpoint.key_table import Target
from qserve_jax.checkpoint.packed import Packing, explain_invalid, field_name, is_valid
from qserve_jax.quantization.config import QuantConfig
from qserve_jax.quantization.params import quantize_kernel
from qserve_jax.quantization.qtensor import (
    Array,
    QuantizedWeight,
    W4PerGroup,
    W8PerChannel,
    is_quantized,
)

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
BLOCK_ELEMENTS = 2**21
"""Weights read at once. Output channels are quantised independently, so a tensor can be cut along
them; that bounds the temporary float32 arrays of quantisation too (8 MB each)."""


def read_params(
    specs: Mapping[str, TensorSpec],
    targets: Mapping[str, Target],
    shapes: Mapping[str, Any],
    *,
    packings: Mapping[str, Packing] | None = None,
    scale_dtype: str = "float32",
    progress: bool = False,
) -> dict[str, Any]:
    """The leaves of the canonical tree, on the default device, by path.

    specs: by name in the files. targets: by the Hugging Face name of a float checkpoint. Both
      checked to fit together (check.py).
    packings: of leaves that are quantised in the files, by path. scale_dtype: as in QuantConfig,
      of those that are quantised here.
    shapes: path -> ShapeDtypeStruct, or container of them, of every leaf of the result.
    progress: show a bar on stderr.

    Host memory beside the result: one block. Weights are quantised from the values in the file,
    whatever dtype the float leaves get. Raises CheckpointError naming a tensor with NaN or
    infinite values, with values beyond the range of its leaf's dtype, or with codes that its
    container cannot hold.
    """
    packings = packings or {}
    # One program for all: compiling one for each shape would take longer than running them.
    leaves = jax.jit(lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), dict(shapes)))()

    def first_tensor(name: str) -> tuple[Path, str]:
        packing = packings.get(targets[name].path)
        name = name if packing is None else field_name(name, packing.fields[0].name)
        return specs[name].file, name

    names = sorted(targets, key=first_tensor)
    for name in tqdm(names, desc="Loading weights", unit="tensor", disable=not progress):
        path = targets[name].path
        if path in packings:
            leaves[path] = _read_packed(leaves[path], name, specs, targets[name], packings[path])
        else:
            leaf, target = leaves[path], targets[name]
            leaves[path] = _read_tensor(leaf, name, specs[name], target, scale_dtype)
    return leaves


def _read_packed(
    leaf: Any, name: str, specs: Mapping[str, TensorSpec], target: Target, packing: Packing
) -> Any:
    keys = [field_name(name, field.name) for field in packing.fields]
    arrays = [read_rows(specs[key], 0, specs[key].shape[0]) for key in keys]
    where = f"{name.removesuffix('.weight')} in {specs[keys[0]].file}"
    try:
        parts = list(packing.decode(*arrays))
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
    leaf, valid = _write_packed(leaf, parts, target.layer)
    if not valid:  # waiting here also keeps layers from queueing up in memory
        raise CheckpointError(f"{where}: {explain_invalid(_container_like(leaf, parts))}")
    return leaf


@functools.partial(jax.jit, donate_argnames="leaf")
def _write_packed(leaf: Any, parts: list[Array], layer: int) -> tuple[Any, Array]:
    """The arrays of one layer's container into `leaf` in place, and whether they are valid."""
    whole = zip(jax.tree.leaves(leaf), parts, strict=True)
    written = [_put(array, part, layer=layer, start=0, axis=0) for array, part in whole]
    valid = is_valid(_container_like(leaf, parts))
    return jax.tree.structure(leaf).unflatten(written), valid


def _container_like(leaf: Any, parts: list[Array]) -> Any:
    return jax.tree.structure(leaf).unflatten(parts)


def _read_tensor(leaf: Any, name: str, spec: TensorSpec, target: Target, scale_dtype: str) -> Any:
    for start, stop in row_blocks(spec.shape):
        rows = read_rows(spec, start, stop)
        is_kernel = target.is_kernel
        leaf, finite = _write(
            leaf, rows, target.layer, start, is_kernel=is_kernel, scale_dtype=scale_dtype
        )
        # Waiting here also keeps blocks from queueing up in memory.
        if not finite:
            raise _not_finite(name, spec, rows, leaf)
    return leaf


def check_tied_head(specs: Mapping[str, TensorSpec]) -> None:
    """For models with tied embeddings: an lm_head.weight in the files must repeat the embedding.

    Raises CheckpointError where it does not: config.json is then wrong, and transformers (5.23,
    `PreTrainedModel.tie_weights`) would use that head.
    """
    head, embedding = specs.get(HEAD), specs[EMBEDDING]
    if head is None or _is_equal(head, embedding):
        return
    raise CheckpointError(
        f"{HEAD} in {head.file} differs from {EMBEDDING}, but config.json ties them: set "
        "tie_word_embeddings to false to use it, or remove it"
    )


def _is_equal(head: TensorSpec, embedding: TensorSpec) -> bool:
    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        return False
    blocks = row_blocks(head.shape)
    return all(
        read_rows(head, *block).tobytes() == read_rows(embedding, *block).tobytes()
        for block in blocks
    )


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks that cover the first axis, of at most BLOCK_ELEMENTS or one row.

    All have one size, so that each tensor shape compiles once: the last may overlap the one before.
    """
    n, *rest = shape
    most = max(1, BLOCK_ELEMENTS // int(np.prod(rest)))
    count = -(-n // most)
    size = -(-n // count)
    for i in range(count):
        start = min(i * size, n - size)
        yield start, start + size


@functools.partial(jax.jit, static_argnames=("is_kernel", "scale_dtype"), donate_argnames="leaf")
def _write(
    leaf: Any, rows: Array, layer: int | None, start: int, *, is_kernel: bool, scale_dtype: str
) -> tuple[Any, Array]:
    """Rows of a Hugging Face tensor into `leaf` in place, and whether all of them are finite."""
    finite = jnp.isfinite(rows).all()
    put = functools.partial(_put, layer=layer, start=start)
    if is_quantized(leaf):
        part = quantize_kernel(rows, _config_of(leaf, scale_dtype), contract=(-1,), out=(-2,))
        # Only the arrays: the whole and a part of it tell of different sources.
        arrays = zip(jax.tree.leaves(leaf), jax.tree.leaves(part), strict=True)
        return jax.tree.structure(leaf).unflatten(put(a, b, axis=0) for a, b in arrays), finite
    part = rows.astype(leaf.dtype)
    finite &= jnp.isfinite(part).all()
    return (put(leaf, part.T, axis=1) if is_kernel else put(leaf, part, axis=0)), finite


def _put(whole: Array, part: Array, *, layer: int | None, start: int, axis: int) -> Array:
    """whole[layer] with `part` at `start` of its `axis`."""
    index: list[Any] = [0] * part.ndim
    index[axis] = start
    if layer is not None:
        part, index = part[None], [layer, *index]
    return jax.lax.dynamic_update_slice(whole, part, index)


def _config_of(container: QuantizedWeight, scale_dtype: str) -> QuantConfig:
    """The config that makes such a container of a kernel."""
    if isinstance(container, W8PerChannel):
        return QuantConfig(weight_bits=8)
    group_size = container.group_size if isinstance(container, W4PerGroup) else -1
    return QuantConfig(group_size=group_size, scale_dtype=scale_dtype)


def _not_finite(name: str, spec: TensorSpec, rows: np.ndarray, leaf: Any) -> CheckpointError:
    where = f"{name} in {spec.file}"
    if np.isfinite(rows.astype(np.float32)).all():
        return CheckpointError(f"{where} exceeds the range of {leaf.dtype}: load it as float32")
    return CheckpointError(f"{where} holds NaN or infinite values: use an intact checkpoint")
