"""What the attention benchmark measures, and its random operands, made on the device.

Keys and values are drawn differently, scales differ by token and head, pages are shuffled. Cached
operands have as many layers as it takes that none is found in the L2 when its turn comes again.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qserve_jax.benchmarks.operands import copies_of
from qserve_jax.quantization.qtensor import Array, KVCache, kv_bytes_per_token

PAGE = 64
Heads = tuple[int, int, int]
"""(query heads, KV heads, head_dim)."""

LLAMA3_8B: Heads = (32, 8, 128)
HEADS: tuple[Heads, ...] = (
    LLAMA3_8B,
    (32, 8, 64),  # Llama-3.2-1B
    (14, 2, 64),  # Qwen2.5-0.5B
    (28, 4, 128),  # Qwen2.5-7B
    (32, 32, 128),  # Llama-2-7B
    (64, 8, 128),  # Llama-3-70B
)
BATCHES = (1, 16, 64, 128, 256)
CONTEXTS = (1024, 1536, 4096, 16384)
LONG, LONG_BATCH = 16384, 64
"""The longest context is measured up to this batch, unless both are asked for."""
RAGGED = (64, 256, 4096)
"""Sequences of lengths drawn evenly from a range."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Decode: one token for each of `lengths` (tokens in the cache, the new one counted)."""

    heads: int
    kv_heads: int
    head_dim: int
    kv_bits: int
    lengths: tuple[int, ...]

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def pages(self) -> tuple[int, ...]:
        """Of each sequence."""
        return tuple(-(-n // PAGE) for n in self.lengths)

    @property
    def bytes_read(self) -> int:
        """Codes and scales of all tokens, once."""
        per_token = kv_bytes_per_token(self.head_dim, self.kv_bits)
        return sum(self.lengths) * self.kv_heads * per_token

    @property
    def place(self) -> dict[str, Any]:
        """The columns of a row that say what it is."""
        ragged = len(set(self.lengths)) > 1
        lengths = {"lengths": list(self.lengths)} if ragged else {"ctx": self.lengths[0]}
        sizes = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        return {"kv_bits": self.kv_bits, "b": self.batch} | lengths | sizes


def decode_cases(
    heads: tuple[Heads, ...],
    bits: tuple[int, ...],
    batches: tuple[int, ...],
    contexts: tuple[int, ...],
    limited: bool = True,
) -> list[Case]:
    """Every combination (limited: but long contexts of large batches), and ragged rows of each
    model."""
    cases = []
    for shape in heads:
        for kv_bits in bits:
            for batch in batches:
                for context in contexts:
                    if not limited or context < LONG or batch <= LONG_BATCH:
                        cases.append(Case(*shape, kv_bits, (context,) * batch))
            if batches == BATCHES and contexts == CONTEXTS:
                cases.append(ragged_case(shape, kv_bits))
    return cases


def ragged_case(shape: Heads, kv_bits: int) -> Case:
    """The same lengths every time."""
    count, low, high = RAGGED
    drawn = np.random.default_rng(0).integers(low, high + 1, count)
    return Case(*shape, kv_bits, tuple(map(int, drawn)))


def default_cases(bits: tuple[int, ...]) -> list[Case]:
    """All combinations of Llama-3-8B's heads, and of the other models' what tells them apart: every
    combination of them all would take three times as long."""
    cases = decode_cases((LLAMA3_8B,), bits, BATCHES, CONTEXTS)
    for shape in HEADS[1:]:
        cases += decode_cases((shape,), (4,), BATCHES, (1024, 4096))
        cases.append(ragged_case(shape, 4))
        cases += decode_cases((shape,), (8,), (16, 256), (1024, 4096))
    return cases


@dataclasses.dataclass
class Paged:
    """A stacked cache, and what goes with it in a call."""

    cache: KVCache
    table: Array
    lens: Array
    layers: list[Array]


@functools.lru_cache(maxsize=1)
def make_paged(case: Case, layers: int | None = None) -> Paged:
    """As many layers as the L2 asks for, unless told. The last one is kept: see `cache_clear`."""
    layers = layers or copies_of(case.bytes_read)
    total, width = sum(case.pages), max(case.pages)
    order = iter(np.random.default_rng(1).permutation(total).astype(np.int32))
    table = np.full((case.batch, width), -1, np.int32)
    for row, count in enumerate(case.pages):
        table[row, :count] = [next(order) for _ in range(count)]
    pages = _pages(layers, total, case.kv_heads, case.head_dim, case.kv_bits)
    cache = KVCache(pages, case.kv_bits, case.head_dim)
    lens = jnp.asarray(case.lengths, jnp.int32)
    return Paged(cache, jnp.asarray(table), lens, [jnp.int32(i) for i in range(layers)])


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _pages(layers: int, total: int, kv_heads: int, head_dim: int, bits: int) -> Array:
    """Layer by layer, so that nothing larger than the result is held."""
    lead = (total, kv_heads)

    def one(key: Array) -> Array:
        keys = jax.random.split(key, 3)
        if bits == 16:
            shape = (*lead, 2, PAGE, head_dim)
            side = jnp.array([1, 0.3], jnp.bfloat16).reshape(2, 1, 1)
            return jax.random.normal(keys[0], shape, jnp.bfloat16) * side
        words = jax.random.bits(keys[0], (*lead, PAGE * head_dim * bits // 16), jnp.uint32)
        scale = jax.random.uniform(keys[1], (*lead, PAGE, 2, 1), minval=0.05, maxval=0.3)
        centre = jax.random.uniform(keys[2], scale.shape, minval=-1.0)
        halves = jnp.concatenate([scale / 2 ** (bits - 4), centre], -1).astype(jnp.float16)
        scales = jax.lax.bitcast_convert_type(halves, jnp.int32).reshape(*lead, 2 * PAGE)
        return jnp.concatenate([jax.lax.bitcast_convert_type(words, jnp.int32), scales], -1)

    key = jax.random.key(layers, impl="rbg")  # the fastest to compile and to run
    return jax.lax.map(one, jax.random.split(key, layers))


@functools.partial(jax.jit, static_argnums=0)  # one program for all seeds
def normal(shape: tuple[int, ...], seed: int) -> Array:
    """bf16, standard normal."""
    return jax.random.normal(jax.random.key(seed, impl="rbg"), shape, jnp.bfloat16)
