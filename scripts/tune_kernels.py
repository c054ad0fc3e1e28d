"""Look for faster configurations of the W4A8 kernels on this GPU than the heuristics choose.

python scripts/tune_kernels.py --model-shape llama3-8b --tokens 16 32 64 [--rounds 3]

Starts from the heuristic's config, or a faster one of those that the design wants tried, and goes
to the fastest neighbour for --rounds rounds; every config must give the same output bit for bit.
Writes what gains over 1 % to the device's file under pallas_kernels/w4a8_matmul/tuned/, after every
case, beside the entries that are there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qserve_jax.benchmarks.clock import call_times, check_available
from qserve_jax.benchmarks.compile import call, compile_all
from qserve_jax.benchmarks.matmul import weight_bytes
from qserve_jax.benchmarks.operands import copies_of, make_activation, make_weight
from qserve_jax.benchmarks.provenance import provenance
from qserve_jax.benchmarks.report import write_report
from qserve_jax.benchmarks.shapes import MODEL_SHAPES, TOKENS, Shape, parse_shape
from qserve_jax.benchmarks.tune import ENOUGH, Measure, climb
from qserve_jax.pallas_kernels.backend import default_device
from qserve_jax.pallas_kernels.w4a8_matmul.api import W4A8_BACKENDS
from qserve_jax.pallas_kernels.w4a8_matmul.tuning import (
    DESIGNS,
    Design,
    bucket,
    tuned_path,
)


def make_measure(design: Design, x: Any, w: Any) -> Measure:
    """Compiles configs beside each other, then runs and times each; see `tune.Measure`."""
    matmul = W4A8_BACKENDS[design.backend]
    layers = [jnp.int32(i) for i in range(w.channel_scale.shape[0])]
    expected: list[np.ndarray] = []

    def product(config: Any):
        def run(x, w, layer):
            return matmul(
                x, w, bias=None, residual=None, layer=layer, out_dtype=jnp.bfloat16, config=config
            )

        return run

    def time(config: Any, run: Any) -> float | None:
        print(f"  {config}", end=" ", flush=True)
        try:
            y = np.asarray(call(run, x, w, layers[1]))
            if not expected:
                expected.append(y)
            same = np.array_equal(y, expected[0])
            times = call_times(lambda i: run(x, w, layers[i % len(layers)]))
        except Exception as error:  # one config that fails must not lose the others
            print(f"{type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
            return None
        us = statistics.median(times)
        print(f"{us:.2f} us" if same else "WRONG", flush=True)
        return us if same else None

    def measure(configs: Any) -> list[float | None]:
        jobs = {config: (product(config), (x, w, layers[0])) for config in configs}
        return [time(config, run) for config, run in compile_all(jobs).items()]

    return measure


def tune(name: str, m: int, n: int, k: int, group_size: int, rounds: int) -> dict[str, Any] | None:
    """An entry for the device's file, without "config" where the heuristic's is not beaten; None
    where nothing could be measured."""
    design, per_group = DESIGNS[name], group_size != -1
    try:
        start = design.choose(m, n, k, per_group)
        design.check(start, m, n, k, per_group)
    except (NotImplementedError, ValueError) as error:
        print(f"{name} {m=} {n=} {k=} {per_group=}: {error}", flush=True)
        return None
    print(f"{name} {m=} {n=} {k=} {per_group=}", flush=True)
    w = make_weight(copies_of(int(weight_bytes(n, k, group_size))), n, k, group_size)
    measure = make_measure(design, make_activation(m, k), w)

    def check(config: Any) -> None:
        design.check(config, m, n, k, per_group)

    try:
        best, us, first = climb(start, check, measure, rounds, design.others(m, n, k, per_group))
    except RuntimeError as error:  # one case that fails must not lose the others
        print(f"{name} {m=} {n=} {k=} {per_group=}: {error}", flush=True)
        return None
    print(f"{name} {m=} {n=} {k=} {per_group=}: {first:.2f} -> {us:.2f} us, {best}", flush=True)
    sizes = {"design": name, "m": m, "n": n, "k": k, "per_group": per_group}
    if us > ENOUGH * first:
        return sizes
    return sizes | {"config": dataclasses.asdict(best), "us": us, "heuristic_us": first}


ORIGIN = ("jax", "commit")


def merge(path: Path, entry: dict[str, Any]) -> None:
    """Write the entry into the file, in the place of one for the same sizes; one without a config
    only takes that away, for the rules do better now. Whole or not at all; entries of an earlier
    run keep the jax and the commit that measured them."""
    here = provenance() | {"jax": jax.__version__}
    origin = {name: here[name] for name in ("device", *ORIGIN)}
    content = read_tuned(path, here["device"]) or {**origin, "entries": []}
    of_then = {name: content[name] for name in ORIGIN if content[name] != origin[name]}
    old = [of_then | e for e in content["entries"] if key(e) != key(entry)]
    new = [entry] if "config" in entry else []
    if not new and len(old) == len(content["entries"]):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report(path, origin | {"entries": sorted([*old, *new], key=key)})


def key(entry: dict[str, Any]) -> tuple:
    """What an entry is for."""
    return tuple(entry[name] for name in ("design", "per_group", "n", "k", "m"))


def read_tuned(path: Path, device: str) -> dict[str, Any] | None:
    """What the file has, None where there is none. Raises ValueError on one that this run must not
    write into: broken, or of another device."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        found, _ = content["device"], [content[name] for name in ORIGIN]
        sorted(map(key, content["entries"]))  # configs of old may be unusable: they are replaced
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is broken, {error!r}: mend it or name another --output") from None
    if found != device:
        raise ValueError(f"{path} is of {found}, this is {device}: name another --output")
    return content


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=[], metavar="NxK")
    parser.add_argument("--model-shape", nargs="+", choices=MODEL_SHAPES, default=[])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="powers of two")
    parser.add_argument("--group-size", nargs="+", type=int, choices=(128, -1), default=[128, -1])
    parser.add_argument("--design", nargs="+", choices=DESIGNS, default=list(DESIGNS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="default: the device's file")
    args = parser.parse_args()
    if not (args.shapes or args.model_shape):
        parser.error("no shape: give --shapes NxK or --model-shape MODEL")
    if any(m < 1 or bucket(m) != m for m in args.tokens):
        parser.error(f"--tokens {args.tokens}: give powers of two, which entries are kept for")
    return args


def main() -> None:
    args = parse_args()
    check_available()
    output = args.output or tuned_path(default_device().device_kind)
    read_tuned(output, default_device().device_kind)  # before hours of measuring
    for case in all_cases(args):
        if entry := tune(*case):
            merge(output, entry)


def all_cases(args: argparse.Namespace) -> Iterator[tuple]:
    """The same."""
    shapes: list[Shape] = [*args.shapes]
    for model in args.model_shape:
        shapes += MODEL_SHAPES[model]
    for name in args.design:
        for n, k in dict.fromkeys(shapes):
            for group_size in args.group_size:
                for m in args.tokens:
                    yield name, m, n, k, group_size, args.rounds


if __name__ == "__main__":
    main()
