"""Log-likelihood of continuations, which multiple-choice tasks compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from qserve_jax.evaluation.candidates import Candidate
from qserve_jax.runtime.perplexity import token_losses

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context, and of what may follow it."""

SHORTEST = 32
"""Smallest padded length, in tokens: few programs are compiled for short rows."""


def encode_pair(tokenizer: Any, context: str, continuation: str) -> Pair:
    """Both texts tokenised together and split where the context's own tokens end (lm-eval's way).
    Spaces that end the context count to the continuation, with whose words they are one token."""
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole = tokenizer.encode(stripped + continuation, verbose=False)
    split = len(tokenizer.encode(stripped, verbose=False))
    return whole[:split], whole[split:]


def log_likelihoods(
    candidate: Candidate, pairs: Sequence[Pair], *, batch_size: int = 8, progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(log p of each continuation after its context f64[n], whether it is the greedy one bool[n]).

    A context too long for the model loses its beginning. Rows are padded to powers of two. Raises
    ValueError where a context or continuation is empty, or a continuation too long.
    """
    limit = candidate.model.config.context_length
    rows = [_row(pair, limit) for pair in pairs]
    scores, greedy = np.zeros(len(rows)), np.zeros(len(rows), bool)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    for start in tqdm(range(0, len(rows), batch_size), disable=not progress, desc="choices"):
        batch = order[start : start + batch_size]
        tokens, lengths = _pad([rows[i][0] for i in batch], batch_size, limit)
        found = token_losses(candidate.model, candidate.params, tokens, lengths, candidate.kv_bits)
        losses, likeliest = np.asarray(found[0], np.float64), np.asarray(found[1])
        for line, i in enumerate(batch):
            ids, first = rows[i]
            scored = slice(first - 1, len(ids) - 1)  # entry j is of token j + 1
            scores[i] = -losses[line, scored].sum()
            greedy[i] = np.array_equal(likeliest[line, scored], ids[first:])
    return scores, greedy


def _row(pair: Pair, limit: int) -> tuple[list[int], int]:
    """(context and continuation, index of the continuation's first token), cut to `limit`."""
    context, continuation = pair
    if not context or not continuation:
        raise ValueError(
            f"a context of {len(context)} and a continuation of {len(continuation)} tokens: "
            "give at least one token each"
        )
    if len(continuation) >= limit:
        raise ValueError(
            f"a continuation has {len(continuation)} tokens: give fewer than the model's "
            f"context of {limit}"
        )
    ids = [*context, *continuation][-limit:]
    return ids, len(ids) - len(continuation)


def _pad(rows: list[list[int]], batch_size: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    longest = max(map(len, rows))
    width = min(max(SHORTEST, 1 << (longest - 1).bit_length()), limit)
    tokens, lengths = np.zeros((batch_size, width), np.int32), np.ones(batch_size, np.int32)
    for line, ids in enumerate(rows):
        tokens[line, : len(ids)], lengths[line] = ids, len(ids)
    return tokens, lengths
