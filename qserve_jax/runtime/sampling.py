"""Choosing the next token of every row of a batch: pure, traceable functions over f32[B, V] logits.

The order of operations is vLLM's: log-probabilities are taken from the model's own logits; then
logit bias, penalties, temperature, min-p, top-k, top-p and the draw. A row's token is a function of
its own logits, parameters, seed and position: never of its place in the batch or its neighbours.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qserve_jax.runtime.sampling_params import SamplingParams

Array = jax.Array
_LOWEST_TEMPERATURE = 1e-30  # its reciprocal is a float32
TOKEN_BLOCK = 8192
"""Token ids that `make_token_counts` sends at once."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """SamplingParams of a batch as arrays, one row per sequence; n is the widest row's biases.

    A row of neutral values (those of `SamplingParams()`) changes nothing: it is greedy.
    """

    temperature: Array  # f32[B], 0 = greedy
    top_k: Array  # i32[B], <= 0 = off
    top_p: Array  # f32[B], >= 1 = off
    min_p: Array  # f32[B], 0 = off
    repetition_penalty: Array  # f32[B], 1 = off
    presence_penalty: Array  # f32[B], 0 = off
    frequency_penalty: Array  # f32[B], 0 = off
    seed: Array  # u32[B, 2], high word first
    bias_ids: Array  # i32[B, n], -1 = none
    bias_values: Array  # f32[B, n]


@dataclasses.dataclass(frozen=True)
class SamplingFeatures:
    """What any row of a batch uses, so that the rest is not compiled. Static and hashable.

    Turning on a feature that no row uses never changes a token; it only costs time.
    """

    greedy: bool = True  # every row is greedy: nothing is drawn
    filters: bool = False  # top-k, top-p or min-p
    penalties: bool = False  # repetition, presence or frequency: `sample` needs TokenCounts
    bias: bool = False
    logprobs: int | None = None  # None: none; k: the chosen token's and the k most likely ones'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenCounts:
    """What the penalties look at."""

    prompt_mask: Array  # bool[B, V], the token is in the prompt
    output_counts: Array  # i32[B, V], how often the token is in the output


class SampleOutput(NamedTuple):
    """Tokens, and the log-probabilities asked for (None where they are not)."""

    tokens: Array  # i32[B]
    finite: Array  # bool[B], whether the model's logits had a finite maximum: no NaN, no overflow
    logprobs: Array | None = None  # f32[B], of `tokens`
    top_tokens: Array | None = None  # i32[B, k], most likely first
    top_logprobs: Array | None = None  # f32[B, k]


def sample(
    logits: Array,
    state: SamplingState,
    features: SamplingFeatures,
    positions: Array,
    counts: TokenCounts | None = None,
) -> SampleOutput:
    """Chooses one token per row. Rows with temperature 0 take the best token, lowest id on ties.

    logits: float[B, V], the model's own; computed on in float32.
    positions: i32[B], the position of the token being chosen in its sequence. Randomness is keyed
      by (seed, position) alone, so a request draws the same tokens in any batch.
    counts: needed when `features.penalties`.

    Raises ValueError if penalties are on and `counts` is None.
    """
    logits = logits.astype(jnp.float32)
    scores = logits
    if features.bias:
        scores = apply_bias(scores, state)
    if features.penalties:
        if counts is None:
            raise ValueError("features.penalties=True needs counts, got None: pass TokenCounts")
        scores = apply_penalties(scores, state, counts)
    tokens = jnp.argmax(scores, axis=-1)
    if not features.greedy:
        scores = apply_temperature(scores, state.temperature)
        if features.filters:
            scores = apply_filters(scores, state)
        drawn = jnp.argmax(scores + gumbel_noise(state.seed, positions, logits.shape[-1]), axis=-1)
        tokens = jnp.where(state.temperature > 0, drawn, tokens)
    tokens = tokens.astype(jnp.int32)
    finite = jnp.isfinite(jnp.max(logits, axis=-1))
    return SampleOutput(tokens, finite, *_logprobs(logits, tokens, features.logprobs))


def apply_bias(logits: Array, state: SamplingState) -> Array:
    """f32[B, V] logits with every row's biases added."""
    batch, vocab = logits.shape
    rows = jnp.arange(batch)[:, None]
    # A negative index would count from the end; one past the end is dropped.
    ids = jnp.where(state.bias_ids < 0, vocab, state.bias_ids)
    return logits.at[rows, ids].add(state.bias_values, mode="drop")


def apply_penalties(logits: Array, state: SamplingState, counts: TokenCounts) -> Array:
    """Penalises f32[B, V] logits: repetition (CTRL, HF), then frequency and presence (OpenAI).

    Repetition looks at the prompt and the output, and divides positive and multiplies negative
    logits; the others look at the output and subtract.
    """
    repetition = state.repetition_penalty[:, None]
    # Times the reciprocal: XLA makes that of a division in some shapes only, and a row's tokens
    # must not depend on the shape of its batch.
    penalised = logits * jnp.where(logits > 0, 1 / repetition, repetition)
    in_output = counts.output_counts > 0
    logits = jnp.where(counts.prompt_mask | in_output, penalised, logits)
    logits -= state.frequency_penalty[:, None] * counts.output_counts.astype(jnp.float32)
    return logits - state.presence_penalty[:, None] * in_output.astype(jnp.float32)


