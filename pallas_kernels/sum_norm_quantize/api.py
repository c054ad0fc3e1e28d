"""Checks and dispatch of the sum over ranks with what follows it."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp

from qserve_jax.pallas_kernels.backend import check_layer, dispatch, usable
from qserve_jax.pallas_kernels.sum_norm_quantize import reference
from qserve_jax.quantization.qtensor import Array, Int8Activation

MAX_RANKS = 8
MAX_ROWS = 512
"""Of a call: every rank reads all of all others, which NCCL does not for more."""
WIDTH_MULTIPLE = 128
"""Of the features of a row."""
ROW_WORDS = 32
"""Of a row's flags, a line of memory: launches so far, then for each rank ready, then done."""


def flag_words() -> int:
    """How many int32 a rank's flags are. They begin as zeros, are made once for a mesh, and are
    changed by the kernel alone."""
    return MAX_ROWS * ROW_WORDS


def sum_norm_quantize(
    partial: Array,
    residual: Array,
    scale: Array,
    flags: Array,
    *,
    axis: str,
    eps: float,
    layer: Array | int | None = None,
    backend: str | None = None,
) -> tuple[Array, Int8Activation]:
    """residual + the ranks' partials -> (x, rms_norm_quantize(x, scale)), within `shard_map`.

    partial: float[..., D], this rank's. residual: the same on all ranks, of the same dtype.
    scale: float[D], or stacked [L, D] and read at `layer`.
    flags: i32[flag_words()], this rank's part of an array that lives as long as programs use it.
      The kernel writes to it though XLA takes it for an input: so nobody copies it, and other
      devices find it where it was.
    axis: of a mesh of at most MAX_RANKS devices, and with no other axis.
    Added in float32, by rank, then the residual; rounded once to its dtype. All ranks get the same
    bits, and the backends the same x; of the codes see `rms_norm_quantize`.

    Raises ValueError where shapes and dtypes do not fit; NotImplementedError from an explicit
    Mosaic backend for more than MAX_ROWS rows, D no multiple of 128, or several processes.
    """
    if partial.shape != residual.shape or partial.dtype != residual.dtype:
        found = f"{partial.dtype}{list(partial.shape)}", f"{residual.dtype}{list(residual.shape)}"
        raise ValueError(f"partial is {found[0]} but residual {found[1]}: make them alike")
    if scale.shape[-1:] != partial.shape[-1:] or scale.ndim not in (1, 2):
        d = partial.shape[-1]
        raise ValueError(f"scale has shape {scale.shape} but x has {d=}: need [{d}] or [L, {d}]")
    if flags.shape != (flag_words(),) or flags.dtype != jnp.int32:
        found = f"{flags.dtype}{list(flags.shape)}"
        raise ValueError(f"flags are {found}: make them int32[{flag_words()}] on each rank")
    check_layer(layer, "norm scales", scale.shape, scale.ndim == 2)

    def kernel(*_: Array, **kwargs: Any) -> tuple[Array, Int8Activation]:
        from qserve_jax.pallas_kernels.sum_norm_quantize import mosaic

        if math.prod(partial.shape[:-1]) > MAX_ROWS:
            rows = math.prod(partial.shape[:-1])
            raise NotImplementedError(f"{rows=} but the flags are for {MAX_ROWS}: sum by NCCL")
        return mosaic.sum_norm_quantize(partial, residual, scale, flags, **kwargs)

    known = {
        "mosaic_sm90": kernel,
        "mosaic_mma": kernel,
        "reference": reference.sum_norm_quantize,
    }
    implementations = {name: known[name] for name in usable(backend)}
    run = functools.partial(dispatch, "sum_norm_quantize", implementations, backend)
    return run(partial, residual, scale, axis=axis, eps=eps, layer=layer)
