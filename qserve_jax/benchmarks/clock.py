"""Kernel times of a GPU as CUPTI tells them: no host time and no gaps between launches."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

CALLS = 20
WARM_SECONDS = 0.03  # of launches that do not count: an idle GPU's clocks take that long to rise

PROTOCOL = (
    "CUPTI kernel time, all kernels of a call together; launched without pause for "
    f"{WARM_SECONDS * 1e3:.0f} ms, then the median of {CALLS} calls; calls go round copies of the "
    "weights of at least 384 MiB, more than three times the L2, so that weights come from memory; "
    "activations and the kernel's code may be in the cache, as in a model whose layers follow each "
    "other; nothing is flushed; every output is bf16"
)
"""How the times of a report were taken, in the report's own words."""

Call = Callable[[int], Any]
"""call(i) launches the work of the i-th call and returns what to wait for."""

Wait = Callable[[Any], Any]
"""Returns when what it is given is computed."""

Clock = Callable[..., list[float]]
"""clock(call, wait=jax.block_until_ready) -> microseconds of each call; see `call_times`."""


def check_available() -> None:
    """ValueError where JAX has no CUPTI."""
    if jax.default_backend() != "gpu":
        raise ValueError(
            "kernel times come from CUPTI on an NVIDIA GPU, but JAX computes on "
            f"{jax.default_backend()}: run this on a machine with one"
        )


def record(run: Callable[[], Any], wait: Wait = jax.block_until_ready) -> list[tuple[str, float]]:
    """(name, microseconds) of every kernel that run() launches, in the order of its stream.

    run returns what to wait for. Raises ValueError as `check_available` does.
    """
    check_available()
    profiler: Any = importlib.import_module("jax.experimental.mosaic.gpu.profiler")
    cupti = profiler.mosaic_gpu_lib._mosaic_gpu_ext
    cupti._cupti_init()
    try:
        wait(run())
    finally:
        timings = cupti._cupti_get_timings(False)  # stay attached: detaching takes 16 ms
    return [(name, 1e3 * milliseconds) for name, milliseconds in timings]


def call_times(call: Call, wait: Wait = jax.block_until_ready) -> list[float]:
    """Microseconds of each of CALLS calls: the sum of all kernels that call(i) launches.

    WARM_SECONDS of calls go before and do not count. The same kernels must run in every call; what
    call(i) reads is for the caller to vary. Raises as `record` and `sums_per_call` do.
    """

    def repeat(count: int) -> Any:
        last = None
        for i in range(count):
            last = call(i)
        return last

    wait(repeat(1))  # what is loaded lazily
    start = time.perf_counter()
    wait(repeat(CALLS))
    warm = math.ceil(CALLS * WARM_SECONDS / (time.perf_counter() - start))
    return sums_per_call(record(lambda: repeat(warm + CALLS), wait), warm + CALLS)[warm:]


def sums_per_call(kernels: Sequence[tuple[str, float]], calls: int) -> list[float]:
    """Of the kernels of `calls` calls one after another, the microseconds of each call.

    Raises RuntimeError where the calls have not the same kernels, or none.
    """
    period, rest = divmod(len(kernels), calls)
    periods = [kernels[i * period : (i + 1) * period] for i in range(calls)]
    names = [[name for name, _ in part] for part in periods]
    if rest or not period or any(part != names[0] for part in names):
        found = sorted({name for name, _ in kernels})
        raise RuntimeError(
            f"{len(kernels)} kernels {found} are not {calls} times those of a call: measure again"
        )
    return [sum(us for _, us in part) for part in periods]
