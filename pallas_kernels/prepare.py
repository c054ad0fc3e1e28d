"""From the canonical parameter tree to what a backend reads fastest. Applied once, at load."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax.pallas_kernels.backend import usable
from qserve_jax.pallas_kernels.w4a8_matmul.layout import fits, to_kernel_layout
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


def prepare_for_backend(
    params: dict, backend: str | None = None, *, act_bits: int = 8, in_place: bool = False
) -> dict:
    """The tree a model runs fastest with: q/k/v fused to `qkv_proj`, gate/up to `gate_up_proj`.

    params: a canonical tree (docs/architecture.md), float or quantised. Models accept both trees
    and give the same integers. Projections quantised in different ways are left apart.
    backend: the one it will run on, None for the first that can run here. For the Mosaic backends
      4-bit kernels are also packed (`layout.to_kernel_layout`), shapes permitting.
    act_bits: of the config; with 16 nothing is packed, since no kernel multiplies by floats.
    in_place: turn `params` itself, plain dicts, into the fused tree and return it. Parts are
      dropped once they are fused, so that besides the result only the parts of one projection are
      in memory; otherwise all parts stay, as long as the caller keeps `params`.

    Raises ValueError on an unknown backend, and in place where params["layers"] is no dict.
    """
    pack = act_bits == 8 and any(name != "reference" for name in usable(backend))
    layers = params["layers"]
    if in_place and not isinstance(layers, dict):
        raise ValueError(
            f"in_place=True needs plain dicts, got {type(layers).__name__}: pass in_place=False"
        )
    layers = layers if in_place else dict(layers)
    for fused, names in FUSED.items():
        if all(name in layers for name in names) and _fusable([layers[name] for name in names]):
            layers[fused] = _fuse([layers.pop(name) for name in names])
    for name in [name for name in layers if pack and fits(layers[name].get("kernel"))]:
        packed = pack_layers(layers[name]["kernel"])
        layers[name] = {**layers[name], "kernel": jax.block_until_ready(packed)}
    return params if in_place else {**params, "layers": layers}


def _fuse(parts: list[dict]) -> dict:
    """One projection of several. Waits for it: until then the runtime holds the parts."""
    fused = {key: concatenate_out([part[key] for part in parts]) for key in parts[0]}
    return jax.block_until_ready(fused)


@jax.jit
def pack_layers(w: Any) -> Any:
    """A stacked container in the kernel's layout; layer by layer, for the memory it takes."""
    return jax.lax.map(to_kernel_layout, w)
