"""Time every way to cut decode attention into blocks on this GPU, beside the rules' own choice.

python scripts/tune_attention.py --batch 1 16 64 --context 1024 4096 [--heads 32 8 128] [--bits 4]

Prints microseconds and GB/s of each config, fastest last, and writes them after every case to
--output. Rules are in pallas_kernels/paged_attention/decode_rules.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qserve_jax.benchmarks.clock import call_times, check_available
from qserve_jax.benchmarks.compile import call, compile_all
from qserve_jax.benchmarks.operands import copies_of
from qserve_jax.benchmarks.provenance import provenance
from qserve_jax.pallas_kernels.paged_attention import mosaic_mma, mosaic_sm90
from qserve_jax.pallas_kernels.paged_attention.decode_config import (
    DecodeConfig,
    check_config,
)
from qserve_jax.pallas_kernels.paged_attention.decode_problem import gather
from qserve_jax.pallas_kernels.paged_attention.decode_rules import choose_config
from qserve_jax.quantization.qtensor import KVCache, kv_bytes_per_token

DECODE = {"mosaic_sm90": mosaic_sm90.decode, "mosaic_mma": mosaic_mma.decode}
PAGE = 64
AGREES = 4e-3
"""Relative: of two outputs that were each rounded to bf16, and summed in another order."""


def make_cache(layers: int, pages: int, heads: int, h: int, bits: int) -> KVCache:
    """Random codes, finite scales; bf16 of size one."""
    key = jax.random.key(0)
    if bits == 16:
        shape = (layers, pages, heads, 2, PAGE, h)
        return KVCache(jax.random.normal(key, shape, jnp.bfloat16), 16, h)
    codes = PAGE * 2 * h * bits // 32
    words = jax.random.randint(key, (layers, pages, heads, codes), -(2**31), 2**31 - 1, jnp.int32)
    scale = np.array([0.125, 0.25, 0.125, -0.5], np.float16).view(np.int32)
    scales = jnp.broadcast_to(jnp.tile(scale, PAGE), (*words.shape[:-1], 2 * PAGE))
    return KVCache(jnp.concatenate([words, scales], axis=-1), bits, h)


def make_operands(b: int, context: int, shape: tuple[int, int, int], bits: int, ragged: bool):
    """(q, cache of several layers, table, lengths) and the bytes that a call has to read."""
    n, k, h = shape
    rng = np.random.default_rng(0)
    lens = rng.integers(context // 16, context, b) if ragged else np.full(b, context)
    needed = -(-lens // PAGE)
    ids = rng.permutation(needed.sum()).astype(np.int32)
    table = np.full((b, -(-context // PAGE)), -1, np.int32)
    for row, pages in enumerate(np.split(ids, np.cumsum(needed)[:-1])):
        table[row, : len(pages)] = pages
    size = int(lens.sum()) * k * kv_bytes_per_token(h, bits)
    cache = make_cache(copies_of(size), len(ids), k, h, bits)
    q = jax.random.normal(jax.random.key(1), (b, 1, n, h), jnp.bfloat16)
    return (q, cache, jnp.asarray(table), jnp.asarray(lens, jnp.int32)), size


def configs(p: Any, clusters: bool, stages_of: Sequence[int]) -> list[DecodeConfig]:
    """The rules' choice first, then all that can run and leave no worker without a page."""
    found = [choose_config(p, clusters=clusters)]
    cuts = [(c, 1) for c in (1, 2, 4, 8)[: 4 if clusters else 1]] + [(1, s) for s in (2, 4, 8, 16)]
    for stages, warpgroups, (cluster, splits) in itertools.product(stages_of, (1, 2, 4), cuts):
        config = DecodeConfig(stages, warpgroups, cluster, splits)
        try:
            check_config(p, config)
        except ValueError:
            continue
        crowded = not config.alone and p.rows * p.head_blocks * cluster * splits > 8 * 132
        if config.workers <= p.width and not crowded and config not in found:
            found.append(config)
    return found


def tune(
    name: str, b: int, context: int, shape: tuple, bits: int, ragged: bool, stages: Sequence[int]
) -> dict[str, Any]:
    """Microseconds of every config that gives the first one's output."""
    (q, cache, table, lens), size = make_operands(b, context, shape, bits, ragged)
    static: dict[str, Any] = {"new_k": None, "new_v": None, "attends": "quantized"}
    static |= {"sm_scale": None, "window": None, "softcap": None}
    order = jnp.argsort(-lens).astype(jnp.int32) if ragged else None
    ones = jnp.minimum(lens, 1)

    def attend(config: DecodeConfig):
        def run(q: Any, cache: KVCache, table: Any, lens: Any, layer: Any) -> Any:
            rest = {"query_lens": ones, "order": order, "layer": layer, "config": config}
            return DECODE[name](q, cache, table, lens, **static, **rest)

        return run

    layers = [jnp.int32(i) for i in range(cache.pages.shape[0])]
    operands = (q, cache, table, lens)
    p, _ = gather(name, *operands, **static, query_lens=ones, order=order, layer=layers[0])
    wanted = configs(p, name == "mosaic_sm90", stages)
    jobs = {config: (attend(config), (*operands, layers[0])) for config in wanted}
    expected, rows = None, []
    for config, run in compile_all(jobs).items():
        try:
            out = np.asarray(call(run, *operands, layers[1]).astype(jnp.float32))
            expected = out if expected is None else expected
            if not np.linalg.norm(out - expected) <= AGREES * np.linalg.norm(expected):
                raise ArithmeticError("WRONG")
            times = call_times(lambda i, run=run: call(run, *operands, layers[i % len(layers)]))
        except Exception as error:  # one config that fails must not lose the others
            print(f"  {config}: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
            continue
        us = statistics.median(times)
        rows.append({"config": vars(config), "us": us, "gbps": size / us / 1e3})
    chosen = vars(wanted[0])
    for row in sorted(rows, key=lambda row: -row["us"]):
        mark = "  <- the rules" if row["config"] == chosen else ""
        print(f"  {row['us']:8.2f} us {row['gbps']:6.0f} GB/s {row['config']}{mark}", flush=True)
    return {"backend": name, "b": b, "ctx": context, "shape": shape, "kv_bits": bits} | {
        "ragged": ragged,
        "rules": chosen,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--context", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--heads", nargs=3, type=int, default=[32, 8, 128], metavar=("N", "K", "H"))
    parser.add_argument("--bits", nargs="+", type=int, choices=(4, 8, 16), default=[4])
    parser.add_argument("--backend", nargs="+", choices=DECODE, default=list(DECODE))
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--ragged", action="store_true", help="lengths of context/16 .. context")
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args()
    check_available()
    found: dict[str, Any] = {**provenance(), "cases": []}
    for name, bits, b, context in itertools.product(
        args.backend, args.bits, args.batch, args.context
    ):
        print(f"{name} {bits} bits, {b} x {context}", flush=True)
        try:
            case = tune(name, b, context, tuple(args.heads), bits, args.ragged, args.stages)
            found["cases"].append(case)
        except Exception as error:
            print(f"  {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
        if args.output:
            args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
