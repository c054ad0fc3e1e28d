"""GPTQ and AWQ checkpoints in 4 bits, in; those that our containers hold exactly.

Per linear, G groups of g inputs: w[n, k] = scales[group(k), n] * (code - zero), with

            qweight                        qzeros                     scales        g_idx
    GPTQ    int32 [K/8, N], k packed       int32 [G, N/8], zero - 1   float [G, N]  int32 [K]
    AWQ     int32 [K, N/8], n interleaved  int32 [G, N/8], zero       float [G, N]  -

(eight codes a word from the lowest bits on; AWQ's "gemm" puts channels 0, 2, 4, 6, 1, 3, 5, 7 of
eight in that order; `checkpoint_format` "gptq_v2" stores the zero itself).

One group for all inputs (group_size -1) is W4PerChannel exactly. Groups of 128 are W4PerGroup where
the float scales of a channel are integer multiples, small enough for int8, of one number; those
that the field publishes are not, and re-quantising them twice loses accuracy, so they are refused.
So is act-order over several groups (`desc_act`), which would permute the inputs at run time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from qserve_jax.checkpoint.errors import CheckpointError
from qserve_jax.checkpoint.hf import TensorSpec, read_rows
from qserve_jax.checkpoint.key_table import FLOATS
from qserve_jax.checkpoint.packed import Field, Packing, kernel_sizes
from qserve_jax.models.config import ModelConfig, brief

METHODS = ("gptq", "awq")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
CURE = "quantise the float checkpoint with qserve_jax instead"


def read_int4_config(hf: Mapping[str, Any]) -> tuple[str, int]:
    """(method, group_size) of a `quantization_config`, method "gptq", "gptq_v2" or "awq".

    Raises CheckpointError for bits other than 4 and variants with another layout.
    """
    stored = hf["quantization_config"]
    method = stored["quant_method"]
    bits = stored.get("bits", stored.get("w_bit"))
    group_size = stored.get("group_size", stored.get("q_group_size"))
    if bits != 4 or group_size not in (-1, 128):
        raise CheckpointError(
            f"quantization_config of {method!r} with bits={brief(bits)}, "
            f"group_size={brief(group_size)} has no exact counterpart here, only 4 bits with -1 "
            f"or 128 may: {CURE}"
        )
    if method == "awq":
        if stored.get("version", "gemm").lower() != "gemm":
            raise CheckpointError(f"awq version {brief(stored['version'])} is not gemm: {CURE}")
        return "awq", group_size
    layout = stored.get("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"gptq checkpoint_format {brief(layout)} is not gptq: {CURE}")
    return layout, group_size


def int4_packings(config: ModelConfig, method: str, group_size: int) -> dict[str, Packing]:
    """How each projection lies in the file. Raises CheckpointError where sizes do not fit."""
    packings = {}
    for path, (n, k) in kernel_sizes(config).items():
        size = k if group_size == -1 else group_size
        if n % 8 or k % 8 or k % size:
            raise CheckpointError(f"{path} N={n} K={k} does not fit {method}'s words: {CURE}")
        shape = (k, n // 8) if method == "awq" else (k // 8, n)
        fields = (
            Field("qweight", shape, ("I32",)),
            Field("qzeros", (k // size, n // 8), ("I32",)),
            Field("scales", (k // size, n), FLOATS),
        )
        packings[path] = Packing(fields, _DECODE[method, group_size])
    return packings


def check_order(specs: Mapping[str, TensorSpec], group_size: int) -> None:
    """Raises CheckpointError, naming it, for a projection whose inputs are not in their order."""
    for name, spec in specs.items():
        if not name.endswith(".g_idx"):
            continue
        size = spec.shape[0] if group_size == -1 else group_size
        g_idx = read_rows(spec, 0, spec.shape[0])
        if not np.array_equal(g_idx, np.arange(len(g_idx)) // size):
            raise CheckpointError(f"{name} orders the inputs by activation (desc_act): {CURE}")


def common_divisor(scales: np.ndarray) -> np.ndarray:
    """f32[N]: the largest number of which all scales f32[G, N] of a channel are integer multiples.

    Exact for float16 scales, which are integer multiples of 2**-24; NaN where a scale is not one.
    """
    units = scales.astype(np.float64) * 2**24
    integer = (units == np.round(units)) & (units > 0) & (units < 2**53)
    divisor = np.gcd.reduce(np.where(integer, units, 0).astype(np.int64), axis=0)
    return np.where(integer.all(axis=0), divisor * 2.0**-24, np.nan).astype(np.float32)


def _nibbles(words: np.ndarray) -> np.ndarray:
    """int32[..., W] -> u8[..., W, 8], from the lowest bits on."""
    return ((words[..., None] >> np.arange(0, 32, 4)) & 15).astype(np.uint8)


def _awq_nibbles(words: np.ndarray) -> np.ndarray:
    parts = _nibbles(words)[..., np.argsort(AWQ_ORDER)]
    return parts.reshape(*words.shape[:-1], -1)


def _gptq_nibbles(words: np.ndarray) -> np.ndarray:
    return _nibbles(words).reshape(*words.shape[:-1], -1)


def _decode(
    method: str, group_size: int, qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray
) -> list[np.ndarray]:
    """The arrays of a container. Raises ValueError where it cannot hold the weights exactly."""
    unpack = _awq_nibbles if method == "awq" else _gptq_nibbles
    codes = unpack(qweight).T if method == "awq" else unpack(np.ascontiguousarray(qweight.T))
    zeros = unpack(qzeros)
    if method == "gptq" and (zeros == 15).any():
        raise ValueError(f"a stored zero point is 15, which readers take for 0 or for 16: {CURE}")
    zeros = zeros.astype(np.float32) + (method == "gptq")
    scales = scales.astype(np.float32)
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    if group_size == -1:
        return [packed, scales[0], (zeros * scales)[0]]
    divisor = common_divisor(scales)
    multiple = scales / divisor
    offset = -zeros * multiple
    if not (np.isfinite(multiple).all() and (multiple <= 255).all() and (offset >= -128).all()):
        raise ValueError(
            "the scales of its groups are no small integer multiples of one number per channel, as "
            f"QoQ's level 2 needs ({method}, groups of {group_size}): {CURE}"
        )
    return [packed, divisor, multiple.T.astype(np.uint8), offset.T.astype(np.int8)]


_DECODE = {
    (method, size): functools.partial(_decode, method, size)
    for method in ("gptq", "gptq_v2", "awq")
    for size in (-1, 128)
}
