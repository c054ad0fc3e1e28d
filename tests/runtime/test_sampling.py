"""Every processor against an independent numpy implementation; distribution and reproducibility."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from qserve_jax.runtime import sampling
from qserve_jax.runtime.sampling import SamplingFeatures, make_sampling_state, make_token_counts
from qserve_jax.runtime.sampling_params import SamplingParams

VOCAB = 37
sample = jax.jit(sampling.sample, static_argnames="features")


def random_logits(rows, seed=0):
    return np.random.default_rng(seed).normal(0, 3, (rows, VOCAB)).astype(np.float32)


def sampled(**kwargs):
    return SamplingParams(**{"temperature": 1.0, **kwargs})


def state_of(*params, pad_to=None, seeds=None):
    seeds = [p.seed or 0 for p in params] if seeds is None else seeds
    return make_sampling_state(params, seeds, pad_to=pad_to or len(params))


# ---- independent numpy implementation, one row at a time, token by token


def np_penalties(logits, params, prompt, output):
    result = logits.copy()
    for token in range(VOCAB):
        value, count = result[token], np.float32(output.count(token))
        if token in prompt or count:
            r = np.float32(params.repetition_penalty)
            value = value * (1 / r if value > 0 else r)
        value = value - np.float32(params.frequency_penalty) * count
        result[token] = value - np.float32(params.presence_penalty) * np.float32(count > 0)
    return result


def np_kept_tokens(scores, params):
    """Token ids that min-p, top-k and top-p keep, in float64."""
    ranked = sorted(range(VOCAB), key=lambda token: (-scores[token], token))
    weights = np.exp(scores.astype(np.float64) - scores.max())
    ranked = [token for token in ranked if weights[token] >= params.min_p * weights.max()]
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    kept, mass, total = [], 0.0, weights[ranked].sum()
    for token in ranked:
        kept.append(token)
        mass += weights[token]
        if params.top_p < 1 and mass >= params.top_p * total:
            break
    return set(kept)


# ---- processors


def test_bias_is_added_exactly():
    logits = random_logits(3)
    biases = [{0: 2.5, 36: -100.0, 5: 1.0}, None, {36: 7.0}]
    state, features = state_of(*[SamplingParams(logit_bias=bias) for bias in biases])
    assert features.bias and state.bias_ids.shape == (3, 4)  # a power of two
    expected = logits.copy()
    for row, bias in enumerate(biases):
        for token, value in (bias or {}).items():
            expected[row, token] += np.float32(value)
    values = jnp.where(state.bias_ids < 0, 50, state.bias_values)  # must not be used
    state = dataclasses.replace(state, bias_values=values)
    np.testing.assert_array_equal(sampling.apply_bias(jnp.asarray(logits), state), expected)


def test_penalties_are_exact_and_look_at_the_right_tokens():
    logits = random_logits(4)
    params = [
        SamplingParams(repetition_penalty=1.3),
        SamplingParams(presence_penalty=0.7),
        SamplingParams(frequency_penalty=-0.4),
        SamplingParams(repetition_penalty=0.8, presence_penalty=1.5, frequency_penalty=0.3),
    ]
    prompts = [[1, 2, 3], [4, 4], [5], [6, 7, 7]]
    outputs = [[3, 9, 9], [8, 8, 4], [10, 11, 10, 10], [7, 12, 12, 12]]
    counts = make_token_counts(prompts, outputs, vocab_size=VOCAB, pad_to=4)
    state, features = state_of(*params)
    assert features.penalties
    actual = sampling.apply_penalties(jnp.asarray(logits), state, counts)
    rows = zip(logits, params, prompts, outputs, strict=True)
    np.testing.assert_array_equal(actual, [np_penalties(*row) for row in rows])


def test_count_tokens_equals_counting_anew():
    counts = make_token_counts([[1], [2]], [[], [5]], vocab_size=VOCAB, pad_to=3)
    counts = sampling.count_tokens(counts, jnp.array([4, 5, 9]), jnp.array([True, True, False]))
    anew = make_token_counts([[1], [2]], [[4], [5, 5]], vocab_size=VOCAB, pad_to=3)
    jax.tree.map(np.testing.assert_array_equal, counts, anew)


def test_tokens_of_many_blocks_are_all_counted_and_compile_nothing(rng):
    shapes = [(0, 3), (1, 0), (sampling.TOKEN_BLOCK + 1, 2), (5, 2 * sampling.TOKEN_BLOCK)]
    make_token_counts([[1]], [[1]], vocab_size=VOCAB, pad_to=5)
    jitted: list[Any] = [sampling._mark, sampling._count]
    programs = [function._cache_size() for function in jitted]
    for lengths in (shapes, shapes[::-1], shapes[:1]):
        prompts, outputs = ([rng.integers(0, VOCAB, pair[i]) for pair in lengths] for i in (0, 1))
        counts = make_token_counts(prompts, outputs, vocab_size=VOCAB, pad_to=5)
        bins = [[np.bincount(x, minlength=VOCAB) for x in side] for side in (prompts, outputs)]
        padding = [[0] * VOCAB] * (5 - len(lengths))
        np.testing.assert_array_equal(counts.prompt_mask, np.array([*bins[0], *padding]) > 0)
        np.testing.assert_array_equal(counts.output_counts, [*bins[1], *padding])
    assert [function._cache_size() for function in jitted] == programs


def test_temperature_is_exact_and_survives_tiny_values():
    logits = random_logits(4)
    temperature = np.array([0.3, 1.7, 1e-40, 0.0], np.float32)
    actual = sampling.apply_temperature(jnp.asarray(logits), jnp.asarray(temperature))
    shifted = logits - logits.max(axis=-1, keepdims=True)
    np.testing.assert_array_equal(actual[:2], shifted[:2] * (1 / temperature[:2, None]))
    assert np.asarray(actual[2]).argmax() == logits[2].argmax()
    assert not np.isnan(actual).any() and np.asarray(actual).max() == 0


FILTERS = [
    dict(),
    dict(top_k=1),
    dict(top_k=5),
    dict(top_k=VOCAB + 100),
    dict(top_p=0.9),
    dict(top_p=0.5),
    dict(top_p=1e-30),
    dict(min_p=0.05),
    dict(min_p=1.0),
    dict(top_k=8, top_p=0.8),
    dict(top_k=20, top_p=0.95, min_p=0.02),
    dict(top_k=3, top_p=0.99, min_p=0.001),
]


def kept_tokens(scores, params):
    state, _ = state_of(*params)
    filtered = np.asarray(sampling.apply_filters(jnp.asarray(scores), state))
    kept = filtered > -np.inf
    np.testing.assert_array_equal(filtered[kept], scores[kept])
    return [set(np.flatnonzero(row)) for row in kept]


def test_filters_keep_the_same_tokens_as_numpy():
    params = [sampled(**kwargs) for kwargs in FILTERS]
    for seed in range(5):
        scores = random_logits(len(params), seed)
        expected = [np_kept_tokens(*row) for row in zip(scores, params, strict=True)]
        assert kept_tokens(scores, params) == expected


def test_ties_go_to_the_lower_id_and_top_p_includes_the_token_that_crosses():
    scores = np.full((4, VOCAB), -np.inf, np.float32)
    scores[:, [3, 8, 20, 30]] = 0.0  # probability 1/4 each, exactly
    params = [
        sampled(**kwargs)
        for kwargs in (dict(top_k=2), dict(top_p=0.5), dict(top_p=0.51), dict(top_k=3, top_p=0.5))
    ]
    # The last: of three survivors at 1/3 each, two reach a half.
    assert kept_tokens(scores, params) == [{3, 8}, {3, 8}, {3, 8, 20}, {3, 8}]


def test_top_p_of_one_never_cuts_a_tail_that_rounding_hides():
    scores = np.full((1, VOCAB), -40.0, np.float32)  # e**-40 vanishes beside 1 in float32
    scores[0, 4] = 0
    params = [SamplingParams(temperature=1.0)]
    assert kept_tokens(scores, params) == [set(range(VOCAB))]


# ---- sample


def test_pipeline_order():
    """Bias, then penalties, then temperature, then filters; log-probabilities of the raw logits."""
    logits = random_logits(1)
    params = SamplingParams(
        temperature=0.6, top_k=7, top_p=0.9, min_p=0.01, logit_bias={2: 3.0, 30: -4.0}, seed=11,
        repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.25, logprobs=5,
    )  # fmt: skip
    prompt, output = [1, 2, 30], [2, 2, 17]
    counts = make_token_counts([prompt], [output], vocab_size=VOCAB, pad_to=1)
    state, features = state_of(params)

    row = logits[0].copy()
    row[[2, 30]] += np.array([3.0, -4.0], np.float32)
    row = np_penalties(row, params, prompt, output)
    row = (row - row.max()) * (1 / np.float32(0.6))
    banned = list(set(range(VOCAB)) - np_kept_tokens(row, params))
    row[banned] = -np.inf
    raw = logits[0].astype(np.float64)
    raw -= np.log(np.exp(raw).sum())
    top = sorted(range(VOCAB), key=lambda token: -raw[token])[:5]

    for position in range(20):
        noise = sampling.gumbel_noise(state.seed, jnp.array([position]), VOCAB)[0]
        result = sample(logits, state, features, jnp.array([position]), counts)
        token = int(result.tokens[0])
        assert token == np.argmax(row + np.asarray(noise))
        np.testing.assert_allclose(result.logprobs, raw[[token]], rtol=1e-6)
        np.testing.assert_array_equal(result.top_tokens, [top])
        np.testing.assert_allclose(result.top_logprobs, raw[None, top], rtol=1e-6)


def test_greedy_takes_the_lowest_id_on_ties_and_counts_the_bias():
    logits = np.zeros((3, VOCAB), np.float32)
    logits[0, [9, 5, 30]] = 2.0
    params = [SamplingParams(), SamplingParams(), SamplingParams(logit_bias={8: 0.5})]
    state, features = state_of(*params)
    assert features == SamplingFeatures(bias=True)
    result = sample(logits, state, features, jnp.zeros(3, jnp.int32))
    assert result.tokens.tolist() == [5, 0, 8] and result.tokens.dtype == jnp.int32
    assert result.finite.tolist() == [True] * 3 and result[2:] == (None, None, None)


def test_greedy_rows_stay_greedy_in_a_mixed_batch():
    logits = random_logits(4)
    logits[1, [6, 22]] = 20.0  # a tie, which a draw at any temperature would break at random
    hot = SamplingParams(temperature=50.0)
    params = [hot, SamplingParams(top_k=3), SamplingParams(temperature=50.0, top_p=1e-20), hot]
    state, features = state_of(*params, seeds=[0, 1, 2, 3])
    assert features == SamplingFeatures(greedy=False, filters=True)
    tokens = np.array(
        [sample(logits, state, features, jnp.full(4, t, jnp.int32)).tokens for t in range(30)]
    )
    assert (tokens[:, 1:3] == logits[1:3].argmax(-1)).all()  # greedy; top_p of next to nothing
    assert len(set(tokens[:, 0])) > 5 and (tokens[:, 0] != tokens[:, 3]).any()


def test_draw_depends_on_seed_and_position_only():
    """Bit for bit the same in any row, batch size and company, with features off or on."""
    logits = random_logits(8)
    params = SamplingParams(temperature=1.3, seed=2**40 + 5)
    state, features = state_of(params)
    alone = [
        int(sample(logits[:1], state, features, jnp.array([position])).tokens[0])
        for position in range(24)
    ]
    company = SamplingParams(
        temperature=0.7, seed=3, top_k=4, top_p=0.8, presence_penalty=1.0, logit_bias={1: 2.0}
    )
    counts = make_token_counts([[0, 1, 2]] * 8, [[3, 4]] * 8, vocab_size=VOCAB, pad_to=8)
    for row in (0, 3, 7):
        rows = [company] * 8
        rows[row] = params
        state, features = state_of(*rows)
        mixed = logits.copy()
        mixed[row] = logits[0]
        positions = np.arange(8) * 100
        for position, expected in enumerate(alone):
            positions[row] = position
            tokens = sample(mixed, state, features, jnp.asarray(positions), counts).tokens
            assert int(tokens[row]) == expected
    assert len(set(alone)) > 5  # positions differ
    for seed in (2**40 + 6, 2**41 + 5, 5):  # either word of the seed counts
        state, features = state_of(dataclasses.replace(params, seed=seed))
        other = [
            int(sample(logits[:1], state, features, jnp.array([position])).tokens[0])
            for position in range(24)
        ]
        assert other != alone


@pytest.mark.parametrize(
    "kwargs",
    [dict(), dict(temperature=0.5, top_k=6), dict(temperature=1.5, top_p=0.7)],
)
def test_draws_follow_the_distribution(kwargs):
    draws = 8192
    params = sampled(**kwargs)
    logits = random_logits(1)[0] / 2
    state, features = state_of(params, seeds=[1])
    batch = jax.tree.map(lambda x: jnp.broadcast_to(x, (draws, *x.shape[1:])), state)
    tokens = sample(jnp.tile(logits, (draws, 1)), batch, features, jnp.arange(draws)).tokens

    scores = logits.astype(np.float64) / params.temperature
    kept = sorted(np_kept_tokens(scores, params))
    expected = np.exp(scores[kept] - scores[kept].max())
    expected *= draws / expected.sum()
    counts = np.bincount(tokens, minlength=VOCAB)
    assert counts.sum() == counts[kept].sum()  # nothing else was drawn
    common = expected >= 5  # chi-square needs that many; the rest share one bin
    bins = lambda x: [*x[common], *([x[~common].sum()] if (~common).any() else [])]  # noqa: E731
    assert stats.chisquare(bins(counts[kept]), bins(expected)).pvalue > 0.01


# ---- make_sampling_state


def test_state_rows_padding_and_features():
    params = [
        SamplingParams(temperature=0.5, top_k=2**40, seed=2**32 + 7),
        SamplingParams(top_p=0.5, logprobs=3),
    ]
    state, features = make_sampling_state(params, [2**32 + 7, 0], pad_to=4)
    assert features == SamplingFeatures(greedy=False, filters=True, logprobs=3)
    assert state.seed.tolist() == [[1, 7], [0, 0], [0, 0], [0, 0]]
    assert state.seed.dtype == jnp.uint32 and state.top_k.tolist() == [2**31 - 1, 0, 0, 0]
    assert state.temperature.tolist() == [0.5, 0, 0, 0] and state.top_p.tolist() == [1, 0.5, 1, 1]
    assert state.bias_ids.shape == (4, 0)
    # Filters of greedy rows change nothing, so they are not compiled.
    assert sampling.sampling_features(params[1:]) == SamplingFeatures(logprobs=3)


def test_misuse_is_refused():
    params = [SamplingParams()]
    with pytest.raises(ValueError, match="1 params but 2 seeds"):
        make_sampling_state(params, [0, 1], pad_to=4)
    with pytest.raises(ValueError, match="1 params exceed pad_to=0"):
        make_sampling_state(params, [0], pad_to=0)
    with pytest.raises(ValueError, match="seed -1 is not in"):
        make_sampling_state(params, [-1], pad_to=1)
    with pytest.raises(ValueError, match="token id 37 is not in"):
        make_token_counts([[37]], [[]], vocab_size=VOCAB, pad_to=1)
    with pytest.raises(ValueError, match="1 prompts, 2 outputs"):
        make_token_counts([[1]], [[], []], vocab_size=VOCAB, pad_to=2)
    state, _ = state_of(*params)
    with pytest.raises(ValueError, match="needs counts"):
        sampling.sample(
            jnp.zeros((1, VOCAB)), state, SamplingFeatures(penalties=True), jnp.zeros(1, jnp.int32)
        )
