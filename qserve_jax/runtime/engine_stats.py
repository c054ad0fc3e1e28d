"""What an engine has done, and what it is doing."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class EngineStats:
    """Counts and seconds since the engine was made; compilation is not in the times.

    generated_tokens: prefill makes the first of each of the prefilled_sequences, decoding the rest.
    prompt_tokens: tokens that prefill computed; shared_tokens: those it found in the cache.
    Seconds are from the launch of a call, or the end of the one before, to when the host has its
    results: every second is one call's, but where the host was late it may be its neighbour's.
    attended_tokens: sum over decode steps and sequences of the cached tokens that one attends to.
    """

    prefilled_sequences: int = 0
    prompt_tokens: int = 0
    shared_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    attended_tokens: int = 0
    preemptions: int = 0


@dataclasses.dataclass(frozen=True)
class EngineStatus:
    """A moment of an engine.

    queue, running: sequences that wait and that have pages. pages_used of num_pages.
    prefix_hit_rate: of all prompt tokens so far, the part found in the cache (0..1).
    tokens_per_second: generated over the last few seconds. preemptions: so far.
    """

    queue: int
    running: int
    pages_used: int
    num_pages: int
    prefix_hit_rate: float
    tokens_per_second: float
    preemptions: int

    def __str__(self) -> str:
        return (
            f"{self.queue} queued · {self.running} running · "
            f"pages {self.pages_used}/{self.num_pages} · "
            f"prefix hits {100 * self.prefix_hit_rate:.0f} % · "
            f"{self.tokens_per_second:.0f} tok/s · {self.preemptions} preempted"
        )
