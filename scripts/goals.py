"""Times, speeds, memory and errors that we aimed at on an H200 beside what was measured: each one
missed.

python scripts/goals.py [--results docs/results] [--all]

Tokens and exactness are for the tests. Reads the files named in FILES, and prints Markdown.
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qserve_jax.benchmarks.provenance import ROOT
from qserve_jax.quantization.qtensor import kv_bytes_per_token

Row = dict[str, Any]
LLAMA_3_8B = ((28672, 4096), (4096, 4096), (4096, 14336), (6144, 4096))
MATMUL_US: dict[int, tuple[float | None, ...]] = {  # tokens: of those four
    64: (27, 9, 17, 11),
    128: (31, 11, 21, 14),
    256: (44, 11, 24, 15),
    1024: (165, None, None, None),
    4096: (670, 105, 345, None),
}
AIM_US = {(1024, 28672, 4096): 150, (4096, 28672, 4096): 610, (4096, 4096, 4096): 90}
AIM_US |= {(4096, 4096, 14336): 310}
QSERVE_US: dict[
    tuple[int, int], dict[int, tuple[float, float]]
] = {  # QServe's CUDA kernels on an H200 by (N, K, tokens), groups of 128 / per channel
    (28672, 4096): {16: (38.3, 28.3), 64: (62.6, 45.6), 128: (110, 64.1), 256: (151, 130)},
    (4096, 4096): {16: (15.6, 14.7), 256: (28.0, 22.6), 4096: (329, 271)},
    (4096, 14336): {16: (45.6, 42.0), 256: (88.3, 69.4), 4096: (1103, 856)},
}
QSERVE_US[28672, 4096] |= {1024: (574, 477), 4096: (2196, 1846)}
ATTENTION_US: dict[tuple[int, int | None], float] = {  # (batch, tokens of each; None: ragged)
    **{(16, 1024): 10, (16, 1536): 12, (16, 4096): 22, (16, 16384): 72},
    **{(1, 1024): 4.5, (1, 16384): 11.5, (64, None): 46},
}
LLAMA_HEADS = (32, 8, 128)
ATTENDS = ("quantized", "full")
TOKENS_PER_S = (  # benchmark, batch, at least; of the first three we aim at the last
    *[("throughput", 256, 13920), ("throughput", 256, 16820), ("throughput", 256, 20000)],
    *[("decode", 1, 450), ("decode", 64, 12000), ("decode", 256, 30000)],
)
MEMORY = (  # what, its column of a row, at most
    ("GiB of weights", "weights_gib", 5.4),
    ("bytes of a cached token", "kv_bytes_per_token", 34816),
    ("GiB in all, 256 x 1536 tokens", "peak_gib", 24),
)
TIMES_ONE_GPU = {2: 1.6, 4: 2.6}
"""Tokens/s of Llama-3-70B on so many GPUs, decoding 64 sequences, in units of one GPU's."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """found is to be at most `limit`, at least where `more`; None: not measured."""

    kind: str
    what: str
    limit: float
    found: float | None
    more: bool = False

    @property
    def excess(self) -> float:
        """How far on the wrong side, relative to the limit (to 1 if that is 0); negative if met."""
        assert self.found is not None
        if not self.limit:
            return self.found
        ratio = self.found / self.limit
        return 1 - ratio if self.more else ratio - 1


