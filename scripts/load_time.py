"""How long a native checkpoint takes to load, from a warm disk cache.

    python scripts/load_time.py --model DIR [--save FILE.json]

Two processes, one after the other: the first one warms the disk cache and that of compiled
programs, the second one counts. Seconds are those of `load_model` until all arrays are on the
device, then of the change to the kernels' layout; starting Python and the device is told apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from qserve_jax import _cli


def load(folder: str) -> dict[str, Any]:
    """Seconds of each part, in this process, and bytes."""
    start = time.perf_counter()
    import jax

    from qserve_jax.benchmarks.provenance import provenance
    from qserve_jax.checkpoint import load_model
    from qserve_jax.pallas_kernels import prepare_for_backend
    from qserve_jax.quantization.qtensor import nbytes
    from qserve_jax.runtime.device_memory import peak_bytes

    _cli.enable_compilation_cache()
    jax.block_until_ready(jax.numpy.zeros(1))
    started = time.perf_counter()
    loaded = load_model(folder)
    jax.block_until_ready(loaded.params)
    done = time.perf_counter()
    act_bits = loaded.model.act_bits
    params = prepare_for_backend(loaded.params, None, act_bits=act_bits, in_place=True)
    jax.block_until_ready(params)
    return provenance() | {
        "start_seconds": started - start,
        "load_seconds": done - started,
        "layout_seconds": time.perf_counter() - done,
        "bytes": nbytes(params),
        "peak_bytes": peak_bytes(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a native checkpoint")
    parser.add_argument("--save", type=Path, help="a JSON file")
    parser.add_argument("--once", action="store_true", help="in this process, without a first one")
    args = parser.parse_args()
    if args.once:
        print(json.dumps(load(args.model)))
        return
    command = [sys.executable, str(Path(__file__).resolve()), "--model", args.model, "--once"]
    for _ in range(2):
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        print(answer, end="", flush=True)
    if args.save is not None:
        content = json.loads(answer.splitlines()[-1])
        args.save.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
