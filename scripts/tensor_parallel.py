"""Decoding on one GPU and on two: tokens/s, their ratios, and the tokens per GPU of 16 bits.

    python scripts/tensor_parallel.py --output FILE.json --seconds 330

Runs `python -m qserve_jax.bench decode` on random weights, a process for each case, because XLA
reads its flags once. Each may take --limit seconds, all together --seconds; what the file has is
not measured again. Rows are printed as they come, the table at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TRITON = "--xla_gpu_experimental_use_collective_kernels=ALL_REDUCE"
"""Sums by kernels of XLA's own over NVLink, where it sees that, instead of NCCL."""
IN_PLACE = "--xla_gpu_enable_dynamic_slice_fusion=true --xla_gpu_enable_triton_gemm=false"
"""cuBLAS reads the layers of a float model where they lie; else XLA copies each of them first."""
CASES = (  # model, precision, GPUs, XLA flags: the most telling first
    ("llama3-70b", "w4a8kv4", 1, ""),
    ("llama3-70b", "w4a8kv4", 2, ""),
    ("llama3-70b", "w4a8kv4", 2, TRITON),
    ("qwen2.5-72b", "w16a16kv16", 2, f"{IN_PLACE} {TRITON}"),
    ("qwen2.5-72b", "w4a8kv4", 1, ""),
    ("qwen2.5-72b", "w16a16kv16", 2, ""),
)
MEMORY = "0.92"
"""Of a GPU for JAX: fusing gate and up of a 72B in 16 bits takes 104 GiB for a moment."""


def measure(case: tuple[str, str, int, str], args: argparse.Namespace, limit: float) -> str | None:
    """Run a case; the reason where it has no row."""
    model, precision, gpus, flags = case
    command = [sys.executable, "-m", "qserve_jax.bench", "decode", "--dummy-weights"]
    command += ["--model-shape", model, "--precision", precision, "--batch", str(args.batch)]
    command += ["--tensor-parallel-size", str(gpus), "--save", str(args.output), "--debug"]
    command += ["--input-len", str(args.input_len), "--output-len", str(args.output_len)]
    given = os.environ.get("XLA_FLAGS", "")
    env = os.environ | {"XLA_FLAGS": f"{given} {flags}".strip()}
    env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY)
    try:
        code = subprocess.run(command, env=env, timeout=limit, stdout=subprocess.DEVNULL).returncode
    except subprocess.TimeoutExpired:
        return f"not done after {limit:.0f} s"
    return f"exit code {code}" if code else None


def table(rows: list[dict[str, Any]]) -> str:
    """tokens/s, per GPU, and over the first row of the same model and precision on one GPU."""
    head = ("model", "precision", "GPUs", "XLA flags", "batch", "context", "ms a step", "tokens/s",
            "per GPU", "over one GPU", "GiB of weights a GPU")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        if row["tokens_per_s"] is None:
            lines.append(f"{row['model']} {row['precision']} on {row['gpus']}: {row['problem']}")
            continue
        same = ("model", "precision", "batch", "input", "output")
        one = [r for r in rows if r["gpus"] == 1 and all(r[k] == row[k] for k in same)]
        ratio = f"{row['tokens_per_s'] / one[0]['tokens_per_s']:.2f}" if one else "-"
        flags = (row["xla_flags"] or "-").replace("--xla_gpu_", "")
        cells = [row["model"], row["precision"], row["gpus"], flags, row["batch"], row["input"]]
        cells += [f"{row['tpot_ms']:.2f}", f"{row['tokens_per_s']:.0f}"]
        cells += [f"{row['tokens_per_s'] / row['gpus']:.0f}", ratio, f"{row['weights_gib']:.1f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    parser.add_argument("--seconds", type=float, default=330, help="for all (default: 330)")
    parser.add_argument("--limit", type=float, default=100, help="for a case (default: 100)")
    add, every = parser.add_argument, range(len(CASES))
    add("--cases", type=int, nargs="+", choices=every, default=every, help="by number, from 0")
    add("--batch", type=int, default=64)
    add("--input-len", type=int, default=1024)
    add("--output-len", type=int, default=64)
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    for index in args.cases:
        left = end - time.monotonic()
        if left < 20:
            print(f"no time for case {index} and what follows", flush=True)
            break
        start = time.monotonic()
        problem = measure(CASES[index], args, min(args.limit, left))
        took = f"{time.monotonic() - start:.0f} s"
        print(index, CASES[index], problem or "measured", took, flush=True)
    if args.output.exists():
        print(table(json.loads(args.output.read_text())["rows"]))


if __name__ == "__main__":
    main()
