"""Decoding on one GPU, two and four: tokens/s, their ratios, and the tokens per GPU of 16 bits.

Sums over GPUs are made by the kernel that normalises too ("auto"), or by NCCL.

    python scripts/tensor_parallel.py --output FILE.json --seconds 330

Runs `python -m qserve_jax.bench decode` on random weights, a process for each case, because XLA
reads its flags once. Each may take --limit seconds, all together --seconds; what the file has is
not measured again, and cases that want more GPUs than there are are left out. Rows are printed as
they come, the table at the end. --model DIR tries it all on a checkpoint, on CPU devices too.
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
CASES = (  # model, precision, GPUs, QSERVE_JAX_SUMS, XLA flags: the most telling first
    ("llama3-70b", "w4a8kv4", 1, "auto", ""),
    ("llama3-70b", "w4a8kv4", 2, "auto", ""),
    ("llama3-70b", "w4a8kv4", 4, "auto", ""),
    ("qwen2.5-72b", "w16a16kv16", 2, "auto", IN_PLACE),
    ("qwen2.5-72b", "w4a8kv4", 1, "auto", ""),
    ("qwen2.5-72b", "w16a16kv16", 4, "auto", IN_PLACE),
    ("llama3-70b", "w4a8kv4", 2, "nccl", ""),
    ("llama3-70b", "w4a8kv4", 4, "nccl", ""),
    ("llama3-70b", "w4a8kv4", 2, "nccl", TRITON),
    ("qwen2.5-72b", "w16a16kv16", 2, "nccl", ""),
)
MEMORY = "0.92"
"""Of a GPU for JAX: fusing gate and up of a 72B in 16 bits takes 104 GiB for a moment."""


def measure(
    case: tuple[str, str, int, str, str], args: argparse.Namespace, limit: float
) -> str | None:
    """Run a case; the reason where it has no row."""
    model, precision, gpus, sums, flags = case
    command = [sys.executable, "-m", "qserve_jax.bench", "decode"]
    command += ["--dummy-weights", "--model-shape", model] if not args.model else []
    command += ["--model", args.model] if args.model else []
    command += ["--precision", precision, "--batch", str(args.batch)]
    command += ["--tensor-parallel-size", str(gpus), "--save", str(args.output), "--debug"]
    command += ["--input-len", str(args.input_len), "--output-len", str(args.output_len)]
    given = os.environ.get("XLA_FLAGS", "")
    env = os.environ | {"XLA_FLAGS": f"{given} {flags}".strip(), "QSERVE_JAX_SUMS": sums}
    env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY)
    try:
        code = subprocess.run(command, env=env, timeout=limit, stdout=subprocess.DEVNULL).returncode
    except subprocess.TimeoutExpired:
        return f"not done after {limit:.0f} s"
    return f"exit code {code}" if code else None


def device_count() -> int:
    """Of JAX, asked in another process: what one process holds of a GPU the next ones lack."""
    command = [sys.executable, "-c", "import jax; print(jax.device_count())"]
    return int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def per_gpu(row: dict[str, Any]) -> float:
    return row["tokens_per_s"] / row["gpus"]


def ratios(row: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """tokens/s over those of one GPU in the same precision, and tokens/s per GPU over the best of
    16 bits, both of the same model and work; None where that is not measured."""
    same = ("model", "batch", "input", "output")
    others = [r for r in rows if all(r[k] == row[k] for k in same)]
    one = [r for r in others if r["gpus"] == 1 and r["precision"] == row["precision"]]
    wide = [per_gpu(r) for r in others if r["precision"] == "w16a16kv16"]
    return (
        row["tokens_per_s"] / one[0]["tokens_per_s"] if one else None,
        per_gpu(row) / max(wide) if wide else None,
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The rows with their `ratios`, then what could not be measured."""
    head = ("model", "precision", "GPUs", "sums", "XLA flags", "batch", "context", "ms a step",
            "tokens/s", "per GPU", "over one GPU", "per GPU over 16 bits",
            "GiB of weights a GPU")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    done = [row for row in rows if row["tokens_per_s"] is not None]
    for row in done:
        flags = (row["xla_flags"] or "-").replace("--xla_gpu_", "")
        sums = "-" if row["gpus"] == 1 else "kernel" if row["all_reduce"] is None else "NCCL"
        cells = [row["model"], row["precision"], row["gpus"], sums, flags]
        cells += [row["batch"], row["input"]]
        cells += [f"{row['tpot_ms']:.2f}", f"{row['tokens_per_s']:.0f}", f"{per_gpu(row):.0f}"]
        cells += ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios(row, done)]
        lines.append(f"| {' | '.join(map(str, [*cells, f'{row["weights_gib"]:.1f}']))} |")
    for row in rows:
        if row["tokens_per_s"] is None:
            lines.append(f"{row['model']} {row['precision']} on {row['gpus']}: {row['problem']}")
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
    add("--model", metavar="DIR", help="a checkpoint in place of random weights")
    add("--batch", type=int, default=64)
    add("--input-len", type=int, default=1024)
    add("--output-len", type=int, default=64)
    args = parser.parse_args()
    end, devices = time.monotonic() + args.seconds, device_count()
    for index in args.cases:
        if CASES[index][2] > devices:
            print(index, CASES[index], f"left out: {devices} devices", flush=True)
            continue
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
