"""The ranks' partial products summed, added to the residual stream, normalised and quantised."""

from qserve_jax.pallas_kernels.sum_norm_quantize.api import (
    MAX_RANKS,
    MAX_ROWS,
    WIDTH_MULTIPLE,
    flag_words,
    sum_norm_quantize,
)

__all__ = ["MAX_RANKS", "MAX_ROWS", "WIDTH_MULTIPLE", "flag_words", "sum_norm_quantize"]
