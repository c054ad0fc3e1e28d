"""Edits of one linear layer {"kernel": [..., K, N], "bias": [..., N]} that others must undo.

All compute in float32 and return the leaves' own dtypes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Params = dict[str, Any]


def update_layers(params: Params, **changes: Params) -> Params:
    """The tree with some of its `layers` replaced."""
    return {**params, "layers": {**params["layers"], **changes}}


def in_float32(function: Callable[[Array], Array], w: Array) -> Array:
    """function(w) computed in float32, in w's dtype."""
    return function(w.astype(jnp.float32)).astype(w.dtype)


def scale_inputs(p: Params, s: Array) -> Params:
    """Row k of the kernel times s[..., k]: for inputs that were divided by s."""
    return {**p, "kernel": in_float32(lambda w: w * s[..., :, None], p["kernel"])}


def scale_outputs(p: Params, s: Array) -> Params:
    """Output n, bias included, times s[..., n]."""
    scaled = {"kernel": in_float32(lambda w: w * s[..., None, :], p["kernel"])}
    if "bias" in p:
        scaled["bias"] = in_float32(lambda b: b * s, p["bias"])
    return {**p, **scaled}


def rotate_inputs(p: Params, q: Array) -> Params:
    """For inputs x @ q instead of x, q [K, K] orthogonal."""
    return {**p, "kernel": in_float32(lambda w: matmul(q.T, w), p["kernel"])}


def rotate_outputs(p: Params, q: Array) -> Params:
    """Outputs, bias included, @ q [N, N]."""
    return {name: in_float32(lambda w: matmul(w, q), leaf) for name, leaf in p.items()}


def take_inputs(p: Params, order: Array) -> Params:
    """For inputs x[order]: row i becomes row order[..., i] (order i32[..., K])."""
    return {**p, "kernel": jnp.take_along_axis(p["kernel"], order[..., :, None], axis=-2)}


def take_outputs(p: Params, order: Array) -> Params:
    """Output i, bias included, becomes output order[..., i] (order i32[..., N])."""
    taken = {"kernel": jnp.take_along_axis(p["kernel"], order[..., None, :], axis=-1)}
    if "bias" in p:
        taken["bias"] = jnp.take_along_axis(p["bias"], order, axis=-1)
    return {**p, **taken}


def matmul(x: Array, y: Array) -> Array:
    """x @ y in full float32."""
    return jnp.matmul(x, y, precision="highest")
