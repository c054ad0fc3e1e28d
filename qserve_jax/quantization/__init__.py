"""What QoQ is: pure transforms over arrays and pytrees. Imports jax and numpy only."""

from qserve_jax.quantization.config import QuantConfig
from qserve_jax.quantization.fake import fake_quantize_params
from qserve_jax.quantization.params import (
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
from qserve_jax.quantization.rules import FLAX_RULES, MAXTEXT_RULES, Rule

__all__ = [
    "FLAX_RULES",
    "Int8Activation",
    "KVCache",
    "MAXTEXT_RULES",
    "QuantConfig",
    "QuantizationReport",
    "Rule",
    "W4PerChannel",
    "W4PerGroup",
    "W8PerChannel",
    "dequantize_kernel",
    "dequantize_params",
    "fake_quantize_params",
    "quantization_report",
    "quantize_kernel",
    "quantize_params",
]
