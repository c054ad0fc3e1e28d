"""The roofline: which share of the ceiling that binds a kernel reaches, over M."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from qserve_jax.benchmarks.ceilings import roofline_share
from qserve_jax.benchmarks.report import Report

Panel = tuple[str, int]
"""A backend and a group size."""


def can_plot() -> bool:
    """Whether matplotlib is installed; it is no dependency."""
    return importlib.util.find_spec("matplotlib") is not None


def roofline_curves(report: Report) -> dict[Panel, dict[str, list[tuple[int, float]]]]:
    """For each backend and group size, for each "N x K": (M, share), M rising."""
    panels: dict[Panel, dict[str, list[tuple[int, float]]]] = {}
    for row in sorted(report["rows"], key=lambda row: row["m"]):
        curves = panels.setdefault((row["backend"], row["group_size"]), {})
        share, _ = roofline_share(row, report["ceilings"])
        curves.setdefault(f"{row['n']}x{row['k']}", []).append((row["m"], share))
    return panels


def plot_roofline(report: Report, path: Path) -> None:
    """Write a picture in the format of the suffix. Raises ValueError where there are no rows."""
    panels = roofline_curves(report)
    if not panels:
        raise ValueError(f"there is no row to plot into {path}: measure some first")
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(6 * len(panels), 4.5), layout="constrained"
    )
    axes: Any = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, ((backend, group_size), curves) in zip(axes, panels.items(), strict=True):
        for label, points in curves.items():
            ax.plot(*zip(*points, strict=True), marker="o", label=label)
        kind = "per channel" if group_size == -1 else f"group size {group_size}"
        ax.set(title=f"{backend}, {kind}", xlabel="M (tokens)", ylim=(0, 1.05))
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.grid(alpha=0.3)
        ax.legend(title="N x K", fontsize="small")
    axes[0].set_ylabel("share of the ceiling that binds")
    figure.suptitle(f"W4A8 matmul on {report['device']}")
    figure.savefig(path)
