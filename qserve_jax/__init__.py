"""W4A8KV4 inference of large language models in JAX (QServe / QoQ, arXiv:2405.04532).

Public names are imported on first use, so that `from qserve_jax import quantize_params` in a
training repository imports neither flax nor transformers.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qserve_jax.checkpoint import load_model
    from qserve_jax.quantization import (
        QuantConfig,
        Rule,
        dequantize_params,
        fake_quantize_params,
        quantization_report,
        quantize_params,
    )
    from qserve_jax.runtime import LLM, AsyncLLM, SamplingParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncLLM",
    "QuantConfig",
    "Rule",
    "SamplingParams",
    "dequantize_params",
    "fake_quantize_params",
    "load_model",
    "quantization_report",
    "quantize_params",
]

_HOME = {
    "AsyncLLM": "runtime",
    "LLM": "runtime",
    "QuantConfig": "quantization",
    "Rule": "quantization",
    "SamplingParams": "runtime",
    "dequantize_params": "quantization",
    "fake_quantize_params": "quantization",
    "load_model": "checkpoint",
    "quantization_report": "quantization",
    "quantize_params": "quantization",
}

# A checkout without symbolic links (Windows) finds models and pallas_kernels beside qserve_jax.
if not os.path.isdir(os.path.join(__path__[0], "models")):
    __path__.append(os.path.dirname(__path__[0]))


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
