"""How long JAX has compiled, and a clock that stands still meanwhile.

Rates without compilation cannot be had by timing a second run, because a command has only one.
JAX reports when each tracing, lowering and compilation began and ended; importing this module
starts listening.
"""

from __future__ import annotations

import dataclasses
import threading
import time

import jax.monitoring

_COMPILE_EVENTS = "/jax/core/compile/"
_CACHE_REQUEST = "/jax/compilation_cache/compile_requests_use_cache"
_CACHE_HIT = "/jax/compilation_cache/cache_hits"
_LOOKUP_SECONDS = 1e-3
"""Less is no compilation: JAX also reports when it finds what it has traced before."""


@dataclasses.dataclass
class CompileTime:
    """What this process has compiled so far.

    seconds: wall time of tracing, lowering and compiling, loads from the persistent cache included;
      once where threads did so beside each other.
    cache_requests, cache_hits: programs looked up in the persistent cache, and found there.
    """

    seconds: float = 0.0
    cache_requests: int = 0
    cache_hits: int = 0
    _spans: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def add_span(self, event: str, start_time: float, end_time: float, **_: object) -> None:
        """Count what no span before it covers: a jit traced within another comes before that one,
        and another thread's may have begun before and ended within it."""
        if not event.startswith(_COMPILE_EVENTS) or end_time - start_time < _LOOKUP_SECONDS:
            return
        with self._lock:
            while self._spans and self._spans[-1][1] > start_time:
                start, end = self._spans.pop()
                self.seconds -= end - start
                start_time, end_time = min(start, start_time), max(end, end_time)
            self._spans.append((start_time, end_time))
            self.seconds += end_time - start_time

    def seconds_without(self, start: float, end: float) -> float:
        """Of the time between two times of `time.time()`, that in which nothing was compiled."""
        seconds = end - start
        with self._lock:
            for began, ended in reversed(self._spans):
                if ended <= start:
                    break
                seconds -= max(min(ended, end) - max(began, start), 0.0)
        return max(seconds, 0.0)

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
