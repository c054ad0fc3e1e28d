"""Serving, measured as it is published: throughput, decoding alone, and latency under load.

Every protocol returns a `serving_report.Row`. Programs are compiled before the clock runs.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qserve_jax.benchmarks.serving_report import Row
from qserve_jax.checkpoint import LoadedModel
from qserve_jax.models import CausalLM, prefill
from qserve_jax.models.collectives import prepare_model, why_all_reduce
from qserve_jax.models.sharding import P, axis_of, cache_spec, rank_config, ranks_of, shardings
from qserve_jax.runtime import (
    LLM,
    AsyncLLM,
    DecodeState,
    RequestOutput,
    SamplingParams,
    cache_bytes_per_token,
    decode_loop,
    init_cache,
    make_sampling_state,
)
from qserve_jax.runtime.compile_time import compile_time
from qserve_jax.runtime.device_memory import held_bytes, limit_bytes, peak_bytes
from qserve_jax.runtime.distributed import to_devices

GIB = 2**30
DECODE_STEPS = 64
"""Steps per call of the decode protocol, as in the engine."""
FILL_TOKENS = 4096
"""Of the prefill calls before it."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """`batch` requests of `input` random tokens, each of which makes `output` more.

    settings: more arguments of `LLM`. seed: of the prompts.
    """

    batch: int
    input: int
    output: int
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def prompts(self, vocab_size: int, run: int) -> list[list[int]]:
        """Other ones in each run, so that none finds its prefix in the cache."""
        rng = np.random.default_rng((self.seed, run))
        return rng.integers(0, vocab_size, (self.batch, self.input)).tolist()

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.output, ignore_eos=True)


def make_llm(loaded: LoadedModel, work: Workload) -> LLM:
    """With pages for all requests at once, unless the settings say how many."""
    page_size = work.settings.get("page_size", 64)
    pages = work.batch * -(-(work.input + work.output) // page_size)
    defaults = {
        "max_num_seqs": work.batch,
        "num_pages": pages + 1 + pages // 50,  # the watermark
        "max_model_len": work.input + work.output,
    }
    return LLM(loaded, **defaults | work.settings)


def warm_up(llm: LLM, work: Workload) -> None:
    """Compile all that a run needs: until every request has made a second token."""
    prompts = work.prompts(llm.config.vocab_size, 0)
    made = [0] * len(prompts)
    for piece in llm.stream(prompts, work.params):
        made[piece.index] += len(piece.token_ids)
        if min(made) >= min(2, work.output):
            return


def throughput(
    loaded: LoadedModel,
    work: Workload,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Row:
    """All requests at once: generated tokens over the wall time of prefill and decoding together.

    around: makes a context of the timed run (a profiler).
    """
    llm = make_llm(loaded, work)
    warm_up(llm, work)
    before, compiled = dataclasses.replace(llm.stats), compile_time.seconds
    prompts = work.prompts(llm.config.vocab_size, 1)
    with around():
        start = time.perf_counter()
        outputs = llm.generate(prompts, work.params)
        seconds = time.perf_counter() - start
    made = sum(len(o.token_ids) for o in outputs)
    return {
        "bench": "throughput",
        **workload_columns(work),
        "tokens_per_s": made / seconds,
        **latencies([*map(request_times, outputs)]),
        "seconds": seconds,
        "prefill_wait_s": llm.stats.prefill_seconds - before.prefill_seconds,
        "decode_wait_s": llm.stats.decode_seconds - before.decode_seconds,
        "decode_steps": llm.stats.decode_steps - before.decode_steps,
        "preemptions": llm.stats.preemptions - before.preemptions,
        **compiling(compile_time.seconds - compiled),
        **llm_memory(llm),
    }


@dataclasses.dataclass
class Decoding:
    """`batch` sequences that have `input` tokens in the cache and make `output` more.

    run(params, cache, state, steps) is jitted, and takes the cache.
    """

    run: Callable[..., tuple[Any, DecodeState, Any]]
    params: Any
    cache: Any
    state: DecodeState
    steps: int


def make_decoding(loaded: LoadedModel, work: Workload) -> Decoding:
    """A call makes DECODE_STEPS steps, or `output` where that is less. It is not compiled yet.

    Tokens are random, and what is in the cache is theirs: rows that are all alike, over a cache of
    zeros, switch fewer transistors, and a GPU at its power limit runs them faster.
    """
    backend, attends = work.settings.get("backend"), work.settings.get("attends", "full")
    model = loaded.model if backend is None else loaded.model.clone(backend=backend)
    params = prepare_model(model, loaded.params)
    page_size = work.settings.get("page_size", 64)
    each = -(-(work.input + work.output) // page_size)
    b = work.batch
    cache = init_cache(
        loaded.config,
        num_pages=b * each,
        page_size=page_size,
        kv_bits=loaded.quant_config.kv_bits,
        dtype=params["embed"]["embedding"].dtype,
        mesh=model.mesh,
    )
    sampling, features = make_sampling_state([work.params] * b, [0] * b, pad_to=b)
    prompts = jnp.asarray(work.prompts(loaded.config.vocab_size, 0), jnp.int32)
    state = DecodeState(
        tokens=prompts[:, -1],
        context_lens=jnp.full(b, work.input, jnp.int32),
        remaining=jnp.full(b, work.output, jnp.int32),
        block_table=jnp.arange(b * each, dtype=jnp.int32).reshape(b, each),
        rope_lens=jnp.full(b, work.input + work.output, jnp.int32),
        stop_ids=jnp.full((b, 1), -1, jnp.int32),
        sampling=sampling,
    )
    steps = min(DECODE_STEPS, work.output)
    loop = functools.partial(
        decode_loop, model, max_steps=steps, features=features, attends=attends
    )
    if model.mesh is not None:
        prompts, state = to_devices((prompts, state), model.mesh)
    cache = _filled(model, params, cache, prompts, state, attends)
    return Decoding(_jitted(loop, model, 3), params, cache, state, steps)


def _jitted(function: Callable[..., Any], model: CausalLM, outputs: int) -> Callable[..., Any]:
    """Of (params, cache, ...), which gives back the cache and others of so many outputs. On a mesh
    they are placed as they came in, or it would compile twice."""
    options: dict[str, Any] = {"donate_argnums": 1}
    if model.mesh is not None:
        places = cache_spec(axis_of(model.mesh)), *[P()] * (outputs - 1)
        options["out_shardings"] = shardings(places, model.mesh)
    return jax.jit(function, **options)


def _filled(
    model: CausalLM, params: Any, cache: Any, prompts: jax.Array, state: DecodeState, attends: str
) -> Any:
    """The cache with the prompts, as many a call as divide the batch and FILL_TOKENS allows."""
    b, tokens = prompts.shape
    fit = [n for n in range(1, b + 1) if b % n == 0 and n * tokens <= FILL_TOKENS]
    at_once = max(fit, default=1)
    run = _jitted(functools.partial(prefill, model, attends=attends, cached_pages=0), model, 2)
    for first in range(0, b, at_once):
        rows = slice(first, first + at_once)
        arrays = prompts[rows], state.block_table[rows], state.context_lens[rows]
        cache, _ = run(params, cache, *arrays)
    return cache


def decode(loaded: LoadedModel, work: Workload, repeats: int = 3) -> Row:
    """Decoding alone; the fastest of `repeats` runs."""
    d = make_decoding(loaded, work)
    cache_bytes, cache = held_bytes(d.cache), d.cache
    cache, _, _ = jax.block_until_ready(d.run(d.params, cache, d.state, d.steps))  # compiles
    best = float("inf")
    for _ in range(repeats):
        now, start = d.state, time.perf_counter()
        for _ in range(-(-work.output // d.steps)):
            cache, now, out = d.run(d.params, cache, now, d.steps)
        jax.block_until_ready((cache, now, out))
        best = min(best, time.perf_counter() - start)
    return {
        "bench": "decode",
        **workload_columns(work),
        "tokens_per_s": work.batch * work.output / best,
        "tpot_ms": 1e3 * best / work.output,
        "seconds": best,
        "decode_steps": work.output,
        "all_reduce": None if loaded.model.mesh is None else why_all_reduce(loaded.model),
        **memory(loaded.model, d.params, cache_bytes, loaded.quant_config.kv_bits),
    }


def latency(loaded: LoadedModel, work: Workload, rate: float, num_requests: int) -> Row:
    """Requests that arrive at random (a Poisson process of `rate` a second): time to the first
    token and time per token after it, as each of them sees it. `batch` are decoded together."""
    llm = make_llm(loaded, work)
    llm.warm_up(work.params, work.input + work.output)
    gaps = np.random.default_rng(work.seed).exponential(1 / rate, num_requests)
    prompts = dataclasses.replace(work, batch=num_requests).prompts(llm.config.vocab_size, 1)
    start, compiled = time.perf_counter(), compile_time.seconds
    times = asyncio.run(_arrivals(llm, prompts, gaps, work.params))
    seconds = time.perf_counter() - start
    return {
        "bench": "latency",
        **workload_columns(work),
        "rate": rate,
        "num_requests": num_requests,
        "tokens_per_s": num_requests * work.output / seconds,
        **latencies(times),
        "seconds": seconds,
        **compiling(compile_time.seconds - compiled),
        **llm_memory(llm),
    }


def compiling(seconds: float) -> Row:
    """Of the timed run: none, or the row is not what it says it is."""
    row: Row = {"compiled_s": seconds}
    if seconds > 0:
        row["problem"] = f"compiled for {seconds:.1f} s while it was timed: it is faster than that"
    return row


Times = tuple[float, float]
"""Seconds to a request's first token, and per token after it."""


