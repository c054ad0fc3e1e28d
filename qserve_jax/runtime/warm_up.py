"""Programs compiled before anybody asks for them."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import jax


def compile_programs(lowered: Iterable[jax.stages.Lowered]) -> None:
    """Compile them beside each other, and meanwhile lower the next. A `jax.jit` that is called with
    what it was lowered for finds its program.

    Processes that share a model compile together, so in the same order.
    """
    pool = ThreadPoolExecutor(1 if jax.process_count() > 1 else None)
    try:
        for job in [pool.submit(program.compile) for program in lowered]:
            job.result()
    finally:  # after Ctrl-C what has not begun never does
        pool.shutdown(cancel_futures=True)
