"""What a benchmark found: the dict that is written as JSON, as a table and as CSV.

device, jax, protocol           where and how all of it was measured
commit, versions                of the last run
ceilings    see `ceilings.measure_ceilings`
baselines   {"m", "n", "k", "bf16_us", "int8_us", "fp8_xla_us", "fp8_torch_tensor_us",
            "fp8_torch_row_us"}: what depends on the sizes only; null where it cannot be had
rows        {"backend", "group_size", "m", "n", "k", "us", "bf16_us", "int8_us", "fp8_us", "gbps",
            "tops", "rel_err", "config"}: fp8_us is the fastest of the three; gbps counts the
            weights' codes and group scales once; rel_err is the norm of the difference to the
            float32 epilogue of the exact sums, over that one's norm (rounding to bf16 alone gives
            about 1.7e-3); config is how the kernel cut it, null for the reference

A report may be continued by later commits: ceilings, baselines and rows each have the "commit" that
measured them, and rows the "kernels" (`provenance.kernels`) too. Baselines need none of ours, and
stay, but are measured again where a null is of a column that can be measured here; a row of other
kernels or another config than this checkout's is not present: when its turn comes, it is dropped
and measured again. Files from before that had one commit for all, which their parts get when read.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from qserve_jax.benchmarks.baselines import COLUMNS, best_fp8
from qserve_jax.benchmarks.ceilings import memory_rates, roofline_share
from qserve_jax.benchmarks.clock import PROTOCOL
from qserve_jax.benchmarks.provenance import provenance

Report = dict[str, Any]
ALWAYS = ("group_size", "m", "n", "k", "us", "gbps", "tops", "rel_err")
"""Columns of numbers that every row has."""
RATES = ("hbm_copy_gbps", "bf16_tops", "int8_tops")
"""Ceilings that reports of every age have, if any."""
ROW = (
    *("backend", "group_size", "m", "n", "k", "us"),
    *("bf16_us", "int8_us", "fp8_us", "gbps", "tops", "rel_err", "config", "kernels", "commit"),
)  # in this order


def empty_report() -> Report:
    """A report of this machine and commit, without results."""
    found = provenance()
    return {
        "device": found["device"],
        "jax": jax.__version__,
        "commit": found["commit"],
        "versions": found["versions"] | {"python": found["python"]},
        "protocol": PROTOCOL,
        "ceilings": {},
        "baselines": [],
        "rows": [],
    }


def read_report(path: Path) -> Report | None:
    """A saved report; None where there is no file. Raises ValueError on another file.

    Of the older form, the parts get the report's commit; which kernels its rows are of is unknown.
    """
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text())
    except (ValueError, RecursionError):
        report = None
    if report is None or not _is_report(report):
        raise ValueError(f"{path} holds no results of this command: name another file")
    _say_origins(report)
    return report


def _is_report(found: Any) -> bool:
    """Whether it has the parts of a report, of their types; what rows hold is for `is_matmul`."""
    types = {"device": str, "jax": str, "commit": str, "ceilings": dict, "baselines": list}
    types |= {"rows": list}
    if not isinstance(found, dict):
        return False
    if not all(isinstance(found.get(name), kind) for name, kind in types.items()):
        return False
    parts = [found["ceilings"], *found["baselines"], *all_rows(found)]
    return all(isinstance(part, dict) for part in parts) and all(
        isinstance(part.get("commit", ""), str) for part in parts
    )


def is_matmul(report: Report) -> bool:
    """Whether a saved report is of matmuls, with all numbers that are shown."""
    rows, others = report["rows"], report["baselines"]
    rates = {name: rate for name, rate in report["ceilings"].items() if name != "commit"}
    needed = [row.get(name) for row in rows for name in ALWAYS]
    needed += [part.get(name) for part in others for name in ("m", "n", "k")]
    needed += [*rates.values(), *(rates.get(name) for name in RATES if rates)]
    times = [row.get(name) for row in rows for name in ("bf16_us", "int8_us", "fp8_us")]
    times += [part.get(name) for part in others for name in COLUMNS]
    given = needed + [us for us in times if us is not None]
    return "op" not in report and are_numbers(given) and all(row["us"] > 0 for row in rows)


def are_numbers(values: list[Any]) -> bool:
    """Whether these, of a JSON file, are finite numbers."""
    return all(type(x) in (int, float) and abs(x) < float("inf") for x in values)


def _say_origins(report: Report) -> None:
    """Of a report of the older form, to the parts."""
    measured = [report["ceilings"]] if report["ceilings"] else []
    for part in (*measured, *report["baselines"], *all_rows(report)):
        part.setdefault("commit", report["commit"])
    for row in all_rows(report):
        row.setdefault("kernels", None)


def all_rows(report: Report) -> list[dict[str, Any]]:
    """Of every list but the baselines."""
    lists = {name: part for name, part in report.items() if isinstance(part, list)}
    return [row for name, rows in lists.items() if name != "baselines" for row in rows]


def commits(report: Report) -> str:
    """Of the rows, shortened, each once; of a report without rows its own."""
    found = [row["commit"] for row in all_rows(report)] or [report["commit"]]
    return ", ".join(dict.fromkeys(name[:12] for name in found))


def write_report(path: Path, report: Report) -> None:
    """Whole or not at all: a killed run leaves the file of the row before."""
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(beside, path)


def continued(report: Report, here: Report) -> Report:
    """A saved report as one of this run too.

    Raises ValueError where the device, JAX's version or the protocol is another: these do not mix.
    """
    for name in ("device", "jax", "protocol"):
        if report.get(name) != here[name]:
            raise ValueError(
                f"the saved results are of {name} {report.get(name)!r}, this is {here[name]!r}: "
                "save to another file"
            )
    return report | {name: here[name] for name in ("commit", "versions")}


def has_row(rows: list[dict[str, Any]], wanted: dict[str, Any], kernels: str) -> bool:
    """Whether a row has all these values and is of these kernels."""
    wanted = wanted | {"kernels": kernels}
    return any(all(row.get(name) == v for name, v in wanted.items()) for row in rows)


def drop_row(rows: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
    """Take out the row that has all these values, of whatever kernels."""
    rows[:] = [row for row in rows if any(row.get(name) != v for name, v in wanted.items())]


def baseline(report: Report, m: int, n: int, k: int) -> dict[str, Any] | None:
    """The baselines of these sizes, where they were measured."""
    found = (b for b in report["baselines"] if (b["m"], b["n"], b["k"]) == (m, n, k))
    return next(found, None)


def fp8_winner(report: Report, row: dict[str, Any]) -> str:
    """Which fp8 is the fastest: xla, torch_tensor or torch_row; empty where there is none."""
    columns = baseline(report, row["m"], row["n"], row["k"]) or {}
    best = best_fp8(columns)
    name = next((name for name, us in columns.items() if best and us == best), "")
    return name.removeprefix("fp8_").removesuffix("_us")


def table(report: Report) -> str:
    """Markdown: the ceilings, and a line per row."""
    ceilings = report["ceilings"]
    rates = ", ".join(f"{way} {rate:.0f}" for way, rate in memory_rates(ceilings).items())
    lines = [
        f"{report['device']}, jax {report['jax']}, commit {commits(report)}",
        f"ceilings: HBM {rates} GB/s; XLA at 8192^3 int8 {ceilings['int8_tops']:.0f} TOP/s, "
        f"bf16 {ceilings['bf16_tops']:.0f} TFLOP/s",
        "",
        "| backend | group | N x K | M | us | GB/s | TOP/s | of ceiling | bf16 us | int8 us "
        "| fp8 us | rel_err |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [_table_line(report, row) for row in report["rows"]])


def _table_line(report: Report, row: dict[str, Any]) -> str:
    share, binding = roofline_share(row, report["ceilings"])

    def other(name: str) -> str:
        """Microseconds, and how many of ours they are."""
        return f"{row[name]:.1f} ({row[name] / row['us']:.2f}x)" if row[name] else "-"

    cells = (
        row["backend"],
        "channel" if row["group_size"] == -1 else row["group_size"],
        f"{row['n']}x{row['k']}",
        row["m"],
        f"{row['us']:.1f}",
        f"{row['gbps']:.0f}",
        f"{row['tops']:.0f}",
        f"{share:.0%} {binding}",
        other("bf16_us"),
        other("int8_us"),
        f"{other('fp8_us')} {fp8_winner(report, row)}".strip(),
        f"{row['rel_err']:.1e}",
    )
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def comma_separated(report: Report) -> str:
    """CSV: the rows as in the JSON, with their share of the ceiling and which fp8 it is."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*ROW, "share", "ceiling", "fp8"], lineterminator="\n")
    writer.writeheader()
    for row in report["rows"]:
        share, binding = roofline_share(row, report["ceilings"])
        more = {"share": share, "ceiling": binding, "fp8": fp8_winner(report, row)}
        writer.writerow(row | more)
    return text.getvalue().rstrip("\n")


FORMATS: dict[str, Callable[[Report], str]] = {
    "table": table,
    "csv": comma_separated,
    "json": lambda report: json.dumps(report, indent=1),
}
