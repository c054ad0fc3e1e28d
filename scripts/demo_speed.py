"""How fast the embedded demo model generates, and how soon a second process does.

Prints a markdown table and writes --output. Rates are of decoding,
after compilation, from the engine's own statistics: the median of --repeats runs. Start-up is the
wall time of `python -m qserve_jax.generate` from the shell to its first text, with the compilation
cache that a first run filled.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qserve_jax import LLM, SamplingParams
from qserve_jax.benchmarks.provenance import ROOT, provenance

MODEL = ROOT / "qserve_jax" / "assets" / "demo"
PROMPT = "Once upon a time"


def decode_rate(llm: LLM, batch: int, tokens: int) -> float:
    """Generated tokens per second of decoding a batch."""
    before = (llm.stats.generated_tokens, llm.stats.decode_seconds)
    llm.generate([PROMPT] * batch, SamplingParams(max_tokens=tokens, ignore_eos=True))
    made = llm.stats.generated_tokens - before[0] - batch  # prefill made the first of each
    return made / (llm.stats.decode_seconds - before[1])


def measure(precision: str, batch: int, tokens: int, repeats: int) -> dict[str, Any]:
    """One row: the median rate after a warm-up run."""
    llm = LLM(MODEL, precision=precision, max_num_seqs=batch)
    decode_rate(llm, batch, tokens)
    rates = [decode_rate(llm, batch, tokens) for _ in range(repeats)]
    rate = statistics.median(rates)
    row = {"precision": precision, "group_size": 128, "batch": batch, "new_tokens": tokens}
    return row | {
        "tokens_per_s": rate,
        "all_tokens_per_s": rates,
        "ms_per_step": 1e3 * batch / rate,
    }


def seconds_to_first_text(cache: str) -> float:
    """Wall time of a new process from its start to its first text on stdout."""
    command = [sys.executable, "-m", "qserve_jax.generate", "--prompt", PROMPT, "--quiet"]
    start = time.perf_counter()
    environment = {**os.environ, "QSERVE_JAX_CACHE": cache}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=ROOT) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
    if not first or process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=128, help="generated per sequence")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="F.json",
        help="default: docs/results/demo_speed_<device>.json, which is tracked",
    )
    args = parser.parse_args()
    rows = [
        measure(precision, batch, args.tokens, args.repeats)
        for precision in ("w4a8kv4", "w16a16kv16")
        for batch in (1, 32)
    ]
    with tempfile.TemporaryDirectory() as cache:
        starts = {name: seconds_to_first_text(cache) for name in ("first_run", "second_run")}
    print("| precision | batch | tokens/s | ms/step |\n|---|---|---|---|")
    for row in rows:
        shown = (row["precision"], row["batch"], f"{row['tokens_per_s']:.0f}")
        print(f"| {' | '.join(map(str, shown))} | {row['ms_per_step']:.1f} |")
    print(
        f"\nfirst text after {starts['first_run']:.1f} s, "
        f"in a second run {starts['second_run']:.1f} s"
    )
    found = provenance()
    device = found["device"].lower().replace(" ", "_")
    path = args.output or ROOT / "docs" / "results" / f"demo_speed_{device}.json"
    path.write_text(
        json.dumps({**found, "seconds_to_first_text": starts, "rows": rows}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
