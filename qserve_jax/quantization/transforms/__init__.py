"""The transforms of QoQ, one file each: pure functions of the canonical tree and statistics.

Each can be used alone, under jit. `quantize_with_recipe` composes them.

Shapes are those of docs/architecture.md: layers stacked on a leading axis L, kernels [L, K, N]. All
that read `ActivationStats` raise ValueError where a statistic is missing or is another model's.
"""

from qserve_jax.quantization.transforms.calibration import (
    ActivationStats,
    InputStats,
    collect_statistics,
    reduce_input,
)
from qserve_jax.quantization.transforms.center_keys import center_keys
from qserve_jax.quantization.transforms.clip import clip_range, clip_ratios
from qserve_jax.quantization.transforms.gptq import gptq_codes
from qserve_jax.quantization.transforms.reorder import permute_ffn, reorder_ffn, reorder_values
from qserve_jax.quantization.transforms.rotate_values import rotate_values
from qserve_jax.quantization.transforms.rotation import fold_norms, hadamard_rotation, rotate
from qserve_jax.quantization.transforms.smooth_attention import (
    search_smooth_attention,
    smooth_attention,
)
from qserve_jax.quantization.transforms.smooth_output import smooth_down, smooth_values
from qserve_jax.quantization.transforms.weights import quantize_with_statistics

__all__ = [
    "ActivationStats",
    "InputStats",
    "center_keys",
    "clip_range",
    "clip_ratios",
    "collect_statistics",
    "fold_norms",
    "gptq_codes",
    "hadamard_rotation",
    "permute_ffn",
    "quantize_with_statistics",
    "reduce_input",
    "reorder_ffn",
    "reorder_values",
    "rotate",
    "rotate_values",
    "search_smooth_attention",
    "smooth_attention",
    "smooth_down",
    "smooth_values",
]
