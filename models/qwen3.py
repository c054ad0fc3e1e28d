"""Qwen 3 (`model_type: qwen3`): Llama with RMSNorm on q and k heads, and its own head_dim."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qserve_jax.models.config import ModelConfig
from qserve_jax.models.hf_config import read_config
from qserve_jax.models.hf_keys import read_bool
from qserve_jax.models.qwen2 import WINDOW_KEYS, qwen_window


def qwen3_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Defaults of transformers `Qwen3Config`: head_dim is 128 where it is not given."""
    attention_bias = read_bool(hf, "attention_bias")
    return read_config(
        hf,
        reads=WINDOW_KEYS | {"attention_bias"},
        max_position_embeddings=32768,
        num_kv_heads=32,
        head_dim=128,
        sliding_window=qwen_window(hf),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=True,
    )
