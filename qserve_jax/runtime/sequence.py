"""One request's sequence on the host, and what the user gets of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from qserve_jax.runtime.detokenizer import IncrementalDetokenizer
from qserve_jax.runtime.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of a generated token and of the most likely ones, by the model itself."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A finished sample of a request. text and token_ids exclude the prompt.

    token_ids holds everything generated, an end-of-sequence or stop token included; text ends
    before a stop string. finish_reason is "stop" or "length". Times are seconds from the call of
    generate, all compilation meanwhile apart, by whatever thread: time_to_first_token, and
    total_time to this sample's end.
    """

    index: int
    sample: int
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[TokenLogprobs] | None
    time_to_first_token: float
    total_time: float


@dataclasses.dataclass(frozen=True)
class StreamOutput:
    """New text and tokens of one sample; finish_reason is None until its last.

    logprobs: of the new tokens, where asked for.
    """

    index: int
    sample: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[TokenLogprobs] | None = None


@dataclasses.dataclass(eq=False)
class Sequence:
    """A sample in progress. `seed` makes its random numbers, `limit` bounds its new tokens.

    tokens are those that the host has seen; calls on their way will bring `sure` to `pending` more
    (a stop token apart). Prefill has computed, or will, `computed` of the `goal` tokens that come
    before decoding.
    page_keys are those of its first full pages, of which `published` are known to the pool.
    slot: its place in `slots.Live`. listener: called with each StreamOutput, or where nobody
    `streams` with the last one only. failures: why sequences ended that could not go on, of all
    that came with it.
    """

    index: int
    sample: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    limit: int
    stop_ids: tuple[int, ...]
    detokenizer: IncrementalDetokenizer
    listener: Callable[[StreamOutput], None] | None = None
    streams: bool = False
    pages: list[int] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    page_keys: list[bytes] = dataclasses.field(default_factory=list)
    published: int = 0
    computed: int = 0
    goal: int = 0
    pending: int = 0
    sure: int = 0
    slot: int = -1
    finish_reason: str | None = None
    failures: list[Exception] = dataclasses.field(default_factory=list)
    first_token_time: float = 0.0
    end_time: float = 0.0

    @property
    def total_len(self) -> int:
        """The longest this sequence may become."""
        return len(self.prompt) + self.limit

    @property
    def known(self) -> list[int]:
        """All tokens that the host has seen."""
        return self.prompt + self.tokens

    @property
    def cached(self) -> int:
        """Tokens before the next decode step: all but the last, which that step will append."""
        return len(self.prompt) + max(len(self.tokens) - 1, 0)

    @property
    def prefilled(self) -> bool:
        """Whether every token before the next decode step has been computed, or will be."""
        return self.computed >= self.goal

    @property
    def steps_left(self) -> int:
        """Tokens it may still make, beyond those that are sure to come."""
        return self.limit - len(self.tokens) - self.sure

    def promise(self, least: int, most: int) -> tuple[int, int]:
        """Another call brings so many, as far as the limit allows: what it adds to both."""
        made = len(self.tokens)
        least = min(least, self.limit - made - self.sure)
        most = min(most, self.limit - made - self.pending)
        self.sure, self.pending = self.sure + least, self.pending + most
        return least, most

    def redeem(self, promised: tuple[int, int]) -> None:
        """The call has come back."""
        self.sure, self.pending = self.sure - promised[0], self.pending - promised[1]

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None

    def len_after(self, steps: int) -> int:
        """Most tokens in the cache after the calls on their way and `steps` more tokens; the last
        token of all is never appended."""
        made = min(len(self.tokens) + self.pending + steps, self.limit)
        return len(self.prompt) + max(made - 1, 0)

    def append(self, token: int, logprobs: TokenLogprobs | None) -> str:
        """Take a generated token; returns new text that is safe to show. Where nobody reads along,
        and no stop string could end the sequence, all text comes at its end: to find it token by
        token costs the host as much as a small model takes to make them."""
        self.tokens.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        ended = token in self.stop_ids
        at_once = self.streams or self.params.stop
        piece = self.detokenizer.add(token) if at_once and not ended else ""
        if ended or self.detokenizer.stopped is not None:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.limit:
            self.finish_reason = "length"
        if self.finish_reason is not None and not at_once:
            piece = self.detokenizer.add_all(self.tokens[: len(self.tokens) - ended])
        if self.finish_reason is not None:
            piece += self.detokenizer.finish()
        return piece

    def fail(self, error: Exception) -> None:
        """End it: it cannot go on."""
        self.finish_reason = "error"
        self.failures.append(error)

    def output(self, start_time: float) -> RequestOutput:
        wants = self.params.logprobs is not None
        # A program that another thread began to compile before us counts when it is done: in full.
        first = max(self.first_token_time - start_time, 0.0)
        return RequestOutput(
            index=self.index,
            sample=self.sample,
            prompt_token_ids=self.prompt,
            text=self.detokenizer.text,
            token_ids=self.tokens,
            finish_reason=self.finish_reason or "length",
            logprobs=self.logprobs if wants else None,
            time_to_first_token=first,
            total_time=max(self.end_time - start_time, first),
        )


def take_logprobs(output: Any, row: int, step: int, params: SamplingParams) -> TokenLogprobs | None:
    """One row's log-probabilities at a step of a SampleOutput of numpy arrays with a step axis.

    The batch computes as many as its most demanding row; each gets what it asked for.
    """
    if params.logprobs is None:
        return None
    ids = output.top_tokens[row, step][: params.logprobs].tolist()
    values = output.top_logprobs[row, step][: params.logprobs].tolist()
    top = tuple(zip(ids, values, strict=True))
    return TokenLogprobs(int(output.tokens[row, step]), float(output.logprobs[row, step]), top)
