"""Which model families there are: Hugging Face `model_type` -> how to read its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qserve_jax.models.config import ModelConfig, brief
from qserve_jax.models.hf_config import llama_config
from qserve_jax.models.mistral import mistral_config
from qserve_jax.models.qwen2 import qwen2_config
from qserve_jax.models.qwen3 import qwen3_config

FAMILIES = {
    "llama": llama_config,
    "mistral": mistral_config,
    "qwen2": qwen2_config,
    "qwen3": qwen3_config,
}


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json, given as the parsed dict.

    Missing keys take the default of transformers' config class of that `model_type`; sizes without
    a meaningful default are required. Raises ValueError, naming key and value, for an unknown
    `model_type`, a missing or impossible value, and every feature that is not implemented.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"model_type {brief(model_type)} is not supported: use one of {known}")
    return FAMILIES[model_type](hf)
