"""From the canonical parameter tree to what a backend reads fastest. Applied once, at load."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from qserve_jax.pallas_kernels.backend import resolve
from qserve_jax.quantization.qtensor import is_quantized

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Projections that read the same activation are one matmul, side by side along N."""


def concatenate_out(leaves: list[Any], axis: int = -1) -> Any:
    """Join kernels (or biases) along their output features N."""
    first = leaves[0]
    if not is_quantized(first):
        return jnp.concatenate(leaves, axis=axis)
    # N is the last axis of per-channel arrays and the one before the last of codes and groups.
    fields = {}
    for field in dataclasses.fields(first):
        parts = [getattr(leaf, field.name) for leaf in leaves]
        if hasattr(parts[0], "shape"):
            per_channel = field.name in ("channel_scale", "scaled_zero")
            fields[field.name] = jnp.concatenate(parts, axis=-1 if per_channel else -2)
    outs = sum(leaf.source.out_shape[-1] for leaf in leaves)
    source = dataclasses.replace(first.source, out_shape=(outs,))
    return dataclasses.replace(first, source=source, **fields)


def _fusable(parts: list[dict]) -> bool:
    """Same container type and group size, and biases on all or none."""
    kernels = [part["kernel"] for part in parts]
    kinds = {(type(k), getattr(k, "group_size", None)) for k in kernels}
    return len(kinds) == 1 and len({"bias" in part for part in parts}) == 1


def prepare_for_backend(params: dict, backend: str | None = None) -> dict:
    """The tree a model runs fastest with: q/k/v fused to `qkv_proj`, gate/up to `gate_up_proj`.

    params: a canonical tree (docs/architecture.md), float or quantised. Models accept both trees
    and give the same integers. Projections quantised in different ways are left apart.
    backend: the one it will run on; all of them read this form so far.

    Raises ValueError on an unknown backend.
    """
    resolve(backend)
    layers = dict(params["layers"])
    for fused, names in FUSED.items():
        parts = [layers[name] for name in names if name in layers]
        if len(parts) == len(names) and _fusable(parts):
            for name in names:
                del layers[name]
            keys = parts[0].keys()
            layers[fused] = {key: concatenate_out([part[key] for part in parts]) for key in keys}
    return {**params, "layers": layers}
