"""The operations of a quantised step, one folder each: `api` checks and dispatches, `reference` is
plain XLA and computes the same integers as every faster backend."""

from qserve_jax.pallas_kernels.append_kv import append_kv, rope_append_kv
from qserve_jax.pallas_kernels.backend import BACKENDS, resolve
from qserve_jax.pallas_kernels.paged_attention import paged_attention, validate_paged_inputs
from qserve_jax.pallas_kernels.prepare import prepare_for_backend
from qserve_jax.pallas_kernels.quantize_activation import (
    quantize_activation,
    rms_norm_quantize,
    silu_mul_quantize,
)
from qserve_jax.pallas_kernels.w4a8_matmul import quantized_matmul, w4a8_matmul

__all__ = [
    "BACKENDS",
    "append_kv",
    "paged_attention",
    "prepare_for_backend",
    "quantize_activation",
    "quantized_matmul",
    "resolve",
    "rms_norm_quantize",
    "rope_append_kv",
    "silu_mul_quantize",
    "validate_paged_inputs",
    "w4a8_matmul",
]
