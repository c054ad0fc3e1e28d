"""What this GPU can do at best, measured: the denominators of every share."""

from __future__ import annotations

import functools
import math
import operator
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax.benchmarks.clock import Clock
from qserve_jax.benchmarks.operands import make_plain_weights

WORDS = 2**30  # 4 GiB: of a millisecond, starting and ending a kernel are next to nothing
ROW = 8192
MERGED = 16
SIZE = 8192


def measure_ceilings(clock: Clock, words: int = WORDS, size: int = SIZE) -> dict[str, float]:
    """GB/s of each of MEMORY, of all bytes read and written; TOP/s of XLA's bf16 (to bf16) and int8
    (to int32) products of two [size, size] matrices.

    words: of 4 bytes, that are read; of the copy, read and written. A multiple of 2 ROW.
    """
    memory = {name: _gbps(clock, run, make(words)) for name, (run, make) in MEMORY.items()}
    return memory | _products(clock, size)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _noise(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> jax.Array:
    """Words without a pattern; of other types, their first byte."""
    index = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    words = (index + jnp.uint32(seed)) * jnp.uint32(2654435761)
    if dtype == jnp.int32:
        return jax.lax.bitcast_convert_type(words, jnp.int32)
    return (words >> 24).astype(dtype)


def _copy(x: jax.Array) -> jax.Array:
    return x ^ 1


def _merge(parts: list[jax.Array]) -> jax.Array:
    """Every thread has many wide loads on their way at once, and writes little."""
    return functools.reduce(operator.xor, parts)


def _largest_of_rows(x: jax.Array) -> jax.Array:
    return jnp.max(x, axis=1)


def _squares_of_rows(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=1)


def _rows(words: int) -> jax.Array:
    return _noise((words // ROW, ROW), jnp.int32)


MEMORY: dict[str, tuple[Callable[[Any], jax.Array], Callable[[int], Any]]] = {
    "hbm_copy_gbps": (_copy, lambda words: _noise((words // 2,), jnp.int32)),
    "hbm_merge_gbps": (
        _merge,
        lambda words: [_noise((words // MERGED,), jnp.int32, i) for i in range(MERGED)],
    ),
    "hbm_read_max_gbps": (jnp.max, _rows),
    "hbm_read_rows_gbps": (_largest_of_rows, _rows),
    "hbm_read_bf16_gbps": (
        _squares_of_rows,
        lambda words: _noise((2 * words // ROW, ROW), jnp.bfloat16),
    ),
}
"""Ways to go through memory: what XLA compiles, and its operand. Which is the fastest is the GPU's
and the compiler's to say."""
NAMES = {*MEMORY, "bf16_tops", "int8_tops"}


def _gbps(clock: Clock, run: Callable[[Any], jax.Array], x: Any) -> float:
    moved = jax.tree.leaves((x, jax.eval_shape(run, x)))
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in moved)
    return nbytes / _median(clock, jax.jit(run), x) / 1e3


def _products(clock: Clock, size: int) -> dict[str, float]:
    left, right = (make_plain_weights(size, size, seed) for seed in (0, 1))
    product = jax.jit(_product, static_argnums=2)
    us = {
        "bf16_tops": _median(clock, product, left.bf16, right.bf16, jnp.bfloat16),
        "int8_tops": _median(clock, product, left.int8.codes, right.int8.codes, jnp.int32),
    }
    return {name: 2 * size**3 / time / 1e6 for name, time in us.items()}


def _product(a: jax.Array, b: jax.Array, out: jax.typing.DTypeLike) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=out)


def _median(clock: Clock, run, *args) -> float:
    return statistics.median(clock(lambda _: run(*args)))


def memory_rates(ceilings: dict[str, Any]) -> dict[str, float]:
    """GB/s by what was done: "copy", "read max"."""
    found = {name: rate for name, rate in ceilings.items() if name.startswith("hbm_")}
    return {
        name.removeprefix("hbm_").removesuffix("_gbps").replace("_", " "): rate
        for name, rate in found.items()
    }


def memory_ceiling(ceilings: dict[str, Any]) -> float:
    """GB/s that no kernel can exceed: the best of all ways that were measured."""
    return max(memory_rates(ceilings).values())


def roofline_share(row: dict, ceilings: dict[str, Any]) -> tuple[float, str]:
    """Which part of the ceiling that binds a row reaches, and which one it is."""
    shares = {
        "memory": row["gbps"] / memory_ceiling(ceilings),
        "int8": row["tops"] / ceilings["int8_tops"],
    }
    binding = max(shares, key=lambda name: shares[name])
    return shares[binding], binding
