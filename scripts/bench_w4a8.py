"""Check and time the W4A8 matmul on a Hopper GPU, beside XLA's bf16 and int8 matmuls.

python scripts/bench_w4a8.py [--skip-check] [--skip-xla] [--shapes 28672x4096 ...] [--output FILE]

Times are CUPTI kernel times, medians over weights that are cold in L2: one jitted loop goes through
as many copies of the weight as take three times the cache. Bandwidth counts codes and scales once.
XLA's int8 column stops at int32, without scales and output rounding.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from qserve_jax.pallas_kernels.w4a8_matmul import mosaic_sm90, reference, to_kernel_layout
from qserve_jax.pallas_kernels.w4a8_matmul.config import choose_config
from qserve_jax.quantization.qtensor import Int8Activation, Source, W4PerChannel, W4PerGroup

SHAPES = ("256x512", "28672x4096", "4096x4096", "4096x14336", "6144x4096")  # N x K
CHECKED = (1, 3, 8, 16, 17, 32, 64)
TIMED = (1, 8, 16, 32, 64)
COLD_BYTES = 180 * 2**20
SOURCE = Source(("stack", "in", "out"), (0,), (0,), "float32")  # the matmul does not read it


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def make_weight(layers: int, n: int, k: int, per_group: bool) -> Any:
    """Random canonical weights; per group all of int8 is reached and never left."""
    keys = jax.random.split(jax.random.key(n + k), 4)
    codes = jax.random.bits(keys[0], (layers, n, k // 2), jnp.uint8)
    scale = jax.random.uniform(keys[1], (layers, n), minval=1e-3, maxval=2e-3)
    if not per_group:
        return W4PerChannel(codes, scale, scale * 7.3, SOURCE)
    group_scale = jax.random.randint(keys[2], (layers, n, k // 128), 1, 18)
    room = 256 - 15 * group_scale  # offsets -128 .. 127 - 15 * scale
    offset = jax.random.randint(keys[3], group_scale.shape, 0, 2**15) % room - 128
    return W4PerGroup(
        codes, scale, group_scale.astype(jnp.uint8), offset.astype(jnp.int8), 128, SOURCE
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def make_activation(m: int, k: int) -> Int8Activation:
    codes = jax.random.randint(jax.random.key(m), (m, k), -127, 128, jnp.int8)
    scale = jax.random.uniform(jax.random.key(k), (m,), minval=1e-3, maxval=2e-3)
    return Int8Activation(codes, scale, codes.astype(jnp.int32).sum(1))


@jax.jit
def expected_of(x: Int8Activation, w: Any) -> tuple[jax.Array, jax.Array]:
    """int32 sums and float32 output of the reference, for layer 1."""
    w = jax.tree.map(lambda leaf: leaf[1], w)
    sums = reference.int8_dot(x.codes, reference.int8_weights(w))
    return sums, reference.epilogue(sums, x, w)


def check(n: int, k: int, per_group: bool, tokens: tuple[int, ...]) -> bool:
    """Sums equal for every M; the float32 output too; repeats bit-identical."""
    w = make_weight(2, n, k, per_group)
    packed = to_kernel_layout(w)
    x = make_activation(max(tokens), k)
    sums, y = (np.asarray(a) for a in expected_of(x, w))
    kind = "g128" if per_group else "channel"
    fine = True
    for m in tokens:
        print(f"check {n}x{k} {kind} {m=} {choose_config(m, n, k, per_group)}", flush=True)
        x_m = jax.tree.map(lambda leaf, m=m: leaf[:m], x)
        run = jax.jit(mosaic_sm90.int32_sums)
        wrong = int((np.asarray(run(x_m, packed, layer=jnp.int32(1))) != sums[:m]).sum())
        report = f"  wrong sums {wrong} of {m * n}"
        if m in (3, 64):
            out = _matmul(jnp.float32)(x_m, packed, jnp.int32(1))
            error = np.abs(np.asarray(out) - y[:m]).max() / np.abs(y[:m]).max()
            differ = int((np.asarray(out) != y[:m]).sum())
            report += f"; float32 outputs that differ {differ}, largest relative {error:.2e}"
            fine &= bool(error < 1e-6)
        if m in (16, 64):
            again = [np.asarray(run(x_m, packed, layer=jnp.int32(1))) for _ in range(20)]
            changed = sum(int((a != again[0]).any()) for a in again)
            report += f"; repeats that differ {changed} of 20"
            fine &= changed == 0
        print(report, flush=True)
        fine &= wrong == 0
    return fine


def _matmul(out_dtype: Any) -> Callable:
    return jax.jit(
        lambda x, w, layer: mosaic_sm90.matmul(
            x, w, bias=None, residual=None, layer=layer, out_dtype=out_dtype
        )
    )


def kernel_times(run: Callable, *args: Any, only: str = "", repeats: int = 3) -> list[float]:
    """Microseconds of every kernel whose name contains `only`."""
    kernels: list[tuple[str, float]] = []
    for _ in range(repeats):
        kernels += profiler.measure(run, aggregate=False)(*args)[1] or []
    times = [1e3 * milliseconds for name, milliseconds in kernels if only in name]
    if not times:
        raise RuntimeError(f"no kernel called {only!r} among {sorted({n for n, _ in kernels})}")
    return times


def time_ours(m: int, n: int, k: int, per_group: bool) -> float:
    """Median microseconds with an output in bf16."""
    layers = 2 + COLD_BYTES // (n * k // 2)
    packed = jax.jit(lambda: jax.lax.map(to_kernel_layout, make_weight(layers, n, k, per_group)))()
    x = make_activation(m, k)

    def step(i, total, x, w):
        y = mosaic_sm90.matmul(x, w, bias=None, residual=None, layer=i, out_dtype=jnp.bfloat16)
        return total + y

    @jax.jit
    def run(x, w):
        zero = jnp.zeros((m, n), jnp.bfloat16)
        return jax.lax.fori_loop(0, layers, functools.partial(step, x=x, w=w), zero)

    return statistics.median(kernel_times(run, x, packed, only="w4a8"))


def time_xla(m: int, n: int, k: int, dtype: Any, out: Any) -> float:
    """Mean microseconds per product of XLA's dot, all its kernels together."""
    size = n * k * jnp.dtype(dtype).itemsize
    copies = 2 + COLD_BYTES // size
    ones = [jnp.full((n, k), i + 1, dtype) for i in range(copies)]
    x = make_activation(m, k).codes.astype(dtype)
    dims = (((1,), (1,)), ((), ()))

    @jax.jit
    def run(x, ws):
        return [jax.lax.dot_general(x, w, dims, preferred_element_type=out) for w in ws]

    return sum(kernel_times(run, x, ones, repeats=3)) / (3 * copies)


