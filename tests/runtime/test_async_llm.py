"""AsyncLLM: many tasks in one batch, cancellation, errors; on the demo model."""

import asyncio
from pathlib import Path

import pytest

import qserve_jax
from qserve_jax import LLM, AsyncLLM, SamplingParams, load_model

DEMO = Path(qserve_jax.__file__).parent / "assets" / "demo"
PROMPTS = [[5 + i, 6, 7 + i] for i in range(20)]
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)


pytestmark = pytest.mark.usefixtures("in_thread")


@pytest.fixture(scope="module")
def llm():
    loaded = load_model(DEMO)
    return LLM(
        loaded, max_model_len=128, page_size=16, num_pages=14, max_num_seqs=8, attends="quantized"
    )


@pytest.fixture(scope="module")
def expected(llm):
    return [o.token_ids for o in llm.generate(PROMPTS, PARAMS)]


def run(llm, body):
    """body(AsyncLLM), with a limit on its time."""

    async def main():
        async with AsyncLLM(llm) as engine:
            return await asyncio.wait_for(body(engine), 300)

    result = asyncio.run(main())
    assert llm.pool.free_pages == llm.pool.num_pages and llm.engine.idle
    return result


def test_many_tasks_share_the_batch(llm, expected):
    steps = llm.stats.decode_steps

    async def body(engine):
        return await asyncio.gather(*(engine.generate(p, PARAMS) for p in PROMPTS))

    outputs = run(llm, body)
    assert [o.token_ids for (o,) in outputs] == expected
    assert llm.stats.decode_steps - steps < 20 * 11 / 2  # one by one it would be 20 * 11


def test_streams_and_a_synchronous_caller_at_once(llm, expected):
    async def read(engine, prompt):
        return [t async for piece in engine.stream(prompt, PARAMS) for t in piece.token_ids]

    async def body(engine):
        streams = [asyncio.create_task(read(engine, p)) for p in PROMPTS[:5]]
        sync = await asyncio.to_thread(llm.generate, PROMPTS[5:8], PARAMS)
        return await asyncio.gather(*streams), [o.token_ids for o in sync]

    streamed, sync = run(llm, body)
    assert streamed == expected[:5] and sync == expected[5:8]


def test_who_leaves_takes_nothing_along(llm, expected):
    """A cancelled task and a stream left early: their pages come back, the others go on."""
    long = SamplingParams(max_tokens=100, ignore_eos=True)

    async def body(engine):
        cancelled = asyncio.create_task(engine.generate(PROMPTS[0], long))
        left = engine.stream(PROMPTS[1], long)
        await anext(left)
        cancelled.cancel()
        await left.aclose()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        return await engine.generate(PROMPTS[2], PARAMS)

    (output,) = run(llm, body)
    assert output.token_ids == expected[2]


def test_what_a_call_raises_reaches_all_and_the_next_request_works(llm, expected, monkeypatch):
    def broken(*args, **kwargs):
        raise MemoryError("no room")

    async def body(engine):
        monkeypatch.setattr(llm.engine.device, "_prefill", broken)
        tasks = [asyncio.create_task(engine.generate(p, PARAMS)) for p in PROMPTS[:3]]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        monkeypatch.undo()
        return results, await engine.generate(PROMPTS[3], PARAMS)

    results, (output,) = run(llm, body)
    assert [type(r) for r in results] == [MemoryError] * 3
    assert output.token_ids == expected[3]


def test_closed_and_unusable(llm):
    async def body():
        engine = AsyncLLM(llm)
        with pytest.raises(ValueError, match="the prompt is empty"):
            await engine.generate("")
        stream = engine.stream(PROMPTS[0], SamplingParams(max_tokens=100, ignore_eos=True))
        await anext(stream)
        await engine.close()
        with pytest.raises(RuntimeError, match="was closed: make another one"):
            while True:
                await anext(stream)
        with pytest.raises(RuntimeError, match="was closed: make another one"):
            await engine.generate(PROMPTS[0])

    asyncio.run(body())
    assert llm.pool.free_pages == llm.pool.num_pages


def test_a_close_that_is_cancelled_leaves_nobody_waiting(llm):
    async def body():
        engine = AsyncLLM(llm)
        stream = engine.stream(PROMPTS[0], SamplingParams(max_tokens=100, ignore_eos=True))
        await anext(stream)
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0)
        closing.cancel()

        async def rest():
            async for _ in stream:
                pass

        with pytest.raises(RuntimeError, match="was closed: make another one"):
            await asyncio.wait_for(rest(), 20)
        await asyncio.to_thread(engine._thread.join)

    asyncio.run(body())
    assert llm.pool.free_pages == llm.pool.num_pages


def test_the_status_is_a_line(llm):
    async def body(engine):
        await engine.generate(PROMPTS, PARAMS)
        return engine.status()

    status = run(llm, body)
    assert (status.queue, status.running, status.pages_used, status.num_pages) == (0, 0, 0, 14)
    assert status.tokens_per_second > 0
    assert "0 queued · 0 running · pages 0/14 · prefix hits" in str(status)
