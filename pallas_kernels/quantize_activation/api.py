"""Checks and dispatch of the operations that end in int8 activations."""

from __future__ import annotations

from typing import Any

from qserve_jax.pallas_kernels.backend import check_layer, dispatch, usable
from qserve_jax.pallas_kernels.quantize_activation import reference
from qserve_jax.quantization import numerics
from qserve_jax.quantization.qtensor import Array, Int8Activation

REFERENCE = {
    "quantize_activation": numerics.quantize_activation,
    "rms_norm_quantize": reference.rms_norm_quantize,
    "silu_mul_quantize": reference.silu_mul_quantize,
}


def _run(op: str, backend: str | None, *args: Any, **kwargs: Any) -> Int8Activation:
    """The first backend that can. One kernel serves both Mosaic backends, from sm_80 on."""
    x = args[0]
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {x.shape}, but a token needs at least one feature")

    def kernel(*args: Any, **kwargs: Any) -> Int8Activation:
        from qserve_jax.pallas_kernels.quantize_activation import mosaic

        return getattr(mosaic, op)(*args, **kwargs)

    known = {"mosaic_sm90": kernel, "mosaic_mma": kernel, "reference": REFERENCE[op]}
    implementations = {name: known[name] for name in usable(backend)}
    return dispatch(op, implementations, backend, *args, **kwargs)


def quantize_activation(x: Array, *, backend: str | None = None) -> Int8Activation:
    """x float[..., K] to int8 per token (QServe section 4.1), with the sum of the codes.

    Every backend gives the same bits, those of `quantization.numerics.quantize_activation`. A token
    with a NaN has the scale NaN.

    Raises ValueError where x has no features; NotImplementedError from an explicit Mosaic backend
    where K is no multiple of 128 up to 32768, there are no tokens, or x is none of bf16, f16 and
    f32; by default such x go to the reference.
    """
    return _run("quantize_activation", backend, x)


def rms_norm_quantize(
    x: Array,
    scale: Array,
    *,
    eps: float,
    layer: Array | int | None = None,
    backend: str | None = None,
) -> Int8Activation:
    """`quantize_activation(rms_norm(x, scale, eps))` in one pass over x float[..., K].

    scale: float[K], or stacked [L, K] and read in place at `layer`. Normalised in float32 and
    rounded to x's dtype before the codes are taken. Backends add the squares in different orders,
    so that a normalised value may be rounded the other way.

    Raises ValueError on a scale that does not fit x or a layer that it does not have, and otherwise
    as `quantize_activation`.
    """
    if scale.shape[-1:] != x.shape[-1:] or scale.ndim not in (1, 2):
        k = x.shape[-1]
        raise ValueError(f"scale has shape {scale.shape} but x has {k=}: need [{k}] or [L, {k}]")
    check_layer(layer, "norm scales", scale.shape, scale.ndim == 2)
    return _run("rms_norm_quantize", backend, x, scale, eps=eps, layer=layer)


def silu_mul_quantize(gate_up: Array, *, backend: str | None = None) -> Int8Activation:
    """`quantize_activation(silu_mul(gate, up))` in one pass over gate_up float[..., 2F].

    gate lies before up, as the fused projection gives them. The kernel rounds the product to
    gate_up's dtype once, where XLA rounds between operations as it likes.

    Raises ValueError where the last axis is odd, and otherwise as `quantize_activation`, for F
    instead of K.
    """
    if gate_up.ndim and gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has shape {gate_up.shape}: its last axis must be gate and up")
    return _run("silu_mul_quantize", backend, gate_up)