def matmul_goals(report: Row) -> Iterator[Goal]:
    rows = {(r["backend"], r["group_size"], r["m"], r["n"], r["k"]): r for r in report["rows"]}
    for (n, k), m, limit in _llama_limits():
        row = rows.get(("mosaic_sm90", 128, m, n, k), {})
        yield Goal("W4A8, Llama-3-8B, µs", f"{n}x{k} M={m}", limit, row.get("us"))
    for (m, n, k), limit in AIM_US.items():
        row = rows.get(("mosaic_sm90", 128, m, n, k), {})
        yield Goal("W4A8, Llama-3-8B, what we aim at, µs", f"{n}x{k} M={m}", limit, row.get("us"))
    for (n, k), by_tokens in QSERVE_US.items():
        for m, limits in by_tokens.items():
            for group_size, limit in zip((128, -1), limits, strict=True):
                row = rows.get(("mosaic_mma", group_size, m, n, k), {})
                what = f"{n}x{k} M={m}" + (" per channel" if group_size == -1 else "")
                yield Goal("mosaic_mma, QServe's kernels, µs", what, limit, row.get("us"))
    for (backend, group_size, m, n, k), row in rows.items():
        what = f"{n}x{k} M={m}" + (" per channel" if group_size == -1 else "")
        whose = "W4A8" if backend == "mosaic_sm90" else backend
        for name in ("bf16", "int8", "fp8"):
            other = row[f"{name}_us"]
            if name == "bf16" or m <= 256:
                found = row["us"] if other else None
                yield Goal(f"{whose}, {name} beside it, µs", what, other or math.nan, found)
        grouped = rows.get((backend, 128, m, n, k))
        if group_size == -1 and grouped:
            kind = f"{whose} per channel, groups of 128, µs"
            yield Goal(kind, what, grouped["us"], row["us"])


def _llama_limits() -> Iterator[tuple[tuple[int, int], int, float]]:
    for shape, *limits in zip(LLAMA_3_8B, *MATMUL_US.values(), strict=True):
        nbytes = shape[0] * shape[1] * (0.5 + 2 / 128)
        yield from ((shape, m, 3.5 + nbytes / 3.9e6) for m in (1, 8, 16))
        yield shape, 32, 4.5 + nbytes / 3.6e6
        yield from ((shape, m, x) for m, x in zip(MATMUL_US, limits, strict=True) if x)


def attention_goals(report: Row) -> Iterator[Goal]:
    rows = [r for r in report["rows"] if r["backend"] == "mosaic_sm90"]
    llama = [r for r in rows if _heads(r) == LLAMA_HEADS]
    known: dict[int, float] = {}  # bytes of a uniform batch: us of the fastest that has so many
    for row in llama:
        if row["kv_bits"] == 4 and "ctx" in row and row["attends"] == "quantized":
            known[_bytes(row)] = min(row["us"], known.get(_bytes(row), math.inf))
    for row in llama:
        bits, b, context = _case(row)
        what = f"KV{bits} {b} x {context or 'ragged'}{_attends(row)}"
        if bits == 16:
            if row["cudnn_bf16_us"]:
                limit = 1.2 * row["cudnn_bf16_us"]
                yield Goal("attention, 1.2 of cuDNN's, µs", what, limit, row["us"])
        elif 8 * b >= 512 and context:
            limit = 5 + _bytes(row) / 4.1e6
            yield Goal("attention, Llama-3-8B, µs", what, limit, row["us"])
        elif bits == 4 and (limit := ATTENTION_US.get((b, context))):
            yield Goal("attention, Llama-3-8B, µs", what, limit, row["us"])
    for row in rows:
        heads = _heads(row)
        if heads != LLAMA_HEADS and row["kv_bits"] == 4:
            what = f"{'/'.join(map(str, heads))} {row['b']} x {row.get('ctx', 'ragged')}"
            what += _attends(row)
            limit = _time_of(sorted(known.items()), _bytes(row)) / 0.8
            yield Goal("attention, 80 % of 32/8/128's bandwidth, µs", what, limit, row["us"])
    for row in report["rows"]:
        what = f"{row['backend']} {_heads(row)} {_case(row)}"
        yield Goal("attention, relative error", what, 2.5e-3, row["rel_err"])
    for row in report["append"]:
        if row["kv_bits"] == 4 and row["b"] == 256:
            yield Goal("append of one token each, µs", f"{row['backend']} 256", 4, row["us"])
    yield from _prefill_goals(report)


