"""Statistics of the inputs of matmuls over a calibration set, reduced on the device batch by batch.

A statistic is named after the first kernel that reads the input: `layers/q_proj` for q, k and v,
`layers/gate_proj` for gate and up (`input_name`). Beside them `layers/queries` and `layers/keys`
are the heads after the rotary embedding, [..., heads, H].
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputStats:
    """One input X [n, K], or a stack of them, over n tokens.

    absmax f32[..., K] = max_n |X|; moment f32[..., K, K] = X^T X, or None; count f32[...] = n.
    """

    absmax: Array
    moment: Array | None
    count: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ActivationStats:
    """Statistics by name (see the module). A pytree: save it, shard it, slice its layers.

    absmax: f32[..., K], the largest |x| of each channel.
    hessian: f32[..., K, K] = 2 X^T X / n, the second derivative of the squared output error of a
      linear layer (GPTQ, Frantar et al. 2022); empty where it was not asked for.
    """

    absmax: dict[str, Array]
    hessian: dict[str, Array]


ApplyFn = Callable[[Any, Array], Mapping[str, Array | InputStats]]
"""(params, tokens) -> the inputs of matmuls by name, [..., K] each, or already reduced."""


def reduce_input(x: Array, *, moment: bool = False) -> InputStats:
    """x float[..., K] -> its statistics over all leading axes."""
    x = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    second = jnp.einsum("nk,nj->kj", x, x, precision="highest") if moment else None
    # XLA's maximum of float32 over an axis can lose NaN on a CPU (jax 0.11.2 and 0.12.0).
    absmax = jnp.where(jnp.isnan(x).any(axis=0), jnp.nan, jnp.max(jnp.abs(x), axis=0))
    return InputStats(absmax, second, jnp.float32(x.shape[0]))


def collect_statistics(
    apply_fn: ApplyFn,
    params: Any,
    token_batches: Iterable[Array],
    *,
    hessians: bool = False,
    first_layer: int = 0,
) -> ActivationStats:
    """Runs `apply_fn(params, tokens)` over batches and reduces what it returns.

    apply_fn: traceable; for the models of this package `matmul_inputs(model, hessians=...)`
      of qserve_jax.models. For any other, a function that returns the inputs of its matmuls by
      name; only their maxima (and X^T X) leave the device program.
    token_batches: whatever apply_fn takes; one compilation per shape. Sharded batches and params
      stay where they are: the reductions become collectives.
    first_layer: what errors call the first entry of a stack.

    Raises ValueError where there is no batch, or where an input, or with hessians its square, is
    NaN or infinite, by name and index in its stack (the layer).
    """
    total = None
    for tokens in token_batches:
        total = _step(apply_fn, hessians, params, tokens, total)
    if total is None:
        raise ValueError("token_batches is empty: give at least one batch of calibration tokens")
    for name, stats in total.items():
        _check_finite(name, stats.absmax, first_layer)
        if stats.moment is not None:  # squares overflow first
            _check_finite(name, jnp.diagonal(stats.moment, axis1=-2, axis2=-1), first_layer)
    return ActivationStats(
        absmax={name: s.absmax for name, s in total.items()},
        hessian={name: _hessian(s) for name, s in total.items() if s.moment is not None},
    )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _step(apply_fn, hessians, params, tokens, total):
    new = {
        name: x if isinstance(x, InputStats) else reduce_input(x, moment=hessians)
        for name, x in apply_fn(params, tokens).items()
    }
    return new if total is None else {name: _merge(total[name], s) for name, s in new.items()}


def _merge(a: InputStats, b: InputStats) -> InputStats:
    moment = None if a.moment is None or b.moment is None else a.moment + b.moment
    return InputStats(jnp.maximum(a.absmax, b.absmax), moment, a.count + b.count)


def _hessian(s: InputStats) -> Array:
    assert s.moment is not None
    return 2 * s.moment / s.count[..., None, None]


def _check_finite(name: str, absmax: Array, first_layer: int) -> None:
    bad = np.argwhere(~np.isfinite(np.asarray(absmax)))
    if len(bad):
        *stack, channel = map(int, bad[0])
        where = f" of layer {first_layer + stack[0]}" if stack else ""
        raise ValueError(
            f"input {name!r}{where} is not finite in channel {channel}: correct the weights or the "
            "calibration text, or compute in a wider dtype"
        )


SHARED_INPUTS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


def input_name(path: str) -> str:
    """Of a kernel's path (`layers/k_proj/kernel`) the name of its input (`layers/q_proj`)."""
    *stem, last = path.removesuffix("/kernel").split("/")
    return "/".join([*stem, SHARED_INPUTS.get(last, last)])


def statistic(values: dict[str, Array], name: str, shape: tuple[int, ...]) -> Array:
    """values[name]; ValueError unless it is there and has `shape`, as the model's own would."""
    if name not in values:
        known = ", ".join(sorted(values)) or "none"
        raise ValueError(
            f"there is no statistic {name!r} (there are: {known}): collect it, with hessians=True "
            "for GPTQ and clipping"
        )
    found = values[name]
    if found.shape != shape:
        raise ValueError(
            f"statistic {name!r} is {list(found.shape)} but the weights need {list(shape)}: "
            "collect the statistics of this model"
        )
    return found
