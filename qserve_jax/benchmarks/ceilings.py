"""What this GPU can do at best, measured: the denominators of every share."""

from __future__ import annotations

import statistics

import jax
import jax.numpy as jnp

from qserve_jax.benchmarks.clock import Clock
from qserve_jax.benchmarks.operands import make_plain_weights

WORDS = 2**28  # 1 GiB
SIZE = 8192


def measure_ceilings(clock: Clock, words: int = WORDS, size: int = SIZE) -> dict[str, float]:
    """GB/s of a copy (read and written bytes) and of a read-only reduction of `words` int32;
    TOP/s of XLA's bf16 (to bf16) and int8 (to int32) products of two [size, size] matrices."""
    big = jnp.arange(words, dtype=jnp.int32)
    copy, read = jax.jit(lambda a: a ^ 1), jax.jit(jnp.max)
    left, right = (make_plain_weights(size, size, seed) for seed in (0, 1))
    product = jax.jit(_product, static_argnums=2)
    operations = 2 * size**3
    return {
        "hbm_copy_gbps": 8 * words / _median(clock, copy, big) / 1e3,
        "hbm_read_gbps": 4 * words / _median(clock, read, big) / 1e3,
        "bf16_tops": operations
        / _median(clock, product, left.bf16, right.bf16, jnp.bfloat16)
        / 1e6,
        "int8_tops": operations
        / _median(clock, product, left.int8.codes, right.int8.codes, jnp.int32)
        / 1e6,
    }


def _product(a: jax.Array, b: jax.Array, out: jax.typing.DTypeLike) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=out)


def _median(clock: Clock, run, *args) -> float:
    return statistics.median(clock(lambda _: run(*args)))


def memory_ceiling(ceilings: dict[str, float]) -> float:
    """GB/s that no kernel can exceed: the better of the copy and the reduction."""
    return max(ceilings["hbm_copy_gbps"], ceilings["hbm_read_gbps"])


def roofline_share(row: dict, ceilings: dict[str, float]) -> tuple[float, str]:
    """Which part of the ceiling that binds a row reaches, and which one it is."""
    shares = {
        "memory": row["gbps"] / memory_ceiling(ceilings),
        "int8": row["tops"] / ceilings["int8_tops"],
    }
    binding = max(shares, key=lambda name: shares[name])
    return shares[binding], binding
