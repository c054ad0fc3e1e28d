"""Quantisation of parameter pytrees: which leaves, by which scheme, and back again."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import re
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import FlattenedIndexKey, GetAttrKey, KeyPath

from qserve_jax.quantization.config import QuantConfig
from qserve_jax.quantization.numerics import (
    quantize_int8,
    quantize_per_channel,
    quantize_progressive,
)
from qserve_jax.quantization.packing import dequantize_weight, pack_nibbles
from qserve_jax.quantization.qtensor import (
    Array,
    AxisRole,
    QuantizedWeight,
    Source,
    W4PerChannel,
    W4PerGroup,
    W8PerChannel,
    is_quantized,
)
from qserve_jax.quantization.rules import AMBIGUOUS, DEFAULT_RULES, Rule

Scheme = Literal["w4 per-group", "w4 per-channel", "w8 per-channel", "float"]
DEFAULT_CONFIG = QuantConfig()


INTERNAL = tuple(
    os.path.join(folder, "")
    for folder in (os.path.dirname(os.path.dirname(__file__)), os.path.dirname(jax.__file__))
)
"""Folders of code that a warning does not point at, but at the line that called into it."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What happens to one leaf, decided by `plan` from its path, shape and dtype alone.

    source: None where the scheme is "float". reason: why the leaf is left in float, or is not
    quantised as asked. fallback: it is not quantised as asked (a warning, or an error if strict).
    """

    scheme: Scheme
    source: Source | None = None
    group_size: int = -1
    reason: str = ""
    fallback: bool = False
    scale_dtype: str = "float32"
    round_level_one: bool = False


def plan(
    path: str, shape: tuple[int, ...], dtype: Any, rule: Rule | None, config: QuantConfig
) -> Plan:
    """The one place that decides a leaf's scheme. `rule` is the first that matches, or None.

    Raises ValueError where a matching leaf is not float, lacks the axes that the rule names or has
    nothing to contract, and where config is no QuantConfig.
    """
    if not isinstance(config, QuantConfig):
        raise ValueError(f"{config=} is not a QuantConfig: use QuantConfig.preset('w4a8kv4')")
    if rule is None:
        return Plan("float", reason="no rule matches")
    if rule.skip:
        return Plan("float", reason="the rule skips it")
    bits = rule.weight_bits or config.weight_bits
    if bits == 16:
        return Plan("float", reason="weight_bits=16")
    if len(shape) < len(rule.contract) + len(rule.out):
        return Plan("float", reason=f"{len(shape)} axes, fewer than the rule needs")
    source = _source(path, shape, dtype, rule)
    k = math.prod(source.in_shape)
    if k == 0:
        raise ValueError(f"leaf {path!r} of shape {shape} has K=0 inputs: skip it with a Rule")
    group_size = rule.group_size or config.group_size
    if bits == 8:
        return Plan("w8 per-channel", source)
    if k % 2:
        return Plan("float", reason=f"K={k} is odd, 4-bit codes need pairs", fallback=True)
    made = functools.partial(Plan, source=source, scale_dtype=config.scale_dtype)
    if group_size == -1:
        return made("w4 per-channel")
    if k % group_size:
        reason = f"K={k} is not a multiple of group_size={group_size}"
        return made("w4 per-channel", reason=reason, fallback=True)
    rounded = config.round_level_one
    return made("w4 per-group", group_size=group_size, round_level_one=rounded)


def _source(path: str, shape: tuple[int, ...], dtype: Any, rule: Rule) -> Source:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"leaf {path!r} has dtype {dtype}, not a float: skip it with a Rule")
    ndim = len(shape)
    axes = {axis % ndim for axis in rule.contract + rule.out if -ndim <= axis < ndim}
    if len(axes) < len(rule.contract) + len(rule.out) or not (rule.contract and rule.out):
        raise ValueError(
            f"leaf {path!r} of shape {shape} does not fit contract={rule.contract}, "
            f"out={rule.out}: name distinct axes of the leaf in its Rule"
        )
    contract, out = (tuple(sorted(a % ndim for a in named)) for named in (rule.contract, rule.out))
    roles: tuple[AxisRole, ...] = tuple(
        "in" if axis in contract else "out" if axis in out else "stack" for axis in range(ndim)
    )
    return Source(
        roles=roles,
        in_shape=tuple(shape[axis] for axis in contract),
        out_shape=tuple(shape[axis] for axis in out),
        dtype=jax.dtypes.canonicalize_dtype(dtype).name,
    )


def plan_leaf(
    path: KeyPath, leaf: Any, config: QuantConfig, rules: Sequence[Rule] | None
) -> tuple[str, Plan]:
    """(name, plan) of one leaf of a tree, `path` as from `tree_flatten_with_path`."""
    name = path_name(path)
    if is_quantized(leaf):
        return name, Plan("float", reason="already quantised")
    shape = jnp.shape(leaf)
    rule = _matching_rule(name, len(shape), DEFAULT_RULES if rules is None else rules)
    leaf_plan = plan(name, shape, getattr(leaf, "dtype", type(leaf)), rule, config)
    taken = leaf_plan.source is not None or leaf_plan.fallback
    if rules is None and taken and len(shape) > 2 and AMBIGUOUS.search(name):
        leaf_plan = _doubtful(leaf_plan, len(shape))
    return name, leaf_plan


def _matching_rule(name: str, ndim: int, rules: Sequence[Rule]) -> Rule | None:
    matching = [rule for rule in rules if re.search(rule.pattern, name)]
    for rule in matching:
        if rule.skip or len(rule.contract) + len(rule.out) <= ndim:
            return rule
    return matching[0] if matching else None


def _doubtful(leaf_plan: Plan, ndim: int) -> Plan:
    """The plan as a fallback: the default rule may have taken the wrong axes for K and N."""
    cure = "pass rules=FLAX_RULES or MAXTEXT_RULES, or a Rule"
    reason = f"{ndim} axes taken as a stack of [K, N]: {cure}"
    reason += f"; {leaf_plan.reason}" if leaf_plan.reason else ""
    return dataclasses.replace(leaf_plan, reason=reason, fallback=True)


def path_name(path: KeyPath) -> str:
    """The names of a key path joined by "/".

    The last keys are left out while they name the inside of a box around the leaf: `.value` of a
    Flax `Variable` or `Partitioned`, or the bare index of a node that has no key names.
    """
    while path and (path[-1] == GetAttrKey("value") or isinstance(path[-1], FlattenedIndexKey)):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def quantize_params(
    params: Any,
    config: QuantConfig = DEFAULT_CONFIG,
    *,
    rules: Sequence[Rule] | None = None,
    stats: Any = None,
    strict: bool = False,
) -> Any:
    """The same tree with its matmul weights replaced by quantised containers (qtensor.py).

    params: any pytree (plain or Linen dicts, NNX state) of float arrays, on the device or the host.
      A weight that is a nested Python list is no array but a tree of numbers: it stays as it is.
    rules: None takes DEFAULT_RULES, every leaf named `kernel` with at least two axes, [..., K, N].
      Trees of Flax attention need FLAX_RULES, MaxText's MAXTEXT_RULES.
    stats: `ActivationStats` with the Hessians of the 4-bit kernels' inputs: these get their codes
      by GPTQ instead of rounding to nearest, on the same grid. It is `quantize_with_statistics`
      (quantization/transforms), which has more options; `collect_statistics` makes them, named
      after the kernels.
    strict: raise where a leaf cannot be quantised as asked. Otherwise one UserWarning names all
      such leaves: 4-bit with K not a multiple of the group falls to per-channel, with K odd stays
      in float; a kernel of three or more axes named query, key, value or out is, without rules,
      taken for a stack, which Flax and MaxText do not mean.

    Pure: `jax.jit(quantize_params, static_argnums=1)`, `jax.eval_shape` and sharded inputs work
    (a weight sharded over N or a stack axis is quantised where it lies). Outside jit, leaves are
    quantised one at a time, so that a host tree larger than device memory can be fed in parts.
    Leaves that are containers already, and all others, come back as they are. Stack axes come
    first in a container: MaxText's [K, L, N] gives codes [L, N, K/2], to be scanned over axis 0.

    qwix exports a function of the same name with another signature; this one is QoQ's (QServe
    section 4.1, round to nearest).

    Raises ValueError where a matching leaf is not float, lacks the axes its rule names or has K=0,
    where config is no QuantConfig, and where a statistic is missing or of another shape.
    """
    if stats is not None:  # a module above this one, which few callers need
        from qserve_jax.quantization.transforms.weights import quantize_with_statistics

        return quantize_with_statistics(params, config, stats, rules=rules, strict=strict)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    planned = [plan_leaf(path, leaf, config, rules) for path, leaf in leaves]
    announce_fallbacks(planned, strict)
    quantized = [
        quantize_leaf(leaf, leaf_plan)
        for (_, leaf), (_, leaf_plan) in zip(leaves, planned, strict=True)
    ]
    return treedef.unflatten(quantized)


def announce_fallbacks(planned: list[tuple[str, Plan]], strict: bool) -> None:
    """One UserWarning, or ValueError if strict, that names every leaf not quantised as asked."""
    fallbacks = [f"{name} ({p.reason}: {p.scheme})" for name, p in planned if p.fallback]
    if not fallbacks:
        return
    message = f"{len(fallbacks)} leaves cannot be quantised as asked: {', '.join(fallbacks)}"
    if strict:
        raise ValueError(f"{message}; use group_size=-1, rules for them, or strict=False")
    warnings.warn(message, UserWarning, skip_file_prefixes=INTERNAL)


def quantize_leaf(leaf: Any, leaf_plan: Plan) -> Any:
    """The leaf as its plan says: a container, or the leaf itself where the scheme is "float"."""
    return leaf if leaf_plan.source is None else _quantize(leaf, leaf_plan)


@functools.partial(jax.jit, static_argnums=1)
def _quantize(w: Array, leaf_plan: Plan) -> QuantizedWeight:
    source, group_size = leaf_plan.source, leaf_plan.group_size
    assert source is not None
    w = as_n_by_k(_replicate_cut_axes(w, source, group_size), source)
    if leaf_plan.scheme == "w8 per-channel":
        return W8PerChannel(*quantize_int8(w), source)
    if leaf_plan.scheme == "w4 per-channel":
        codes, scale, scaled_zero = quantize_per_channel(w, leaf_plan.scale_dtype)
        return W4PerChannel(pack_nibbles(codes), scale, scaled_zero, source)
    options = leaf_plan.scale_dtype, leaf_plan.round_level_one
    codes, scale, group_scale, offset = quantize_progressive(w, group_size, *options)
    return W4PerGroup(pack_nibbles(codes), scale, group_scale, offset, group_size, source)


def _axes(source: Source, role: AxisRole) -> tuple[int, ...]:
    return tuple(axis for axis, r in enumerate(source.roles) if r == role)


def as_n_by_k(w: Array, source: Source) -> Array:
    """The original layout -> [*stack, N, K]."""
    order = _axes(source, "stack") + _axes(source, "out") + _axes(source, "in")
    w = jnp.transpose(w, order)
    stack = w.shape[: source.roles.count("stack")]
    return w.reshape(*stack, math.prod(source.out_shape), math.prod(source.in_shape))


def _replicate_cut_axes(w: Array, source: Source, group_size: int) -> Array:
    """Under explicit sharding (jax.sharding.AxisType.Explicit) a reshape may not cut a shard.

    So replicate the axes of `w` where `as_n_by_k` or the grouping along K would: a sharded axis
    merged behind another, and K in shards that are no multiple of the group (or of a pair of
    codes). Under automatic sharding types carry no spec, and XLA moves what it must.
    """
    sharding = jax.typeof(w).sharding
    spec = list(sharding.spec)
    contract, out = _axes(source, "in"), _axes(source, "out")
    shards = math.prod(sharding.mesh.shape[name] for name in _mesh_axes(spec[contract[0]]))
    cut = {*contract[1:], *out[1:]}
    if math.prod(source.in_shape) % (shards * max(group_size, 2)):
        cut.add(contract[0])
    if all(spec[axis] is None for axis in cut):
        return w
    spec = [None if axis in cut else names for axis, names in enumerate(spec)]
    return jax.sharding.reshard(w, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def _mesh_axes(names: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def quantize_kernel(
    w: Array,
    config: QuantConfig = DEFAULT_CONFIG,
    contract: tuple[int, ...] = (-2,),
    out: tuple[int, ...] = (-1,),
) -> QuantizedWeight:
    """One kernel -> its container, codes [*stack, N, K] packed as in qtensor.py.

    w: float array in any layout; `contract` and `out` as in `Rule`, the default is [..., K, N].
    Raises ValueError where the config cannot be had: K odd, K not a multiple of the group,
    weight_bits=16, a dtype that is not float, axes that do not exist.
    """
    leaf_plan = plan("kernel", w.shape, w.dtype, Rule("", contract, out), config)
    if leaf_plan.reason:
        raise ValueError(
            f"kernel of shape {w.shape} cannot be quantised to {config.weight_bits} bits: "
            f"{leaf_plan.reason}; use another config (group_size=-1, 8 bits) or leave it in float"
        )
    return quantize_leaf(w, leaf_plan)


@jax.jit
def dequantize_kernel(w: QuantizedWeight) -> Array:
    """A container -> the kernel in its original layout and dtype.

    Leading axes of the codes are the stack axes of the original. Where a slice (of `lax.scan`, or
    `tree.map(lambda x: x[i], w)`) has removed some, the first ones are missing from the result
    too; where `vmap` has added some, they lead the result.
    """
    source = w.source
    value = dequantize_weight(w)
    lead = value.ndim - 2
    value = value.reshape(*value.shape[:-2], *source.out_shape, *source.in_shape)
    value = jnp.transpose(value, _original_order(source, lead))
    return value.astype(source.np_dtype)


def _original_order(source: Source, lead: int) -> list[int]:
    """The transpose from [*lead, *out, *in] to the original order of axes."""
    stacks, outs = source.roles.count("stack"), len(source.out_shape)
    added, missing = max(lead - stacks, 0), max(stacks - lead, 0)
    stack = iter([None] * missing + list(range(added, lead)))
    axes = {"stack": stack, "out": itertools.count(lead), "in": itertools.count(lead + outs)}
    order = [next(axes[role]) for role in source.roles]
    return [*range(added), *(axis for axis in order if axis is not None)]


def dequantize_params(params: Any) -> Any:
    """The tree with each quantised container as a float kernel again, in its layout and dtype."""
    return jax.tree.map(
        lambda leaf: dequantize_kernel(leaf) if is_quantized(leaf) else leaf,
        params,
        is_leaf=is_quantized,
    )