def guarded(function: Callable, *args: Any) -> float | None:
    try:
        return function(*args)
    except Exception as error:  # one variant that fails must not lose the others
        print(
            f"  {function.__name__}{args} failed: {type(error).__name__}: {error}"[:600], flush=True
        )
        return None


def bench(n: int, k: int, tokens: tuple[int, ...], with_xla: bool) -> list[dict]:
    rows = []
    for m in tokens:
        print(f"time {n}x{k} {m=}", flush=True)
        row: dict[str, Any] = {"m": m, "n": n, "k": k}
        row["us"] = guarded(time_ours, m, n, k, True)
        row["channel_us"] = guarded(time_ours, m, n, k, False)
        if row["us"]:
            row["gbps"] = round(n * k * (0.5 + 2 / 128) / row["us"] / 1e3)
        if with_xla:
            row["bf16_us"] = guarded(time_xla, m, n, k, jnp.bfloat16, jnp.bfloat16)
            row["int8_us"] = guarded(time_xla, m, n, k, jnp.int8, jnp.int32)
        rows.append(row)
    return rows


def print_table(rows: list[dict]) -> None:
    columns = ("n", "k", "m", "us", "gbps", "channel_us", "bf16_us", "int8_us")
    print(" ".join(f"{c:>10}" for c in columns))
    for row in rows:
        cells = (row.get(c) for c in columns)
        print(" ".join(f"{'-' if c is None else round(c, 2):>10}" for c in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--skip-check", action="store_true")
    parser.add_argument("--skip-time", action="store_true")
    parser.add_argument("--skip-xla", action="store_true")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--tokens", nargs="+", type=int, default=TIMED)
    parser.add_argument("--output", help="JSON file")
    args = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    fine, rows, start = True, [], time.time()
    for n, k in shapes if not args.skip_check else ():
        for per_group in (True, False):
            tokens = CHECKED if per_group else (1, 17, 64)
            ok = guarded(check, n, k, per_group, tokens)
            fine &= bool(ok)
    print(f"correct: {fine}, {time.time() - start:.0f} s", flush=True)
    for n, k in shapes if not args.skip_time else ():
        if n * k >= 2**24:
            rows += bench(n, k, tuple(args.tokens), not args.skip_xla)
            print_table(rows)
    device = jax.devices()[0].device_kind
    result = {"device": device, "jax": jax.__version__, "correct": fine, "rows": rows}
    if args.output:
        with open(args.output, "w") as file:
            json.dump(result, file, indent=1)
    if not fine:
        raise SystemExit("not correct")


if __name__ == "__main__":
    main()
