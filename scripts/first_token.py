"""Seconds from a new process to its first token, with nothing compiled before and with all of it.

    python scripts/first_token.py --folder DIR [--shape llama3-8b] [--save FILE.json]

Writes random weights of that shape to DIR/SHAPE as a native checkpoint, unless it is there, and
runs `python -m qserve_jax.generate` on it twice, a prompt of 1024 tokens: with an empty compilation
cache, then with what the first run has left there. The disk cache is warm in both. FILE.json is
written after each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qserve_jax import QuantConfig
from qserve_jax.benchmarks.dummy import dummy_model
from qserve_jax.benchmarks.model_shapes import MODEL_CONFIGS
from qserve_jax.benchmarks.provenance import ROOT
from qserve_jax.benchmarks.report import write_report
from qserve_jax.checkpoint.native import save_native

PROMPT = 1024
TOLD = ("load_seconds", "compile_seconds", "compile_cached", "time_to_first_token")


def write_checkpoint(folder: Path, shape: str) -> None:
    """In a process of its own, which gives the GPU's memory back."""
    code = f"import first_token; first_token.make({str(folder)!r}, {shape!r})"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def make(folder: str, shape: str) -> None:
    loaded = dummy_model(MODEL_CONFIGS[shape], QuantConfig())
    save_native(folder, loaded.params, loaded.config, loaded.quant_config)


def origin() -> dict[str, Any]:
    """What `provenance` says in a process of its own: this one must not hold the GPU's memory."""
    code = "import json; from qserve_jax.benchmarks.provenance import *; "
    code += "print(json.dumps(provenance()))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, env=environment(), stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def environment() -> dict[str, str]:
    paths = (str(ROOT), str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", ""))
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def generate(model: Path, vocab_size: int, cache: str) -> dict[str, Any]:
    """One new process; seconds are its own words, but for all of them together."""
    ids = [i % vocab_size for i in range(1, PROMPT + 1)]
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as prompts:
        prompts.write(json.dumps({"prompt_token_ids": ids}) + "\n")
        prompts.flush()
        command = [sys.executable, "-m", "qserve_jax.generate", "--model", str(model)]
        command += ["--prompts-file", prompts.name, "--max-tokens", "2", "--ignore-eos"]
        more = {"JAX_COMPILATION_CACHE_DIR": cache}
        start = time.perf_counter()
        done = subprocess.run(
            [*command, "--output", "json"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=environment() | more,
        )
        seconds = time.perf_counter() - start
    run = json.loads(done.stdout)["run"]
    return {"process_seconds": seconds} | {name: run[name] for name in TOLD}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shape", choices=MODEL_CONFIGS, default="llama3-8b")
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    if args.save and (args.save.is_dir() or not args.save.parent.is_dir()):
        parser.error(f"--save {args.save}: name a file in a folder that is there")
    model = args.folder / args.shape
    if not model.exists():
        write_checkpoint(model, args.shape)
    found: dict[str, Any] = origin() | {"model_shape": args.shape, "prompt": PROMPT}
    vocab_size = MODEL_CONFIGS[args.shape].vocab_size
    with tempfile.TemporaryDirectory() as cache:
        for name in ("nothing compiled before", "all compiled before"):
            found[name] = generate(model, vocab_size, cache)
            print(f"{name}: {found[name]}", flush=True)
            if args.save:
                write_report(args.save, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
