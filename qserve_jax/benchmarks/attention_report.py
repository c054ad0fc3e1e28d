"""What the attention benchmark found, as a table, as CSV and as a picture.

device, jax, ..., ceilings, and what is continued   as in `report`
baselines        cudnn_bf16_us of each batch and size, once for all bits; null where it failed
rows             decode: {"backend", "kv_bits", "b", "ctx" or "lengths", "heads", "kv_heads",
                 "head_dim", "attends", "us", "cudnn_bf16_us", "gbps", "rel_err"}: gbps counts the
                 codes and scales of every token once; rel_err is relative Frobenius against float64
                 on the dequantised values, of the worst of up to 16 sequences of the timed call
                 (attention_error.py); none above 2.5e-3
append           us of RoPE, quantise and append, one token per sequence
prefill          us of fresh prompts, attended as stored in 4-bit pages or "full", which is cuDNN
                 with lengths; chunked_prefill: of the last `chunk` of `ctx` tokens. Rows without
                 "attends" are from before the other was timed: "full" of prefill, and "quantized";
                 the next run writes it into them
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qserve_jax.benchmarks.attention import LISTS
from qserve_jax.benchmarks.ceilings import memory_ceiling
from qserve_jax.benchmarks.plot import Curves, draw
from qserve_jax.benchmarks.report import RATES, Report, are_numbers, commits

TITLES = {"append": "RoPE and append", "prefill": "prefill", "chunked_prefill": "chunked prefill"}
SIZES = ("heads", "kv_heads", "head_dim")
NUMBERS = {
    "rows": (*SIZES, "kv_bits", "b", "us", "gbps"),
    "append": (*SIZES, "kv_bits", "b", "us"),
    "prefill": (*SIZES, "b", "tokens", "us", "tflops"),
    "chunked_prefill": (*SIZES, "kv_bits", "chunk", "ctx", "us", "tflops", "rel_err"),
    "baselines": (),
}
"""List -> the columns of numbers that every row has."""
BESIDE = ("rows", "prefill", "chunked_prefill", "baselines")
"""Lists with cuDNN's time, or null."""
ORIGIN = ("kernels", "commit")
COLUMNS = (
    *("backend", "kv_bits", "attends", *SIZES, "b", "ctx", "us", "gbps"),
    *("share", "cudnn_bf16_us", "speedup", "rel_err"),
)


def is_attention(report: Report) -> bool:
    """Whether a saved report is of this benchmark, with all numbers that are shown."""
    lists = {name: report.get(name) for name in NUMBERS}
    if report.get("op") != "attention" or not all(isinstance(x, list) for x in lists.values()):
        return False
    rates = {name: rate for name, rate in report["ceilings"].items() if name != "commit"}
    needed = [*rates.values(), *(rates.get(name) for name in RATES if rates or report["rows"])]
    needed += [row.get(x) for name in NUMBERS for row in report[name] for x in NUMBERS[name]]
    lengths = [n for row in report["rows"] for n in _lengths(row)]
    beside = [part for name in BESIDE for part in report[name]]
    times = [part.get("cudnn_bf16_us", "missing") for part in beside]
    times += [row.get("rel_err") for row in report["rows"]]
    given = needed + lengths + [x for x in times if x is not None]
    above = lengths + [row.get("us", 1) for name in NUMBERS for row in report[name]]
    return are_numbers(given) and all(x > 0 for x in above)


def _lengths(row: dict[str, Any]) -> list[Any]:
    """Of its sequences, or of all of them."""
    lengths = row.get("lengths")
    given = "ctx" not in row and isinstance(lengths, list)
    return lengths if given and lengths else [row.get("ctx")]


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
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    return lines + [f"| {' | '.join(_cell(n, row.get(n)) for n in names)} |" for row in rows]


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


def curves(report: Report) -> dict[str, Curves]:
    """For each backend and bits, for each model size: (MB read, share), rising."""
    panels: dict[str, Curves] = {}
    for row, shown in zip(report["rows"], decode_rows(report), strict=True):
        if row.get("attends") == "quantized" and "ctx" in row:
            found = panels.setdefault(f"{row.get('backend')}, KV{row['kv_bits']}", {})
            sizes = f"{row['heads']}/{row['kv_heads']}/{row['head_dim']}"
            megabytes = row["gbps"] * row["us"] / 1e3
            found.setdefault(sizes, []).append((megabytes, shown["share"]))
    return {
        panel: {sizes: sorted(points) for sizes, points in panels[panel].items()}
        for panel in sorted(panels)
    }


def plot(report: Report, path: Path) -> None:
    """As `draw`: shares of the memory ceiling, over what is read."""
    panels = curves(report)
    labels = dict.fromkeys(panels, ("MB read", "share of the memory ceiling"))
    draw(f"Decode attention on {report['device']}", panels, labels, path, line="none")
