"""Canonical float tree -> an ordinary Hugging Face directory, the inverse of `load_model`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from qserve_jax.checkpoint.errors import listing
from qserve_jax.checkpoint.hf import SINGLE
from qserve_jax.checkpoint.key_table import Target, targets
from qserve_jax.models.config import ModelConfig, RopeConfig
from qserve_jax.models.llama import param_shapes
from qserve_jax.models.registry import config_from_hf
from qserve_jax.quantization.qtensor import is_quantized

DTYPES = ("float32", "bfloat16", "float16")
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def export_hf(
    path: str | os.PathLike[str],
    params: Mapping[str, Any],
    config: ModelConfig,
    *,
    dtype: Any = "bfloat16",
) -> None:
    """Write config.json, generation_config.json and model.safetensors into the directory `path`.

    params: the canonical float tree (docs/architecture.md), as `CausalLM(config).init` makes it.
    dtype: of the tensors in the file: float32, bfloat16 or float16, as a name or a dtype.

    transformers and `load_model` read the directory; a tokenizer is for the caller to add. All
    tensors go into one file and through host memory together. config.json is written last, so that
    a run that is cut off leaves nothing that loads.

    Raises ValueError for a quantised or misshapen tree, for values that `dtype` cannot hold, and
    for a config that its model_type cannot express.
    """
    dtype = float_dtype(dtype)
    leaves = _checked_leaves(params, config)
    hf = config_to_hf(dataclasses.replace(config, dtype=dtype.name))
    tensors = {name: _tensor(leaves, t, dtype) for name, t in targets(config).items()}
    bad = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
    if bad:
        raise ValueError(
            f"{len(bad)} tensors are not finite in {dtype.name} ({listing(bad)}): "
            "export an intact tree, or a dtype of wider range"
        )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})  # transformers 4 asks for it
    (folder / SINGLE).chmod(0o644)  # safetensors leaves it to its owner alone
    generation = {key: hf[key] for key in ("bos_token_id", "eos_token_id")}
    for name, content in (("generation_config.json", generation), ("config.json", hf)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def float_dtype(dtype: Any) -> jnp.dtype:
    """`dtype`, a name or a dtype, as one of DTYPES. Raises ValueError for any other."""
    try:
        parsed = jnp.dtype(dtype)
    except TypeError:
        parsed = None
    if parsed is None or parsed.name not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported: use one of {', '.join(DTYPES)}")
    return parsed


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a ModelConfig, the inverse of `config_from_hf`.

    Spelled as transformers 4 does (`torch_dtype`, `rope_theta`, `rope_scaling`), which transformers
    5 and others read too. Raises ValueError where the model_type has no way to say a field.
    """
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"model_type {config.model_type!r} is not supported: use one of {known}")
    if config.centered_keys:
        raise ValueError(
            "centered_keys=True has no place in this format: write native safetensors or Orbax, or "
            "use a recipe without key centres"
        )
    eos = config.eos_token_ids
    hf = {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "torch_dtype": config.dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config.rope),
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "use_cache": True,
        **_family_fields(config),
    }
    _check_expressed(config, config_from_hf(hf))
    return hf


def _family_fields(config: ModelConfig) -> dict[str, Any]:
    window = config.sliding_window
    if config.model_type == "llama":
        return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    if config.model_type == "mistral":
        return {"sliding_window": window}
    fields: dict[str, Any] = {"use_sliding_window": window is not None, "sliding_window": window}
    if window is not None:
        fields["max_window_layers"] = 0  # all layers from the first on
    if config.model_type == "qwen3":
        fields["attention_bias"] = config.qkv_bias
    return fields


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    """The fields that a type needs, and those that differ from their default."""
    if rope.rope_type == "default":
        return None
    needed = {"llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    keep = needed.get(rope.rope_type, ("factor",))
    fields = [f for f in dataclasses.fields(rope) if f.name not in ("rope_type", "theta")]
    values = {f.name: getattr(rope, f.name) for f in fields}
    changed = {f.name for f in fields if values[f.name] != f.default}
    scaling = {name: value for name, value in values.items() if name in keep or name in changed}
    return {"rope_type": rope.rope_type, **scaling}


def _check_expressed(config: ModelConfig, read_back: ModelConfig) -> None:
    names = [field.name for field in dataclasses.fields(config)]
    lost = [n for n in names if getattr(config, n) != getattr(read_back, n)]
    if lost:
        shown = ", ".join(f"{n}={getattr(config, n)!r}" for n in lost)
        raise ValueError(
            f"a {config.model_type} config.json cannot say {shown}: it would be read back as "
            f"{', '.join(repr(getattr(read_back, n)) for n in lost)}; use another model_type"
        )


def _checked_leaves(params: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """path -> leaf on the host, once every leaf of the config is there with its shape, no other."""
    if any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))):
        raise ValueError("params are quantised: export the float tree, or dequantize_params first")
    leaves: dict[str, Any] = flatten_dict(dict(params), sep="/")
    found = {path: leaf.shape for path, leaf in leaves.items()}
    wanted = flatten_dict(param_shapes(config), sep="/")
    wrong = [
        f"{path} is {found.get(path, 'missing')} instead of {wanted.get(path, 'absent')}"
        for path in sorted({*found, *wanted})
        if found.get(path) != wanted.get(path)
    ]
    if wrong:
        raise ValueError(f"params do not fit config: {listing(wrong)}; use the config they have")
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}


def _tensor(leaves: Mapping[str, np.ndarray], target: Target, dtype: jnp.dtype) -> np.ndarray:
    """One Hugging Face tensor: this layer's slice, kernels from [K, N] to [N, K]."""
    leaf = leaves[target.path]
    tensor = (leaf if target.layer is None else leaf[target.layer]).astype(dtype)
    return np.ascontiguousarray(tensor.T if target.is_kernel else tensor)
