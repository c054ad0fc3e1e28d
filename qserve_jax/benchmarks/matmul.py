"""W4A8 matmuls beside XLA's and torch's: every column by one clock, weights out of the cache.

`clock.PROTOCOL` says how times are taken. A row is kept only if its output equals the reference's
bit for bit and memory can be that fast.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax.benchmarks import baselines
from qserve_jax.benchmarks.ceilings import NAMES, measure_ceilings, memory_ceiling
from qserve_jax.benchmarks.clock import Clock
from qserve_jax.benchmarks.compile import Compiled, call, compile_all
from qserve_jax.benchmarks.operands import (
    copies_of,
    first_tokens,
    make_activation,
    make_plain_weights,
    make_weight,
)
from qserve_jax.benchmarks.provenance import kernels
from qserve_jax.benchmarks.report import Report, baseline, drop_row, has_row
from qserve_jax.benchmarks.shapes import Shape
from qserve_jax.pallas_kernels import w4a8_matmul
from qserve_jax.pallas_kernels.w4a8_matmul import from_kernel_layout, take_layer
from qserve_jax.pallas_kernels.w4a8_matmul.tuning import chosen_config, chosen_design
from qserve_jax.quantization.qtensor import Array


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What to measure: every backend and group size (128, -1) at every (N, K) and M.

    others: beside them XLA's and torch's bf16, int8 and fp8.
    """

    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    group_sizes: tuple[int, ...]
    backends: tuple[str, ...]
    others: bool = True


@dataclasses.dataclass
class Bench:
    """What a sweep works with: the clock, the report that it fills, and whom it tells.

    save is called after every row; op is one of `provenance.OPS`, whose kernels rows must be of;
    problems are lines about what could not be measured.
    """

    clock: Clock
    report: Report
    save: Callable[[Report], None]
    say: Callable[[str], None]
    op: str = "matmul"
    problems: list[str] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def kernels(self) -> str:
        return kernels(self.op)

    @property
    def origin(self) -> dict[str, str]:
        """The columns of a row that say what measured it."""
        return {"kernels": self.kernels, "commit": self.report["commit"]}

    def problem(self, line: str) -> None:
        self.problems.append(line)
        self.say(line)

    def median_us(self, run: Compiled, fixed: tuple, rotating: list[Any]) -> float:
        """Of run(*fixed, one of rotating)."""
        return statistics.median(
            self.clock(lambda i: call(run, *fixed, rotating[i % len(rotating)]))
        )

    def believes(self, place: str, gbps: float) -> bool:
        """Whether memory can be that fast; a problem where not."""
        ceiling = memory_ceiling(self.report["ceilings"])
        if gbps > ceiling:
            self.problem(
                f"{place}: {gbps:.0f} GB/s is above the {ceiling:.0f} GB/s of memory: rejected as "
                "a measuring error"
            )
        return gbps <= ceiling


def run_sweep(sweep: Sweep, bench: Bench) -> None:
    """Measure what the report lacks. One case that fails is a problem and does not end the rest."""
    find_ceilings(bench)
    for n, k in sweep.shapes:
        for size in sweep.group_sizes:
            with _told(f"w4a8 {n}x{k} group size {size}", bench):
                _measure_ours(sweep, n, k, size, bench)
    # Last: XLA's search for its fastest kernels takes most of the time.
    for n, k in sweep.shapes if sweep.others else ():
        with _told(f"bf16, int8 and fp8 {n}x{k}", bench):
            _measure_baselines(sweep, n, k, bench)


@contextlib.contextmanager
def _told(place: str, bench: Bench) -> Iterator[None]:
    """What fails before the single cases is a problem, too: weights that do not fit, above all."""
    try:
        yield
    except Exception as failure:
        bench.problem(f"{place}: {_line(failure)}")


def find_ceilings(bench: Bench) -> None:
    """Measure them where the report has not all of them."""
    if not NAMES <= bench.report["ceilings"].keys():
        bench.say("ceilings: ways through 4 GiB of memory, bf16 and int8 products of 8192 x 8192")
        found = measure_ceilings(bench.clock)
        bench.report["ceilings"] = {**found, "commit": bench.report["commit"]}
        bench.save(bench.report)


