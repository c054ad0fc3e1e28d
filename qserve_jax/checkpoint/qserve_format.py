"""Published QServe checkpoints (mit-han-lab), in and out.

Per linear: `qweight` int8 [N, K/2] and `s1_scales` float16 [N]; per channel `s1_szeros` float16 [N]
= z * s1; with groups of 128 `s2_scales` and `s2_zeros` int8 [K/128, N]. There

    w = s1 * w8,  w8 = int8((code * s2 + s2_zero) mod 256)

which reads both generations of the converter: s2_zero is -z * s2 for a 4-bit zero point and -z for
an 8-bit one. Codes lie as the reference's tensor-core instructions want them: of channel n and
input k in the byte

    ((n >> 5) * (K / 32) + (k >> 5)) * 512 + (((n & 7) << 2) | ((k >> 2) & 3)) * 16
        + ((((k >> 4) & 1) << 1) | ((n >> 3) & 1)) * 4 + (k & 3)

of the flattened qweight, in the high nibble where bit 4 of n is set. Channels of the rows of
s2_scales and s2_zeros come in one of two orders (S2_ORDERS), and nothing in the file says which.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from qserve_jax.checkpoint.atomic import atomic_folder, copy_companions, write_json, write_shards
from qserve_jax.checkpoint.errors import CheckpointError, listing
from qserve_jax.checkpoint.export import config_to_hf
from qserve_jax.checkpoint.hf import TensorSpec, read_rows
from qserve_jax.checkpoint.native import by_layer, checked_leaves, float_tensor
from qserve_jax.checkpoint.packed import (
    PROJECTIONS,
    Field,
    Packing,
    field_name,
    kernel_sizes,
)
from qserve_jax.models.config import ModelConfig
from qserve_jax.quantization.packing import pack_nibbles, unpack_nibbles
from qserve_jax.quantization.qtensor import Array, W4PerChannel, W4PerGroup, is_quantized

METHOD = "qoq"
GROUP = 128
S2_ORDERS = {"tile32": 4, "tile16": 2}
"""Channels n, n + 8, ... of 32 (or 16) side by side: 0, 8, 16, 24, 1, ... or 0, 8, 1, 9, ...; the
value is how many. The first is that of the published checkpoints."""
AMBIGUITY = 1.5
"""The statistic of the wrong order is about 4 times that of the right one; below this many times,
nothing is decided."""


# The file's layout <-> codes


def codes_from_qweight(qweight: Array) -> Array:
    """int8[N, K/2] as in the file -> codes u8[N, K]."""
    n, half = qweight.shape
    octets = jax.lax.bitcast_convert_type(qweight, jnp.uint8)
    # N/32, K/32, n & 7, k >> 2 & 3, k >> 4 & 1, n >> 3 & 1, k & 3; the nibble is n >> 4 & 1
    octets = octets.reshape(n // 32, half // 16, 8, 4, 2, 2, 4)
    nibbles = jnp.stack([octets & 15, octets >> 4])
    return nibbles.transpose(1, 0, 6, 3, 2, 5, 4, 7).reshape(n, 2 * half)


def qweight_from_codes(codes: Array) -> Array:
    """The inverse of `codes_from_qweight`. N and K are multiples of 32."""
    n, k = codes.shape
    nibbles = codes.reshape(n // 32, 2, 2, 8, k // 32, 2, 4, 4).transpose(1, 0, 4, 3, 6, 5, 2, 7)
    octets = nibbles[0] | (nibbles[1] << 4)
    return jax.lax.bitcast_convert_type(octets.reshape(n, k // 2), jnp.int8)


def from_s2_order(rows: Array, order: str) -> Array:
    """[K/128, N] as in the file -> [N, K/128] with channels in their own order."""
    groups, n = rows.shape
    side = S2_ORDERS[order]
    tiles = rows.reshape(groups, n // (8 * side), 8, side)
    return tiles.transpose(1, 3, 2, 0).reshape(n, groups)


def to_s2_order(values: Array, order: str = "tile32") -> Array:
    """The inverse of `from_s2_order`."""
    n, groups = values.shape
    side = S2_ORDERS[order]
    tiles = values.reshape(n // (8 * side), side, 8, groups)
    return tiles.transpose(3, 0, 2, 1).reshape(groups, n)


# In


@functools.partial(jax.jit, static_argnums=0)
def _decode_group(order: str, qweight: Array, s1: Array, s2: Array, zeros: Array) -> list[Array]:
    scale = jax.lax.bitcast_convert_type(from_s2_order(s2, order), jnp.uint8)
    codes = pack_nibbles(codes_from_qweight(qweight))
    return [codes, s1.astype(jnp.float32), scale, from_s2_order(zeros, order)]


@jax.jit
def _decode_channel(qweight: Array, s1: Array, szeros: Array) -> list[Array]:
    codes = pack_nibbles(codes_from_qweight(qweight))
    return [codes, s1.astype(jnp.float32), szeros.astype(jnp.float32)]


def qserve_group_size(specs: Mapping[str, TensorSpec]) -> int | None:
    """128 or -1 by the names of the tensors; None where they are not those of the format."""
    if not any(name.endswith(".s1_scales") for name in specs):
        return None
    return GROUP if any(name.endswith(".s2_scales") for name in specs) else -1


def qserve_packings(
    config: ModelConfig, group_size: int, s2_order: str = "tile32"
) -> dict[str, Packing]:
    """How each projection lies in the file.

    Raises CheckpointError where a projection's sizes are none that the format has.
    """
    check_sizes(config, group_size)
    packings = {}
    for path, (n, k) in kernel_sizes(config).items():
        fields = (Field("qweight", (n, k // 2), ("I8",)), Field("s1_scales", (n,), ("F16",)))
        if group_size == -1:
            fields += (Field("s1_szeros", (n,), ("F16",)),)
            packings[path] = Packing(fields, _decode_channel)
            continue
        fields += tuple(Field(x, (k // GROUP, n), ("I8",)) for x in ("s2_scales", "s2_zeros"))
        packings[path] = Packing(fields, functools.partial(_decode_group, s2_order))
    return packings


def check_sizes(config: ModelConfig, group_size: int) -> None:
    """Raises CheckpointError, naming the projections whose N or K the format's tiles do not fit."""
    unit = 32 if group_size == -1 else GROUP
    wrong = [
        f"{path} N={n} K={k}" for path, (n, k) in kernel_sizes(config).items() if n % 32 or k % unit
    ]
    if wrong:
        raise CheckpointError(
            f"QServe's format needs N a multiple of 32 and K of {unit}: {listing(wrong)} are not; "
            "use the native format"
        )


