"""AsyncLLM: the engine behind `await` and `async for`, for thousands of requests of many tasks."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator
from collections.abc import Sequence as Seq
from typing import Any

import jax

from qserve_jax.runtime.compile_time import clock
from qserve_jax.runtime.engine_stats import EngineStatus
from qserve_jax.runtime.llm import LLM, errors
from qserve_jax.runtime.prompts import Prompt
from qserve_jax.runtime.sampling_params import SamplingParams
from qserve_jax.runtime.sequence import RequestOutput, Sequence, StreamOutput

Events = asyncio.Queue[StreamOutput | BaseException]


class AsyncLLM:
    """`LLM` for asyncio. All requests of all tasks run in one batch, first come, first served.

    model, settings: as `LLM` takes them, or an `LLM`, which its owner may go on using.

    A thread of its own drives the engine while there are requests, and sleeps otherwise. A task
    that is cancelled, or leaves its stream, cancels its request. Use it in `async with`, or `close`
    it.
    """

    def __init__(self, model: Any, **settings: Any):
        if jax.process_count() > 1:
            raise ValueError(
                f"AsyncLLM runs in one process but there are {jax.process_count()}, whose requests "
                "would arrive in other orders: use LLM"
            )
        self.llm = model if isinstance(model, LLM) else LLM(model, **settings)
        self._open: dict[Sequence, tuple[asyncio.AbstractEventLoop, Events]] = {}
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._drive, name="qserve_jax", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """As `LLM.generate`. Raises what that raises, and RuntimeError once closed."""
        start = clock()
        sequences = self.llm.sequences(prompts, sampling_params)
        async with contextlib.aclosing(self._stream(sequences, streams=False)) as outputs:
            async for _ in outputs:
                pass
        return [sequence.output(start) for sequence in sequences]

    def stream(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> AsyncGenerator[StreamOutput]:
        """As `LLM.stream`, for `async for`."""
        return self._stream(self.llm.sequences(prompts, sampling_params))

    def status(self) -> EngineStatus:
        """Queue, pages and speed at this moment; printed, it is one line."""
        return self.llm.status()

    async def close(self) -> None:
        """Stop the thread. Requests that are still open fail with RuntimeError."""
        self._closed = True
        self._wake.set()
        try:
            await asyncio.to_thread(self._thread.join)
        finally:  # also when the task is cancelled: nobody else would tell them
            self.fail(RuntimeError("the AsyncLLM was closed: make another one"))

    def fail(self, error: BaseException) -> None:
        """End all requests that are open: each caller gets the error. Later ones are served."""
        for loop, events in set(self._open.values()):
            tell(loop, events, error)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _stream(
        self, sequences: list[Sequence], *, streams: bool = True
    ) -> AsyncGenerator[StreamOutput]:
        if self._closed:
            raise RuntimeError("the AsyncLLM was closed: make another one")
        loop, events = asyncio.get_running_loop(), Events()

        def listener(output: StreamOutput) -> None:  # called by the engine's thread
            tell(loop, events, output)

        for sequence in sequences:
            sequence.listener, sequence.streams = listener, streams
            self._open[sequence] = loop, events
        unfinished = len(sequences)
        try:
            self.llm.engine.add(sequences)
            self._wake.set()
            while unfinished:
                output = await events.get()
                if isinstance(output, BaseException):
                    raise output
                for error in errors(sequences):
                    raise error
                unfinished -= output.finish_reason is not None
                yield output
        finally:  # also when the task is cancelled
            for sequence in sequences:
                self._open.pop(sequence, None)
            self.llm.engine.cancel(sequences)

    def _drive(self) -> None:
        """The thread: step while there is something to do."""
        engine = self.llm.engine
        while not self._closed:
            self._wake.wait()
            self._wake.clear()
            try:
                engine.run_until(lambda: self._closed or engine.idle)
            except Exception as error:  # of a device call: it belongs to all who wait for one
                self.fail(error)


def tell(
    loop: asyncio.AbstractEventLoop, events: Events, event: StreamOutput | BaseException
) -> None:
    """Put an event where a task of another thread waits for it, unless its loop has ended."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(events.put_nowait, event)
