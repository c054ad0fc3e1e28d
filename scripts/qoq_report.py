"""What the tables of qoq_tables.py must show, and their JSON, markdown and plot."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from qserve_jax.evaluation.compare import table

Tables = dict[str, Any]
"""name -> {"title": ..., "rows": [...]}."""

BROKEN, MENDED = 1.5, 1.03
"""Perplexity of round to nearest over float's, at least; of the transform meant for the outliers
over that of W4A8KV4 without them, at most."""
BROKEN_ROWS = {
    "keys": ("RTN per channel",),
    "values": ("RTN per channel",),
    "hidden": ("RTN per channel",),
    "salient": ("RTN g128",),
    "residual": ("RTN per channel", "RTN g128"),
    "all": ("RTN per channel", "RTN g128"),
}
# Outliers, the row that mends them, the table without them, its row to compare with. The massive
# direction breaks round to nearest before it is put on one channel, so GPTQ is its W4A8KV4.
MEANT = (
    ("keys", "SmoothAttention search, RTN per channel", "trained", "RTN per channel"),
    ("values", "output smoothing, RTN per channel", "trained", "RTN per channel"),
    ("hidden", "output smoothing, RTN per channel", "trained", "RTN per channel"),
    ("salient", "reordering, RTN g128", "trained", "RTN g128"),
    ("residual", "rotation, RTN per channel", "massive", "GPTQ per channel"),
    ("residual", "rotation and clip search, RTN per channel", "massive", "GPTQ per channel"),
    ("residual", "rotation, GPTQ per channel", "massive", "GPTQ per channel"),
    ("residual", "rotation, GPTQ g128", "massive", "GPTQ g128"),
)


def bars(tables: Tables) -> list[dict[str, Any]]:
    """One dict for each bar whose rows are there: text, value, limit, whether it is met."""
    found: list[dict[str, Any]] = []

    def add(text: str, value: float, limit: float, at_least: bool = False) -> None:
        met = value >= limit if at_least else value <= limit
        sign = "≥" if at_least else "≤"
        found.append({"bar": f"{text} {sign} {limit:g}", "value": value, "met": met})

    for name, rows in BROKEN_ROWS.items():
        for row in rows if name in tables else ():
            ratio = _perplexity(tables, name, row) / _perplexity(tables, name, "float")
            add(f"{name}: {row} / float", ratio, BROKEN, at_least=True)
    for name, row, other, base in MEANT:
        if name in tables and other in tables:
            ratio = _perplexity(tables, name, row) / _perplexity(tables, other, base)
            add(f"{name}: {row} / {base} without outliers", ratio, MENDED)
    for name, row, limit in (
        ("all", "qoq-g128", 1.03),
        ("all", "qoq-per-channel", 1.06),
        ("trained", "qoq-g128", 1.015),
    ):
        if name in tables:
            ratio = _perplexity(tables, name, row) / _perplexity(tables, name, "float")
            add(f"{name}: {row} / float", ratio, limit)
    for row in ("qoq-g128", "qoq-per-channel") if "trained" in tables else ():
        change = _row(tables, "trained", row)["loss_change_from_rtn"]
        add(f"trained: {row} − RTN, nats/token", change, 0.0)
    for row in ("KV4, SmoothAttention 0.5", "KV4, SmoothAttention search"):
        if "kv4" in tables:
            kept, lost = (_row(tables, "kv4", r)["loss_change"] for r in (row, "KV4"))
            add(f"kv4: loss of {row} / of KV4", kept / lost, 0.25)
    return found


def _row(tables: Tables, name: str, row: str) -> dict[str, Any]:
    return next(r for r in tables[name]["rows"] if r["name"] == row)


def _perplexity(tables: Tables, name: str, row: str) -> float:
    return _row(tables, name, row)["perplexity"]


def save(path: Path, content: dict[str, Any]) -> None:
    """path (.json), and the tables as markdown beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**content, "bars": bars(content["tables"])}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(content), encoding="utf-8")


def markdown(content: dict[str, Any]) -> str:
    """The whole file: note, plot, bars, tables."""
    parts = [f"# {content['title']}", content["note"]]
    if "plot" in content:
        parts.append(f"![{content['title']}]({content['plot']})")
    if content["bars"]:
        lines = ["| bar | measured | |", "|---|---|---|"]
        for bar in content["bars"]:
            lines.append(
                f"| {bar['bar']} | {bar['value']:.4g} | {'met' if bar['met'] else 'MISSED'} |"
            )
        parts.append("\n".join(lines))
    for name, part in content["tables"].items():
        parts += [f"## {name}: {part['title']}", table(part["rows"])]
        for row in part["rows"]:
            if "loss_change_from_rtn" in row:
                change, error = (row[f"loss_change_from_rtn{x}"] for x in ("", "_standard_error"))
                parts.append(
                    f"{row['name']} against RTN at its group size: {change:+.4f} ± {error:.4f} "
                    "nats/token, paired."
                )
    return "\n\n".join(parts) + "\n"


def plot_ablation(rows: list[dict[str, Any]], path: Path) -> bool:
    """The steps' losses above float with their standard errors; False where matplotlib, which is
    no dependency, is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(6, 3.6), layout="constrained"
    )
    ax: Any = figure.subplots()
    steps = rows[1:][::-1]
    ax.barh(
        [row["name"] for row in steps],
        [row["loss_change"] for row in steps],
        xerr=[row["loss_change_standard_error"] for row in steps],
        color="#7a9cc6",
    )
    ax.set_xlabel("nats per token above float, ± standard error")
    ax.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=80)
    return True
