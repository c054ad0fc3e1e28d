"""How long JAX has compiled, and a clock that stands still meanwhile.

Rates without compilation cannot be had by timing a second run, because a command has only one.
JAX reports when each tracing, lowering and compilation began and ended; importing this module
starts listening.
"""

from __future__ import annotations

import dataclasses
import time

import jax.monitoring

_COMPILE_EVENTS = "/jax/core/compile/"
_CACHE_REQUEST = "/jax/compilation_cache/compile_requests_use_cache"
_CACHE_HIT = "/jax/compilation_cache/cache_hits"


@dataclasses.dataclass
class CompileTime:
    """What this process has compiled so far.

    seconds: wall time of tracing, lowering and compiling, loads from the persistent cache included.
    cache_requests, cache_hits: programs looked up in the persistent cache, and found there.
    """

    seconds: float = 0.0
    cache_requests: int = 0
    cache_hits: int = 0
    _spans: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    def add_span(self, event: str, start_time: float, end_time: float, **_: object) -> None:
        """Count a span once; those inside it (a jit traced within another) came before it."""
        if not event.startswith(_COMPILE_EVENTS):
            return
        while self._spans and self._spans[-1][0] >= start_time:
            inner_start, inner_end = self._spans.pop()
            self.seconds -= inner_end - inner_start
        self._spans.append((start_time, end_time))
        self.seconds += end_time - start_time

    def add_event(self, event: str, **_: object) -> None:
        """Count requests and hits of the persistent cache."""
        self.cache_requests += event == _CACHE_REQUEST
        self.cache_hits += event == _CACHE_HIT


compile_time = CompileTime()
jax.monitoring.register_event_time_span_listener(compile_time.add_span)
jax.monitoring.register_event_listener(compile_time.add_event)


def clock() -> float:
    """Seconds, for differences only, less what this process has spent compiling."""
    return time.perf_counter() - compile_time.seconds
