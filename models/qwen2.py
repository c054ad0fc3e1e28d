"""Qwen 1.5, 2 and 2.5 (`model_type: qwen2`): Llama with biases on q, k and v, and only there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qserve_jax.models.config import ModelConfig
from qserve_jax.models.hf_config import read_config
from qserve_jax.models.hf_keys import read_bool, read_size

WINDOW_KEYS = {"use_sliding_window", "sliding_window", "max_window_layers"}


def qwen2_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Defaults of transformers `Qwen2Config`."""
    return read_config(
        hf,
        reads=WINDOW_KEYS,
        max_position_embeddings=32768,
        num_kv_heads=32,
        sliding_window=qwen_window(hf),
        qkv_bias=True,
    )


def qwen_window(hf: Mapping[str, Any]) -> int | None:
    """The sliding window that all layers share, or None.

    As in transformers, `use_sliding_window` turns it on, `layer_types` says for which layers, and
    without `layer_types` those from `max_window_layers` on have it. Raises ValueError where layers
    differ.
    """
    if not read_bool(hf, "use_sliding_window"):
        return None
    if "sliding_window" in hf and hf["sliding_window"] is None:
        return None
    window = read_size(hf, "sliding_window", 4096)
    layers = read_size(hf, "num_hidden_layers")
    if hf.get("layer_types") is not None:  # a mixture is refused by read_config
        return window if hf["layer_types"] == ["sliding_attention"] * layers else None
    first = hf.get("max_window_layers", 28)
    if first == 0:
        return window
    if read_size(hf, "max_window_layers", 28) < layers:
        raise ValueError(
            f"max_window_layers={first} with use_sliding_window=true is not supported: use a "
            f"checkpoint whose {layers} layers all attend alike"
        )
    return None
