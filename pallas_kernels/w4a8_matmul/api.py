"""Checks and dispatch of the quantised matmuls."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax.pallas_kernels.backend import check_floats, check_layer, dispatch, usable
from qserve_jax.pallas_kernels.w4a8_matmul import reference
from qserve_jax.pallas_kernels.w4a8_matmul.layout import (
    BLOCKS,
    CODE_WORDS,
    LAYOUT,
    SCALE_WORDS,
    from_kernel_layout,
    take_layer,
    weight_shape,
)
from qserve_jax.quantization.qtensor import (
    Array,
    Int8Activation,
    QuantizedWeight,
    W4PerChannel,
    W4PerGroup,
    W8PerChannel,
)


def _reference(
    x: Int8Activation,
    w: W4PerGroup | W4PerChannel,
    *,
    layer: Array | int | None,
    **kwargs: Any,
) -> Array:
    """The reference for either layout: of a packed weight it unpacks the one layer."""
    if w.layout != LAYOUT:
        return reference.matmul(x, w, layer=layer, **kwargs)
    w = from_kernel_layout(take_layer(w, layer))
    return reference.matmul(x, w, layer=None, **kwargs)


# Jitted, so that a call outside of any jit compiles its kernel once. Imported when asked for: what
# they stand on is JAX's for GPUs.


@functools.partial(jax.jit, static_argnames=("out_dtype", "config"))
def _mosaic_sm90(*args: Any, **kwargs: Any) -> Array:
    from qserve_jax.pallas_kernels.w4a8_matmul import mosaic_sm90

    return mosaic_sm90.matmul(*args, **kwargs)


@functools.partial(jax.jit, static_argnames=("out_dtype", "config"))
def _mosaic_mma(*args: Any, **kwargs: Any) -> Array:
    from qserve_jax.pallas_kernels.w4a8_matmul import mosaic_mma

    return mosaic_mma.matmul(*args, **kwargs)


W4A8_BACKENDS = {
    "mosaic_sm90": _mosaic_sm90,
    "mosaic_mma": _mosaic_mma,
    "reference": _reference,
}
W8A8_BACKENDS = {"reference": reference.matmul}  # XLA's own int8 dot is already the fast path


def _check(
    x: Int8Activation,
    w: QuantizedWeight,
    bias: Array | None,
    residual: Array | None,
    layer: Array | int | None,
    out_dtype: jax.typing.DTypeLike,
) -> None:
    if not isinstance(x, Int8Activation):
        name = type(x).__name__
        raise ValueError(
            f"x is of {name} but must be Int8Activation: quantize_activation makes one"
        )
    if not isinstance(w, QuantizedWeight):
        raise ValueError(
            f"the weight is of {type(w).__name__}: quantize_params makes one that fits"
        )
    out = jnp.dtype(out_dtype)
    if out != jnp.int32 and not jnp.issubdtype(out, jnp.floating):
        raise ValueError(f"out_dtype={out.name} must be a float, or int32 for the sums alone")
    eight_bits = isinstance(w, W8PerChannel)
    packed = not eight_bits and w.layout == LAYOUT
    w_dtype = jnp.int8 if eight_bits else jnp.int32 if packed else jnp.uint8
    for name, codes, dtype in (
        ("x", x.codes, jnp.int8),
        ("weight", w.codes, w_dtype),
    ):
        if codes.dtype != dtype:
            needs = jnp.dtype(dtype).name
            raise ValueError(f"{name} codes are {codes.dtype} but must be {needs}: quantise first")
    rank = w.codes.ndim - 2 * packed  # [.., N, K/2] or [.., N/64, K/128, 4, words]
    if rank not in (2, 3):
        raise ValueError(f"weight codes have shape {w.codes.shape}: need [N, K] or [L, N, K]")
    if x.codes.ndim == 0:
        raise ValueError("x codes have shape (): need [..., K]")
    k = x.codes.shape[-1]
    n, k_weight = weight_shape(w)
    if k != k_weight:
        raise ValueError(f"x has {k=} but weight has K={k_weight}")
    if out == jnp.int32 and (bias is not None or residual is not None):
        raise ValueError("out_dtype=int32 is for the sums alone: leave bias and residual out")
    words = CODE_WORDS + (SCALE_WORDS if isinstance(w, W4PerGroup) else 0)
    if packed and w.codes.shape[-2:] != (BLOCKS, words):
        shape = w.codes.shape
        raise ValueError(f"packed codes have shape {shape}: need [..., {BLOCKS}, {words}]")
    check_layer(layer, "weight codes", w.codes.shape, rank == 3)
    floats = {"bias": bias, "residual": residual, "x scale": x.scale}
    check_floats(**floats, channel_scale=w.channel_scale)
    lead, stack = x.codes.shape[:-1], w.codes.shape[: rank - 2]
    for name, array, shape in (
        ("bias", bias, (n,)),
        ("residual", residual, (*lead, n)),
        ("x scale", x.scale, lead),
        ("x code_sum", x.code_sum, lead),
        ("channel_scale", w.channel_scale, (*stack, n)),
        ("scaled_zero", getattr(w, "scaled_zero", None), (*stack, n)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape} but the product needs {shape}")


def quantized_matmul(
    x: Int8Activation,
    w: QuantizedWeight,
    *,
    bias: Array | None = None,
    residual: Array | None = None,
    layer: Array | int | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    backend: str | None = None,
) -> Array:
    """x [..., K] times w [K, N] -> out_dtype[..., N], for any quantised weight container (QServe
    section 5.2 for 4 bits).

    x: int8 codes, f32 scales and int32 code sums of tokens. w: see the containers.
    bias float[N] and residual float[..., N] are added in float32 before the one rounding to
      out_dtype.
    layer: i32[]; w is stacked [L, ...]; use this layer of it, read in place.
    out_dtype: a float, or int32 for the sums before any scale (per channel those of the codes).
    backend: see `pallas_kernels.backend.resolve`.

    Raises ValueError on shapes and dtypes that do not fit and on a layer that w does not have,
    NotImplementedError from an explicit backend that cannot do this case. The int32 sums are exact
    in every backend for K <= 65 536.
    """
    _check(x, w, bias, residual, layer, out_dtype)
    backends = W8A8_BACKENDS if isinstance(w, W8PerChannel) else W4A8_BACKENDS
    backends = {name: backends[name] for name in usable(backend) if name in backends}
    return dispatch(
        "quantized_matmul",
        backends,
        backend,
        x,
        w,
        bias=bias,
        residual=residual,
        layer=layer,
        out_dtype=out_dtype,
    )


def w4a8_matmul(
    x: Int8Activation,
    w: W4PerGroup | W4PerChannel,
    *,
    bias: Array | None = None,
    residual: Array | None = None,
    layer: Array | int | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    backend: str | None = None,
) -> Array:
    """`quantized_matmul` for 4-bit weights (QServe section 5.2). Raises ValueError for others."""
    if not isinstance(w, W4PerGroup | W4PerChannel):
        raise ValueError(f"w4a8_matmul needs 4-bit weights, got {type(w).__name__}")
    return quantized_matmul(
        x, w, bias=bias, residual=residual, layer=layer, out_dtype=out_dtype, backend=backend
    )