def apply_temperature(logits: Array, temperature: Array) -> Array:
    """(logits - row maximum) / temperature, f32[B, V].

    The shift leaves the distribution alone; with it and a floor under the temperature (1e-30, where
    any draw is greedy) tiny temperatures give no NaN.
    """
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    return shifted * (1 / jnp.maximum(temperature, _LOWEST_TEMPERATURE))[:, None]


def apply_filters(scores: Array, state: SamplingState) -> Array:
    """f32[B, V] scores (log-probabilities up to a constant) with filtered tokens at -inf.

    Tokens are ranked by score, the lower id first on ties, and each filter keeps a prefix of the
    ranking: min-p, then top-k, then top-p over what these two left. The best token always stays.
    """
    ids = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    negated, ranking = lax.sort((-scores, ids), num_keys=1, is_stable=True)
    last = _num_kept(-negated, state)[:, None] - 1
    last_score = -jnp.take_along_axis(negated, last, axis=-1)
    last_id = jnp.take_along_axis(ranking, last, axis=-1)
    kept = (scores > last_score) | ((scores == last_score) & (ids <= last_id))
    return jnp.where(kept, scores, -jnp.inf)


def _num_kept(ranked: Array, state: SamplingState) -> Array:
    """How many tokens of each row the filters keep, i32[B] >= 1; `ranked` f32[B, V] descends."""
    vocab = ranked.shape[-1]
    best = ranked[:, :1]
    kept = jnp.sum(ranked >= best + jnp.log(state.min_p)[:, None], axis=-1)
    kept = jnp.where(state.top_k > 0, jnp.minimum(kept, state.top_k), kept)
    survivors = jnp.arange(vocab) < kept[:, None]
    mass = jnp.cumsum(jnp.where(survivors, jnp.exp(ranked - best), 0), axis=-1)
    # Tokens before the one whose mass reaches top_p, and that one.
    nucleus = 1 + jnp.sum(mass < state.top_p[:, None] * mass[:, -1:], axis=-1)
    # At top_p = 1 rounding of the sum could still cut the tail: off means off.
    return jnp.where(state.top_p < 1, jnp.minimum(kept, nucleus), kept)


def gumbel_noise(seed: Array, positions: Array, vocab_size: int) -> Array:
    """Gumbel noise f32[B, V] from seed u32[B, 2] and positions i32[B].

    argmax(scores + noise) is a draw from softmax(scores) (the Gumbel-max trick).
    """

    def row(words: Array, position: Array) -> Array:
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, position), (vocab_size,), jnp.float32)

    return jax.vmap(row)(seed, positions)


def _logprobs(logits: Array, tokens: Array, num_top: int | None) -> tuple[Array | None, ...]:
    if num_top is None:
        return None, None, None
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    top_logprobs, top_tokens = lax.top_k(logprobs, num_top)
    return chosen, top_tokens.astype(jnp.int32), top_logprobs


def make_sampling_state(
    params: Sequence[SamplingParams], seeds: Sequence[int], *, pad_to: int
) -> tuple[SamplingState, SamplingFeatures]:
    """Arrays of `pad_to` rows for a batch of requests, and the features they use.

    seeds: one integer in [0, 2**64) per request: its `seed`, or the engine's choice where that is
      None. Rows beyond the requests are greedy. The width of the biases is a power of two, so that
      few shapes are compiled.

    Raises ValueError if the lengths differ, exceed `pad_to`, or a seed is out of range.
    """
    state = sampling_arrays(params, seeds, pad_to=pad_to)
    return jax.tree.map(jnp.asarray, state), sampling_features(params)


