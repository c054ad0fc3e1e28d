"""Which rows of a report are of today's kernels, though of older sources?

    python scripts/same_kernels.py docs/results/h200_w4a8_matmul.json [--stamp]

Lowers every row with its configuration for CUDA (no GPU is needed) at the row's commit and here,
and compares the Mosaic modules, without the places in the sources, and the attributes of their
calls. --stamp gives equal rows today's hash (`provenance.kernels`), by which `bench kernels` takes
them for measured; their commit stays. A row whose commit is not in this repository is lowered at
another one of the same hash. Exit code 1 where rows differ or could not be compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax._src.interpreters.mlir import make_ir_context
from jaxlib.mlir import ir

from qserve_jax.benchmarks import attention_cases
from qserve_jax.benchmarks.operands import copies_of, make_activation, make_weight
from qserve_jax.benchmarks.provenance import ROOT, kernels
from qserve_jax.benchmarks.report import write_report
from qserve_jax.pallas_kernels import paged_attention, rope_append_kv
from qserve_jax.pallas_kernels.paged_attention import mosaic_decode
from qserve_jax.pallas_kernels.paged_attention.decode_config import DecodeConfig
from qserve_jax.pallas_kernels.w4a8_matmul.api import W4A8_BACKENDS
from qserve_jax.pallas_kernels.w4a8_matmul.mma_config import MmaConfig
from qserve_jax.pallas_kernels.w4a8_matmul.sm90_config import Sm90Config
from qserve_jax.quantization.qtensor import KVCache

Row = dict[str, Any]
Shape = jax.ShapeDtypeStruct

MODULE = re.compile(r'module = "((?:[^"\\]|\\.)*)"')
HASH = re.compile(r'kernel_hash = "(?:[^"\\]|\\.)*"')
CALL = "custom_call @mosaic_gpu"


def digest(function: Callable[..., Any], *operands: Any) -> str:
    """Of the kernels that it launches. ValueError: it launches none."""
    text = jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if CALL in line]
    if not calls:
        raise ValueError("no kernel of ours is launched")
    found = hashlib.sha256()
    for line in calls:
        attributes = HASH.sub("", MODULE.sub("", line.partition(CALL)[2]))
        found.update(re.sub(r"%\w+", "%", attributes).encode())
        for module in MODULE.findall(line):
            found.update(assembly(unescape(module)).encode())
    return found.hexdigest()


def unescape(text: str) -> bytes:
    """The bytes of a string as MLIR prints it."""
    plain = re.compile(rb'\\([\\"]|[0-9A-F]{2})')
    char = lambda found: found[1] if len(found[1]) == 1 else bytes.fromhex(found[1].decode())  # noqa: E731
    return plain.sub(char, text.encode())


def assembly(bytecode: bytes) -> str:
    """Without locations, which name lines of our sources."""
    with make_ir_context() as context:
        context.allow_unregistered_dialects = True
        return str(ir.Module.parse(bytecode).operation.get_asm(enable_debug_info=False))


def known_fields(config: type, values: Row) -> Any:
    """The config; fields that an older commit lacks were not used by what it measured."""
    names = {field.name for field in dataclasses.fields(config)}
    return config(**{name: value for name, value in values.items() if name in names})


def matmul(row: Row) -> str:
    m, n, k = row["m"], row["n"], row["k"]
    design = MmaConfig if "row_tiles" in row["config"] else Sm90Config
    config = known_fields(design, row["config"])
    backend = "mosaic_mma" if design is MmaConfig else "mosaic_sm90"

    def run(x: Any, w: Any, layer: Any) -> Any:
        options = {"bias": None, "residual": None, "out_dtype": jnp.bfloat16, "config": config}
        return W4A8_BACKENDS[backend](x, w, layer=layer, **options)

    x = jax.eval_shape(lambda: make_activation(m, k))
    w = jax.eval_shape(lambda: make_weight(2, n, k, row["group_size"]))
    return digest(run, x, w, integers())


def integers(*shape: int) -> Shape:
    return Shape(shape, jnp.int32)


def normals(*shape: int) -> Shape:
    return Shape(shape, jnp.bfloat16)


def case_of(row: Row, lengths: tuple[int, ...]) -> attention_cases.Case:
    heads, kv_heads, head_dim = (row[name] for name in ("heads", "kv_heads", "head_dim"))
    return attention_cases.Case(heads, kv_heads, head_dim, row.get("kv_bits", 4), lengths)


def pages(case: attention_cases.Case, layers: int | None = None) -> Shape:
    layers = layers or copies_of(case.bytes_read)
    sizes = layers, sum(case.pages), case.kv_heads, case.head_dim, case.kv_bits
    return jax.eval_shape(lambda: attention_cases._pages(*sizes))


def decode(row: Row) -> str:
    case = case_of(row, tuple(row.get("lengths") or (row["ctx"],) * row["b"]))
    batch, full = case.batch, row["attends"] == "full"
    config = DecodeConfig(**row["config"])

    def run(pages: Any, q: Any, new: Any, table: Any, lens: Any, order: Any, layer: Any) -> Any:
        more = {"new_k": new[0], "new_v": new[1]} if full else {}
        more |= {"attends": row["attends"], "order": order, "backend": row["backend"]}
        cache = KVCache(pages, case.kv_bits, case.head_dim)
        with mock.patch.object(mosaic_decode, "choose_config", lambda p, *, clusters: config):
            more |= {"query_lens": lens[1], "layer": layer}
            return paged_attention(q, cache, table, lens[0], **more)

    q, new = normals(batch, case.heads, case.head_dim), normals(batch, case.kv_heads, case.head_dim)
    table, lens = integers(batch, max(case.pages)), integers(batch)
    order = lens if row.get("ordered", "lengths" in row) else None
    return digest(run, pages(case), q, (new, new), table, (lens, lens), order, integers())


def append(row: Row) -> str:
    case = case_of(row, (1024,) * row["b"])

    def run(pages: Any, qkv: Any, cos: Any, sin: Any, slots: Any, layer: Any) -> Any:
        cache = KVCache(pages, case.kv_bits, case.head_dim)
        return rope_append_kv([qkv], cos, sin, cache, slots, layer=layer, backend=row["backend"])

    qkv = normals(case.batch, case.heads + 2 * case.kv_heads, case.head_dim)
    turn = Shape((case.batch, case.head_dim // 2), jnp.float32)
    return digest(run, pages(case, 4), qkv, turn, turn, integers(case.batch), integers())


def prefill(row: Row) -> str:
    """Of a chunk, or of fresh prompts that are read from their pages."""
    new = row.get("chunk") or row["tokens"]
    case = case_of(row, (row.get("ctx") or new,) * row.get("b", 1))
    full = row.get("attends") == "full"

    def run(pages: Any, q: Any, side: Any, table: Any, lens: Any, layer: Any) -> Any:
        more = {"new_k": side, "new_v": side} if full else {}
        more |= {"query_lens": lens[1], "backend": row["backend"]}
        more |= {"attends": "full" if full else "quantized"}
        cache = KVCache(pages, case.kv_bits, case.head_dim)
        return paged_attention(q, cache, table, lens[0], layer=layer, **more)

    q, side = (normals(case.batch, new, n, case.head_dim) for n in (case.heads, case.kv_heads))
    table, lens = integers(case.batch, max(case.pages)), integers(case.batch)
    return digest(run, pages(case), q, side, table, (lens, lens), integers())


LISTS = {"append": append, "prefill": prefill, "chunked_prefill": prefill}


def rows_of(report: Row) -> list[tuple[Row, Callable[[Row], str]]]:
    """Rows of our kernels, each with what lowers it. Fresh prompts over themselves are cuDNN's."""
    first = decode if report.get("op") == "attention" else matmul
    found = [(row, first) for row in report["rows"] if row.get("config")]
    others = [(row, lower) for name, lower in LISTS.items() for row in report.get(name, ())]
    return found + [(row, f) for row, f in others if "tokens" not in row or is_paged(row)]


