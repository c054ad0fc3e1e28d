"""load_model: a checkpoint, float or quantised -> a model with float or quantised parameters."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from qserve_jax.checkpoint.check import check_tensors
from qserve_jax.checkpoint.errors import CheckpointError
from qserve_jax.checkpoint.export import float_dtype
from qserve_jax.checkpoint.formats import FLOAT, ORBAX, StoredFormat, find_format
from qserve_jax.checkpoint.hf import read_config, tensor_specs, weight_files
from qserve_jax.checkpoint.key_table import ignored, targets
from qserve_jax.checkpoint.native import PARAMS
from qserve_jax.checkpoint.onto_mesh import orbax_onto_mesh, read_onto_mesh
from qserve_jax.checkpoint.packed import packed_targets, scheme_rules
from qserve_jax.checkpoint.resolve import resolve
from qserve_jax.checkpoint.stream import check_tied_head, read_params
from qserve_jax.checkpoint.tokenizer import load_tokenizer
from qserve_jax.models.config import ModelConfig
from qserve_jax.models.llama import CausalLM, param_shapes
from qserve_jax.models.sharding import check_ranks, checked_mesh, even_config
from qserve_jax.pallas_kernels.backend import resolve as resolve_backend
from qserve_jax.quantization.config import QuantConfig
from qserve_jax.quantization.params import quantize_params
from qserve_jax.quantization.rules import Rule


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """What `load_model` returns. `model.apply({"params": params}, tokens)` gives logits.

    params: the canonical tree (docs/architecture.md) of arrays and quantised containers.
    tokenizer: of transformers; None where the directory has none.
    path: the local directory.
    format: what it holds: float, native, orbax, qserve, gptq or awq.
    """

    model: CausalLM
    params: dict[str, Any]
    config: ModelConfig
    tokenizer: Any
    quant_config: QuantConfig
    path: Path
    format: str = FLOAT


def load_model(
    path_or_id: str | os.PathLike[str],
    *,
    precision: str | None = None,
    group_size: int | None = None,
    dtype: Any = jnp.bfloat16,
    strict: bool = False,
    progress: bool = False,
    backend: str | None = None,
    scale_dtype: str = "float32",
    s2_order: str | None = None,
    mesh: Mesh | None = None,
) -> LoadedModel:
    """Load a checkpoint; matmul weights of a float one are quantised on the way (to nearest).

    path_or_id: a directory with config.json and weights, or a hub id "org/name". Weights are float
      safetensors, or quantised: native (`save_native`, `save_native_orbax`), published QServe, or
      GPTQ and AWQ as far as they can be had exactly (int4_format.py).
    precision, group_size: as in `QuantConfig.preset`, by default w4a8kv4 with groups of 128, and
      what a quantised checkpoint holds; w16a16kv16 leaves all in float. Bits of activations and
      cache may be chosen for a quantised checkpoint too, those of weights and groups must agree.
    dtype: of float leaves and of computation: float32, bfloat16 or float16, as a name or a dtype;
      "auto" for the one that config.json names.
    strict: raise, instead of one warning naming them, where leaves cannot be quantised as asked
      (as `quantize_params` does; before any weight is read).
    progress: show a bar on stderr. backend: of the model's kernels, None takes the first that can.
    scale_dtype: as in `QuantConfig`, for weights that are quantised here.
    s2_order: of a published QServe checkpoint with groups, where it cannot be told.
    mesh: of the devices that share the model, with one axis (models/sharding.py); None for one
      device. Each device reads its part of the files, and a process for its own devices only;
      inputs of o and down are read whole where they are quantised here, for their scales, and
      kernels of QServe, GPTQ and AWQ. KV heads, F and vocabulary are made to divide.

    Codes and scales are those of `quantize_params` on the weights as they are in the files; they do
    not depend on `dtype`. Host memory beside the result: tens of MB, or for quantised files the
    largest tensor.

    Raises ValueError for a bad argument or heads that the devices cannot share, CheckpointError (a
    ValueError) for files that are missing, corrupt or do not fit the config, and for a config that
    the models do not support.
    """
    asked = _quant_config(precision, group_size, scale_dtype)
    dtype = dtype if isinstance(dtype, str) and dtype == "auto" else float_dtype(dtype)
    resolve_backend(backend)  # an unknown name fails here, not after minutes of loading
    folder = resolve(path_or_id)
    stored = find_format(folder, s2_order)
    config = read_config(folder, is_quantized=stored is not None)
    dtype = float_dtype(config.dtype if dtype == "auto" else dtype)
    mesh = checked_mesh(mesh)
    shapes_of = functools.partial(quantized_shapes, dtype=dtype)
    if stored is None:
        quant_config, packings = asked, {}
        specs, wanted = tensor_specs(weight_files(folder)), targets(config)
        check_tensors(folder, specs, wanted, ignored(config))
        shapes_of = functools.partial(shapes_of, quant_config=quant_config, strict=strict)
    else:
        config = dataclasses.replace(config, centered_keys=stored.centered_keys)
        quant_config = _agreed(folder, stored, asked, precision, group_size)
        rules, specs = scheme_rules(stored.schemes), stored.specs
        shapes_of = functools.partial(
            shapes_of, quant_config=quant_config, strict=True, rules=rules
        )
        packings = stored.pack(config, flatten_dict(shapes_of(config), sep="/"))
        if stored.name != ORBAX:
            check_tensors(folder, specs, packed_targets(config, packings), _ignored(config, stored))
    if mesh is not None:
        group_size = quant_config.group_size if quant_config.weight_bits == 4 else -1
        check_ranks(config, mesh.size, group_size)
    tokenizer = load_tokenizer(folder)
    if config.tie_embeddings and specs:
        check_tied_head(specs)
    even = config if mesh is None else even_config(config, mesh.size)
    shapes = shapes_of(even)
    options = {"packings": packings, "scale_dtype": scale_dtype, "progress": progress}
    if stored is not None and stored.name == ORBAX and mesh is not None:
        params = orbax_onto_mesh(folder / PARAMS, shapes_of(config), shapes, mesh)
    elif stored is not None and stored.name == ORBAX:
        from qserve_jax.checkpoint.orbax_io import load_orbax  # takes a second to import

        params = load_orbax(folder / PARAMS, shapes)
    elif mesh is not None:
        params = read_onto_mesh(specs, config, shapes, mesh, **options)
    else:
        flat = flatten_dict(shapes, sep="/")
        params = unflatten_dict(read_params(specs, targets(config), flat, **options), sep="/")
    config = dataclasses.replace(even, vocab_size=config.vocab_size)
    model = CausalLM(config, act_bits=quant_config.act_bits, backend=backend, mesh=mesh)
    name = FLOAT if stored is None else stored.name
    return LoadedModel(model, params, config, tokenizer, quant_config, folder, name)


def _ignored(config: ModelConfig, stored: StoredFormat) -> re.Pattern[str]:
    common = ignored(config)
    if stored.ignored is None:
        return common
    return re.compile(f"{common.pattern}|{stored.ignored.pattern}")


def _agreed(
    folder: Path,
    stored: StoredFormat,
    asked: QuantConfig,
    precision: str | None,
    group_size: int | None,
) -> QuantConfig:
    """The config of a quantised checkpoint, activations and cache in the bits that are asked for.

    Raises CheckpointError where other weights are asked for.
    """
    held = stored.quant_config
    if precision is not None and asked.weight_bits != held.weight_bits:
        raise CheckpointError(
            f"{folder} holds weights of {held.weight_bits} bits ({held.precision}), not of "
            f"precision={precision}: leave precision out, or use the float checkpoint"
        )
    if group_size is not None and held.weight_bits == 4 and group_size != held.group_size:
        raise CheckpointError(
            f"{folder} holds weights quantised with group_size={held.group_size}, not "
            f"{group_size}: leave group_size out, or use the float checkpoint"
        )
    if precision is None:
        return held
    return dataclasses.replace(held, act_bits=asked.act_bits, kv_bits=asked.kv_bits)


def _quant_config(precision: Any, group_size: Any, scale_dtype: str) -> QuantConfig:
    precision = "w4a8kv4" if precision is None else precision
    group_size = 128 if group_size is None else group_size
    if not isinstance(precision, str):
        raise ValueError(f"precision={precision!r:.60} is not a string: use a name like 'w4a8kv4'")
    if not isinstance(group_size, int) or isinstance(group_size, bool):
        raise ValueError(f"group_size={group_size!r:.60} is not an integer: use 128 or -1")
    config = QuantConfig.preset(precision, group_size=group_size)
    return dataclasses.replace(config, scale_dtype=scale_dtype)


def quantized_shapes(
    config: ModelConfig,
    quant_config: QuantConfig,
    dtype: Any,
    strict: bool,
    rules: Sequence[Rule] | None = None,
) -> dict[str, Any]:
    """The quantised tree with a ShapeDtypeStruct for each array. Warns or raises for leaves that
    cannot be quantised as asked."""
    floats = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        param_shapes(config),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    quantize = functools.partial(quantize_params, config=quant_config, strict=strict, rules=rules)
    return jax.eval_shape(quantize, floats)
