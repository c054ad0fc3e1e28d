"""What QoQ is: pure transforms over arrays and pytrees. Imports jax and numpy only."""

from qserve_jax.quantization.config import QuantConfig
from qserve_jax.quantization.params import (
    Rule,
    dequantize_kernel,
    dequantize_params,
    quantize_kernel,
    quantize_params,
)
from qserve_jax.quantization.qtensor import (
    Int8Activation,
    KVCache,
    W4PerChannel,
    W4PerGroup,
    W8PerChannel,
)
from qserve_jax.quantization.report import QuantizationReport, quantization_report

__all__ = [
    "Int8Activation",
    "KVCache",
    "QuantConfig",
    "QuantizationReport",
    "Rule",
    "W4PerChannel",
    "W4PerGroup",
    "W8PerChannel",
    "dequantize_kernel",
    "dequantize_params",
    "quantization_report",
    "quantize_kernel",
    "quantize_params",
]