NEUTRAL = SamplingParams()
FLOATS = (
    *("temperature", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
_floats = operator.attrgetter(*FLOATS)


def sampling_arrays(
    params: Sequence[SamplingParams], seeds: Sequence[int], *, pad_to: int, biases: int = 0
) -> SamplingState:
    """The state of `make_sampling_state`, of numpy arrays; room for `biases` a row at least."""
    if len(seeds) != len(params):
        raise ValueError(f"{len(params)} params but {len(seeds)} seeds: pass one seed per request")
    if len(params) > pad_to:
        raise ValueError(f"{len(params)} params exceed {pad_to=}: raise pad_to")
    if bad := [seed for seed in seeds if not 0 <= seed < 2**64]:
        raise ValueError(f"seed {bad[0]} is not in [0, 2**64): use a 64-bit unsigned seed")
    padding = pad_to - len(params)
    rows = [*params, *[NEUTRAL] * padding]
    words = np.array([*seeds, *[0] * padding], np.uint64)
    floats = np.array([_floats(row) for row in rows], np.float32).reshape(pad_to, len(FLOATS))
    bias_ids, bias_values = _bias_arrays([row.logit_bias or {} for row in rows], biases)
    fields: Any = dict(
        **dict(zip(FLOATS, floats.T, strict=True)),
        top_k=np.array([min(row.top_k, 2**31 - 1) for row in rows], np.int32),
        seed=np.stack([words >> np.uint64(32), words & np.uint64(2**32 - 1)], 1).astype(np.uint32),
        bias_ids=bias_ids,
        bias_values=bias_values,
    )
    return SamplingState(**fields)


def bias_width(count: int) -> int:
    """Room for so many biases: a power of two, or 0."""
    return 1 << (count - 1).bit_length() if count else 0


def _bias_arrays(biases: Sequence[dict[int, float]], least: int) -> tuple[np.ndarray, np.ndarray]:
    """i32[B, n] ids (-1 = none) and f32[B, n] values, n at least `least`."""
    width = max(least, bias_width(max(map(len, biases), default=0)))
    ids = np.full((len(biases), width), -1, np.int32)
    values = np.zeros((len(biases), width), np.float32)
    if not width:
        return ids, values
    for row, bias in enumerate(biases):
        ids[row, : len(bias)] = list(bias.keys())
        values[row, : len(bias)] = list(bias.values())
    return ids, values


def penalizes(params: SamplingParams) -> bool:
    """Whether the request looks at its token counts."""
    p = params
    return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0


def sampling_features(params: Sequence[SamplingParams]) -> SamplingFeatures:
    """What any of the requests uses; filters count only where something is drawn."""
    drawn = [p for p in params if p.temperature > 0]
    return SamplingFeatures(
        greedy=not drawn,
        filters=any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in drawn),
        penalties=any(map(penalizes, params)),
        bias=any(p.logit_bias for p in params),
        logprobs=max((p.logprobs for p in params if p.logprobs is not None), default=None),
    )


def join_features(a: SamplingFeatures, b: SamplingFeatures) -> SamplingFeatures:
    """What either uses."""
    logprobs = [f.logprobs for f in (a, b) if f.logprobs is not None]
    return SamplingFeatures(
        greedy=a.greedy and b.greedy,
        filters=a.filters or b.filters,
        penalties=a.penalties or b.penalties,
        bias=a.bias or b.bias,
        logprobs=max(logprobs, default=None),
    )


def make_token_counts(
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    *,
    vocab_size: int,
    pad_to: int,
) -> TokenCounts:
    """Counts of a batch's token ids, padded with empty rows to `pad_to`.

    Only the ids go to the device and are counted there, in blocks of one size: whatever their
    number, nothing is compiled anew.

    Raises ValueError if the lengths differ or exceed `pad_to`, or a token id is not in
    [0, vocab_size).
    """
    if len(prompts) != len(outputs) or len(prompts) > pad_to:
        raise ValueError(
            f"{len(prompts)} prompts, {len(outputs)} outputs and {pad_to=}: pass as many outputs "
            "as prompts, at most pad_to"
        )
    shape = pad_to, vocab_size
    prompt_mask, output_counts = jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32)
    for rows, ids in _token_blocks(prompts, *shape):
        prompt_mask = _mark(prompt_mask, rows, ids)
    for rows, ids in _token_blocks(outputs, *shape):
        output_counts = _count(output_counts, rows, ids)
    return TokenCounts(prompt_mask, output_counts)


def _token_blocks(
    sequences: Sequence[Sequence[int]], pad_to: int, vocab_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows and ids of all tokens, i32[TOKEN_BLOCK] each; row pad_to is padding. At least one block:
    who comes first, or warms up, compiles for all."""
    ids = np.fromiter(itertools.chain.from_iterable(sequences), np.int64)
    if bad := ids[(ids < 0) | (ids >= vocab_size)][:1].tolist():
        raise ValueError(f"token id {bad[0]} is not in [0, {vocab_size}): check the ids")
    rows = np.repeat(np.arange(len(sequences)), [*map(len, sequences)])
    padding = 0, -ids.size % TOKEN_BLOCK if ids.size else TOKEN_BLOCK
    rows = np.pad(rows.astype(np.int32), padding, constant_values=pad_to)
    ids = np.pad(ids.astype(np.int32), padding)
    for start in range(0, ids.size, TOKEN_BLOCK):
        block = slice(start, start + TOKEN_BLOCK)
        yield rows[block], ids[block]


@functools.partial(jax.jit, donate_argnums=0)
def _mark(mask: Array, rows: Array, ids: Array) -> Array:
    return mask.at[rows, ids].set(True, mode="drop")


@functools.partial(jax.jit, donate_argnums=0)
def _count(counts: Array, rows: Array, ids: Array) -> Array:
    return counts.at[rows, ids].add(1, mode="drop")


def count_tokens(counts: TokenCounts, tokens: Array, active: Array) -> TokenCounts:
    """Adds the sampled tokens i32[B] of the active rows (bool[B]) to the output counts."""
    rows = jnp.arange(tokens.shape[0])
    output_counts = counts.output_counts.at[rows, tokens].add(active.astype(jnp.int32))
    return dataclasses.replace(counts, output_counts=output_counts)
