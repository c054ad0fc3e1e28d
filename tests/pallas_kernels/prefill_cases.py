"""Cases of attention of many new tokens: poisoned caches on shuffled pages, and how far off."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from qserve_jax.pallas_kernels import paged_attention
from qserve_jax.pallas_kernels.paged_attention.prefill_problem import problem
from qserve_jax.quantization.qtensor import KVCache
from tests.pallas_kernels import lanes


@dataclasses.dataclass
class Case:
    """Arrays of a call; the pages of one layer of two."""

    q: Any
    pages: Any
    bits: int
    table: Any
    context_lens: Any
    query_lens: Any
    new_k: Any
    new_v: Any

    @property
    def cache(self):
        return KVCache(self.pages, self.bits, self.q.shape[-1])

    def call(self, run=paged_attention, q_dtype=None, **options):
        """On JAX's arrays; q, new_k and new_v in q_dtype where it is given."""
        floats = [jnp.asarray(x, q_dtype) for x in (self.q, self.new_k, self.new_v)]
        lens = map(jnp.asarray, (self.table, self.context_lens, self.query_lens))
        table, context_lens, query_lens = lens
        cache = KVCache(jnp.asarray(self.pages), self.bits, self.q.shape[-1])
        return run(
            floats[0],
            cache,
            table,
            context_lens,
            new_k=floats[1],
            new_v=floats[2],
            query_lens=query_lens,
            layer=jnp.int32(1),
            **options,
        )


def make_pages(rng, bits, num_pages, kv_heads, head_dim, dtype="bfloat16"):
    """K and V drawn differently, scales that differ by token and head."""
    if bits == 16:
        shape = (2, num_pages, kv_heads, 2, 64, head_dim)
        side = np.array([1, 0.3]).reshape(2, 1, 1)
        return (rng.standard_normal(shape) * side + 0.1).astype(jnp.dtype(dtype))
    words = 64 * 2 * head_dim * bits // 32
    lead = (2, num_pages, kv_heads)
    codes = rng.integers(-(2**31), 2**31, (*lead, words), dtype=np.int32)
    scales = rng.uniform(0.05, 0.3, (*lead, 64, 4)) / (2 ** (bits - 4))
    scales[..., 1::2] = rng.uniform(-1, 1, (*lead, 64, 2))
    scales = np.ascontiguousarray(scales.astype(np.float16)).view(np.int32)
    return np.concatenate([codes, scales.reshape(*lead, 128)], -1)


def poison(pages, bits, head_dim, page, tokens):
    """NaN where nobody may look: of a page the tokens of a slice, in all layers and heads."""
    if bits == 16:
        pages[:, page, :, :, tokens] = np.nan
    else:
        scales = pages[..., 64 * 2 * head_dim * bits // 32 :].view(np.float16)
        scales.reshape(*pages.shape[:3], 64, 4)[:, page, :, tokens] = np.nan


def make_case(rng, context, new, heads, kv_heads, head_dim, bits, dtype="float16", attends="full"):
    """Shuffled pages; what is behind each length, and the page that nobody has, is NaN."""
    context, new = np.array(context, np.int32), np.array(new, np.int32)
    b, t = len(context), max(2, int(new.max()))
    stored = context - new if attends == "full" else context
    needed = -(-stored // 64)
    num_pages, width = int(needed.sum()) + 2, int(needed.max(initial=0)) + 1
    pages = make_pages(rng, bits, num_pages, kv_heads, head_dim, dtype)
    table = np.full((b, width), -1, np.int32)
    order = iter(rng.permutation(num_pages))
    for row in range(b):
        table[row, : needed[row]] = [next(order) for _ in range(needed[row])]
        if stored[row] % 64:
            poison(pages, bits, head_dim, table[row, needed[row] - 1], slice(stored[row] % 64, 64))
    for page in order:
        poison(pages, bits, head_dim, page, slice(0, 64))
    shape = (b, t, kv_heads, head_dim)
    draw = [rng.standard_normal((b, t, heads, head_dim)), rng.standard_normal(shape)]
    q, k, v = (x.astype(jnp.dtype(dtype)) for x in (*draw, rng.standard_normal(shape) * 0.3 + 0.1))
    for row in range(b):
        k[row, new[row] :] = v[row, new[row] :] = np.nan
    return Case(q, pages, bits, table, context, new, k, v)


def operands_of(case, attends, window, layer=1):
    """What a kernel is given: its problem, and its operands and output as memory."""
    options = {"sm_scale": None, "window": window, "softcap": None}
    cache: Any = case.cache
    p = problem(
        *("twins", case.q, cache, case.table),
        **{"new_k": case.new_k, "attends": attends, "layer": 1, **options},
    )
    lens = np.stack([case.context_lens, case.query_lens], 1)
    arrays = [case.q, lens, case.table, case.pages]
    arrays += [case.new_k, case.new_v] if p.full else []
    arrays[2] = arrays[2] if p.width else np.full((p.rows, 1), -1, np.int32)
    memories = [lanes.Memory(x) for x in (*arrays, np.array([layer], np.int32))]
    return p, memories, lanes.Memory(np.zeros_like(case.q), filled=False)


def worst_error(found, expected, query_lens):
    """Relative Frobenius, of the worst sequence's real tokens."""
    found, expected = (np.asarray(a, np.float64) for a in (found, expected))
    norms = [
        (np.linalg.norm(found[row, :n] - expected[row, :n]), np.linalg.norm(expected[row, :n]))
        for row, n in enumerate(query_lens)
    ]
    return np.max([error / norm for error, norm in norms if norm > 0])  # NaN where there is one


def expected_of(case, **options):
    return case.call(q_dtype=jnp.float32, backend="reference", **options)