def is_paged(row: Row) -> bool:
    return row.get("attends") == "quantized"


def lower_all(report: Row) -> list[str]:
    """A digest of each of `rows_of`, or why there is none."""
    found = []
    for row, lower in rows_of(report):
        try:
            found.append(lower(row))
        except Exception as error:  # the other rows can be compared
            found.append(f"{type(error).__name__}: {error}".splitlines()[0])
    return found


def lower_at(commit: str, report: Path) -> list[str]:
    """`lower_all`, by the package of another commit."""
    with tempfile.TemporaryDirectory() as folder:
        tree, git = Path(folder) / "tree", ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "-q", "--detach", str(tree), commit], check=True)
        try:
            command = [sys.executable, __file__, str(report), "--lower"]
            env = os.environ | {"PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu"}
            run = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
        return json.loads(run.stdout)


def is_here(commit: str) -> bool:
    git = ["git", "-C", str(ROOT), "cat-file", "-e", f"{commit}^{{commit}}"]
    return subprocess.run(git, capture_output=True, check=False).returncode == 0


def sources(rows: list[Row]) -> list[str | None]:
    """The commit at which to lower each row; None where this repository has none."""
    here = {commit: is_here(commit) for commit in {row["commit"] for row in rows}}
    same = {row["kernels"]: row["commit"] for row in rows if here[row["commit"]]}
    return [row["commit"] if here[row["commit"]] else same.get(row["kernels"]) for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path)
    parser.add_argument("--stamp", action="store_true", help="write today's hash into equal rows")
    parser.add_argument("--lower", action="store_true", help="print the digests of all rows")
    args = parser.parse_args()
    report = json.loads(args.report.read_text())
    if args.lower:
        print(json.dumps(lower_all(report)))
        return 0
    rows = [row for row, _ in rows_of(report)]
    hash_now = kernels(report.get("op", "matmul"))
    commits, here = sources(rows), lower_all(report)
    there = {c: lower_at(c, args.report.resolve()) for c in set(filter(None, commits))}
    count: dict[str, int] = defaultdict(int)
    for index, (row, commit) in enumerate(zip(rows, commits, strict=True)):
        if commit is None:
            state = f"of {row['commit'][:12]}, which is not here"
        elif len(here[index]) != 64:
            state = f"not lowered: {here[index]}"
        elif here[index] == there[commit][index]:
            state = "equal"
            if args.stamp:
                row["kernels"] = hash_now
        else:
            state = f"other than at {commit[:12]}"
        count[state] += 1
    for state, number in sorted(count.items()):
        print(f"{number} rows {state}")
    if args.stamp:
        write_report(args.report, report)
    return int(set(count) != {"equal"})


if __name__ == "__main__":
    sys.exit(main())