def _measure_baselines(sweep: Sweep, n: int, k: int, bench: Bench) -> None:
    tokens = [m for m in sweep.tokens if _lacks_baselines(bench.report, m, n, k)]
    if not tokens:
        return
    bench.say(f"bf16, int8 and fp8 {n}x{k}: compile for m={tokens}")
    made = baselines.xla_activations(make_activation(max(sweep.tokens), k))
    host = jax.device_get(made)
    rotating = baselines.xla_weights(
        [make_plain_weights(n, k, seed) for seed in range(copies_of(n * k))]
    )
    x = {m: first_tokens(host, m) for m in tokens}
    jobs = {
        (m, name): (run, (x[m][name], rotating[name][0]))
        for m in tokens
        for name, run in baselines.XLA.items()
    }
    compiled = compile_all(jobs, at_once=1)
    torch = _torch_fp8(n, k, bench)
    for m in tokens:
        times: dict[str, Callable[[], float]] = {
            name: functools.partial(
                bench.median_us, compiled[m, name], (x[m][name],), rotating[name]
            )
            for name in baselines.XLA
        }
        for scales in ("tensor", "row") if torch else ():
            name = f"fp8_torch_{scales}_us"
            times[name] = functools.partial(torch.median_us, m, scales, bench.clock)
        found = dict.fromkeys(baselines.COLUMNS) | (baseline(bench.report, m, n, k) or {})
        found |= {name: _column(time, name, m, n, k, bench) for name, time in times.items()}
        place = {"m": m, "n": n, "k": k}
        drop_row(bench.report["baselines"], place)
        bench.report["baselines"].append(place | found | {"commit": bench.report["commit"]})
        for row in bench.report["rows"]:
            if (row["m"], row["n"], row["k"]) == (m, n, k):
                row |= _baseline_columns(bench.report, m, n, k)
        bench.save(bench.report)
    if torch:
        torch.free()


def _lacks_baselines(report: Report, m: int, n: int, k: int) -> bool:
    """Whether a column is null that can be measured here: it failed, or torch is here only now."""
    found = baseline(report, m, n, k) or {}
    here = baselines.XLA if baselines.why_no_torch() else baselines.COLUMNS
    return any(found.get(name) is None for name in here)


def _torch_fp8(n: int, k: int, bench: Bench) -> Any:
    """None, and a line about it, where torch cannot."""
    reason = baselines.why_no_torch()
    try:
        if reason is None:
            return baselines.TorchFp8(n, k)
    except Exception as error:  # a library that is not ours must not end the sweep
        reason = _line(error)
    bench.say(f"fp8 is XLA's alone: {reason}")
    return None


def _column(
    time: Callable[[], float], name: str, m: int, n: int, k: int, bench: Bench
) -> float | None:
    """Microseconds of a baseline; None where there are none to believe."""
    place = f"{name.removesuffix('_us')} {n}x{k} m={m}"
    bench.say(place)
    try:
        us = time()
    except Exception as error:
        bench.problem(f"{place}: {_line(error)}")
        return None
    gbps = baselines.COLUMNS[name] * n * k / us / 1e3
    return us if bench.believes(place, gbps) else None


