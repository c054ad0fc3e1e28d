"""What Prometheus is told: requests and their times, and the engine as it is at this moment."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qserve_jax.runtime.llm import LLM

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, llm: LLM):
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(llm))
        self.requests = Counter(
            "qserve_jax_requests",
            "Requests, by route and HTTP status; 499 where the client went before the first byte",
            ("route", "status"),
            registry=self.registry,
        )
        self.first_text = Histogram(
            "qserve_jax_time_to_first_token_seconds",
            "From the arrival of a streaming request to its first tokens",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.seconds = Histogram(
            "qserve_jax_request_seconds",
            "From the arrival of a request for completions to the end of its answer",
            buckets=SECONDS,
            registry=self.registry,
        )


class EngineCollector(Collector):
    """The engine's own counts, read when Prometheus asks."""

    def __init__(self, llm: LLM):
        self._llm = llm

    def collect(self) -> Iterator[Metric]:
        stats, status, prefix = self._llm.stats, self._llm.status(), "qserve_jax_"
        for name, help, count in (
            ("prompt_tokens", "Prompt tokens computed", stats.prompt_tokens),
            ("shared_tokens", "Prompt tokens found in the cache", stats.shared_tokens),
            ("generated_tokens", "Tokens generated", stats.generated_tokens),
            ("decode_steps", "Decode steps of the whole batch", stats.decode_steps),
            ("preemptions", "Sequences that had to give way", status.preemptions),
        ):
            yield CounterMetricFamily(prefix + name, help, value=count)
        for name, help, value in (
            ("sequences_running", "Sequences that have pages", status.running),
            ("sequences_waiting", "Sequences that wait for a place or pages", status.queue),
            ("cache_pages_used", "Pages of the KV cache in use", status.pages_used),
            ("cache_pages", "Pages of the KV cache", status.num_pages),
        ):
            yield GaugeMetricFamily(prefix + name, help, value=value)