def find_s2_order(folder: Path, specs: Mapping[str, TensorSpec]) -> str:
    """The order of S2_ORDERS in which the rows of s2 lie, told from the first layer.

    Weights of a group average to about zero if its scale and zero point are its own. The statistic
    is the mean over groups of |mean of code * s2 + s2_zero|. Raises CheckpointError where that of
    one order is not AMBIGUITY times that of the other.
    """
    modules = [n.removesuffix(".s2_scales") for n in specs if n.endswith(".s2_scales")]
    layer = [m for m in modules if ".layers.0." in m] or modules
    totals = dict.fromkeys(S2_ORDERS, 0.0)
    for module in layer:
        fields = ("qweight", "s2_scales", "s2_zeros")
        arrays = [_read(f"{module}.{field}", specs) for field in fields]
        for order in totals:
            totals[order] += float(_mean_offset(*arrays, order=order))
    right, wrong = sorted(totals, key=lambda order: totals[order])
    if not totals[wrong] > AMBIGUITY * totals[right]:
        shown = ", ".join(f"{order} {value:.3g}" for order, value in totals.items())
        raise CheckpointError(
            f"{folder}: the order of s2_scales cannot be told (mean offsets {shown}, less than "
            f"{AMBIGUITY} times apart): name it by s2_order, one of {', '.join(S2_ORDERS)}"
        )
    return right


def _read(name: str, specs: Mapping[str, TensorSpec]) -> np.ndarray:
    if name not in specs:
        raise CheckpointError(f"{name} is missing: download the whole checkpoint")
    return read_rows(specs[name], 0, specs[name].shape[0])


@functools.partial(jax.jit, static_argnames="order")
def _mean_offset(qweight: Array, s2: Array, zeros: Array, *, order: str) -> Array:
    scale, offset = (from_s2_order(x, order).astype(jnp.float32) for x in (s2, zeros))
    codes = codes_from_qweight(qweight).reshape(*scale.shape, GROUP).astype(jnp.float32)
    return jnp.abs(codes.mean(axis=-1) * scale + offset).mean()


# Out


