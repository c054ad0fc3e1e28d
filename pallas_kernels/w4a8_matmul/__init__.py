"""int8 activations x 4-bit (or 8-bit) weights -> float, accumulated exactly in int32."""

from qserve_jax.pallas_kernels.w4a8_matmul.api import quantized_matmul, w4a8_matmul

__all__ = ["quantized_matmul", "w4a8_matmul"]
