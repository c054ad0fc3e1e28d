"""CUPTI's list of kernels, cut into calls; the clock itself needs a GPU."""

import jax
import jax.numpy as jnp
import pytest

from qserve_jax.benchmarks import clock
from qserve_jax.benchmarks.clock import CALLS, call_times, record, sums_per_call

KERNELS = [("pack", 2.0), ("matmul", 5.0), ("pack", 3.0), ("matmul", 4.5)]


def test_the_kernels_of_a_call_are_added():
    assert sums_per_call(KERNELS, 2) == [7.0, 7.5]
    assert sums_per_call([("matmul", 5.0)] * 3, 3) == [5.0] * 3


@pytest.mark.parametrize("kernels, calls", [(KERNELS, 3), (KERNELS, 4), (KERNELS[:3], 2), ([], 2)])
def test_what_does_not_fit_is_refused(kernels, calls):
    with pytest.raises(RuntimeError, match=f"{len(kernels)} kernels .* are not {calls} times "):
        sums_per_call(kernels, calls)


def test_calls_before_the_clocks_have_risen_do_not_count(monkeypatch):
    """A call of 1 ms: 30 go before, and the last 20 are returned in order."""
    seconds, made = [0.0], []

    def call(i):
        seconds[0] += 1e-3
        made.append(i)

    monkeypatch.setattr(clock.time, "perf_counter", lambda: seconds[0])

    def fake_record(run, wait):
        before = len(made)
        wait(run())
        return [("matmul", float(i)) for i in made[before:]]

    monkeypatch.setattr(clock, "record", fake_record)
    times = call_times(call, wait=lambda _: None)
    assert times == [float(i) for i in range(len(made) - 21 - CALLS, len(made) - 21)]
    assert len(made) - 21 - CALLS in (30, 31)  # but for rounding


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.raises(ValueError, match="CUPTI on an NVIDIA GPU, but JAX computes on cpu: run"):
        record(lambda: None)


@pytest.mark.gpu
def test_times_of_a_copy_are_those_of_memory():
    big = jnp.arange(2**28)
    copy = jax.jit(lambda a: a ^ 1)
    times = call_times(lambda _: copy(big))
    assert len(times) == CALLS
    gbps = sorted(8 * 2**28 / us / 1e3 for us in times)[CALLS // 2]
    assert 500 < gbps < 10_000
