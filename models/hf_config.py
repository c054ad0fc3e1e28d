"""Hugging Face config.json -> ModelConfig: what all families share, and Llama itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qserve_jax.models.config import ModelConfig, brief
from qserve_jax.models.hf_keys import read_bool, read_size, read_token_ids, refuse_unsupported
from qserve_jax.models.hf_rope import rope_from_hf

DTYPES = ("float32", "bfloat16", "float16")


def llama_config(hf: Mapping[str, Any]) -> ModelConfig:
    """`model_type: llama` (Llama 1 to 3.2, Yi, Vicuna); defaults of transformers `LlamaConfig`."""
    attention_bias = read_bool(hf, "attention_bias")
    return read_config(
        hf,
        reads={"attention_bias", "mlp_bias"},
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=read_bool(hf, "mlp_bias"),
    )


def read_config(
    hf: Mapping[str, Any],
    *,
    reads: set[str],
    max_position_embeddings: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    sliding_window: int | None = None,
    **flags: bool,
) -> ModelConfig:
    """The ModelConfig of one family.

    reads: the keys that the family reads itself (see hf_keys).
    max_position_embeddings, num_kv_heads, head_dim, bos_token_id, eos_token_id: the defaults of
      transformers' config class. None: as many KV heads as heads; hidden_size / heads.
    sliding_window, flags: ModelConfig fields that the family has worked out.

    Raises ValueError naming the key for what is missing, malformed, contradictory or not supported.
    """
    refuse_unsupported(hf, reads)
    hidden_size, num_heads = read_size(hf, "hidden_size"), read_size(hf, "num_attention_heads")
    positions = read_size(hf, "max_position_embeddings", max_position_embeddings)
    num_layers = read_size(hf, "num_hidden_layers")
    _check_layer_types(hf, num_layers, sliding_window)
    vocab_size = read_size(hf, "vocab_size")
    return ModelConfig(
        model_type=hf["model_type"],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=read_size(hf, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_read_kv_heads(hf, num_heads, num_kv_heads or num_heads),
        head_dim=read_size(hf, "head_dim", head_dim or _split_heads(hf, hidden_size, num_heads)),
        max_position_embeddings=positions,
        rms_norm_eps=_read_eps(hf),
        rope=rope_from_hf(hf, positions),
        tie_embeddings=read_bool(hf, "tie_word_embeddings"),
        sliding_window=sliding_window,
        bos_token_id=_read_bos(hf, vocab_size, bos_token_id),
        eos_token_ids=read_token_ids(hf, "eos_token_id", vocab_size, eos_token_id),
        dtype=_read_dtype(hf),
        **flags,
    )


def _read_kv_heads(hf: Mapping[str, Any], num_heads: int, missing: int) -> int:
    """null means one KV head per head, also in families where a missing key means another number"""
    if "num_key_value_heads" in hf:
        return read_size(hf, "num_key_value_heads", num_heads)
    if num_heads % missing:
        raise ValueError(
            f"config.json has no num_key_value_heads, and its default of {missing} does not divide "
            f"num_attention_heads={num_heads}: add it"
        )
    return missing


def _split_heads(hf: Mapping[str, Any], hidden_size: int, num_heads: int) -> int | None:
    if hf.get("head_dim") is None and hidden_size % num_heads:
        raise ValueError(
            f"hidden_size={hidden_size} is not a multiple of num_attention_heads={num_heads}: "
            "set head_dim"
        )
    return hidden_size // num_heads


def _read_eps(hf: Mapping[str, Any]) -> float:
    eps = hf.get("rms_norm_eps", 1e-6)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
        raise ValueError(f"rms_norm_eps={brief(eps)} is not between 0 and 1: correct config.json")
    return float(eps)


def _read_bos(hf: Mapping[str, Any], vocab_size: int, default: int | None) -> int | None:
    if isinstance(hf.get("bos_token_id"), list):
        raise ValueError(f"bos_token_id={brief(hf['bos_token_id'])} is not an integer or null")
    return next(iter(read_token_ids(hf, "bos_token_id", vocab_size, default)), None)


def _read_dtype(hf: Mapping[str, Any]) -> str:
    """The dtype of the weights, bfloat16 where the config does not say; `dtype` wins."""
    dtype = hf.get("dtype") or hf.get("torch_dtype") or "bfloat16"
    if dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise ValueError(f"dtype={brief(dtype)} is not supported: use a checkpoint in {known}")
    return dtype


def _check_layer_types(hf: Mapping[str, Any], num_layers: int, sliding_window: int | None) -> None:
    """All layers run in one scan, so they attend alike: refuse `layer_types` that say otherwise."""
    kind = "full_attention" if sliding_window is None else "sliding_attention"
    if hf.get("layer_types") not in (None, [kind] * num_layers):
        raise ValueError(
            f"layer_types={brief(hf['layer_types'])} is not supported: with sliding window "
            f"{sliding_window} in effect, use a checkpoint with all {num_layers} layers {kind!r}"
        )
