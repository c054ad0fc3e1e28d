"""int8 activations per token, alone or with the operation before: RMSNorm, SiLU and product."""

from qserve_jax.pallas_kernels.quantize_activation.api import (
    quantize_activation,
    rms_norm_quantize,
    silu_mul_quantize,
)
from qserve_jax.pallas_kernels.quantize_activation.reference import rms_norm, silu_mul

__all__ = [
    "quantize_activation",
    "rms_norm",
    "rms_norm_quantize",
    "silu_mul",
    "silu_mul_quantize",
]
