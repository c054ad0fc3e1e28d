"""Tensors from files to the device, a block of rows at a time, quantised on the way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
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
from qserve_jax.models.sharding import Part
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

PartOf = Callable[[Target], Part | None]
"""What of a tensor is wanted: the part of one rank; None for the whole."""


def read_params(
    specs: Mapping[str, TensorSpec],
    targets: Mapping[str, Target],
    shapes: Mapping[str, Any],
    *,
    packings: Mapping[str, Packing] | None = None,
    part_of: PartOf = lambda target: None,
    scale_dtype: str = "float32",
    progress: bool = False,
) -> dict[str, Any]:
    """The leaves of the canonical tree, on the default device, by path.

    specs: by name in the files. targets: by the Hugging Face name of a float checkpoint. Both
      checked to fit together (check.py).
    packings: of leaves that are quantised in the files, by path. scale_dtype: as in QuantConfig,
      of those that are quantised here.
    shapes: path -> ShapeDtypeStruct, or container of them, of every leaf of the result. What no
      part fills is zero.
    part_of: what to read of each tensor. Only that is read, with two exceptions: a part of the
      inputs of a kernel that is quantised here, whose scales need all of them, and of a packing
      that stores no container's arrays as they are.
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
            options = targets[name], packings[path], part_of(targets[name])
            leaves[path] = _read_packed(leaves[path], name, specs, *options)
        else:
            options = targets[name], part_of(targets[name]), scale_dtype
            leaves[path] = _read_tensor(leaves[path], name, specs[name], *options)
    return leaves


def _read_packed(
    leaf: Any,
    name: str,
    specs: Mapping[str, TensorSpec],
    target: Target,
    packing: Packing,
    part: Part | None,
) -> Any:
    if part is not None and part.start == part.stop:
        return leaf
    keys = [field_name(name, field.name) for field in packing.fields]
    where = f"{name.removesuffix('.weight')} in {specs[keys[0]].file}"
    k = target.shape[-1]
    own = part if packing.as_stored else None
    arrays = [read_part(specs[key], _field_part(specs[key].shape, k, own)) for key in keys]
    try:
        parts = list(packing.decode(*arrays))
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
    if part is not None and not packing.as_stored:
        parts = [take_part(x, _field_part(x.shape, k, part)) for x in parts]
    leaf, valid = _write_packed(leaf, parts, target.layer)
    if not valid:  # waiting here also keeps layers from queueing up in memory
        raise CheckpointError(f"{where}: {explain_invalid(_container_like(leaf, parts))}")
    return leaf


def _field_part(shape: tuple[int, ...], k: int, part: Part | None) -> Part | None:
    """The part of a container's array: [N], or [N, ...] with the K inputs' bytes or groups."""
    if part is None or part.axis == 0:
        return part
    if len(shape) == 1:  # of channels, which have all inputs
        return None
    return Part(1, part.start * shape[1] // k, part.stop * shape[1] // k)


def read_part(spec: TensorSpec, part: Part | None) -> np.ndarray:
    """The part of a tensor, a mapping as of `read_rows`."""
    rows = part if part is not None and part.axis == 0 else Part(0, 0, spec.shape[0])
    found = read_rows(spec, rows.start, rows.stop)
    return found if part is rows else take_part(found, part)


def take_part(array: Any, part: Part | None) -> Any:
    """The part of an array."""
    if part is None:
        return array
    return array[:, part.start : part.stop] if part.axis else array[part.start : part.stop]


@functools.partial(jax.jit, donate_argnames="leaf")
def _write_packed(leaf: Any, parts: list[Array], layer: int) -> tuple[Any, Array]:
    """The arrays of one layer's container into `leaf` in place, and whether they are valid."""
    whole = zip(jax.tree.leaves(leaf), parts, strict=True)
    written = [_put(array, part, layer=layer, start=0, axis=0) for array, part in whole]
    valid = is_valid(_container_like(leaf, parts))
    return jax.tree.structure(leaf).unflatten(written), valid


def _container_like(leaf: Any, parts: list[Array]) -> Any:
    return jax.tree.structure(leaf).unflatten(parts)


def _read_tensor(
    leaf: Any, name: str, spec: TensorSpec, target: Target, part: Part | None, scale_dtype: str
) -> Any:
    if part is not None and part.start == part.stop:
        return leaf
    by_rows = part if part is not None and part.axis == 0 else Part(0, 0, spec.shape[0])
    inputs = None if by_rows is part else part
    static = {"is_kernel": target.is_kernel, "scale_dtype": scale_dtype, "inputs": inputs}
    for start, stop in row_blocks((by_rows.stop - by_rows.start, *spec.shape[1:])):
        rows = read_rows(spec, by_rows.start + start, by_rows.start + stop)
        if not is_quantized(leaf):
            rows = take_part(rows, inputs)
        leaf, finite = _write(leaf, rows, target.layer, start, **static)
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


@functools.partial(
    jax.jit, static_argnames=("is_kernel", "scale_dtype", "inputs"), donate_argnames="leaf"
)
def _write(
    leaf: Any,
    rows: Array,
    layer: int | None,
    start: int,
    *,
    is_kernel: bool,
    scale_dtype: str,
    inputs: Part | None,
) -> tuple[Any, Array]:
    """Rows of a Hugging Face tensor into `leaf` in place, and whether all of them are finite.

    inputs: those that a quantised leaf holds, None for all.
    """
    finite = jnp.isfinite(rows).all()
    put = functools.partial(_put, layer=layer, start=start)
    if is_quantized(leaf):
        part = quantize_kernel(rows, _config_of(leaf, scale_dtype), contract=(-1,), out=(-2,))
        # Only the arrays: the whole and a part of it tell of different sources.
        k = rows.shape[1]
        own = [take_part(x, _field_part(x.shape, k, inputs)) for x in jax.tree.leaves(part)]
        arrays = zip(jax.tree.leaves(leaf), own, strict=True)
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