def export_qserve(
    path: str | os.PathLike[str],
    params: Mapping[str, Any],
    config: ModelConfig,
    *,
    source: Path | None = None,
    progress: bool = False,
) -> float:
    """Write a QServe checkpoint (order tile32, float16) to the new directory `path`.

    params: the canonical tree, all projections W4PerChannel, or all W4PerGroup with groups of 128.
    source: a directory whose tokenizer and generation_config.json are copied, None for none.
    config.json says what SGLang reads: {"quant_method": "qoq", "wbits": 4, "group_size": ...}.
    Tied embeddings are written twice, because the reference's loader knows no ties.

    Returns the largest relative error of rounding scales and zero points to float16: 0 where they
    were quantised with `QuantConfig(scale_dtype="float16")` or imported, below 2**-11 otherwise for
    scales from 2**-14 on. Codes and level-2 scales are kept exactly. Atomic (atomic.py).

    Raises CheckpointError where `path` exists, and ValueError for a tree that is not of this kind,
    sizes that the format's tiles do not fit, and values that float16 cannot hold.
    """
    leaves = checked_leaves(params, config)
    group_size = _common_group_size([leaves[f"layers/{name}/kernel"] for name in PROJECTIONS])
    check_sizes(config, group_size)
    hf = config_to_hf(dataclasses.replace(config, dtype="float16")) | {
        "quantization_config": {"quant_method": METHOD, "wbits": 4, "group_size": group_size}
    }
    errors = [0.0]
    with atomic_folder(path) as folder:
        copy_companions(source, folder)
        found = _tensors(leaves, config, errors)
        write_shards(folder, tqdm(found, "Writing weights", unit="tensor", disable=not progress))
        write_json(folder / "config.json", hf)
    return max(errors)


def _common_group_size(kernels: list[Any]) -> int:
    sizes = {getattr(kernel, "group_size", -1) for kernel in kernels}
    kinds = {type(kernel) for kernel in kernels}
    if len(kinds) > 1 or not kinds <= {W4PerGroup, W4PerChannel} or not sizes <= {-1, GROUP}:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(
            f"QServe's format has 4-bit weights of one kind, per channel or in groups of {GROUP}, "
            f"not {found}: quantise to 4 bits with group_size=-1, or use the native format"
        )
    return sizes.pop()


def _tensors(
    leaves: Mapping[str, Any], config: ModelConfig, errors: list[float]
) -> Iterator[tuple[str, np.ndarray]]:
    for name, target in by_layer(config):
        leaf = leaves[target.path]
        if not is_quantized(leaf):
            yield name, _as_float16(name, float_tensor(leaf, target))
            continue
        one = jax.tree.map(lambda x, layer=target.layer: x[layer], leaf)
        for field, array in _encode(one).items():
            key, value = field_name(name, field), np.asarray(array)
            if field in ("s1_scales", "s1_szeros"):
                exact, value = value, _as_float16(key, value)
                errors.append(_relative_error(key, exact, value))
            yield key, value
    if config.tie_embeddings:
        yield "lm_head.weight", _as_float16("lm_head.weight", np.asarray(leaves["embed/embedding"]))


@jax.jit
def _encode(w: W4PerGroup | W4PerChannel) -> dict[str, Array]:
    fields = {"qweight": qweight_from_codes(unpack_nibbles(w.codes)), "s1_scales": w.channel_scale}
    if isinstance(w, W4PerChannel):
        return fields | {"s1_szeros": w.scaled_zero}
    scale = jax.lax.bitcast_convert_type(w.group_scale, jnp.int8)
    return fields | {"s2_scales": to_s2_order(scale), "s2_zeros": to_s2_order(w.group_offset)}


def _as_float16(name: str, tensor: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = tensor.astype(np.float16)
    if not np.isfinite(rounded).all():
        raise ValueError(f"{name} is not finite in float16, QServe's dtype: use the native format")
    return rounded


def _relative_error(name: str, exact: np.ndarray, rounded: np.ndarray) -> float:
    """Largest |rounded - exact| / |exact|, at most 1/16 (four bits are kept of a scale)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.abs(rounded.astype(np.float32) - exact) / np.abs(exact)
    worst = float(np.nan_to_num(error).max(initial=0))
    if worst > 1 / 16:
        n = int(np.nan_to_num(error).argmax())
        raise ValueError(
            f"{name}[{n}] = {exact[n]:.3g} is too small for float16, QServe's dtype: use the "
            "native format"
        )
    return worst
