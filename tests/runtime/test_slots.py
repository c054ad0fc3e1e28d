"""What lies on the device between calls: rows get their own, and leave the others' alone."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from qserve_jax import SamplingParams
from qserve_jax.runtime import DecodeState, make_sampling_state, make_token_counts
from qserve_jax.runtime.decode import advance
from qserve_jax.runtime.sampling import SamplingFeatures, join_features
from qserve_jax.runtime.slots import make_live, put, take


def state(tokens, counted=False):
    b = len(tokens)
    sampling, _ = make_sampling_state([SamplingParams()] * b, [0] * b, pad_to=b)
    counts = None
    if counted:
        ids = [[t] for t in tokens]
        counts = make_token_counts(ids, ids, vocab_size=9, pad_to=b)
    return DecodeState(
        tokens=jnp.asarray(tokens),
        context_lens=10 + jnp.asarray(tokens),
        remaining=20 + jnp.asarray(tokens),
        block_table=jnp.zeros((b, 2), jnp.int32),
        rope_lens=jnp.zeros(b, jnp.int32),
        stop_ids=jnp.asarray([[7, -1]] * b),
        sampling=sampling,
        counts=counts,
    )


def test_rows_come_back_from_their_slots_in_any_order():
    live = put(make_live(4, 9), state([1, 2, 3], counted=True), jnp.asarray([2, 0, 4]))
    np.testing.assert_array_equal(live.tokens, [2, 0, 1, 0, 3])
    rows = take(live, state([0, 0, 0]), jnp.asarray([0, 4, 2]))
    np.testing.assert_array_equal(rows.tokens, [2, 3, 1])
    np.testing.assert_array_equal(rows.context_lens, [12, 13, 11])
    np.testing.assert_array_equal(rows.remaining, [22, 23, 21])
    assert rows.counts is not None
    np.testing.assert_array_equal(np.argmax(rows.counts.prompt_mask, axis=1), [2, 3, 1])
    np.testing.assert_array_equal(np.argmax(rows.counts.output_counts, axis=1), [2, 3, 1])
    live = put(live, state([8], counted=True), jnp.asarray([3]))
    np.testing.assert_array_equal(live.tokens, [2, 0, 1, 8, 3])


def test_a_row_that_makes_no_token_cannot_end():
    """Padding of stop ids is -1, and so is the token of a row that made none."""
    before = dataclasses.replace(state([5, 5, 5]), remaining=jnp.asarray([4, 4, 4]))
    active = jnp.asarray([True, False, True])
    after = advance(before, jnp.asarray([7, -1, 6]), active, appended=1)
    np.testing.assert_array_equal(after.remaining, [0, 4, 3])
    np.testing.assert_array_equal(after.tokens, [7, 5, 6])
    np.testing.assert_array_equal(after.context_lens, [16, 15, 16])


def test_features_join():
    a = SamplingFeatures(greedy=True, bias=True, logprobs=2)
    b = SamplingFeatures(greedy=False, filters=True, logprobs=None)
    both = SamplingFeatures(greedy=False, filters=True, bias=True, logprobs=2)
    assert join_features(a, b) == join_features(b, a) == both
    assert join_features(a, SamplingFeatures()) == a
