"""load_model: a Hugging Face checkpoint -> a model with float or quantised parameters."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from qserve_jax.checkpoint.check import check_tensors
from qserve_jax.checkpoint.hf import read_config, tensor_specs, weight_files
from qserve_jax.checkpoint.key_table import ignored, targets
from qserve_jax.checkpoint.resolve import resolve
from qserve_jax.checkpoint.stream import check_tied_head, read_params
from qserve_jax.checkpoint.tokenizer import load_tokenizer
from qserve_jax.models.config import ModelConfig
from qserve_jax.models.llama import CausalLM, param_shapes
from qserve_jax.pallas_kernels.backend import resolve as resolve_backend
from qserve_jax.quantization.config import QuantConfig
from qserve_jax.quantization.params import quantize_params

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """What `load_model` returns. `model.apply({"params": params}, tokens)` gives logits.

    params: the canonical tree (docs/architecture.md) of arrays and quantised containers.
    tokenizer: of transformers; None where the directory has none.
    path: the local directory.
    """

    model: CausalLM
    params: dict[str, Any]
    config: ModelConfig
    tokenizer: Any
    quant_config: QuantConfig
    path: Path


def load_model(
    path_or_id: str | os.PathLike[str],
    *,
    precision: str = "w4a8kv4",
    group_size: int = 128,
    dtype: Any = jnp.bfloat16,
    strict: bool = False,
    progress: bool = False,
    backend: str | None = None,
) -> LoadedModel:
    """Load a Hugging Face checkpoint and quantise its matmul weights on the way (round to nearest).

    path_or_id: a directory with config.json and safetensors, or a hub id "org/name".
    precision, group_size: as in `QuantConfig.preset`; w16a16kv16 leaves all in float.
    dtype: of float leaves and of computation: float32, bfloat16 or float16, as a name or a dtype.
    strict: raise, instead of one warning naming them, where leaves cannot be quantised as asked
      (as `quantize_params` does; before any weight is read).
    progress: show a bar on stderr. backend: of the model's kernels, None takes the first that can.

    Codes and scales are those of `quantize_params` on the weights as they are in the files; they do
    not depend on `dtype`. Host memory beside the result stays within tens of MB.

    Raises ValueError for a bad argument, CheckpointError (a ValueError) for files that are missing,
    corrupt or do not fit the config, and for a config that the models do not support.
    """
    quant_config = _quant_config(precision, group_size)
    dtype = float_dtype(dtype)
    resolve_backend(backend)  # an unknown name fails here, not after minutes of loading
    folder = resolve(path_or_id)
    config = read_config(folder)
    specs, wanted = tensor_specs(weight_files(folder)), targets(config)
    check_tensors(folder, specs, wanted, ignored(config))
    shapes = quantized_shapes(config, quant_config, dtype, strict)
    tokenizer = load_tokenizer(folder)
    if config.tie_embeddings:
        check_tied_head(specs)
    leaves = read_params(specs, wanted, flatten_dict(shapes, sep="/"), progress=progress)
    params = unflatten_dict(leaves, sep="/")
    model = CausalLM(config, act_bits=quant_config.act_bits, backend=backend)
    return LoadedModel(model, params, config, tokenizer, quant_config, folder)


def _quant_config(precision: Any, group_size: Any) -> QuantConfig:
    if not isinstance(precision, str):
        raise ValueError(f"precision={precision!r:.60} is not a string: use a name like 'w4a8kv4'")
    if not isinstance(group_size, int) or isinstance(group_size, bool):
        raise ValueError(f"group_size={group_size!r:.60} is not an integer: use 128 or -1")
    return QuantConfig.preset(precision, group_size=group_size)


def float_dtype(dtype: Any) -> jnp.dtype:
    """`dtype`, a name or a dtype, as one of DTYPES. Raises ValueError for any other."""
    try:
        parsed = jnp.dtype(dtype)
    except TypeError:
        parsed = None
    if parsed is None or parsed.name not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported: use one of {', '.join(DTYPES)}")
    return parsed


def quantized_shapes(
    config: ModelConfig, quant_config: QuantConfig, dtype: Any, strict: bool
) -> dict[str, Any]:
    """The quantised tree with a ShapeDtypeStruct for each array. Warns or raises for leaves that
    cannot be quantised as asked."""
    floats = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        param_shapes(config),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return jax.eval_shape(lambda p: quantize_params(p, quant_config, strict=strict), floats)
