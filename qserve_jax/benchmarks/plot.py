"""Pictures of benchmarks: panels of curves, and the matmul's share of the ceiling that binds it."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qserve_jax.benchmarks.ceilings import roofline_share
from qserve_jax.benchmarks.report import Report

Curves = dict[str, list[tuple[float, float]]]
"""For each label: (x, y), x rising."""
FEW = 10
"""Curves that colours of their own, and a legend within the panel, can tell apart."""


def can_plot() -> bool:
    """Whether matplotlib is installed; it is no dependency."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(
    title: str,
    panels: dict[str, Curves],
    labels: Mapping[str, tuple[str, str]],
    path: Path,
    *,
    line: str = "-",
) -> None:
    """Write a picture in the format of the suffix. Raises ValueError where there are no panels.

    labels: of the axes of each panel. line: "none" for points alone.
    """
    if not panels:
        raise ValueError(f"there is no row to plot into {path}: measure some first")
    many = any(len(curves) > FEW for curves in panels.values())
    columns = math.ceil(len(panels) ** 0.5)
    rows = math.ceil(len(panels) / columns)
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=((7.5 if many else 6) * columns, 4.5 * rows), layout="constrained"
    )
    for index, (name, curves) in enumerate(panels.items()):
        ax: Any = figure.add_subplot(rows, columns, index + 1)
        if len(curves) > FEW:
            colors = importlib.import_module("matplotlib").colormaps["turbo"]
            ax.set_prop_cycle(color=[colors(i / len(curves)) for i in range(len(curves))])
        for label, points in curves.items():
            ax.plot(*zip(*points, strict=True), linestyle=line, marker="o", label=label)
        ax.set(title=name, xlabel=labels[name][0], ylabel=labels[name][1])
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
        beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if many else {}
        ax.legend(fontsize="small", **beside)
    figure.suptitle(title)
    figure.savefig(path)


def roofline_curves(report: Report) -> dict[str, Curves]:
    """For each backend and group size, for each "N x K": (M, share), M rising."""
    panels: dict[str, Curves] = {}
    for row in sorted(report["rows"], key=lambda row: (row["backend"], row["m"])):
        kind = "per channel" if row["group_size"] == -1 else f"groups of {row['group_size']}"
        curves = panels.setdefault(f"{row['backend']}, {kind}", {})
        share, _ = roofline_share(row, report["ceilings"])
        curves.setdefault(f"{row['n']} x {row['k']}", []).append((row["m"], share))
    return panels


def plot_roofline(report: Report, path: Path) -> None:
    """As `draw`: shares of the ceiling that binds, over M."""
    panels = roofline_curves(report)
    labels = dict.fromkeys(panels, ("M (tokens)", "share of the ceiling that binds"))
    draw(f"W4A8 matmul on {report['device']}: N x K", panels, labels, path)
