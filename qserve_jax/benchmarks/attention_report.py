"""What the attention benchmark found, as a table, as CSV and as a picture.

device, jax, ..., ceilings, and what is continued   as in `report`
baselines        cudnn_bf16_us of each batch and size, once for all bits; null where it failed
rows             decode: {"backend", "kv_bits", "b", "ctx" or "lengths", "heads", "kv_heads",
                 "head_dim", "attends", "us", "cudnn_bf16_us", "gbps", "rel_err"}: gbps counts the
                 codes and scales of every token once; rel_err is relative Frobenius against float64
                 on the dequantised values, of the worst of up to three sequences of the timed call
                 (null in older rows where new tokens are attended unquantised); none above 2.5e-3
append           us of RoPE, quantise and append, one token per sequence
prefill          us of fresh prompts; chunked_prefill: of the last `chunk` of `ctx` tokens
"""

from __future__ import annotations

import csv
import importlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qserve_jax.benchmarks.attention import LISTS
from qserve_jax.benchmarks.ceilings import memory_ceiling
from qserve_jax.benchmarks.report import Report, commits

TITLES = {"append": "RoPE and append", "prefill": "prefill", "chunked_prefill": "chunked prefill"}
ORIGIN = ("kernels", "commit")
COLUMNS = (
    *("backend", "kv_bits", "attends", "heads", "kv_heads", "head_dim", "b", "ctx", "us", "gbps"),
    *("share", "cudnn_bf16_us", "speedup", "rel_err"),
)


def is_attention(report: Report) -> bool:
    """Whether a saved report is of this benchmark."""
    return report.get("op") == "attention"


def decode_rows(report: Report) -> list[dict[str, Any]]:
    """The decode rows with COLUMNS: the share of the memory ceiling, and cuDNN's time over ours."""
    ceiling = memory_ceiling(report["ceilings"]) if report["rows"] else 1.0
    rows = []
    for row in report["rows"]:
        other = row["cudnn_bf16_us"]
        more = {
            "ctx": row.get("ctx") or f"{min(row['lengths'])}-{max(row['lengths'])}",
            "share": row["gbps"] / ceiling,
            "speedup": other / row["us"] if other else None,
        }
        rows.append({name: (row | more).get(name) for name in COLUMNS})
    return rows


def table(report: Report) -> str:
    """Markdown: the ceilings, a line per decode row, and the other measurements."""
    lines = [f"{report['device']}, jax {report['jax']}, commit {commits(report)}"]
    if report["ceilings"]:
        lines.append(f"memory: {memory_ceiling(report['ceilings']):.0f} GB/s")
    lines += ["", *_markdown(decode_rows(report))]
    for name in LISTS:
        if report[name]:
            rows = [{k: row[k] for k in row if k not in ORIGIN} for row in report[name]]
            lines += ["", TITLES[name], "", *_markdown(rows)]
    return "\n".join(lines)


def _markdown(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    return lines + [f"| {' | '.join(_cell(n, row[n]) for n in names)} |" for row in rows]


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    formats = {"share": "{:.0%}", "speedup": "{:.2f}x", "rel_err": "{:.1e}", "gbps": "{:.0f}"}
    return formats.get(name, "{:.1f}").format(value)


def comma_separated(report: Report) -> str:
    """CSV of the decode rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(decode_rows(report))
    return text.getvalue().rstrip("\n")


FORMATS: dict[str, Callable[[Report], str]] = {
    "table": table,
    "csv": comma_separated,
    "json": lambda report: json.dumps(report, indent=1),
}


def curves(report: Report) -> dict[str, list[tuple[int, float]]]:
    """For each backend, model size and bits: (tokens in the cache, share), rising."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row, shown in zip(report["rows"], decode_rows(report), strict=True):
        if row["attends"] == "quantized" and "ctx" in row:
            sizes = f"{row['heads']}/{row['kv_heads']}/{row['head_dim']}"
            label = f"{row['backend']} {sizes} KV{row['kv_bits']}"
            found.setdefault(label, []).append((row["b"] * row["ctx"], shown["share"]))
    return {label: sorted(points) for label, points in found.items()}


def plot(report: Report, path: Path) -> None:
    """Shares of the memory ceiling, as a picture. Raises ValueError where there are no rows."""
    found = curves(report)
    if not found:
        raise ValueError(f"there is no row to plot into {path}: measure some first")
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(9, 5), layout="constrained"
    )
    ax: Any = figure.subplots()
    for label, points in found.items():
        ax.plot(*zip(*points, strict=True), marker="o", label=label)
    ax.set(xlabel="tokens in the cache, all sequences", ylabel="share of the memory ceiling")
    ax.set(ylim=(0, 1.05), title=f"decode attention on {report['device']}")
    ax.set_xscale("log", base=2)
    ax.grid(alpha=0.3)
    ax.legend(fontsize="x-small")
    figure.savefig(path)
