"""Jobs on an engine: what may come in, what goes to the engine, what comes of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jinja2

from qserve_jax.runtime.async_llm import AsyncLLM
from qserve_jax.runtime.prompts import encode_prompt
from qserve_jax.runtime.sampling_params import SamplingParams
from qserve_jax.server.answers import Answer, Json
from qserve_jax.server.errors import ApiError
from qserve_jax.server.fields import named_field
from qserve_jax.server.job import Job
from qserve_jax.server.metrics import Metrics
from qserve_jax.server.token_text import most_characters, token_bytes

HEALTH_SECONDS = 30
TOO_LONG = "context_length_exceeded"
CUT_SECONDS = 2
"""What requests get to say goodbye to their clients when their time is up."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bytes of a body, tokens of a prompt (None: the context), completions that wait for a place
    among those decoded together."""

    max_body_bytes: int = 4 * 2**20
    max_prompt_tokens: int | None = None
    max_queue: int = 1024


class Service:
    """An engine behind a name, with limits.

    `open` counts completions accepted and not ended, `requests` the HTTP requests they are of.
    draining: nothing new is accepted; cut: nor does anything go on.
    failure: what the engine raised last, until it works again.
    """

    def __init__(self, engine: AsyncLLM, name: str, limits: Limits):
        self.engine, self.name, self.limits = engine, name, limits
        self.metrics = Metrics(engine.llm)
        self.bytes_of = token_bytes(engine.llm.tokenizer)
        self._most_characters = most_characters(engine.llm.tokenizer)
        self.open = self.requests = 0
        self.draining = self.cut = False
        self.failure: str | None = None
        self._nobody = asyncio.Event()
        # One thread: tokenizers are not made for several, and a long text must not stop the loop.
        self._tokenizing = ThreadPoolExecutor(1, "qserve_jax-tokenizer")

    # Answers.

    async def whole(self, job: Job) -> Json:
        """The answer to a job, at once. Raises ApiError."""
        with self._accepted(job), self._engine_errors():
            start = time.monotonic()
            answer, prompts, params = await self._prepare(job)
            outputs = await self.engine.generate(prompts, params)
            self.metrics.seconds.observe(time.monotonic() - start)
            self.failure = None
            return answer.whole(outputs)

    async def chunks(self, job: Job) -> AsyncGenerator[Json]:
        """The answer to a job in chunks. Raises ApiError, also after the first."""
        with self._accepted(job), self._engine_errors():
            start, unseen = time.monotonic(), True
            answer, prompts, params = await self._prepare(job)
            async with contextlib.aclosing(self.engine.stream(prompts, params)) as outputs:
                async for output in outputs:
                    if unseen:
                        self.metrics.first_text.observe(time.monotonic() - start)
                        for chunk in answer.first():
                            yield chunk
                        unseen = False
                    yield answer.chunk(output)
            for chunk in answer.last():
                yield chunk
            self.metrics.seconds.observe(time.monotonic() - start)
            self.failure = None

    async def _prepare(self, job: Job) -> tuple[Answer, list[list[int]], list[SamplingParams]]:
        loop = asyncio.get_running_loop()
        prompts, echoes = await loop.run_in_executor(self._tokenizing, self._encode, job)
        if self.cut:  # the time has run out meanwhile
            raise shutting_down()
        params = [self._with_room(job, prompt) for prompt in prompts]
        try:
            self.engine.llm.sequences(prompts, params)  # which refuses what it cannot do
        except ValueError as error:
            raise ApiError(400, str(error), param=named_field(error)) from None
        tokens = sum(map(len, prompts))
        return Answer(job, self.name, self.bytes_of, tokens, echoes), prompts, params

    def _encode(self, job: Job) -> tuple[list[list[int]], list[str] | None]:
        """Token ids of the prompts, and their texts where they are to be echoed."""
        llm, field = self.engine.llm, "messages" if job.chat else "prompt"
        if job.chat and llm.tokenizer is not None and not llm.tokenizer.chat_template:
            message = "the model has no chat template: use /v1/completions, or serve it with one"
            raise ApiError(400, message, param=field)

        def check(text: str) -> None:
            self._check_text(len(text), field)

        try:
            prompts = [
                encode_prompt(prompt, llm.tokenizer, llm.config.vocab_size, check)
                for prompt in job.prompts
            ]
        except ValueError as error:
            raise ApiError(400, str(error), param=field) from None
        except (jinja2.TemplateError, TypeError) as error:
            message = f"the chat template refuses the messages ({error}): write them as it wants"
            raise ApiError(400, message, param=field) from None
        for prompt in prompts:
            self._check_length(len(prompt), field)
        if not job.echo:
            return prompts, None
        if llm.tokenizer is None:
            raise ApiError(400, "echo needs a tokenizer, which the model has not", param="echo")
        return prompts, [
            raw if isinstance(raw, str) else llm.tokenizer.decode(ids, skip_special_tokens=True)
            for raw, ids in zip(job.prompts, prompts, strict=True)
        ]

    def _check_text(self, length: int, field: str) -> None:
        """What cannot but be too long is not tokenised: megabytes take seconds, others wait."""
        if (
            self._most_characters is not None
            and length > self.longest_prompt * self._most_characters
        ):
            message = (
                f"the prompt has {length} characters, the limit is {self.longest_prompt} tokens"
            )
            raise ApiError(400, f"{message}: shorten it", param=field, code=TOO_LONG)

    def _check_length(self, length: int, field: str) -> None:
        if length > self.longest_prompt:
            message = (
                f"the prompt has {length} tokens, the limit is {self.longest_prompt}: shorten it"
            )
            raise ApiError(400, message, param=field, code=TOO_LONG)

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""
        most = self.limits.max_prompt_tokens
        return self._room() - 1 if most is None else min(self._room() - 1, most)

    def _room(self) -> int:
        """Tokens of the longest prompt and completion."""
        llm = self.engine.llm
        return min(llm.max_model_len, llm.pool.num_pages * llm.pool.page_size)

    def _with_room(self, job: Job, prompt: list[int]) -> SamplingParams:
        room = self._room() - len(prompt)
        asked = room if job.max_tokens is None else min(job.max_tokens, room)
        return dataclasses.replace(job.params, max_tokens=asked)

    # Who may come in.

    @contextlib.contextmanager
    def _accepted(self, job: Job) -> Iterator[None]:
        """Within, the job has its place. Raises ApiError 404, 429 or 503."""
        if job.model not in (None, self.name):
            message = f"there is no model {job.model!r:.80}: use {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        if self.draining:
            raise shutting_down()
        count, places = job.num_sequences, self.engine.llm.max_num_seqs
        most = places + self.limits.max_queue
        if count > most:
            message = f"{count} completions are asked for, the limit is {most}: ask for fewer"
            raise ApiError(400, message, param="n")
        if self.open + count > most:
            raise ApiError(
                429,
                f"{self.open} completions are accepted and {count} more would exceed {places} "
                f"places and the queue of {self.limits.max_queue}: try again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        self.open, self.requests = self.open + count, self.requests + 1
        try:
            yield
        finally:
            self.open, self.requests = self.open - count, self.requests - 1
            if not self.requests:
                self._nobody.set()

    @contextlib.contextmanager
    def _engine_errors(self) -> Iterator[None]:
        """Within, what the engine raises becomes an ApiError 500, and is told on stderr."""
        try:
            yield
        except ApiError:
            raise
        except Exception as error:
            line = (str(error).strip() or "no message").splitlines()[0]
            message = f"the engine failed: {type(error).__name__}: {line}"
            if message != self.failure:  # all that were open get the same
                print(f"error: {message}", file=sys.stderr, flush=True)
            self.failure = message
            raise ApiError(500, message, code="engine_error") from error

    # Beginning and end.

    async def health(self) -> None:
        """Raises ApiError 503 where no request can be served. After a failure, one token tells."""
        if self.draining:
            raise shutting_down()
        if self.failure is None:
            return
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                await self.engine.generate([[0]], SamplingParams(max_tokens=1))
        except Exception:
            raise ApiError(503, self.failure, code="engine_error") from None
        self.failure = None

    async def drain(self, grace: float) -> None:
        """Accept nothing more; let what runs finish for `grace` seconds, then cut it."""
        self.draining = True
        try:
            await self._empty(grace)
        except TimeoutError:
            self.cut = True
            self.engine.fail(ApiError(503, f"cut: the server stops, {grace:g} s are over"))
            with contextlib.suppress(TimeoutError):
                await self._empty(CUT_SECONDS)

    async def _empty(self, seconds: float) -> None:
        async with asyncio.timeout(seconds):
            while self.requests:
                self._nobody.clear()
                await self._nobody.wait()

    async def close(self) -> None:
        """Stop the threads."""
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        await self.engine.close()


def shutting_down() -> ApiError:
    """What is said to whom comes too late."""
    return ApiError(
        503,
        "the server is shutting down: ask another one",
        code="shutting_down",
        headers={"Retry-After": "5", "Connection": "close"},
    )


def models(service: Service, created: int) -> list[dict[str, Any]]:
    """The models of /v1/models: the only one."""
    context = service.engine.llm.max_model_len
    card = {"id": service.name, "object": "model", "created": created, "owned_by": "qserve_jax"}
    return [card | {"max_model_len": context}]
