"""Quantised projections as files hold them: several tensors for each, some in another order.

A format says how by a `Packing` per projection; names, shapes, checks and stacking are here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qserve_jax.checkpoint.key_table import Target, targets
from qserve_jax.models.config import ModelConfig
from qserve_jax.quantization.packing import unpack_nibbles
from qserve_jax.quantization.qtensor import QuantizedWeight, W4PerChannel, W4PerGroup
from qserve_jax.quantization.rules import Rule

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Field:
    """One tensor of a projection, `<module>.<name>`. dtypes: safetensors' names."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Packing:
    """A projection of one layer in a file. Hashable.

    decode: the fields' numpy arrays, in order -> the arrays of the container of one layer, in the
      order of its pytree leaves. Raises ValueError where the container cannot hold them.
    as_stored: they are these arrays, so that a part of one can be read without the rest.
    """

    fields: tuple[Field, ...]
    decode: Callable[..., Sequence[Any]]
    as_stored: bool = False


def packed_targets(config: ModelConfig, packings: Mapping[str, Packing]) -> dict[str, Target]:
    """What a checkpoint must hold: as `key_table.targets`, fields instead of packed weights.

    packings: by the path of the canonical leaf, like layers/q_proj/kernel.
    """
    wanted = {}
    for name, target in targets(config).items():
        if target.path not in packings:
            wanted[name] = target
            continue
        for field in packings[target.path].fields:
            key = field_name(name, field.name)
            wanted[key] = Target(target.path, target.layer, field.shape, field.dtypes)
    return wanted


def field_name(weight: str, field: str) -> str:
    """model.layers.0.mlp.up_proj.weight, codes -> model.layers.0.mlp.up_proj.codes"""
    return f"{weight.removesuffix('.weight')}.{field}"


def kernel_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Path of each projection's kernel -> (N, K)."""
    return {t.path: (t.shape[0], t.shape[1]) for t in targets(config).values() if t.is_kernel}


def scheme_rules(schemes: Mapping[str, Mapping[str, int]]) -> tuple[Rule, ...]:
    """{projection: {weight_bits, group_size}} as rules, which say what `quantize_params` makes."""
    return tuple(
        Rule(
            rf"^layers/{projection}/kernel$",
            weight_bits=scheme["weight_bits"],
            group_size=scheme["group_size"],
        )
        for projection, scheme in schemes.items()
    )


def is_valid(container: QuantizedWeight) -> jax.Array:
    """Whether every stored code gives an int8 and every scale is finite; under jit."""
    arrays = jax.tree.leaves(container)
    floats = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
    finite = jnp.stack([jnp.isfinite(x).all() for x in floats]).all()
    if not isinstance(container, W4PerGroup):
        return finite
    pairs = container.codes.reshape(*container.group_scale.shape, container.group_size // 2)
    for codes in (pairs & 15, pairs >> 4):  # not unpacked, which would need memory
        value = _level_one(codes, container)
        finite &= (value >= -128).all() & (value <= 127).all()
    return finite


def _level_one(codes: Any, w: W4PerGroup) -> Any:
    """code * group_scale + group_offset of codes [N, K/g, ...], int32, without wrapping."""
    scale, offset = (x.astype("int32")[..., None] for x in (w.group_scale, w.group_offset))
    return codes.astype("int32") * scale + offset


def explain_invalid(container: QuantizedWeight) -> str:
    """What makes `is_valid` false: the first offender, with its numbers."""
    scales = [container.channel_scale]
    scales += [container.scaled_zero] if isinstance(container, W4PerChannel) else []
    for scale in map(np.asarray, scales):
        if not np.isfinite(scale).all():
            n = int(np.argmin(np.isfinite(scale)))
            return f"the scale of channel {n} is {scale[n]}: use an intact checkpoint"
    assert isinstance(container, W4PerGroup)
    codes = np.asarray(unpack_nibbles(container.codes))
    grouped = codes.reshape(*container.group_scale.shape, container.group_size)
    value = np.asarray(_level_one(grouped, container))
    n, group, i = np.argwhere((value < -128) | (value > 127))[0]
    k = int(group) * container.group_size + int(i)
    code = int(codes[n, k])
    scale, offset = (int(x[n, group]) for x in (container.group_scale, container.group_offset))
    return (
        f"the stored code {code} of channel {n}, input {k} gives {code} * {scale} + {offset} = "
        f"{value[n, group, i]}, outside int8, which the kernels cannot compute: quantise the float "
        "checkpoint again with a protective range of 119"
    )
