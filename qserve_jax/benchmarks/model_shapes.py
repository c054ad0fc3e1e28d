"""Sizes of published models, for runs on random weights: from their config.json files."""

from __future__ import annotations

import functools

from qserve_jax.models.config import ModelConfig, RopeConfig


def _config(
    model_type: str,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    context: int,
    theta: float,
    qkv_bias: bool = False,
) -> ModelConfig:
    """Heads of 128; no end-of-sequence token, so that every request makes all its tokens."""
    return ModelConfig(
        *(model_type, vocab_size, hidden_size, intermediate_size),
        *(num_layers, num_heads, num_kv_heads, 128, context),
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=theta),
        qkv_bias=qkv_bias,
    )


_llama = functools.partial(_config, "llama")
_qwen2 = functools.partial(_config, "qwen2", 152064, qkv_bias=True)

MODEL_CONFIGS: dict[str, ModelConfig] = {
    "llama3-8b": _llama(128256, 4096, 14336, 32, 32, 8, 8192, 5e5),
    "llama2-7b": _llama(32000, 4096, 11008, 32, 32, 32, 4096, 1e4),
    "llama2-13b": _llama(32000, 5120, 13824, 40, 40, 40, 4096, 1e4),
    "llama3-70b": _llama(128256, 8192, 28672, 80, 64, 8, 8192, 5e5),
    "mistral-7b": _config("mistral", 32000, 4096, 14336, 32, 32, 8, 32768, 1e6),  # v0.2
    "yi-34b": _llama(64000, 7168, 20480, 60, 56, 8, 4096, 5e6),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, 32768, 1e6),
    "qwen2.5-72b": _qwen2(8192, 29568, 80, 64, 8, 32768, 1e6),
    "qwen1.5-72b": _qwen2(8192, 24576, 80, 64, 64, 32768, 1e6),
}
