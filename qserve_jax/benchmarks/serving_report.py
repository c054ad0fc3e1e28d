"""What the serving benchmarks found: rows, their JSON file, table and plot.

The file: device, jax, commit, versions; rows {"bench", "model", "precision", "group_size", "batch",
"input", "output", "tokens_per_s", "ttft_ms", "tpot_ms", "peak_gib", "gpus", ...}. tokens_per_s is
null where a case does not fit, and `problem` says why; it also says what else is wrong with a row.
`gpus` share the model: tokens_per_s is what they make together; weights_gib, cache_gib,
kv_bytes_per_token and peak_gib are of the fullest one.
compiled_s: seconds of the timed run that went into compiling, 0 where the warm-up met all shapes;
otherwise that is its `problem`.
prefill_wait_s, decode_wait_s: seconds that the host waited for each kind of call, in the order of
their launches. Where the host is late, seconds count for the call whose results it looks at next.
Together they are the run. (`prefill_s` and `decode_s` of older rows are the same. Until e4477f7 the
host was late by a whole decode call.)
peak_gib is that of the process so far: for the peak of one case run that case alone.
memory_limit_gib: what JAX may use of a device (`_cli.own_the_gpu`); what does not fit does not fit
there. Rows of older commits had 75 % of the GPU and do not say so. allocator: of the GPU's memory,
null for JAX's own.

A file may be continued at later commits: each row has the "commit" that measured it, and a case of
another commit is measured again when its turn comes.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from qserve_jax.benchmarks.plot import Curves, draw
from qserve_jax.benchmarks.provenance import provenance

Row = dict[str, Any]
SETTINGS = (
    *("dtype", "backend", "page_size", "num_pages", "max_num_seqs", "max_model_len"),
    *("max_num_batched_tokens", "prefix_caching", "num_requests", "seed"),
)
"""Flags that change what is measured, as they were given."""
KEY = (
    *("bench", "model", "precision", "group_size", "batch", "input", "output", "gpus", "rate"),
    *("attends", "lm_head_bits", "xla_flags", "allocator", "sums", *SETTINGS),
)
"""What tells cases apart."""
COLUMNS = (
    *("bench", "model", "precision", "group_size", "gpus", "batch", "input", "output", "rate"),
    *("tokens_per_s", "ttft_ms", "tpot_ms", "weights_gib", "cache_gib", "peak_gib"),
)


def empty_report() -> dict[str, Any]:
    """A report of this machine and commit, without rows."""
    found = provenance()
    origin = {name: found[name] for name in ("device", "commit")}
    return {**origin, "jax": found["versions"]["jax"], "versions": found["versions"], "rows": []}


def read_report(path: Path | None) -> dict[str, Any]:
    """A saved report as one of this commit too, or an empty one where there is none.

    Raises ValueError on a file of another kind, device or version of JAX.
    """
    here = empty_report()
    if path is None or not path.exists():
        return here
    try:
        report = json.loads(path.read_text())
        rows_fit = all({"bench", "tokens_per_s"} <= row.keys() for row in report["rows"])
    except (ValueError, TypeError, KeyError, AttributeError):
        rows_fit, report = False, {}
    if not rows_fit:
        raise ValueError(f"{path} holds no results of this command: name another file")
    for name in ("device", "jax"):
        if report.get(name) != here[name]:
            raise ValueError(
                f"{path} is of {name} {report.get(name)!r}, this is {here[name]!r}: "
                "name another file"
            )
    for row in report["rows"]:
        row.setdefault("commit", report["commit"])
    return report | {name: here[name] for name in ("commit", "versions")}


def same_case(a: Row, b: Row) -> bool:
    return all(a.get(name) == b.get(name) for name in KEY)


def put_row(rows: list[Row], row: Row) -> None:
    """In the place of what another commit measured of the case."""
    rows[:] = [*(other for other in rows if not same_case(row, other)), row]


def markdown(rows: list[Row]) -> str:
    """A table of COLUMNS, with the reasons of what does not fit below."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(_cell(row.get(name)) for name in COLUMNS)} |" for row in rows]
    problems = dict.fromkeys(str(row["problem"]) for row in rows if row.get("problem"))
    return "\n".join([*lines, *problems])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def as_csv(rows: list[Row]) -> str:
    """All columns that any row has."""
    names = dict.fromkeys(name for row in rows for name in row)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


def curves(rows: list[Row]) -> dict[str, Curves]:
    """Panels of curves: for each protocol, for each model and precision, (x, y), x rising.

    Throughput and decoding: tokens/s over the batch. Latency: median time to the first token (ms)
    over the rate.
    """
    panels: dict[str, Curves] = {}
    for row in rows:
        if row.get("tokens_per_s") is None:
            continue
        is_latency = row["bench"] == "latency"
        point = (
            (row["rate"], row["ttft_p50_ms"])
            if is_latency
            else (
                row["batch"],
                row["tokens_per_s"],
            )
        )
        label = f"{row['model']} {row['precision']}"
        panels.setdefault(row["bench"], {}).setdefault(label, []).append(point)
    return {name: {k: sorted(v) for k, v in panel.items()} for name, panel in panels.items()}


AXES = {
    "throughput": ("requests at once", "generated tokens/s"),
    "decode": ("batch", "tokens/s"),
    "latency": ("requests/s", "median time to first token, ms"),
}


def plot(report: dict[str, Any], path: Path) -> None:
    """As `draw`: a panel for each benchmark."""
    draw(f"Serving on {report['device']}", curves(report["rows"]), AXES, path)
