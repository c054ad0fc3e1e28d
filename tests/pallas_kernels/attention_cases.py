"""Cases of decode attention: poisoned caches with sequences on shuffled pages, and float64.

All of it in numpy, the layout of the cache too, as `KVCache` describes it.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from qserve_jax.quantization.qtensor import KVCache

S_P, LAYERS = 64, 2
POISON = 0x7FC0  # NaN as f16 and as bf16


@dataclasses.dataclass
class Case:
    """One decode step. arguments: of paged_attention; stored: float64[2, S, K, H] of each row, K
    and V as they are to be seen."""

    arguments: dict[str, Any]
    stored: list[np.ndarray]
    options: dict[str, Any]

    def expected(self, seen: dict[int, np.ndarray] | None = None) -> np.ndarray:
        """float64[B, N, H]. seen: row -> bool[S] of the tokens that can be."""
        q = np.asarray(self.arguments["q"].astype(jnp.float32), np.float64)
        rows = [
            decode(q[row], *kv, seen=(seen or {}).get(row), **self.options)
            for row, kv in enumerate(self.stored)
        ]
        return np.stack(rows)


def quantized(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [..., H] -> codes u8, scale and centre f16 [...], asymmetric over H."""
    low, high = x.min(-1), x.max(-1)
    scale = ((high - low) / (2**bits - 1)).astype(np.float16)
    centre = (low + 2 ** (bits - 1) * scale.astype(np.float64)).astype(np.float16)
    codes = np.rint(
        (x - centre.astype(np.float64)[..., None]) / scale.astype(np.float64)[..., None]
    )
    return np.clip(codes + 2 ** (bits - 1), 0, 2**bits - 1).astype(np.uint8), scale, centre


def dequantized(codes: np.ndarray, scale: np.ndarray, centre: np.ndarray, bits: int) -> np.ndarray:
    offset = codes.astype(np.float64) - 2 ** (bits - 1)
    return offset * scale.astype(np.float64)[..., None] + centre.astype(np.float64)[..., None]


def make_pages(raw: list[np.ndarray], table: np.ndarray, num_pages: int, bits: int, dtype: Any):
    """Pages [LAYERS, P, K, ...] with the rows on layer 1, else NaN; and what they hold.

    raw: float64[2, S, K, H] of each row, K and V.
    """
    heads, h = raw[0].shape[2:]
    size, half = h * bits // 8, np.dtype(dtype)
    extra = 0 if bits == 16 else 8
    lead = (LAYERS, num_pages, heads)
    pages = np.full((*lead, S_P * (2 * size + extra) // 2), POISON, np.uint16).view(np.uint8)
    sections = np.split(pages[1], [S_P * size, 2 * S_P * size], axis=-1)  # views [P, K, bytes]
    k, v, scales = (x.reshape(num_pages, heads, S_P, x.shape[-1] // S_P) for x in sections)
    stored = []
    for row, kv in enumerate(raw):
        at = np.arange(kv.shape[1])
        where = (table[row, at // S_P], slice(None), at % S_P)  # [S, K, bytes]
        if bits == 16:
            codes = kv.astype(half)
            stored.append(codes.astype(np.float64))
            octets = np.ascontiguousarray(codes).view(np.uint8)
        else:
            codes, scale, centre = quantized(kv, bits)
            stored.append(dequantized(codes, scale, centre, bits))
            octets = codes if bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4
            four = np.stack([scale[0], centre[0], scale[1], centre[1]], axis=-1)
            scales[where] = four.view(np.uint8)
        k[where], v[where] = octets
    shape = (*lead, 2, S_P, h) if bits == 16 else (*lead, -1)
    return pages.view(half if bits == 16 else np.int32).reshape(shape), stored


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
    sink: bool = False,
    spare_columns: int = 1,
    **options: Any,
) -> Case:
    """K and V with different scales and means for each token and head, on layer 1 of a cache.

    rising: scores grow by several powers of two from page to page. sink: the first token has most
    of the weight (with one query head of each KV head) and next to no V, and the others a small one
    around zero, so that what counts are small weights times small scales. options: of
    paged_attention.
    """
    lens, half = np.asarray(lens), np.dtype(dtype)
    needed = -(-lens // S_P)
    ids = rng.permutation(needed.sum() + 3)
    num_pages = len(ids)
    table = np.full((len(lens), max(needed.max(initial=0), 1) + spare_columns), -1, np.int32)
    q = rng.standard_normal((len(lens), heads, h)).astype(half)
    raw, last = [], np.full((2, len(lens), kv_heads, h), np.nan, half)
    for row, length in enumerate(lens):
        table[row, : needed[row]], ids = np.split(ids, needed[row : row + 1])
        spread = rng.uniform(0.3, 1.5, (2, length, kv_heads, 1))
        k, v = rng.standard_normal((2, length, kv_heads, h)) * spread
        if rising:
            mean = q[row].astype(np.float64).reshape(kv_heads, -1, h).mean(1)
            k += mean * (np.arange(length) // 32 * 0.6)[:, None, None]
        v += rng.uniform(-1, 1, (length, kv_heads, 1)) + 0.5
        if sink and length:
            k[0] = q[row].astype(np.float64).reshape(kv_heads, -1, h).mean(1)
            v -= v.mean(-1, keepdims=True)
            v *= 0.01
            v[0] *= 0.01
        raw.append(np.stack([k, v]).astype(half).astype(np.float64))
        if length:
            last[:, row] = raw[row][:, -1]
    pages, stored = make_pages(raw, table, num_pages, bits, cache_dtype)
    full = attends == "full"
    for kv, exact in zip(stored, raw, strict=True):
        if full:
            kv[:, -1:] = exact[:, -1:]
    arguments = {
        "q": jnp.asarray(q),
        "cache": KVCache(jnp.asarray(pages), bits, h),
        "block_table": jnp.asarray(table),
        "context_lens": jnp.asarray(lens, jnp.int32),
        "new_k": jnp.asarray(last[0]) if full else None,
        "new_v": jnp.asarray(last[1]) if full else None,
        "attends": attends,
        "layer": jnp.int32(1),
        **options,
    }
    return Case(arguments, stored, options)


def decode(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    sm_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    seen: np.ndarray | None = None,
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
    """The largest relative Frobenius error of a sequence; zeros where nothing is seen."""
    out = np.asarray(jnp.asarray(out).astype(jnp.float32), np.float64)
    assert np.isfinite(out).all()
    assert not out[~expected.any((1, 2))].any()
    seen = expected.any((1, 2))
    difference = np.linalg.norm((out - expected)[seen], axis=(1, 2))
    return float((difference / np.linalg.norm(expected[seen], axis=(1, 2))).max(initial=0))
