"""The error of an attention output against float64, on sequences of the timed call."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from qserve_jax.benchmarks.attention_cases import PAGE, Case, Paged

SAMPLES = 16
TOKENS = 2**16
"""Of all samples together, on average: float64 takes some seconds for so many."""


def sampled_rows(lengths: tuple[int, ...]) -> list[int]:
    """The first, the last, the longest and the shortest sequence, and others evenly between: up to
    SAMPLES, fewer of long ones."""
    order = np.argsort(lengths, kind="stable")
    count = min(SAMPLES - 2, max(2, TOKENS * len(lengths) // sum(lengths)))
    spread = np.linspace(0, len(lengths) - 1, count).round()
    return sorted({int(order[-1]), int(order[0]), *map(int, spread)})


def worst_error(
    case: Case,
    paged: Paged,
    layer: int,
    q: jax.Array,
    out: jax.Array,
    new: Sequence[jax.Array] | None = None,
) -> float:
    """Relative Frobenius error of out [B, N, H], of the worst of the sampled sequences, for every
    token as stored in the cache; q [B, N, H]. new: K and V [B, K, H] of the last tokens instead."""

    def error(row: int) -> float:
        last = [np.asarray(x[row : row + 1], np.float64) for x in new or ()]
        exact = attend_row(case, paged, layer, row, np.asarray(q[row], np.float64), last)
        found = np.asarray(out[row], np.float64)
        return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))

    with ThreadPoolExecutor(SAMPLES) as pool:  # numpy's large operations run beside each other
        return float(np.max(list(pool.map(error, sampled_rows(case.lengths)))))  # NaN if one is


def attend_row(
    case: Case,
    paged: Paged,
    layer: int,
    row: int,
    q: np.ndarray,
    last: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """float64 [N, H] of one token that sees the whole sequence; last: K and V [tokens, K, H] of its
    last tokens, where they are not those of the cache."""
    pages = paged.table[row, : case.pages[row]]
    blocks = np.asarray(paged.cache.pages[layer, pages])
    group = case.heads // case.kv_heads
    outs = []
    for head in range(case.kv_heads):
        k, v = dequantized(case, blocks[:, head])
        k, v = k[: case.lengths[row]], v[: case.lengths[row]]
        if last:
            k[-len(last[0]) :], v[-len(last[1]) :] = (x[:, head] for x in last)
        scores = q[head * group : (head + 1) * group] @ k.T * case.head_dim**-0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        outs.append(weights @ v / weights.sum(-1, keepdims=True))
    return np.concatenate(outs)


def dequantized(case: Case, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """K and V float64 [tokens, H] of the pages of one KV head, by the layout's own words."""
    h, bits = case.head_dim, case.kv_bits
    if bits == 16:  # [pages, 2, PAGE, H]
        k, v = (blocks[:, side].astype(np.float64).reshape(-1, h) for side in (0, 1))
        return k, v
    octets = np.ascontiguousarray(blocks).view(np.uint8)  # K codes, V codes, (sk, ck, sv, cv)
    side = PAGE * h * bits // 8
    scales = octets[:, 2 * side :].copy().view(np.float16).astype(np.float64).reshape(-1, 4)
    sides = []
    for i in range(2):
        codes = octets[:, i * side : (i + 1) * side].reshape(-1, h * bits // 8)
        if bits == 4:
            codes = np.stack([codes & 15, codes >> 4], -1).reshape(-1, h)
        centred = codes.astype(np.float64) - 2 ** (bits - 1)
        sides.append(centred * scales[:, 2 * i : 2 * i + 1] + scales[:, 2 * i + 1 : 2 * i + 2])
    return sides[0], sides[1]
