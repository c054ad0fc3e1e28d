"""Llama, Mistral and Qwen decoders over one parameter tree."""

from qserve_jax.models.config import ModelConfig, RopeConfig
from qserve_jax.models.llama import CausalLM, decode_step, init_params, param_shapes, prefill
from qserve_jax.models.registry import config_from_hf

__all__ = [
    "CausalLM",
    "ModelConfig",
    "RopeConfig",
    "config_from_hf",
    "decode_step",
    "init_params",
    "param_shapes",
    "prefill",
]
