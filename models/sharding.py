"""Tensor parallelism, the plan: which part of every parameter each device of a mesh holds.

As in Megatron-LM (Shoeybi et al. 2019): q/k/v and gate/up are cut along their output features, by
heads and by F; o and down along their inputs, so that a block needs one sum over the devices; the
embedding and the head along the vocabulary; the cache along its KV heads. All else is on every
device. Ranks are the devices of a mesh with one axis, of any name.

What does not divide is made to, without a change of the function: KV heads are repeated where there
are fewer of them than ranks, F gets channels and the vocabulary rows of zeros at the end.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qserve_jax.models.config import ModelConfig
from qserve_jax.quantization.qtensor import is_quantized

AXIS = "tensor"
"""The name of the axis of our own meshes."""

QUERIES, KEYS = ("q_proj",), ("k_proj", "v_proj", "key_center")
FFN, VOCABULARY = ("gate_proj", "up_proj"), ("embed", "lm_head")
FUSED = ("qkv_proj", "gate_up_proj")  # of a prepared tree: each rank's parts side by side
EXCHANGE = "exchange"
"""Of a prepared tree: the flags of the kernel that sums over ranks, i32[ranks * flag_words()]."""
OUT = (*QUERIES, *KEYS, *FFN, *VOCABULARY, *FUSED, EXCHANGE)
IN = ("o_proj", "down_proj")

# Of each array the axis of its output features (heads, vocabulary) and that of its inputs.
AXES = {
    **{"kernel": (-1, -2), "bias": (-1, None), "embedding": (-2, None), "center": (-2, None)},
    "flags": (-1, None),
    **{name: (-2, -1) for name in ("codes", "group_scale", "group_offset")},
    **{name: (-1, None) for name in ("channel_scale", "scaled_zero")},
}
PACKED_AXES = AXES | {"codes": (-4, -3), "group_scale": (None,) * 2, "group_offset": (None,) * 2}
"""Of containers in the kernels' layout, [N/64, K/128, ...], whose group scales lie in the codes."""


def tensor_mesh(size: int) -> Mesh | None:
    """A mesh of `size` devices; None for one, which needs none.

    Raises ValueError where there are fewer, and where several processes would not take all theirs.
    """
    devices = jax.devices()
    if size > len(devices):
        raise ValueError(
            f"tensor_parallel_size={size} but JAX sees {len(devices)} "
            f"{devices[0].platform} device(s): use at most {len(devices)}"
        )
    if jax.process_count() > 1 and size != len(devices):
        raise ValueError(
            f"tensor_parallel_size={size} but {jax.process_count()} processes have {len(devices)} "
            f"devices: use {len(devices)}"
        )
    return None if size == 1 else Mesh(np.array(devices[:size]), (AXIS,), (AxisType.Auto,))


def checked_mesh(mesh: Mesh | None) -> Mesh | None:
    """The mesh with automatic sharding outside of our functions; None where it has one device.

    Raises ValueError unless it has one axis.
    """
    if mesh is None or mesh.size == 1:
        return None
    if len(mesh.axis_names) != 1:
        raise ValueError(f"mesh has axes {mesh.axis_names}: give one with a single axis")
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,))


def _up(size: int, unit: int) -> int:
    return math.ceil(size / unit) * unit


def _even_ffn(f: int, ranks: int) -> int:
    """F with channels of zeros: whole groups of 128 for each rank, or pairs of 4-bit codes.

    An F without groups gets none: its kernels are quantised per channel.
    """
    if f % 128 == 0:
        return _up(f, 128 * ranks)
    even = _up(f, 2 * ranks)
    return even if even % 128 else even + 2 * ranks


def even_config(config: ModelConfig, ranks: int) -> ModelConfig:
    """The config of the same function whose KV heads, F and vocabulary `ranks` divide."""
    return dataclasses.replace(
        config,
        num_kv_heads=max(config.num_kv_heads, ranks),
        intermediate_size=_even_ffn(config.intermediate_size, ranks),
        vocab_size=_up(config.vocab_size, ranks),
    )


