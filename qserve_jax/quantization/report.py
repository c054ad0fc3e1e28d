"""What quantize_params would do to a tree, and the bytes it saves, from shapes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qserve_jax.quantization.config import QuantConfig
from qserve_jax.quantization.params import DEFAULT_CONFIG, plan_leaf, quantize_leaf
from qserve_jax.quantization.qtensor import Source, is_quantized, nbytes
from qserve_jax.quantization.rules import Rule


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """One leaf. `reason` says why it is left in float, or is not quantised as the config asks.

    axes: how its axes are taken, for example "stack 8 · K 256 · N 4x32"; empty where it is left as
      it is.
    """

    path: str
    shape: tuple[int, ...]
    axes: str
    scheme: str
    reason: str
    bytes_before: int
    bytes_after: int

    @property
    def changed(self) -> bool:
        """Whether quantize_params replaces the leaf by a container."""
        return self.scheme.startswith("w")


@dataclasses.dataclass(frozen=True)
class QuantizationReport:
    """One row per leaf of the tree. `print` shows a table; `to_dict` is for JSON."""

    config: QuantConfig
    rows: tuple[LeafReport, ...]

    @property
    def bytes_before(self) -> int:
        """Bytes of the whole tree as it is."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of the whole tree after quantize_params."""
        return sum(row.bytes_after for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Config, totals and rows as plain Python values."""
        return dataclasses.asdict(self) | {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def __str__(self) -> str:
        rows = [_cells(row) for row in self.rows]
        changed = [row for row in self.rows if row.changed]
        totals = [_total("total", self.rows), _total("quantised leaves", changed)]
        header = ("path", "shape", "axes", "scheme", "bytes", "after", "ratio", "reason")
        title = (
            f"{self.config.precision}, group_size {self.config.group_size}: "
            f"{len(changed)} of {len(self.rows)} leaves quantised"
        )
        return f"{title}\n{_table([header, *rows, *totals])}"


def quantization_report(
    params: Any,
    config: QuantConfig = DEFAULT_CONFIG,
    *,
    rules: Sequence[Rule] | None = None,
) -> QuantizationReport:
    """How quantize_params(params, config, rules=rules) treats each leaf, and the bytes it saves.

    params: a pytree of arrays or ShapeDtypeStructs (`jax.eval_shape` of the initialiser is enough);
    nothing is computed. Both functions ask `params.plan`, so they agree by construction.
    Raises ValueError where quantize_params would.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    return QuantizationReport(config, tuple(_row(*leaf, config, rules) for leaf in leaves))


def _row(path: Any, leaf: Any, config: QuantConfig, rules: Sequence[Rule] | None) -> LeafReport:
    name, leaf_plan = plan_leaf(path, leaf, config, rules)
    if is_quantized(leaf):
        size = nbytes(leaf)
        kind = type(leaf).__name__
        return LeafReport(name, leaf.codes.shape, "", kind, leaf_plan.reason, size, size)
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    before = after = nbytes(leaf)
    axes = ""
    if leaf_plan.source is not None:
        axes = _axes(leaf.shape, leaf_plan.source)
        struct = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        after = nbytes(jax.eval_shape(lambda w: quantize_leaf(w, leaf_plan), struct))
    return LeafReport(name, leaf.shape, axes, leaf_plan.scheme, leaf_plan.reason, before, after)


def _axes(shape: tuple[int, ...], source: Source) -> str:
    """Sizes of the stack, "in" and "out" axes, as in `LeafReport.axes`."""
    pairs = zip(shape, source.roles, strict=True)
    stack = tuple(size for size, role in pairs if role == "stack")
    sizes = {"stack": stack, "K": source.in_shape, "N": source.out_shape}
    return " · ".join(f"{name} {_times(axes)}" for name, axes in sizes.items() if axes)


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _cells(row: LeafReport) -> tuple[str, ...]:
    sizes = _sizes(row.bytes_before, row.bytes_after)
    return (row.path, _times(row.shape) or "scalar", row.axes, row.scheme, *sizes, row.reason)


def _total(name: str, rows: Sequence[LeafReport]) -> tuple[str, ...]:
    before, after = sum(r.bytes_before for r in rows), sum(r.bytes_after for r in rows)
    return (name, "", "", "", *_sizes(before, after), "")


def _sizes(before: int, after: int) -> tuple[str, str, str]:
    return f"{before:,}", f"{after:,}", f"{after / before:.3f}" if before else "-"


def _table(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = {4, 5, 6}  # bytes, after, ratio: aligned to the right
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in numeric else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
