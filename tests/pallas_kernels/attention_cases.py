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


def fill_page(block: np.ndarray, offset: int, parts: list[Any], bits: int) -> None:
    """Write a token into a (page, head) block u8[bytes]. parts: codes, scale, centre of K, of V."""
    scales = np.array([parts[1], parts[2], parts[4], parts[5]], np.float16).view(np.uint8)
    size = len(parts[0]) * bits // 8
    for side, codes in enumerate((parts[0], parts[3])):
        octets = codes if bits == 8 else codes[0::2] | codes[1::2] << 4
        start = side * S_P * size + offset * size
        block[start : start + size] = octets
    block[2 * S_P * size + 8 * offset :][:8] = scales


def make_pages(raw: list[np.ndarray], table: np.ndarray, num_pages: int, bits: int, dtype: Any):
    """Pages [LAYERS, P, K, ...] with the rows on layer 1, else NaN; and what they hold."""
    _, _, heads, h = raw[0].shape
    if bits == 16:
        half = np.dtype(dtype)
        pages = np.full((LAYERS, num_pages, heads, 2, S_P, h), POISON, np.uint16).view(half)
        rounded = [kv.astype(half) for kv in raw]
        for row, kv in enumerate(rounded):
            for t in range(kv.shape[1]):
                pages[1, table[row, t // S_P], :, :, t % S_P] = kv[:, t].swapaxes(0, 1)
        return pages, [kv.astype(np.float64) for kv in rounded]
    size = S_P * (2 * h * bits // 8 + 8)
    pages = np.full((LAYERS, num_pages, heads, size // 2), POISON, np.uint16).view(np.uint8)
    stored = []
    for row, kv in enumerate(raw):
        codes, scale, centre = quantized(kv, bits)
        stored.append(dequantized(codes, scale, centre, bits))
        for t, head in np.ndindex(kv.shape[1:3]):
            parts = [x[side, t, head] for side in range(2) for x in (codes, scale, centre)]
            fill_page(pages[1, table[row, t // S_P], head], t % S_P, parts, bits)
    return pages.view(np.int32), stored


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
    """K and V with different scales and means for each token and head, on layer 1 of a cache.

    rising: scores grow by several powers of two from page to page. options: of paged_attention.
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
