"""The errors of all layers, drawn."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any


def can_plot() -> bool:
    """Whether matplotlib is installed; it is no dependency."""
    return importlib.util.find_spec("matplotlib") is not None


def error_curves(report: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """(layer, error) of the layers' and each projection's output; where the recipe has collected
    none, of the projections' weights."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for part in report["parts"]:
        if "layer" not in part:
            continue
        if "output_error" in part:
            curves.setdefault("whole layer", []).append((part["layer"], part["output_error"]))
        for name, errors in part["projections"].items():
            error = errors.get("output_error", errors["weight_error"])
            curves.setdefault(name, []).append((part["layer"], error))
    return curves


def plot_errors(report: dict[str, Any], path: Path) -> None:
    """Write a picture of what `quantize_checkpoint` returns, in the format of the suffix."""
    figure = importlib.import_module("matplotlib.figure").Figure((8, 4.5), layout="constrained")
    ax: Any = figure.subplots()
    for name, points in error_curves(report).items():
        width = 2.5 if name == "whole layer" else 1
        ax.plot(*zip(*points, strict=True), marker=".", label=name, linewidth=width)
    kind = "outputs" if report["settings"]["recipe"]["gptq"] else "weights"
    ax.set(title=f"Error of quantised {kind}", xlabel="layer", ylabel="relative squared error")
    ax.set_yscale("log")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
    figure.savefig(path)