def _prefill_goals(report: Row) -> Iterator[Goal]:
    """Rows without "attends" are "full", which is cuDNN with lengths."""
    rows = {(r["backend"], r.get("attends", "full")): r for r in report["prefill"]}
    for backend in dict.fromkeys(backend for backend, _ in rows):
        for attends in ATTENDS:
            row = rows.get((backend, attends), {})
            other = row.get("cudnn_bf16_us")
            limit, found = (1.1 * other, row["us"]) if other else (math.nan, None)
            what = f"{backend}, {attends}"
            yield Goal("prefill of 8 x 1024, 1.1 of cuDNN's, µs", what, limit, found)


def _attends(row: Row) -> str:
    """Said of what is not the default of `LLM`."""
    return "" if row["attends"] == "quantized" else f", {row['attends']}"


def _heads(row: Row) -> tuple[int, int, int]:
    return row["heads"], row["kv_heads"], row["head_dim"]


def _case(row: Row) -> tuple[int, int, int | None]:
    return row["kv_bits"], row["b"], row.get("ctx")


def _bytes(row: Row) -> int:
    """Of the cache that a call reads."""
    tokens = sum(row["lengths"]) if "lengths" in row else row["b"] * row["ctx"]
    return tokens * row["kv_heads"] * kv_bytes_per_token(row["head_dim"], row["kv_bits"])


def _time_of(known: list[tuple[int, float]], nbytes: int) -> float:
    """Of 32/8/128 for so many bytes: between the two nearest uniform batches; what fewer than the
    smallest take is the smallest's time."""
    at = bisect.bisect([size for size, _ in known], nbytes)
    if at == 0:
        return known[0][1]
    if at == len(known):
        return known[-1][1] * nbytes / known[-1][0]
    (left, a), (right, b) = known[at - 1], known[at]
    return a + (b - a) * (nbytes - left) / (right - left)


def serving_goals(report: Row) -> Iterator[Goal]:
    for bench, batch, limit in TOKENS_PER_S:
        wanted = {"bench": bench, "batch": batch, "model": "llama3-8b", "precision": "w4a8kv4"}
        wanted |= {"gpus": 1, "input": 1024, "output": 512}
        rows = [r for r in report["rows"] if wanted.items() <= r.items()]
        found = rows[0]["tokens_per_s"] if rows else None
        yield Goal("Llama-3-8B, tokens/s", f"{bench}, batch {batch}", limit, found, more=True)

    yield from _memory_goals(report["rows"])


def _memory_goals(rows: list[Row]) -> Iterator[Goal]:
    """Of 256 requests of 1024 + 512 tokens."""
    wanted = {"bench": "throughput", "batch": 256, "model": "llama3-8b", "gpus": 1}
    wanted |= {"input": 1024, "output": 512}
    found = {row["precision"]: row for row in rows if wanted.items() <= row.items()}
    ours, other = found.get("w4a8kv4", {}), found.get("w16a16kv16", {})
    for what, name, limit in MEMORY:
        yield Goal("Llama-3-8B, memory", what, limit, ours.get(name))
    peaks = other.get("peak_gib"), ours.get("peak_gib")
    less = peaks[0] / peaks[1] if peaks[0] and peaks[1] else None
    yield Goal("Llama-3-8B, memory", "times less than 16 bits at its peak", 2.2, less, more=True)


def step_goals(report: Row) -> Iterator[Goal]:
    """Compiled in a process that keeps no programs on disk, tracing included."""
    for row in report["rows"]:
        what = f"batch {row['batch']}"
        known = row["gaps"] is not None and row["gaps"] >= 0  # less: the clock had fallen by then
        gaps = 100 * row["gaps"] if known else None
        yield Goal("decode step, % no kernel runs", what, 8, gaps)
        yield Goal("decode step, launches per layer", what, 10, row["launches_per_layer"])
        yield Goal("decode step compiled, s (5 from the cache)", what, 25, row["compile_s"])


