"""From sequences on the host to the padded arrays of one device call.

Shapes are padded to few sizes (powers of two), so that few programs are compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from collections.abc import Sequence as Seq

import jax
import jax.numpy as jnp
import numpy as np

from qserve_jax.runtime.decode import DecodeState
from qserve_jax.runtime.sampling import (
    SamplingFeatures,
    make_sampling_state,
    make_token_counts,
    sampling_features,
)
from qserve_jax.runtime.sampling_params import MAX_LOGPROBS
from qserve_jax.runtime.sequence import Sequence

MIN_PROMPT_BUCKET = 16
MIN_PAGES_BUCKET = 4
MIN_STOPS_BUCKET = 4
LOGPROBS_BUCKETS = (0, 5, MAX_LOGPROBS)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is >= n and >= least: the bucket of a shape."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def pad_rows(rows: Seq[Seq[int]], count: int, width: int, fill: int) -> np.ndarray:
    """Ragged lists -> i32[count, width]."""
    padded = np.full((count, width), fill, np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


def pad_column(values: Seq[int], count: int) -> jax.Array:
    """i32[count], zeros behind the values."""
    return jnp.asarray(list(values) + [0] * (count - len(values)), jnp.int32)


def prompt_array(batch: Seq[Sequence]) -> np.ndarray:
    """The batch's prompts, i32[rows, T], right-padded to its bucket."""
    width = power_of_two(max(len(s.prompt) for s in batch), MIN_PROMPT_BUCKET)
    return pad_rows([s.prompt for s in batch], power_of_two(len(batch)), width, 0)


def row_bucket(wanted: int, previous: int) -> int:
    """Rows of a batch of `wanted` sequences. A batch that drains keeps its rows, which are
    compiled, until a quarter of them would do."""
    rows = power_of_two(wanted)
    return previous if previous // 4 < rows <= previous else rows


def run_features(sequences: Seq[Sequence], vocab_size: int) -> SamplingFeatures:
    """What any sequence of a run uses, so that all its batches share one program."""
    features = sampling_features([s.params for s in sequences])
    if features.logprobs is None:
        return features
    bucket = next(size for size in LOGPROBS_BUCKETS if features.logprobs <= size)
    return dataclasses.replace(features, logprobs=min(bucket, vocab_size))


def device_state(
    batch: Seq[Sequence],
    *,
    rows: int,
    features: SamplingFeatures,
    page_size: int,
    vocab_size: int,
) -> DecodeState:
    """The batch's state, padded to `rows`. The block table covers each sequence's whole length."""
    pages = max(-(-s.total_len // page_size) for s in batch)
    width = power_of_two(pages, MIN_PAGES_BUCKET)
    stops = power_of_two(max(len(s.stop_ids) for s in batch), MIN_STOPS_BUCKET)
    sampling, _ = make_sampling_state(
        [s.params for s in batch], [s.seed for s in batch], pad_to=rows
    )
    counts = None
    if features.penalties:
        counts = make_token_counts(
            [s.prompt for s in batch],
            [s.tokens for s in batch],
            vocab_size=vocab_size,
            pad_to=rows,
        )
    return DecodeState(
        tokens=pad_column([s.tokens[-1] if s.tokens else 0 for s in batch], rows),
        context_lens=pad_column([s.cached for s in batch], rows),
        remaining=pad_column([s.limit - len(s.tokens) for s in batch], rows),
        block_table=jnp.asarray(pad_rows([s.pages for s in batch], rows, width, -1)),
        rope_lens=pad_column([s.total_len for s in batch], rows),
        stop_ids=jnp.asarray(pad_rows([s.stop_ids for s in batch], rows, stops, -1)),
        sampling=sampling,
        counts=counts,
    )


def prefill_batches(sequences: Seq[Sequence], max_tokens: int) -> Iterator[list[Sequence]]:
    """Split by padded size, so that one call computes at most max_tokens (or one prompt)."""
    batch: list[Sequence] = []
    longest = 0
    for sequence in sequences:
        longest = max(longest, len(sequence.prompt))
        padded = power_of_two(len(batch) + 1) * power_of_two(longest, MIN_PROMPT_BUCKET)
        if batch and padded > max_tokens:
            yield batch
            batch, longest = [], len(sequence.prompt)
        batch.append(sequence)
    if batch:
        yield batch
