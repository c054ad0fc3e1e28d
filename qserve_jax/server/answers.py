"""The JSON of answers: choices, log-probabilities, usage; whole or in chunks. Pure functions."""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from qserve_jax.runtime.sequence import RequestOutput, StreamOutput, TokenLogprobs
from qserve_jax.server.job import Job
from qserve_jax.server.token_text import TokenBytes, shown

LEAST_LOGPROB = -9999.0
"""In place of minus infinity, which JSON does not have."""

Json = dict[str, Any]


@dataclasses.dataclass
class Answer:
    """The answer to a job, as it is made. `lengths` are characters of tokens so far, per choice.

    echoes: the prompts' texts, where the job asks for them.
    """

    job: Job
    model: str
    bytes_of: TokenBytes
    prompt_tokens: int
    echoes: list[str] | None = None
    completion_tokens: int = 0
    id: str = ""
    created: int = 0
    lengths: dict[int, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.id = f"{'chatcmpl' if self.job.chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())

    def whole(self, outputs: Sequence[RequestOutput]) -> Json:
        """The answer at once."""
        self.completion_tokens = sum(len(output.token_ids) for output in outputs)
        choices = [self._choice(output) for output in outputs]
        return self._object(choices, chunk=False) | {"usage": self.usage()}

    def first(self) -> Iterator[Json]:
        """The chunks before all others: of a chat the role, of an echo the prompt."""
        n = self.job.params.n
        for index in range(self.job.num_sequences):
            if self.job.chat:
                yield self._chunk(index, {"role": "assistant", "content": ""}, None, None)
            elif self.echoes is not None:
                yield self._chunk(index, self.echoes[index // n], None, None)

    def chunk(self, output: StreamOutput) -> Json:
        """A chunk of what is new."""
        self.completion_tokens += len(output.token_ids)
        index = self._index(output)
        content = {"content": output.text} if self.job.chat and output.text else {}
        delta = content if self.job.chat else output.text
        return self._chunk(index, delta, self._logprobs(index, output), output.finish_reason)

    def last(self) -> Iterator[Json]:
        """The chunk after all others: the usage, where asked for."""
        if self.job.include_usage:
            yield self._object([], chunk=True) | {"usage": self.usage()}

    def usage(self) -> Json:
        """Tokens so far. A prompt counts once, however many completions it has."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def _index(self, output: StreamOutput | RequestOutput) -> int:
        return output.index * self.job.params.n + output.sample

    def _object(self, choices: list[Json], *, chunk: bool) -> Json:
        kind = "text_completion"
        if self.job.chat:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _choice(self, output: RequestOutput) -> Json:
        index = self._index(output)
        if self.job.chat:
            content = {"message": {"role": "assistant", "content": output.text, "refusal": None}}
        else:
            content = {"text": (self.echoes[output.index] if self.echoes else "") + output.text}
        logprobs = self._logprobs(index, output)
        reason = output.finish_reason
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}

    def _chunk(self, index: int, delta: Any, logprobs: Json | None, reason: str | None) -> Json:
        content = {"delta" if self.job.chat else "text": delta}
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self.job.include_usage else {}
        return self._object([choice], chunk=True) | usage

    def _logprobs(self, index: int, output: StreamOutput | RequestOutput) -> Json | None:
        if output.logprobs is None:
            return None
        if self.job.chat:
            content = [chat_logprobs(token, self.bytes_of) for token in output.logprobs]
            return {"content": content, "refusal": None}
        start = self.lengths.get(index, 0)
        logprobs = completion_logprobs(output.logprobs, self.bytes_of, start)
        self.lengths[index] = start + sum(map(len, logprobs["tokens"]))
        return logprobs


def chat_logprobs(token: TokenLogprobs, bytes_of: TokenBytes) -> Json:
    """A token's entry in a chat's logprobs."""

    def entry(token_id: int, logprob: float) -> Json:
        data = bytes_of(token_id)
        return {
            "token": shown(token_id, data),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": None if data is None else list(data),
        }

    top = [entry(*pair) for pair in token.top]
    return entry(token.token_id, token.logprob) | {"top_logprobs": top}


def completion_logprobs(tokens: Sequence[TokenLogprobs], bytes_of: TokenBytes, start: int) -> Json:
    """The logprobs of a completion's tokens, of which the first begins at character `start`."""
    texts = [shown(t.token_id, bytes_of(t.token_id)) for t in tokens]
    offsets = itertools.accumulate(map(len, texts[:-1]), initial=start)
    tops = [
        {
            shown(token_id, bytes_of(token_id)): max(value, LEAST_LOGPROB)
            for token_id, value in t.top
        }
        for t in tokens
    ]
    return {
        "tokens": texts,
        "token_logprobs": [max(t.logprob, LEAST_LOGPROB) for t in tokens],
        "top_logprobs": tops,
        "text_offset": list(offsets)[: len(texts)],
    }
