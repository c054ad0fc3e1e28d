"""From sequences on the host to the padded arrays of one device call.

Shapes are padded to few sizes (powers of two), so that few programs are compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any

import numpy as np

from qserve_jax.runtime.decode import DecodeState
from qserve_jax.runtime.sampling import (
    SamplingFeatures,
    TokenCounts,
    bias_width,
    join_features,
    make_token_counts,
    penalizes,
    sampling_arrays,
    sampling_features,
)
from qserve_jax.runtime.sampling_params import MAX_LOGPROBS
from qserve_jax.runtime.sequence import Sequence

if TYPE_CHECKING:
    from qserve_jax.runtime.scheduler import Chunk

MIN_PROMPT_BUCKET = 16
MIN_PAGES_BUCKET = 4
MIN_STOPS_BUCKET = 4
CALL_TOKENS = 512
"""What a prefill call costs beside its tokens, in tokens: it reads all weights."""
LOGPROBS_BUCKETS = (0, 5, MAX_LOGPROBS)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is >= n and >= least: the bucket of a shape."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def powers_of_two(low: int, high: int) -> list[int]:
    """Those from low to high."""
    return [1 << i for i in range((low - 1).bit_length(), high.bit_length())]


def pad_rows(rows: Seq[Seq[int]], count: int, width: int, fill: int) -> np.ndarray:
    """Ragged lists -> i32[count, width]."""
    padded = np.full((count, width), fill, np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


def pad_column(values: Seq[int], count: int, fill: int = 0) -> np.ndarray:
    """i32[count], `fill` behind the values."""
    return np.array([*values, *[fill] * (count - len(values))], np.int32)


def prompt_bucket(length: int) -> int:
    """Tokens per row of a prefill call whose longest chunk is this."""
    return power_of_two(length, MIN_PROMPT_BUCKET)


@dataclasses.dataclass(frozen=True)
class Needs:
    """What the programs of a batch are compiled for, beside its rows: what is sampled, pages of the
    longest length that anybody may reach (columns of the block table), stop ids, logit biases."""

    features: SamplingFeatures = SamplingFeatures()  # noqa: RUF009 (frozen)
    columns: int = 0
    stops: int = MIN_STOPS_BUCKET
    biases: int = 0

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            join_features(self.features, other.features),
            max(self.columns, other.columns),
            max(self.stops, other.stops),
            max(self.biases, other.biases),
        )


def needs_of(sequence: Sequence, page_size: int, vocab_size: int) -> Needs:
    """Of one sequence, in buckets."""
    return Needs(
        bucket_features(sampling_features([sequence.params]), vocab_size),
        power_of_two(-(-sequence.total_len // page_size), MIN_PAGES_BUCKET),
        power_of_two(len(sequence.stop_ids), MIN_STOPS_BUCKET),
        bias_width(len(sequence.params.logit_bias or ())),
    )


def call_shape(chunks: Seq[Chunk]) -> tuple[int, int]:
    """Rows, and tokens of each, of a prefill call."""
    return power_of_two(len(chunks)), prompt_bucket(max(c.end - c.start for c in chunks))


def full_calls(chunks: Seq[Chunk]) -> list[Seq[Chunk]]:
    """The chunks in order, in calls of powers of two of rows, where padding the rows of one call
    would cost more than another call does."""
    width = prompt_bucket(max(c.end - c.start for c in chunks))
    calls = []
    while (power_of_two(len(chunks)) - len(chunks)) * width >= CALL_TOKENS:
        rows = power_of_two(len(chunks)) // 2
        calls.append(chunks[:rows])
        chunks = chunks[rows:]
    return [*calls, chunks]


def row_bucket(wanted: int, previous: int) -> int:
    """Rows of a batch of `wanted` sequences. A batch that drains keeps its rows, which are
    compiled, until a quarter of them would do."""
    rows = power_of_two(wanted)
    return previous if previous // 4 < rows <= previous else rows


def bucket_features(features: SamplingFeatures, vocab_size: int) -> SamplingFeatures:
    """With as many log-probabilities as the next bucket has."""
    if features.logprobs is None:
        return features
    bucket = next(size for size in LOGPROBS_BUCKETS if features.logprobs <= size)
    return dataclasses.replace(features, logprobs=min(bucket, vocab_size))


def token_counts(chunks: Seq[Chunk], *, rows: int, vocab_size: int) -> TokenCounts:
    """What the penalties of each chunk's sequence look at, padded to `rows` rows; nothing where
    there are none, and nothing for any but a sequence's last chunk, after which it is sampled."""
    counted = [
        c.sequence if c.end == c.sequence.goal and penalizes(c.sequence.params) else None
        for c in chunks
    ]
    prompts = [s.prompt if s else [] for s in counted]
    outputs = [s.tokens if s else [] for s in counted]
    return make_token_counts(prompts, outputs, vocab_size=vocab_size, pad_to=rows)


def device_state(
    batch: Seq[Sequence],
    *,
    rows: int,
    needs: Needs,
    lens: Seq[int],
    counts: TokenCounts | None = None,
) -> DecodeState:
    """The batch's state as the host knows it, in numpy arrays (one transfer takes them all to the
    device), padded to `rows` rows.

    lens: tokens of each in the cache. counts: of `token_counts`, where penalties are on.
    """
    fields: dict[str, Any] = {
        "tokens": pad_column([s.tokens[-1] if s.tokens else 0 for s in batch], rows),
        "context_lens": pad_column(lens, rows),
        "remaining": pad_column([s.limit - len(s.tokens) for s in batch], rows),
        "block_table": pad_rows([s.pages for s in batch], rows, needs.columns, -1),
        "rope_lens": pad_column([s.total_len for s in batch], rows),
        "stop_ids": pad_rows([s.stop_ids for s in batch], rows, needs.stops, -1),
    }
    params, seeds = [s.params for s in batch], [s.seed for s in batch]
    sampling = sampling_arrays(params, seeds, pad_to=rows, biases=needs.biases)
    return DecodeState(**fields, sampling=sampling, counts=counts)
