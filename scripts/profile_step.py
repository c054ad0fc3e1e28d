"""Where the time of a decode step goes: kernels by CUPTI, beside the wall time of the same call.

    python scripts/profile_step.py --model-shape llama3-8b --batch 1 64 256 --output FILE.json
    python scripts/profile_step.py --prefill --batch 256 --output FILE.json

Random weights. Per step and batch: milliseconds of matmuls, attention, small kernels of the layers,
head and sampling; what of the wall time no kernel ran (gaps); launches; every kernel's count and
microseconds. The wall time is that of the calls right before and after the recorded one, after
some seconds of others: under load a GPU may slow down. gaps is null where kernels took longer.

--prefill: the same of all prompts of a batch, as the engine computes them (one "step"), and the
GPU's clock and power meanwhile, as nvidia-smi tells them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from qserve_jax.benchmarks.clock import check_available, record
from qserve_jax.benchmarks.dummy import dummy_model
from qserve_jax.benchmarks.model_shapes import MODEL_CONFIGS
from qserve_jax.benchmarks.provenance import provenance
from qserve_jax.benchmarks.serving import Decoding, Workload, make_decoding, make_llm
from qserve_jax.checkpoint import LoadedModel
from qserve_jax.quantization import QuantConfig

GROUPS = {
    "w4a8_matmul": "matmul",
    "paged_attention": "attention",
    "prefill_attention": "attention",
    "rms_norm_quantize": "small",
    "silu_mul_quantize": "small",
    "quantize_activation": "small",
    "rope_append": "small",
}
"""Of our own kernels' names; what else runs is XLA's: head, sampling and the loops."""


WARM_SECONDS = 2.0


def group_of(name: str) -> str:
    return next((group for part, group in GROUPS.items() if part in name), "head and rest")


def summary(
    kernels: list[tuple[str, float]], seconds: float, steps: int, layers: int
) -> dict[str, Any]:
    """Of the kernels (name, microseconds) of a call of so many steps, which took so long."""
    count: dict[str, int] = defaultdict(int)
    total: dict[str, float] = defaultdict(float)
    for name, us in kernels:
        count[name] += 1
        total[name] += us
    groups: dict[str, float] = defaultdict(float)
    for name, us in total.items():
        groups[group_of(name)] += us / steps / 1e3
    kernel_ms = sum(groups.values())
    step_ms = 1e3 * seconds / steps
    gaps = 1 - kernel_ms / step_ms
    return {
        "step_ms": step_ms,
        "kernel_ms": kernel_ms,
        "gaps": gaps if gaps >= 0 else None,
        "groups_ms": dict(groups),
        "launches_per_layer": sum(n // (steps * layers) for n in count.values()),
        "launches_per_step": len(kernels) / steps,
        "kernels": [
            {"name": name, "per_step": count[name] / steps, "us": total[name] / count[name]}
            for name in sorted(total, key=lambda name: -total[name])
        ],
    }


def profile(loaded: LoadedModel, work: Workload) -> dict[str, Any]:
    d = make_decoding(loaded, work)
    start = time.perf_counter()
    run = d.run.lower(d.params, d.cache, d.state, d.steps).compile()  # pyright: ignore
    compile_seconds = time.perf_counter() - start
    kernels, seconds = recorded(lambda: launch(run, d))
    found = summary(kernels, seconds, d.steps, loaded.config.num_layers)
    return {"batch": work.batch, "context": work.input, "compile_s": compile_seconds, **found}


def profile_prefill(loaded: LoadedModel, work: Workload) -> dict[str, Any]:
    """`work.output` is 1: the token that prefill chooses."""
    llm, vocab = make_llm(loaded, work), loaded.config.vocab_size

    each = itertools.count()  # other prompts in each run, so that none finds its prefix
    llm.generate(work.prompts(vocab, next(each)), work.params)  # compiles
    samples: dict[str, list[float]] = {}
    with gpu_state(samples):
        kernels, seconds = recorded(
            lambda: llm.generate(work.prompts(vocab, next(each)), work.params)
        )
    state = {name: statistics.median(values) for name, values in samples.items()}
    found = summary(kernels, seconds, 1, loaded.config.num_layers)
    del found["launches_per_layer"]  # of many calls
    return {"batch": work.batch, "context": work.input, "gpu": state, **found}


STATE = {"clocks.sm": "sm_mhz", "power.draw": "watts", "enforced.power.limit": "limit_watts"}


@contextlib.contextmanager
def gpu_state(samples: dict[str, list[float]]) -> Iterator[None]:
    """Gathers the first GPU's clock and power, five times a second."""
    query = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(STATE)}"]
    query += ["--format=csv,noheader,nounits", "--loop-ms=200"]
    process = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
    try:
        yield
    finally:
        process.kill()
        lines = [line.split(",") for line in process.communicate()[0].splitlines()]
        complete = [line for line in lines if len(line) == len(STATE)]
        for name, values in zip(STATE.values(), zip(*complete, strict=True), strict=False):
            samples[name] = [float(value) for value in values]


def launch(run: Any, d: Decoding) -> Any:
    """A call; the cache that comes back takes the place of the one that it took."""
    d.cache, *rest = run(d.params, d.cache, d.state, d.steps)
    return d.cache, rest


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def recorded(call: Callable[[], Any]) -> tuple[list[tuple[str, float]], float]:
    """Kernels of a call (name, microseconds), and the seconds that such calls take."""
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_SECONDS:
        timed(call)
    before, kernels, after = timed(call), record(call), timed(call)
    return kernels, (before + after) / 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-shape", choices=MODEL_CONFIGS, default="llama3-8b")
    parser.add_argument("--precision", default="w4a8kv4")
    parser.add_argument("--attends", choices=("full", "quantized"), default="quantized")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 64, 256])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--prefill", action="store_true", help="not the decode step")
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    args = parser.parse_args()
    check_available()
    loaded = dummy_model(MODEL_CONFIGS[args.model_shape], QuantConfig.preset(args.precision))
    content = {**provenance(), **{k: str(v) for k, v in vars(args).items()}, "rows": []}
    del content["output"]
    for batch in args.batch:
        steps = 1 if args.prefill else args.steps
        work = Workload(batch, args.context, steps, {"attends": args.attends})
        row = (profile_prefill if args.prefill else profile)(loaded, work)
        content["rows"].append(row)
        args.output.write_text(json.dumps(content, indent=1) + "\n")
        print(json.dumps({k: v for k, v in row.items() if k != "kernels"}), flush=True)


if __name__ == "__main__":
    main()
