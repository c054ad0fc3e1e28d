"""Time the kernels that end in int8 activations, beside XLA's fusions of the reference.

python scripts/bench_elementwise.py [--tokens 1 16 ...] [--widths 4096 ...] [--output FILE]

Times are CUPTI kernel times: the median over calls of the sum of all kernels of a call, inputs in
bf16 and cold in L2, which a sum over a large array has swept before each call. Bandwidth counts the
input once and the codes once; its share is of what a copy of a large array reaches in the same run.
Writes docs/results/h200_elementwise.json by default.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from qserve_jax.benchmarks.provenance import ROOT, provenance
from qserve_jax.pallas_kernels import (
    quantize_activation,
    rms_norm_quantize,
    silu_mul_quantize,
)

TOKENS, WIDTHS = (1, 16, 64, 256, 1024, 4096), (4096, 14336)
BACKENDS = {"us": "mosaic_sm90", "xla_us": "reference"}
SWEEP_BYTES = 192 * 2**20  # three times the L2
WARM_CALLS, CALLS = 600, 51  # the clocks rise for some 30 ms


def quantize(x: jax.Array, scale: jax.Array, backend: str) -> Any:
    return quantize_activation(x, backend=backend)


def norm(x: jax.Array, scale: jax.Array, backend: str) -> Any:
    return rms_norm_quantize(x, scale, eps=1e-5, layer=1, backend=backend)


def product(x: jax.Array, scale: jax.Array, backend: str) -> Any:
    return silu_mul_quantize(x, backend=backend)


OPS = {
    "quantize_activation": (quantize, 1),
    "rms_norm_quantize": (norm, 1),
    "silu_mul_quantize": (product, 2),
}
"""The operation, and the columns of its input over its width."""


def cold(op: Callable | None) -> Callable:
    """op behind a sum over `sweep`; the barrier keeps the order and anything from fusing."""

    def run(sweep: jax.Array, x: jax.Array, scale: jax.Array) -> Any:
        total, x, scale = jax.lax.optimization_barrier((jnp.sum(sweep), x, scale))
        return total, op(x, scale) if op else None

    return run


def inputs(m: int, width: int, columns: int) -> tuple[Any, ...]:
    """Shapes of the sweep, x and the scales of two norms."""
    return (
        jax.ShapeDtypeStruct((SWEEP_BYTES // 4,), jnp.int32),
        jax.ShapeDtypeStruct((m, columns * width), jnp.bfloat16),
        jax.ShapeDtypeStruct((2, width), jnp.bfloat16),
    )


def make(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Random numbers, repeated, made on the host: nothing to compile."""
    x = np.random.default_rng(0).standard_normal(2**20).astype(shape.dtype)
    return jax.device_put(np.resize(x, shape.shape))


@jax.jit
def _sweep() -> jax.Array:
    return jnp.arange(SWEEP_BYTES // 4, dtype=jnp.int32)


def kernels_of_calls(compiled: Any, args: tuple[Any, ...]) -> list[list[tuple[str, float]]]:
    """(name, microseconds) of the kernels of each call, in their order."""
    last = None
    for _ in range(WARM_CALLS):
        last = compiled(*args)
    jax.block_until_ready(last)
    _, calls = profiler.measure(compiled, aggregate=False, iterations=CALLS)(*args)
    if not calls:
        raise RuntimeError("CUPTI saw no kernel: is another profiler attached?")
    return [[(name, 1e3 * ms) for name, ms in call] for call in calls]


def copy_gbps() -> float:
    """Read and written bytes of an elementwise kernel over 256 MiB, per second."""
    x = jnp.zeros(2**26, jnp.int32)
    compiled = jax.jit(lambda x: x + 1).lower(x).compile()
    calls = kernels_of_calls(compiled, (x,))
    return 2 * x.nbytes / median_sum(calls) / 1e3


def compile_all(tokens: list[int], widths: list[int]) -> dict[tuple, Any]:
    """Every program, compiled side by side."""
    lowered: dict[tuple, Any] = {(): jax.jit(cold(None)).lower(*inputs(1, 128, 1))}
    for name, (op, columns) in OPS.items():
        for width in widths:
            for m in tokens:
                for column, backend in BACKENDS.items():
                    run = cold(lambda x, w, op=op, backend=backend: op(x, w, backend))
                    key = name, m, width, column
                    lowered[key] = jax.jit(run).lower(*inputs(m, width, columns))
    with ThreadPoolExecutor(8) as pool:
        compiled = pool.map(lambda program: program.compile(), lowered.values())
        return dict(zip(lowered, compiled, strict=True))


class Clock:
    """Times the programs of `cold`: kernels of the sweep come first and are left out."""

    def __init__(self, sweep_alone: Any):
        self.sweep = _sweep()
        args = (self.sweep, *(make(shape) for shape in inputs(1, 128, 1)[1:]))
        calls = kernels_of_calls(sweep_alone, args)
        self.count, self.us = len(calls[0]), median_sum(calls)

    def kernels(self, program: Any, args: list[jax.Array]) -> list[list[tuple[str, float]]]:
        """The operation's kernels, for each call."""
        calls = kernels_of_calls(program, (self.sweep, *args))
        first = median_sum([call[: self.count] for call in calls])
        if not 0.8 < first / self.us < 1.25:
            raise RuntimeError(f"the sweep takes {self.us} us, but first come {calls[0]}")
        return [call[self.count :] for call in calls]


def median_sum(calls: list[list[tuple[str, float]]]) -> float:
    """Microseconds of a call's kernels together."""
    return statistics.median(sum(us for _, us in call) for call in calls)


def measure(programs: dict[tuple, Any], copy: float) -> list[dict[str, Any]]:
    """A row for each operation and shape."""
    clock = Clock(programs.pop(()))
    rows: dict[tuple, dict[str, Any]] = {}
    for (name, m, width, column), program in programs.items():
        columns = OPS[name][1]
        calls = clock.kernels(program, [make(s) for s in inputs(m, width, columns)[1:]])
        row = rows.setdefault((name, m, width), {"op": name, "m": m, "width": width})
        row[column] = round(median_sum(calls), 2)
        row[column.replace("us", "kernels")] = len(calls[0])
        print(name, m, width, column, row[column], [kernel for kernel, _ in calls[0]], flush=True)
        row["gbps"] = round(m * width * (2 * columns + 1) / row["us"] / 1e3)
        row["share_of_copy"] = round(row["gbps"] / copy, 3)
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    default = ROOT / "docs" / "results" / "h200_elementwise.json"
    parser.add_argument("--output", type=Path, default=default)
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("JAX finds no GPU: install the cuda12 or cuda13 extra on a machine with one")
    programs = compile_all(args.tokens, args.widths)
    copy = copy_gbps()
    rows = measure(programs, copy)
    result = {**provenance(), "dtype": "bfloat16", "copy_gbps": round(copy), "rows": rows}
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(*(f"{value:>8}" for value in row.values()))


if __name__ == "__main__":
    main()
