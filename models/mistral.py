"""Mistral (`model_type: mistral`): Llama without biases, with a sliding window on every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qserve_jax.models.config import ModelConfig
from qserve_jax.models.hf_config import read_config
from qserve_jax.models.hf_keys import read_size


def mistral_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Defaults of transformers `MistralConfig`: null `sliding_window` is none, missing is 4096."""
    no_window = "sliding_window" in hf and hf["sliding_window"] is None
    return read_config(
        hf,
        reads={"sliding_window"},
        max_position_embeddings=131072,
        num_kv_heads=8,
        bos_token_id=1,
        eos_token_id=2,
        sliding_window=None if no_window else read_size(hf, "sliding_window", 4096),
    )