def rank_config(even: ModelConfig, ranks: int) -> ModelConfig:
    """The config of one rank's part: a decoder of fewer heads and a smaller F and vocabulary."""
    return dataclasses.replace(
        even,
        num_heads=even.num_heads // ranks,
        num_kv_heads=even.num_kv_heads // ranks,
        intermediate_size=even.intermediate_size // ranks,
        vocab_size=-(-even.vocab_size // ranks),
    )


def divides(config: ModelConfig, ranks: int, group_size: int = -1) -> bool:
    """Whether all ranks can have as many heads, KV heads repeated where there are fewer.

    group_size: of 4-bit kernels, -1 for none: no group of o's inputs may lie on two ranks.
    """
    n, k = config.num_heads, config.num_kv_heads
    inputs = n * config.head_dim
    grouped = group_size > 0 and inputs % group_size == 0
    whole = not grouped or inputs % (ranks * group_size) == 0
    return n % ranks == 0 and (k % ranks == 0 or ranks % k == 0) and whole


def check_ranks(config: ModelConfig, ranks: int, group_size: int = -1) -> None:
    """Raises ValueError, naming the sizes that would do, unless `divides`."""
    if divides(config, ranks, group_size):
        return
    sizes = [str(i) for i in range(1, config.num_heads + 1) if divides(config, i, group_size)]
    groups = f" in groups of {group_size} inputs" if group_size > 0 else ""
    cure = ", or quantise with group_size=-1" if divides(config, ranks) else ""
    raise ValueError(
        f"tensor_parallel_size={ranks} does not divide {config.num_heads} query and "
        f"{config.num_kv_heads} KV heads of {config.head_dim}{groups}: "
        f"use {' or '.join(sizes)}{cure}"
    )


class Part(NamedTuple):
    """start:stop of an axis."""

    axis: int
    start: int
    stop: int


def checkpoint_part(
    config: ModelConfig, path: str, shape: tuple[int, ...], rank: int, ranks: int
) -> Part | None:
    """What a rank reads of a tensor in a checkpoint; None for all of it.

    config: of the checkpoint. path: of the canonical leaf, names joined by "/".
    shape: of one layer's tensor; kernels are [N, K] as in Hugging Face.
    start == stop where the rank holds zeros only.
    """
    owner, name = path.split("/")[-2:]
    if owner in KEYS and config.num_kv_heads < ranks:
        head = rank * config.num_kv_heads // ranks
        size = shape[0] // config.num_kv_heads
        return Part(0, head * size, (head + 1) * size)
    if owner in OUT or (owner in IN and name == "kernel"):
        axis = int(owner in IN)
        size = shape[axis]
        ffn = owner in FFN or owner == "down_proj"
        width = (_even_ffn(size, ranks) if ffn else _up(size, ranks)) // ranks
        return Part(axis, min(rank * width, size), min((rank + 1) * width, size))
    return None


def param_specs(params: Any, axis: str) -> Any:
    """The tree with a PartitionSpec for each array; canonical or prepared, whole or of shapes."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    return treedef.unflatten(leaf_specs(path, leaf, axis) for path, leaf in leaves)


def leaf_specs(path: Any, leaf: Any, axis: str) -> Any:
    """The PartitionSpecs of a leaf, an array or a container, at a key path of the tree."""
    owner, name = path[-2].key, path[-1].key
    if not is_quantized(leaf):
        return _spec(AXES.get(name), owner, leaf.ndim, axis)
    table = AXES if getattr(leaf, "layout", "canonical") == "canonical" else PACKED_AXES
    return jax.tree_util.tree_map_with_path(
        lambda field, x: _spec(table[field[-1].name], owner, x.ndim, axis), leaf
    )


def _spec(axes: tuple[int | None, int | None] | None, owner: str, ndim: int, axis: str) -> P:
    cut = None if axes is None else axes[0] if owner in OUT else axes[1] if owner in IN else None
    return P() if cut is None else P(*[None] * (ndim + cut), axis)


def cache_spec(axis: str) -> P:
    """Of the pages of a `KVCache`, [L, P, K, ...]."""
    return P(None, None, axis)


def shardings(specs: Any, mesh: Mesh) -> Any:
    """The tree of PartitionSpecs as NamedShardings."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P)
    )


def ranks_of(mesh: Mesh | None) -> int:
    """How many devices share a model."""
    return 1 if mesh is None else mesh.size


def axis_of(mesh: Mesh) -> str:
    """The name of the mesh's one axis."""
    return mesh.axis_names[0]
