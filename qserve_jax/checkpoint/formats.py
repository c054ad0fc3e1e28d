"""Which kind of checkpoint a directory holds, and how its quantised projections are stored."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qserve_jax.checkpoint import native, qserve_format
from qserve_jax.checkpoint.errors import CheckpointError
from qserve_jax.checkpoint.hf import (
    TensorSpec,
    read_json,
    tensor_specs,
    torch_files,
    weight_files,
)
from qserve_jax.checkpoint.int4_format import METHODS as INT4_METHODS
from qserve_jax.checkpoint.int4_format import check_order, int4_packings, read_int4_config
from qserve_jax.checkpoint.packed import PROJECTIONS, Packing
from qserve_jax.models.config import ModelConfig, brief
from qserve_jax.quantization.config import QuantConfig

FLOAT, NATIVE, ORBAX, QSERVE = "float", "native", "orbax", "qserve"
KNOWN = (native.METHOD, qserve_format.METHOD, *INT4_METHODS)
G_IDX = re.compile(r".*\.g_idx")


@dataclasses.dataclass(frozen=True)
class StoredFormat:
    """A quantised checkpoint. name: native, orbax, qserve, gptq or awq.

    quant_config: what it was quantised to. schemes: {weight_bits, group_size} of each projection.
    specs: of its tensors; none for Orbax. pack: (config, path -> leaf of ShapeDtypeStructs) ->
    packings. ignored: tensors that say nothing new.
    """

    name: str
    quant_config: QuantConfig
    schemes: Mapping[str, Mapping[str, int]]
    specs: Mapping[str, TensorSpec]
    pack: Callable[[ModelConfig, Mapping[str, Any]], Mapping[str, Packing]]
    ignored: re.Pattern[str] | None = None
    centered_keys: bool = False


def find_format(folder: Path, s2_order: str | None = None) -> StoredFormat | None:
    """The quantised format of a directory, None for a float checkpoint (or none at all).

    s2_order: of a QServe checkpoint with groups, one of `qserve_format.S2_ORDERS`; None finds it.
    Told from `quantization_config`, or from the names of the tensors, because the checkpoints that
    the authors of QServe have published say nothing in config.json.
    Raises CheckpointError for variants that cannot be read, and for damaged files.
    """
    if not (folder / "config.json").is_file():
        return None
    hf = read_json(folder / "config.json")
    stored = hf.get("quantization_config")
    method = stored.get("quant_method") if isinstance(stored, Mapping) else None
    if method == native.METHOD:
        return _native(folder, hf)
    if method in INT4_METHODS:
        return _int4(folder, hf)
    if method == qserve_format.METHOD or not stored:
        return _qserve(folder, stored, s2_order)
    return None  # config_from_hf refuses it by name


def _native(folder: Path, hf: Mapping[str, Any]) -> StoredFormat:
    quant_config, schemes, storage = native.read_native_config(hf)
    centered = native.read_centered_keys(hf)
    if storage == "orbax":
        no_packings = lambda config, shapes: {}  # noqa: E731
        return StoredFormat(ORBAX, quant_config, schemes, {}, no_packings, centered_keys=centered)
    specs = tensor_specs(weight_files(folder))
    pack = lambda config, shapes: native.native_packings(shapes)  # noqa: E731
    return StoredFormat(NATIVE, quant_config, schemes, specs, pack, centered_keys=centered)


def _int4(folder: Path, hf: Mapping[str, Any]) -> StoredFormat:
    method, group_size = read_int4_config(hf)
    specs = tensor_specs(weight_files(folder))
    check_order(specs, group_size)
    pack = lambda config, shapes: int4_packings(config, method, group_size)  # noqa: E731
    name = method.removesuffix("_v2")
    return StoredFormat(name, *_uniform(group_size), specs, pack, ignored=G_IDX)


def _qserve(
    folder: Path, stored: Mapping[str, Any] | None, s2_order: str | None
) -> StoredFormat | None:
    orders = qserve_format.S2_ORDERS
    if s2_order is not None and s2_order not in orders:
        raise CheckpointError(f"s2_order {brief(s2_order)} is none of {', '.join(orders)}")
    try:
        specs = tensor_specs(torch_files(folder) or weight_files(folder))
    except CheckpointError:
        if stored or torch_files(folder):
            raise
        return None  # a float checkpoint's reader says it better
    group_size = qserve_format.qserve_group_size(specs)
    declared = (stored or {}).get("group_size", group_size)
    if group_size is None and not stored:
        return None
    if group_size is None or declared != group_size:
        raise CheckpointError(
            f"{folder}: config.json says qoq with group_size {brief(declared)}, the tensors "
            f"{'are not of that format' if group_size is None else group_size}: use the "
            "config.json and the weights of the same checkpoint"
        )
    if group_size != -1 and s2_order is None:
        s2_order = qserve_format.find_s2_order(folder, specs)
    pack = functools.partial(_pack_qserve, group_size, s2_order or "tile32")
    return StoredFormat(QSERVE, *_uniform(group_size), specs, pack)


def _pack_qserve(
    group_size: int, s2_order: str, config: ModelConfig, shapes: Any
) -> Mapping[str, Packing]:
    return qserve_format.qserve_packings(config, group_size, s2_order)


def _uniform(group_size: int) -> tuple[QuantConfig, dict[str, dict[str, int]]]:
    scheme = {"weight_bits": 4, "group_size": group_size}
    return QuantConfig(group_size=group_size), dict.fromkeys(PROJECTIONS, scheme)
