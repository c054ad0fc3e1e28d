"""Measure most of what docs/results has of one GPU, part by part, within a given time.

    python scripts/measure.py --into FOLDER [--seconds 540] PART [PART ...]
    python scripts/measure.py --list

FOLDER begins as a copy of the JSON files of docs/results, where it lacks them; parts go on in those
that can be continued, and write the others anew. Each part runs in a process of its own, which is
stopped when its own time or that of all is over: what it had saved stays. Copy what is good back to
docs/results. Exit code 1 where a part failed or was stopped.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from qserve_jax.benchmarks.provenance import ROOT

RESULTS = ROOT / "docs" / "results"
BENCH = "python -m qserve_jax.bench"
MATMULS = f"{BENCH} kernels --save {{into}}/h200_w4a8_matmul.json"
ATTENTION = f"{BENCH} kernels --op attention --save {{into}}/h200_paged_attention.json"
MODELS = "--model-shape llama3-8b qwen2.5-7b llama2-7b llama3-70b qwen2.5-72b"
QSERVE = "--shapes 28672x4096 4096x4096 4096x14336 --tokens 16 64 128 256 1024 4096"
RANDOM_8B = "--dummy-weights --model-shape llama3-8b"
RANDOM_72B = "--dummy-weights --model-shape qwen2.5-72b"
FLOAT_LAYERS = "--xla_gpu_enable_dynamic_slice_fusion=true --xla_gpu_enable_triton_gemm=false"
"""Without, XLA copies the weights of float layers."""
ONE_PIECE = "XLA_PYTHON_CLIENT_ALLOCATOR=cuda_async"
"""Without, what is free beside the weights is in pieces, none of which holds so large a cache."""
TESTS = "python scripts/gpu_tests.py --processes 16 --output {into}/gpu_tests_nvidia_h200.json"
BATCHING = "python scripts/batching_check.py --dummy-weights llama3-8b"
BATCHING += " --output {into}/new_batching.json --parts"


def gpu_tests(*names: str) -> str:
    return " ".join([TESTS, *(f"tests/pallas_kernels/test_{name}.py" for name in names)])


# fmt: off
PARTS: dict[str, tuple[int, str]] = {
    "matmul": (120, f"{MATMULS} {MODELS} --backend mosaic_sm90 --only-ours"),
    "matmul mma": (90, f"{MATMULS} {QSERVE} --backend mosaic_mma --only-ours"),
    "matmul others": (540, f"{MATMULS} {MODELS} --backend mosaic_sm90"),
    "matmul ablation": (90, "python scripts/ablation_w4a8.py --output {into}/h200_ablation.json"),
    "matmul sanitizer": (
        100, "python scripts/sanitize_kernels.py --seconds 90 --cases 'blocks along K'"),
    "matmul tests": (
        400,
        gpu_tests("w4a8_gpu", "w4a8_layout", "ptx_gpu", "fused_elementwise")),
    "elementwise": (
        60, "python scripts/bench_elementwise.py --output {into}/h200_elementwise.json"),
    "attention": (400, f"{ATTENTION} --backend mosaic_sm90"),
    "attention mma": (400, f"{ATTENTION} --backend mosaic_mma"),
    "attention sanitizer": (
        130, "python scripts/sanitize_kernels.py --seconds 120 --cases attention"),
    "prefill sanitizer": (
        130, "python scripts/sanitize_kernels.py --seconds 120 --cases bits"),
    "attention tests": (
        300,
        gpu_tests("decode_gpu", "rope_append", "chunked_prefill", "prefill_attention",
                  "prefill_wgmma")),
    "engine tests": (
        180, f"{TESTS} tests/runtime/test_engine.py tests/runtime/test_launches.py"),
    "throughput": (
        120, f"{BENCH} throughput {RANDOM_8B} --batch 256 --save {{into}}/new_throughput.json"),
    "throughput beside 16 bits": (
        240,
        f"env 'XLA_FLAGS={FLOAT_LAYERS}' {BENCH} throughput {RANDOM_8B} --batch 256"
        " --precisions w4a8kv4 w16a16kv16 --save {into}/new_16_bits.json"),
    "decode": (
        120, f"{BENCH} decode {RANDOM_8B} --batch 1 64 256 --save {{into}}/new_decode.json"),
    "latency": (
        240,
        f"{BENCH} latency {RANDOM_8B} --batch 256 --rate 8 16 28 --num-requests 300"
        " --save {into}/new_latency.json"),
    "72b": (
        300,
        f"env {ONE_PIECE} {BENCH} throughput {RANDOM_72B} --batch 512"
        " --save {into}/new_72b.json"),
    "profile": (
        60,
        "python scripts/profile_step.py --batch 1 64 256 --output {into}/h200_decode_step.json"),
    "profile of prefill": (
        90,
        "python scripts/profile_step.py --prefill --batch 256 --output {into}/h200_prefill.json"),
    "batching": (180, f"{BATCHING} 'pages for all'"),
    "batching in a small pool": (420, f"{BATCHING} 'small pool'"),
    "batching alone": (150, f"{BATCHING} alone"),
    "batching of equal lengths": (150, f"{BATCHING} 'equal lengths'"),
    "batching of prefixes": (60, f"{BATCHING} prefixes"),
}
"""Most seconds, and the command; {into} is the folder."""
# fmt: on


def copy_results(into: Path) -> None:
    """Those of docs/results that the folder lacks."""
    into.mkdir(parents=True, exist_ok=True)
    for path in RESULTS.glob("*.json"):
        if not (into / path.name).exists():
            shutil.copy(path, into)


def run_part(command: str, seconds: float, into: Path) -> str:
    """Runs it in a process group of its own; how it ended."""
    words = [word.format(into=into) for word in shlex.split(command)]
    words = [sys.executable if word == "python" else word for word in words]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, cwd=ROOT, env=env, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    finally:  # whatever it was that ended this: nobody else would stop what holds the GPU
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "done" if code == 0 else f"failed with exit code {code}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="in this order; see --list")
    parser.add_argument("--into", type=Path, metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=540, help="for all (default: 540)")
    parser.add_argument("--list", action="store_true", help="print the parts and their commands")
    args = parser.parse_args()
    if args.list:
        for name, (seconds, command) in PARTS.items():
            print(f"{name} (at most {seconds} s)\n    {command.format(into='FOLDER')}")
        return 0
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"{unknown[0]!r} is no part: choose from {', '.join(map(repr, PARTS))}")
    if not args.parts or args.into is None:
        parser.error("name PARTs and --into FOLDER, or see --list")
    if not args.seconds > 0:
        parser.error(f"--seconds {args.seconds:g} must be more than 0")
    into = args.into.resolve()
    try:
        copy_results(into)
    except OSError as error:
        parser.error(
            f"--into {args.into} is no folder to write to ({error.strerror}): name another"
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    end, ends = time.monotonic() + args.seconds, {}
    for name in args.parts:
        seconds, command = PARTS[name]
        started = time.monotonic()
        if started >= end:
            ends[name] = "no time left"
            print(f"== {name}: {ends[name]}")
            continue
        print(f"== {name}", flush=True)
        ends[name] = run_part(command, min(seconds, end - started), into)
        print(f"== {name}: {ends[name]}, {time.monotonic() - started:.0f} s", flush=True)
    return int(any(how != "done" for how in ends.values()))


if __name__ == "__main__":
    sys.exit(main())