def _measure_ours(sweep: Sweep, n: int, k: int, group_size: int, bench: Bench) -> None:
    missing = [
        (backend, m)
        for backend in sweep.backends
        for m in sweep.tokens
        if not _is_measured(
            {"backend": backend, "group_size": group_size, "m": m, "n": n, "k": k}, bench
        )
    ]
    if not missing:
        return
    bench.say(f"w4a8 {n}x{k} group size {group_size}: compile for {missing}")
    x = make_activation(max(sweep.tokens), k)
    packed = make_weight(copies_of(int(weight_bytes(n, k, group_size))), n, k, group_size)
    weights = {backend: packed for backend in sweep.backends}
    if "reference" in weights:
        weights["reference"] = from_kernel_layout(packed)
    layers = [jnp.int32(i) for i in range(packed.channel_scale.shape[0])]
    expected, host = _expected(x, from_kernel_layout(take_layer(packed, 1))), jax.device_get(x)
    arguments = {(b, m): (first_tokens(host, m), weights[b]) for b, m in missing}
    jobs = {case: (_matmul(case[0]), (*arguments[case], layers[0])) for case in missing}
    outputs = {m: (jax.ShapeDtypeStruct((m, n), jnp.bfloat16), expected) for _, m in missing}
    compare = compile_all({m: (_compare, shapes) for m, shapes in outputs.items()})
    for (backend, m), run in compile_all(jobs).items():
        row = {"backend": backend, "group_size": group_size, "m": m, "n": n, "k": k}
        config = _config(row)
        place = f"{backend} {n}x{k} group size {group_size} m={m}"
        bench.say(place)
        drop_row(bench.report["rows"], row)
        try:
            y = call(run, *arguments[backend, m], layers[1])
            wrong, error = call(compare[m], y, expected)
            if wrong:
                raise ArithmeticError(f"{wrong} of {y.size} outputs are not the reference's")
            us = bench.median_us(run, arguments[backend, m], layers)
        except NotImplementedError as refusal:
            bench.say(f"{place}: {_line(refusal)}")
        except Exception as failure:
            bench.problem(f"{place}: {_line(failure)}")
        else:
            _keep(row | {"us": us, "rel_err": float(error), "config": config}, place, bench)


def _is_measured(row: dict[str, Any], bench: Bench) -> bool:
    return has_row(bench.report["rows"], row | {"config": _config(row)}, bench.kernels)


def _config(row: dict[str, Any]) -> dict[str, int] | None:
    """Of a row's kernel, tuned or by the rules; the reference has none."""
    if row["backend"] == "reference":
        return None
    sizes = row["m"], row["n"], row["k"], row["group_size"] != -1
    design = "mma" if row["backend"] == "mosaic_mma" else chosen_design(*sizes)
    return dataclasses.asdict(chosen_config(design, *sizes))


def _keep(row: dict[str, Any], place: str, bench: Bench) -> None:
    """Add the row to the report, with the columns that follow from others, if it is believed."""
    m, n, k = row["m"], row["n"], row["k"]
    columns: dict[str, Any] = _baseline_columns(bench.report, m, n, k) | {
        "gbps": weight_bytes(n, k, row["group_size"]) / row["us"] / 1e3,
        "tops": 2 * m * n * k / row["us"] / 1e6,
    }
    if bench.believes(place, columns["gbps"]):
        sizes = {name: row[name] for name in ("backend", "group_size", "m", "n", "k", "us")}
        more = {"rel_err": row["rel_err"], "config": row["config"]}
        found = {**sizes, **columns, **more, **bench.origin}
        bench.report["rows"].append(found)
        bench.save(bench.report)


def _baseline_columns(report: Report, m: int, n: int, k: int) -> dict[str, float | None]:
    """Those of a row; None where they are not measured (yet)."""
    others = baseline(report, m, n, k) or {}
    times = {name: others.get(name) for name in ("bf16_us", "int8_us")}
    return times | {"fp8_us": baselines.best_fp8(others)}


def weight_bytes(n: int, k: int, group_size: int) -> float:
    """Codes, and a scale and an offset per group."""
    return n * k * (0.5 if group_size == -1 else 0.5 + 2 / group_size)


def _matmul(backend: str) -> Callable[..., Array]:
    def matmul(x, w, layer):
        return w4a8_matmul(x, w, layer=layer, out_dtype=jnp.bfloat16, backend=backend)

    return matmul


@jax.jit  # with its autotuning: without, XLA 0.11.2 computed other int8 products on an H200
def _expected(x: Any, w: Any) -> Array:
    """Exact sums, scaled in float32."""
    return w4a8_matmul(x, w, out_dtype=jnp.float32, backend="reference")


def _compare(y: Array, expected: Array) -> tuple[Array, Array]:
    """How many of y are not `expected` rounded once, and the relative norm of the difference.

    expected may have more tokens than y.
    """
    expected = expected[: y.shape[0]]
    wrong = jnp.sum(y != expected.astype(y.dtype))
    difference = jnp.linalg.norm(y.astype(jnp.float32) - expected)
    return wrong, difference / jnp.linalg.norm(expected)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
