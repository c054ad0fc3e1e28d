"""Weights to and from qwix (`qwix.QArray`), where it is installed.

A QArray has the axes of the original kernel: value = (qvalue - zero_point) * scale, where scale and
zero_point have size 1 along an axis that shares them, and size axis / tile along a tiled one. Our
4-bit codes are 0..15; in qwix they are int4, lower by 8.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qserve_jax.quantization.packing import pack_nibbles, unpack_nibbles
from qserve_jax.quantization.qtensor import (
    Array,
    QuantizedWeight,
    Source,
    W4PerChannel,
    W4PerGroup,
    W8PerChannel,
)

GROUP_SIZE = 128
MAX_GROUP_SCALE = 16
RATIO_TOLERANCE = 1e-6
"""Scales whose ratio is this near an integer, relatively, are that multiple of one float32."""


def to_qwix(w: QuantizedWeight) -> Any:
    """A container as `qwix.QArray` in the layout of the original kernel, with the same codes.

    W8PerChannel: int8, symmetric. W4PerChannel, W4PerGroup: int4 with zero points; the two levels
    of scales become one, channel_scale * group_scale. `qwix.dequantize` gives the weight to within
    float32 rounding, in float32. A whole tree:

        jax.tree.map(lambda w: to_qwix(w) if is_quantized(w) else w, params, is_leaf=is_quantized)

    Raises ImportError without qwix, ValueError where the codes are packed for a kernel, a layer was
    sliced off the stack, groups do not fit the kernel's axes, or zero points are no integers 0..15.
    """
    try:
        qarray = importlib.import_module("qwix").QArray
    except ModuleNotFoundError:
        raise ImportError("to_qwix needs qwix, which is not installed: pip install qwix") from None
    if not isinstance(w, W8PerChannel) and w.layout != "canonical":
        raise ValueError(f"layout {w.layout!r} is a kernel's: apply from_kernel_layout first")
    if w.codes.ndim - 2 != w.source.roles.count("stack"):
        raise ValueError(
            f"codes of shape {w.codes.shape} lack stack axes of {w.source.roles}: convert the "
            "whole stack and slice that"
        )
    if isinstance(w, W8PerChannel):
        codes = _to_original(w.codes, w.source, w.source.in_shape)
        return qarray(codes, _to_original(w.channel_scale, w.source, _ones(w.source)))
    if isinstance(w, W4PerChannel):
        scale, zero = w.channel_scale, w.scaled_zero / w.channel_scale
        counts = _ones(w.source)
    else:
        scale = w.channel_scale[..., None] * w.group_scale
        zero = -w.group_offset.astype(jnp.float32) / w.group_scale
        counts = _groups_per_axis(w.source.in_shape, w.group_size)
    _check_zeros(zero)
    codes = (unpack_nibbles(w.codes).astype(jnp.int8) - 8).astype(jnp.int4)
    zero = (jnp.round(zero) - 8).astype(jnp.int4)
    return qarray(
        _to_original(codes, w.source, w.source.in_shape),
        _to_original(scale, w.source, counts),
        _to_original(zero, w.source, counts),
    )


def from_qwix(
    array: Any, contract: tuple[int, ...] = (-2,), out: tuple[int, ...] = (-1,)
) -> QuantizedWeight:
    """A `qwix.QArray` as a container with the same codes; `contract` and `out` as in `Rule`.

    int8 without zero points and one scale per output channel: W8PerChannel. int4 or uint4 with one
    scale per channel: W4PerChannel. The same in groups of 128 inputs: W4PerGroup, where the scales
    of a channel are integer multiples, up to 16, of one number, as those that `to_qwix` makes are;
    the channel scale may differ from the original by a whole factor and float32 rounding, values by
    the rounding. The container's dtype is that of the scales. Not for use under jit.

    Raises ValueError for any other array, which says what does not fit.
    """
    shape, dtype = array.qvalue.shape, jnp.dtype(array.qvalue.dtype).name
    source = _source(shape, contract, out, array.scale.dtype)
    codes = _from_original(array.qvalue.astype(jnp.int8), source)
    scale = _from_original(_expand(array.scale.astype(jnp.float32), shape), source)
    zero = 0 if array.zero_point is None else array.zero_point.astype(jnp.int8)
    zero = _from_original(_expand(jnp.asarray(zero), shape), source).astype(jnp.float32)
    per_channel = _is_constant(scale) and _is_constant(zero)
    if dtype == "int8" and per_channel and array.zero_point is None:
        return W8PerChannel(codes, scale[..., 0], source)
    if dtype not in ("int4", "uint4"):
        raise _refusal(f"qvalue {dtype} with scale {array.scale.shape}")
    shift = 8 if dtype == "int4" else 0
    packed, zero = pack_nibbles((codes + shift).astype(jnp.uint8)), zero + shift
    if per_channel:
        return W4PerChannel(packed, scale[..., 0], (zero * scale)[..., 0], source)
    if scale.shape[-1] % GROUP_SIZE:
        raise _refusal(f"{scale.shape[-1]} inputs, no multiple of {GROUP_SIZE},")
    scale, zero = (x.reshape(*x.shape[:-1], -1, GROUP_SIZE) for x in (scale, zero))
    if not (_is_constant(scale) and _is_constant(zero)):
        raise _refusal(f"scale {array.scale.shape} of groups that are not of {GROUP_SIZE} inputs")
    channel_scale, group_scale = _split_scales(np.asarray(scale[..., 0]))
    offset = -np.asarray(zero[..., 0]) * group_scale
    _check_int8(np.asarray(codes) + shift, group_scale, offset)
    return W4PerGroup(
        packed,
        jnp.asarray(channel_scale),
        jnp.asarray(group_scale.astype(np.uint8)),
        jnp.asarray(offset.astype(np.int8)),
        GROUP_SIZE,
        source,
    )


def _refusal(what: str) -> ValueError:
    return ValueError(f"QArray with {what} is no QoQ weight: quantize_params of qwix.dequantize")


def _order(source: Source) -> list[int]:
    """Axes of the original kernel in the order stack, out, in."""
    return [a for role in ("stack", "out", "in") for a, r in enumerate(source.roles) if r == role]


def _to_original(x: Array, source: Source, in_shape: tuple[int, ...]) -> Array:
    """[*stack, N, ...] -> the original order of axes, with `in_shape` for the contracted ones."""
    stack = x.shape[: source.roles.count("stack")]
    x = x.reshape(*stack, *source.out_shape, *in_shape)
    return jnp.transpose(x, np.argsort(_order(source)).tolist())


def _from_original(x: Array, source: Source) -> Array:
    """The original order of axes -> [*stack, N, K]."""
    x = jnp.transpose(x, _order(source))
    n, k = math.prod(source.out_shape), math.prod(source.in_shape)
    return x.reshape(*x.shape[: source.roles.count("stack")], n, k)


def _ones(source: Source) -> tuple[int, ...]:
    return (1,) * len(source.in_shape)


def _groups_per_axis(in_shape: tuple[int, ...], group_size: int) -> tuple[int, ...]:
    """How many groups lie along each contracted axis; a group fills the last axes first."""
    counts, left = [], group_size
    for size in reversed(in_shape):
        tile = math.gcd(size, left)
        if tile not in (size, left):
            raise ValueError(
                f"groups of {group_size} inputs do not fit the axes {in_shape}: use group_size=-1"
            )
        counts.append(size // tile)
        left //= tile
    return tuple(reversed(counts))


def _check_zeros(zero: Array) -> None:
    if isinstance(zero, Tracer):
        return
    found = np.asarray(zero)
    bad = found[(np.abs(found - np.rint(found)) > 1e-3) | (found < -0.5) | (found > 15.5)]
    if bad.size:
        raise ValueError(
            f"zero point {bad[0]:.4g} is no integer in 0..15, as int4 needs: dequantise instead"
        )


def _source(
    shape: tuple[int, ...], contract: tuple[int, ...], out: tuple[int, ...], dtype: Any
) -> Source:
    ndim = len(shape)
    ins, outs = ({axis % ndim for axis in axes} for axes in (contract, out))
    if ins & outs or max((*contract, *out)) >= ndim or min((*contract, *out)) < -ndim:
        raise ValueError(f"QArray of shape {shape} does not fit {contract=}, {out=}: name its axes")
    return Source(
        roles=tuple("in" if a in ins else "out" if a in outs else "stack" for a in range(ndim)),
        in_shape=tuple(shape[axis] for axis in sorted(ins)),
        out_shape=tuple(shape[axis] for axis in sorted(outs)),
        dtype=jnp.dtype(dtype).name,
    )


def _expand(x: Array, shape: tuple[int, ...]) -> Array:
    """x, each axis of which divides that of `shape`, repeated along tiles to `shape`."""
    x = x.reshape((1,) * len(shape)) if x.ndim == 0 else x
    for axis, size in enumerate(shape):
        x = jnp.repeat(x, size // x.shape[axis], axis=axis)
    return x


def _is_constant(x: Array) -> bool:
    """Whether x does not vary along its last axis."""
    return bool((x == x[..., :1]).all())


def _split_scales(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f32[..., N, G] -> (channel_scale f32[..., N], group_scale int[..., N, G] in 1..16)."""
    smallest = scale.min(axis=-1)
    channel = np.zeros_like(smallest)
    for divisor in range(MAX_GROUP_SCALE, 0, -1):  # the smallest that fits is the last to be kept
        ratio = scale / (smallest / divisor)[..., None]
        whole = np.rint(ratio)
        near = np.abs(ratio - whole) <= RATIO_TOLERANCE * ratio
        fits = (near & (whole <= MAX_GROUP_SCALE)).all(axis=-1)
        channel = np.where(fits, smallest / divisor, channel)
    if not (channel > 0).all():
        raise _refusal("group scales that are no multiples 1..16 of one per channel")
    return channel.astype(np.float32), np.rint(scale / channel[..., None]).astype(np.int32)


def _check_int8(codes: np.ndarray, group_scale: np.ndarray, offset: np.ndarray) -> None:
    groups = codes.reshape(*group_scale.shape, GROUP_SIZE).astype(np.int32)
    value = groups * group_scale[..., None] + offset[..., None]
    if value.min() < -128 or value.max() > 127 or offset.min() < -128:
        raise _refusal("groups that leave int8 (code * scale + offset)")
