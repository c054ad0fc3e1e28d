"""From a loaded model to text: sampling, the decode loop, the paged cache and the engine.

Names are imported on first use, so that commands check their flags (SamplingParams) before JAX is
imported. `perplexity` is in the module of its name, which would hide it here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qserve_jax.runtime.async_llm import AsyncLLM
    from qserve_jax.runtime.decode import DecodeState, decode_loop, prefill_and_sample
    from qserve_jax.runtime.engine_stats import EngineStats, EngineStatus
    from qserve_jax.runtime.kv_cache import cache_bytes_per_token, init_cache
    from qserve_jax.runtime.llm import LLM
    from qserve_jax.runtime.sampling import (
        SampleOutput,
        SamplingFeatures,
        SamplingState,
        TokenCounts,
        make_sampling_state,
        make_token_counts,
    )
    from qserve_jax.runtime.sampling_params import SamplingParams
    from qserve_jax.runtime.sequence import RequestOutput, StreamOutput, TokenLogprobs

__all__ = [
    "LLM",
    "AsyncLLM",
    "DecodeState",
    "EngineStats",
    "EngineStatus",
    "RequestOutput",
    "SampleOutput",
    "SamplingFeatures",
    "SamplingParams",
    "SamplingState",
    "StreamOutput",
    "TokenCounts",
    "TokenLogprobs",
    "cache_bytes_per_token",
    "decode_loop",
    "init_cache",
    "make_sampling_state",
    "make_token_counts",
    "prefill_and_sample",
]

_HOME = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "DecodeState": "decode",
    "EngineStats": "engine_stats",
    "EngineStatus": "engine_stats",
    "RequestOutput": "sequence",
    "SampleOutput": "sampling",
    "SamplingFeatures": "sampling",
    "SamplingParams": "sampling_params",
    "SamplingState": "sampling",
    "StreamOutput": "sequence",
    "TokenCounts": "sampling",
    "TokenLogprobs": "sequence",
    "cache_bytes_per_token": "kv_cache",
    "decode_loop": "decode",
    "init_cache": "kv_cache",
    "make_sampling_state": "sampling",
    "make_token_counts": "sampling",
    "prefill_and_sample": "decode",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
