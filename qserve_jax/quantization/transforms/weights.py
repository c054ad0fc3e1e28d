"""4-bit weights from statistics: clipping and GPTQ over the kernels of a tree."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax.quantization.config import QuantConfig
from qserve_jax.quantization.numerics import (
    PROTECTIVE_RANGE,
    per_channel_grid,
    progressive_grid,
    quantize_per_channel,
    quantize_progressive,
    scaled_zeros,
)
from qserve_jax.quantization.packing import pack_nibbles
from qserve_jax.quantization.params import (
    Plan,
    announce_fallbacks,
    as_n_by_k,
    plan_leaf,
    quantize_leaf,
)
from qserve_jax.quantization.qtensor import (
    QuantizedWeight,
    W4PerChannel,
    W4PerGroup,
    is_quantized,
)
from qserve_jax.quantization.rules import Rule
from qserve_jax.quantization.transforms.calibration import ActivationStats, input_name, statistic
from qserve_jax.quantization.transforms.clip import clip_range, clip_ratios
from qserve_jax.quantization.transforms.gptq import gptq_codes
from qserve_jax.quantization.transforms.linear import Array


def quantize_with_statistics(
    params: Any,
    config: QuantConfig,
    stats: ActivationStats,
    *,
    gptq: bool = True,
    clip: bool = False,
    rules: Sequence[Rule] | None = None,
    strict: bool = False,
    name_of: Callable[[str], str] = input_name,
) -> Any:
    """`quantize_params` with 4-bit codes by GPTQ, per-channel ranges by clip search, or both.

    stats: with the Hessians of every 4-bit kernel's input, [*stack, K, K].
    gptq: else round to nearest. clip: for per-channel weights only; groups keep their range.
    rules, strict: as in `quantize_params`.
    name_of: a kernel's path -> the name of its input's statistics.

    Pure and traceable with all but params and stats static; layers of a stack are done one at a
    time. Kernels that are not 4-bit are quantised, or left, as by `quantize_params`. Raises
    ValueError where a statistic is missing or of another shape.
    """
    if not isinstance(stats, ActivationStats):
        raise ValueError(
            f"stats={type(stats).__name__} is no ActivationStats: use what collect_statistics "
            "returns with hessians=True"
        )
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    planned = [plan_leaf(path, leaf, config, rules) for path, leaf in leaves]
    announce_fallbacks(planned, strict)
    done = []
    for (_, leaf), (name, plan) in zip(leaves, planned, strict=True):
        if not plan.scheme.startswith("w4"):
            done.append(quantize_leaf(leaf, plan))
            continue
        assert plan.source is not None
        w = as_n_by_k(jnp.asarray(leaf, jnp.float32), plan.source)
        shape = (*w.shape[:-2], w.shape[-1], w.shape[-1])
        hessian = statistic(stats.hessian, name_of(name), shape)
        done.append(_quantize(w, hessian, plan, gptq, clip))
    return treedef.unflatten(done)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _quantize(w: Array, hessian: Array, plan: Plan, gptq: bool, clip: bool) -> QuantizedWeight:
    """w f32[*stack, N, K], hessian f32[*stack, K, K]."""
    one = _per_channel if plan.scheme == "w4 per-channel" else _per_group
    one = functools.partial(one, plan=plan, gptq=gptq, clip=clip)
    if w.ndim == 2:
        return one(w, hessian)
    stack = w.shape[:-2]
    flat = (x.reshape(-1, *x.shape[-2:]) for x in (w, hessian))
    done = jax.lax.map(lambda xs: one(*xs), tuple(flat))
    return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), done)


def _per_channel(w: Array, hessian: Array, *, plan: Plan, gptq: bool, clip: bool) -> W4PerChannel:
    target = clip_range(w, clip_ratios(w, hessian)) if clip else w
    codes, scale, scaled_zero = quantize_per_channel(target, plan.scale_dtype)
    if gptq:
        scale, zero = per_channel_grid(target, plan.scale_dtype)
        codes = gptq_codes(w, hessian, scale[:, None], zero[:, None])
        scaled_zero = scaled_zeros(scale, zero, plan.scale_dtype)
    assert plan.source is not None
    return W4PerChannel(pack_nibbles(codes), scale, scaled_zero, plan.source)


def _per_group(w: Array, hessian: Array, *, plan: Plan, gptq: bool, clip: bool) -> W4PerGroup:
    if not gptq:
        return _rounded_per_group(w, plan)
    options = plan.group_size, plan.scale_dtype, plan.round_level_one
    u, channel_scale, scale, zero = progressive_grid(w, *options)
    codes = gptq_codes(u, hessian, scale, zero, bound=PROTECTIVE_RANGE)
    offset = (-zero * scale).astype(jnp.int8)
    assert plan.source is not None
    return W4PerGroup(
        pack_nibbles(codes),
        channel_scale,
        scale.astype(jnp.uint8),
        offset,
        plan.group_size,
        plan.source,
    )


def _rounded_per_group(w: Array, plan: Plan) -> W4PerGroup:
    options = plan.group_size, plan.scale_dtype, plan.round_level_one
    codes, channel_scale, scale, offset = quantize_progressive(w, *options)
    assert plan.source is not None
    packed = pack_nibbles(codes)
    return W4PerGroup(packed, channel_scale, scale, offset, plan.group_size, plan.source)