async def _arrivals(
    llm: LLM, prompts: list[list[int]], gaps: np.ndarray, params: SamplingParams
) -> list[Times]:
    async with AsyncLLM(llm) as engine:

        async def request(prompt: list[int], delay: float) -> Times:
            await asyncio.sleep(delay)
            start, first, last, made = time.perf_counter(), 0.0, 0.0, 0
            async for piece in engine.stream([prompt], params):
                last = time.perf_counter() - start
                first = first or last
                made += len(piece.token_ids)
            return first, (last - first) / max(made - 1, 1)

        delays = np.cumsum(gaps)
        return await asyncio.gather(*(request(p, d) for p, d in zip(prompts, delays, strict=False)))


def request_times(output: RequestOutput) -> Times:
    """Of a request of `generate`."""
    rest = output.total_time - output.time_to_first_token
    return output.time_to_first_token, rest / max(len(output.token_ids) - 1, 1)


def latencies(times: list[Times]) -> Row:
    """Means and percentiles in milliseconds."""
    row: Row = {}
    for name, values in zip(("ttft", "tpot"), zip(*times, strict=True), strict=True):
        row[f"{name}_ms"] = 1e3 * float(np.mean(values))
        for q in (50, 90, 99):
            row[f"{name}_p{q}_ms"] = 1e3 * float(np.percentile(values, q))
    return row


def workload_columns(work: Workload) -> Row:
    return {"batch": work.batch, "input": work.input, "output": work.output}


def memory(model: CausalLM, params: Any, cache_bytes: int, kv_bits: int) -> Row:
    """GiB of weights and cache, bytes a cached token takes, the peak of this process so far and
    what it may use; of the fullest device where several share the model."""
    own = rank_config(model.config, ranks_of(model.mesh))
    dtype, limit = params["embed"]["embedding"].dtype, limit_bytes()
    return {
        "peak_gib": peak_bytes() / GIB,
        "memory_limit_gib": None if limit is None else limit / GIB,
        "weights_gib": held_bytes(params) / GIB,
        "cache_gib": cache_bytes / GIB,
        "kv_bytes_per_token": cache_bytes_per_token(own, kv_bits, dtype),
    }


def llm_memory(llm: LLM) -> Row:
    return memory(llm.model, llm.params, llm.engine.cache_bytes, llm.quant_config.kv_bits)
