"""Cases of decode attention: poisoned caches with sequences on shuffled pages, and float64."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qserve_jax.pallas_kernels import append_kv
from qserve_jax.quantization.numerics import fake_quantize_kv
from qserve_jax.quantization.qtensor import KVCache, kv_bytes_per_token

S_P, LAYERS = 64, 2
append = jax.jit(append_kv)


@dataclasses.dataclass
class Case:
    """One decode step. arguments: of paged_attention; expected float64[B, N, H]."""

    arguments: dict[str, Any]
    expected: np.ndarray


def poisoned_cache(bits: int, pages: int, heads: int, h: int, dtype: Any = jnp.bfloat16) -> KVCache:
    """Every 16-bit half of every page, so every scale too, is a NaN (as f16 and as bf16)."""
    lead = (LAYERS, pages, heads)
    if bits == 16:
        return KVCache(jnp.full((*lead, 2, S_P, h), jnp.nan, dtype), 16, h)
    words = S_P * kv_bytes_per_token(h, bits) // 4
    return KVCache(jnp.full((*lead, words), 0x7FC07FC0, jnp.int32), bits, h)


def make_case(
    rng: np.random.Generator,
    lens: Any,
    *,
    bits: int = 4,
    heads: int = 8,
    kv_heads: int = 2,
    h: int = 128,
    dtype: Any = jnp.bfloat16,
    cache_dtype: Any = jnp.bfloat16,
    attends: str = "full",
    rising: bool = False,
    spare_columns: int = 1,
    **options: Any,
) -> Case:
    """K and V with different scales and means for each token and head, on layer 1.

    rising: scores grow by several powers of two from page to page.
    """
    lens = np.asarray(lens)
    needed = -(-lens // S_P)
    ids = rng.permutation(needed.sum() + 3)
    num_pages = len(ids)
    table = np.full((len(lens), max(needed.max(initial=0), 1) + spare_columns), -1, np.int32)
    slots, raw = [], []
    q = rng.standard_normal((len(lens), heads, h)).astype(np.float32)
    q = np.asarray(jnp.asarray(q, dtype).astype(jnp.float32))
    for row, length in enumerate(lens):
        table[row, : needed[row]], ids = np.split(ids, needed[row : row + 1])
        at = np.arange(length)
        slots.append(table[row, at // S_P] * S_P + at % S_P)
        k, v = rng.standard_normal((2, length, kv_heads, h)) * rng.uniform(
            0.3, 1.5, (2, length, kv_heads, 1)
        )
        if rising:
            mean = q[row].reshape(kv_heads, -1, h).mean(1)
            k += mean * (at // 32 * 0.6)[:, None, None]
        v += rng.uniform(-1, 1, (length, kv_heads, 1)) + 0.5
        raw.append(np.stack([k, v]))
    k, v = jnp.asarray(np.concatenate(raw, axis=1), dtype)
    cache = poisoned_cache(bits, num_pages, kv_heads, h, cache_dtype)
    slots = jnp.asarray(np.concatenate(slots), jnp.int32)
    cache = append(cache, k, v, slots, layer=jnp.int32(1))
    if bits == 16:
        stored = jnp.stack([k, v]).astype(cache_dtype).astype(jnp.float32)
    else:
        stored = jax.jit(fake_quantize_kv, static_argnums=1)(jnp.stack([k, v]), bits)
    stored = np.split(np.asarray(stored, np.float64), np.cumsum(lens)[:-1], axis=1)
    exact = np.asarray(jnp.stack([k, v]).astype(jnp.float32), np.float64)
    exact = np.split(exact, np.cumsum(lens)[:-1], axis=1)
    last = np.zeros((2, len(lens), kv_heads, h))
    for row, length in enumerate(lens):
        last[:, row] = exact[row][:, -1] if length else np.nan
        if attends == "full" and length:
            stored[row][:, -1] = exact[row][:, -1]
    full = attends == "full"
    arguments = {
        "q": jnp.asarray(q, dtype),
        "cache": cache,
        "block_table": jnp.asarray(table),
        "context_lens": jnp.asarray(lens, jnp.int32),
        "new_k": jnp.asarray(last[0], dtype) if full else None,
        "new_v": jnp.asarray(last[1], dtype) if full else None,
        "attends": attends,
        "layer": jnp.int32(1),
        **options,
    }
    expected = np.stack([decode(q[row], *stored[row], **options) for row in range(len(lens))])
    return Case(arguments, expected)


def decode(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    sm_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    seen: np.ndarray | None = None,
    **_: Any,
) -> np.ndarray:
    """The last token's q [N, H] over k, v [S, K, H] in float64. seen: bool[S]."""
    n, h = q.shape
    visible = np.ones(len(k), bool) if seen is None else seen.copy()
    if window is not None:
        visible[: max(len(k) - window, 0)] = False
    k, v = k[visible], v[visible]
    if not len(k):
        return np.zeros((n, h))
    queries = q.reshape(k.shape[1], -1, h).astype(np.float64)
    scores = np.einsum("KGH,SKH->KGS", queries, k) * (sm_scale or h**-0.5)
    scores = softcap * np.tanh(scores / softcap) if softcap else scores
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("KGS,SKH->KGH", weights, v).reshape(n, h)


def worst_error(out: Any, expected: np.ndarray) -> float:
    """The largest relative Frobenius error of a sequence; where nothing is seen, zeros are asked."""
    out = np.asarray(jnp.asarray(out).astype(jnp.float32), np.float64)
    assert np.isfinite(out).all()
    assert not out[~expected.any((1, 2))].any()
    seen = expected.any((1, 2))
    difference = np.linalg.norm((out - expected)[seen], axis=(1, 2))
    return float((difference / np.linalg.norm(expected[seen], axis=(1, 2))).max(initial=0))
