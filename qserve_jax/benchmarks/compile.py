"""Many programs compiled beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

Compiled = Callable[..., Any] | Exception
"""A compiled function, or why there is none."""


def compile_all[Name](
    jobs: Mapping[Name, tuple[Callable, tuple]], *, at_once: int | None = None
) -> dict[Name, Compiled]:
    """The compiled functions of {name: (function, arguments)}.

    at_once: 1 where XLA runs kernels to choose between them, which others would disturb.
    """
    compiled: dict[Name, Any] = {}
    pool = ThreadPoolExecutor(at_once)
    try:
        for name, (function, arguments) in jobs.items():
            try:
                compiled[name] = pool.submit(jax.jit(function).lower(*arguments).compile)
            except Exception as error:
                compiled[name] = error
        for name, job in compiled.items():
            if not isinstance(job, Exception):
                compiled[name] = job.exception() or job.result()
    finally:  # after Ctrl-C what has not begun, which may be minutes of it, never does
        pool.shutdown(cancel_futures=True)
    return compiled


def call(run: Compiled, *arguments: Any) -> Any:
    """The result, or the exception that stands for it."""
    if isinstance(run, Exception):
        raise run
    return run(*arguments)