def batching_goals(report: Row) -> Iterator[Goal]:
    found, prefixes = report["compared"], report["parts"].get("prefixes", {})
    speed, same = found.get("of_static"), prefixes.get("equal")
    kind = "2 000 requests under preemption"
    yield Goal(kind, "share of a static run's tokens/s", 0.85, speed, more=True)
    pool = report["parts"].get("small pool", {})
    yield Goal(kind, "preemptions", 1, pool.get("preemptions"), more=True)
    wrong = len(report["failures"]) if "failures" in report else None
    yield Goal(kind, "lost, cut short, pages kept, compiled", 0, wrong)
    kind = "64 requests that share 2048 tokens"
    fewer = prefixes.get("times_fewer")
    yield Goal(kind, "times fewer tokens prefilled", 20, fewer, more=True)
    yield Goal(kind, "share with the same tokens", 1, same, more=True)


def first_token_goals(report: Row) -> Iterator[Goal]:
    cold, warm = report["nothing compiled before"], report["all compiled before"]
    kind = "a new process of generate, Llama-3-8B, s"
    yield Goal(kind, "first token, all compiled before", 30, warm["process_seconds"])
    yield Goal(kind, "compiling, nothing compiled before", 60, cold["compile_seconds"])


def parallel_goals(report: Row) -> Iterator[Goal]:
    """With the sums that run by default."""
    wanted = {"bench": "decode", "model": "llama3-70b", "precision": "w4a8kv4", "batch": 64}
    rows = [r for r in report["rows"] if (wanted | {"sums": None}).items() <= r.items()]
    speeds = {row["gpus"]: row["tokens_per_s"] for row in rows}
    for gpus, limit in TIMES_ONE_GPU.items():
        found = speeds[gpus] / speeds[1] if {1, gpus} <= speeds.keys() else None
        yield Goal("Llama-3-70B, times one GPU's tokens/s", f"{gpus} GPUs", limit, found, more=True)


FILES = {  # what reads it, what writes it
    "h200_w4a8_matmul.json": (matmul_goals, "qserve_jax.bench"),
    "h200_paged_attention.json": (attention_goals, "qserve_jax.bench"),
    "h200_serving.json": (serving_goals, "qserve_jax.bench"),
    "h200_decode_step.json": (step_goals, "scripts/profile_step.py"),
    "h200_batching.json": (batching_goals, "scripts/batching_check.py"),
    "h200_first_token.json": (first_token_goals, "scripts/first_token.py"),
    "h200_tensor_parallel.json": (parallel_goals, "scripts/tensor_parallel.py"),
}


def table(goals: list[Goal], *, all_of_them: bool) -> str:
    """A line for each kind, and one for each goal that is missed (or each)."""
    lines = ["| goal | met | missed | not measured |", "|---|---|---|---|"]
    for kind in dict.fromkeys(g.kind for g in goals):
        mine = [g for g in goals if g.kind == kind]
        missed = sum(g.found is not None and g.excess > 0 for g in mine)
        unknown = sum(g.found is None for g in mine)
        lines.append(f"| {kind} | {len(mine) - missed - unknown} | {missed} | {unknown} |")
    lines += ["", "| goal | case | aimed at | measured | off by |", "|---|---|---|---|---|"]
    for g in goals:
        if g.found is not None and (all_of_them or g.excess > 0):
            numbers = f"{_number(g.limit)} | {_number(g.found)} | {100 * g.excess:+.1f} %"
            lines.append(f"| {g.kind} | {g.what} | {numbers} |")
    return "\n".join(lines)


def _number(x: float) -> str:
    return f"{x:.1e}" if 0 < x < 0.01 else f"{x:.1f}" if x < 1000 else f"{x:.0f}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--all", action="store_true", help="those that are met, too")
    args = parser.parse_args(argv)
    goals: list[Goal] = []
    for name, (find, bench) in FILES.items():
        try:
            goals += find(json.loads((args.results / name).read_text()))
        except FileNotFoundError:
            print(f"no {name} in {args.results}: measure it with {bench}", file=sys.stderr)
            return 1
    print(table(goals, all_of_them=args.all))
    return 0


if __name__ == "__main__":
    sys.exit(main())
