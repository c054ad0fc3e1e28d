"""int8 activations x 4-bit (or 8-bit) weights -> float, accumulated exactly in int32."""

from qserve_jax.pallas_kernels.w4a8_matmul.api import quantized_matmul, w4a8_matmul
from qserve_jax.pallas_kernels.w4a8_matmul.layout import (
    from_kernel_layout,
    take_layer,
    to_kernel_layout,
)

__all__ = [
    "from_kernel_layout",
    "quantized_matmul",
    "take_layer",
    "to_kernel_layout",
    "w4a8_matmul",
]
