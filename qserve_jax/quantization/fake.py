"""Quantisation-aware training: weights as quantisation returns them, with gradients through it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax

from qserve_jax.quantization.config import QuantConfig
from qserve_jax.quantization.params import (
    DEFAULT_CONFIG,
    Plan,
    announce_fallbacks,
    dequantize_kernel,
    plan_leaf,
    quantize_leaf,
)
from qserve_jax.quantization.qtensor import Array, is_quantized
from qserve_jax.quantization.rules import Rule


def fake_quantize_params(
    params: Any,
    config: QuantConfig = DEFAULT_CONFIG,
    rules: Sequence[Rule] | None = None,
    *,
    strict: bool = False,
) -> Any:
    """The same tree of float arrays, each matmul weight replaced by what it is after quantisation.

    Equals `dequantize_params(quantize_params(params, config, rules=rules))` exactly; the gradient
    passes straight through (the derivative of rounding is taken as 1: Bengio et al. 2013,
    arXiv:1308.3432). Call it in the loss:

        loss = lambda p: cross_entropy(model.apply({"params": fake_quantize_params(p, config)}, x))

    and train the float `params` with its gradient. Which leaves, warnings, `strict` and errors are
    those of `quantize_params`. Works under jit, grad, vmap and scan, and keeps shardings.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    planned = [plan_leaf(path, leaf, config, rules) for path, leaf in leaves]
    announce_fallbacks(planned, strict)
    return treedef.unflatten(
        [
            leaf if leaf_plan.source is None else straight_through(leaf, leaf_plan)
            for (_, leaf), (_, leaf_plan) in zip(leaves, planned, strict=True)
        ]
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def straight_through(w: Array, leaf_plan: Plan) -> Array:
    """Quantise and dequantise w as its plan says; its derivative is the identity."""
    return dequantize_kernel(quantize_leaf(w, leaf_plan))


@straight_through.defjvp
def _straight_through_jvp(leaf_plan: Plan, primals: Any, tangents: Any) -> tuple[Array, Array]:
    return straight_through(primals[0], leaf_plan), tangents[0]
