"""The time that JAX compiles, told from the rest, and the line of statistics."""

import time
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.quantization import QuantConfig
from qserve_jax.runtime import compile_time as compile_time_module
from qserve_jax.runtime.compile_time import CompileTime, clock
from qserve_jax.runtime.engine import attended_tokens
from qserve_jax.runtime.run_stats import format_stats, weight_format

TRACE = "/jax/core/compile/jaxpr_trace_duration"


def test_nested_spans_count_once():
    compile_time = CompileTime()
    for start, end in [(0, 1), (2, 3), (4, 5), (2, 6), (7, 8)]:  # (2, 6) holds (2, 3) and (4, 5)
        compile_time.add_span(TRACE, start, end)
    compile_time.add_span("/jax/something/else", 8, 100)
    compile_time.add_span(TRACE, 9, 9.0005)  # found, not traced
    assert compile_time.seconds == 1 + 4 + 1


def test_spans_of_threads_count_once():
    compile_time = CompileTime()
    for start, end in [(0, 2), (1, 3), (2.5, 4), (5, 6), (4.5, 7), (0, 8)]:
        compile_time.add_span(TRACE, start, end)
        assert compile_time.seconds == {2: 2, 3: 3, 4: 4, 6: 5, 7: 6.5, 8: 8}[end]


def test_seconds_without_compiling():
    compile_time = CompileTime()
    for start, end in [(0, 2), (3, 5), (6, 9)]:
        compile_time.add_span(TRACE, start, end)
    assert compile_time.seconds_without(9, 11) == 2
    assert compile_time.seconds_without(4, 10) == 1 + 1
    assert compile_time.seconds_without(1, 7) == 1 + 1
    assert compile_time.seconds_without(7, 8) == 0
    assert compile_time.seconds_without(3, 2.5) == 0


def test_clock_stands_still_while_jax_compiles():
    @jax.jit
    def inner(x):
        time.sleep(0.2)  # runs while tracing only
        return jnp.sin(x)

    wall, steady = time.perf_counter(), clock()
    jax.jit(lambda x: inner(x) + 1)(1.0).block_until_ready()
    wall, steady = time.perf_counter() - wall, clock() - steady
    assert wall >= 0.2
    assert 0 <= steady <= wall - 0.2


def test_clock_runs_while_jax_does_not_compile():
    start = clock()
    time.sleep(0.01)
    assert clock() - start >= 0.01


def test_cache_hits_are_counted():
    compile_time = CompileTime()
    for event in ("compile_requests_use_cache", "compile_requests_use_cache", "cache_hits"):
        compile_time.add_event(f"/jax/compilation_cache/{event}")
    assert (compile_time.cache_requests, compile_time.cache_hits) == (2, 1)
    assert compile_time_module.compile_time is not compile_time


def test_attended_tokens():
    made = np.array([3, 0, 2])
    assert attended_tokens([10, 50, 3], made, None) == (11 + 12 + 13) + (4 + 5)
    assert attended_tokens([10, 50, 3], made, 12) == (11 + 12 + 12) + (4 + 5)


@pytest.fixture
def stats():
    return {
        "load_seconds": 3.14,
        "compile_seconds": 21.43,
        "compile_cached": True,
        "prompt_tokens": 12,
        "prompt_tokens_per_second": 850.2,
        "time_to_first_token": 0.0141,
        "generated_tokens": 256,
        "generated_tokens_per_second": 182.3,
        "seconds_per_step": 0.00549,
        "weight_bytes": int(5.3 * 2**30),
        "weight_format": "W4A8 g128",
        "kv_bits": 4,
        "kv_bytes_per_token": 34816,
        "peak_bytes": int(6.9 * 2**30),
        "decode_bytes_per_second": 0.97e12,
        "device": "GPU",
    }


def test_stats_line(stats):
    assert format_stats(stats) == (
        "Load 3.1 s · compile 21.4 s (cached) · prompt 12 tok, 850 tok/s, TTFT 14 ms · "
        "generation 256 tok, 182 tok/s (5.5 ms/tok) · weights 5.3 GiB W4A8 g128 · "
        "KV4 34816 B/tok · peak 6.9 GiB · 0.97 TB/s on GPU"
    )


def test_stats_line_of_a_small_model_that_made_one_token(stats):
    nothing = dict.fromkeys(
        ("generated_tokens_per_second", "seconds_per_step", "decode_bytes_per_second")
    )
    small = {"generated_tokens": 1, "weight_bytes": 3 * 2**19, "compile_cached": False}
    line = format_stats(stats | nothing | small)
    assert "compile 21.4 s · " in line and "weights 1.5 MiB" in line
    assert "generation 1 tok · " in line and line.endswith("peak 6.9 GiB")


def test_stats_line_of_a_tiny_model(stats):
    line = format_stats(stats | {"weight_bytes": 9 * 2**9, "decode_bytes_per_second": 2.5e6})
    assert "weights 4.5 KiB" in line and line.endswith("2.50 MB/s on GPU")
    line = format_stats(stats | {"decode_bytes_per_second": 3.1e8})
    assert line.endswith("0.31 GB/s on GPU")


@pytest.mark.parametrize(("dtype", "weights"), [("float32", "W32A32"), ("bfloat16", "W16A16")])
def test_weight_format_of_floats_is_their_dtype(dtype, weights):
    params = {"embed": {"embedding": jnp.zeros((2, 2), dtype)}}
    llm: Any = SimpleNamespace(params=params, quant_config=QuantConfig.preset("w16a16kv16"))
    assert weight_format(llm) == weights


def test_stats_line_of_a_fast_device(stats):
    line = format_stats(stats | {"decode_bytes_per_second": 3.351e12})
    assert line.endswith("3.35 TB/s on GPU")
