"""The decode loop: the same as steps by hand, stops where it must, updates the cache in place."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.models import CausalLM, ModelConfig, decode_step, init_params, prefill
from qserve_jax.pallas_kernels import prepare_for_backend
from qserve_jax.quantization import QuantConfig, quantize_params
from qserve_jax.quantization.qtensor import KVCache
from qserve_jax.runtime.decode import DecodeState, advance, decode_loop, prefill_and_sample
from qserve_jax.runtime.kv_cache import init_cache
from qserve_jax.runtime.sampling import make_sampling_state, make_token_counts, sample
from qserve_jax.runtime.sampling_params import SamplingParams

CONFIG = ModelConfig("llama", 64, 64, 64, 2, 4, 2, 16, 128)
MODEL = CausalLM(CONFIG)
PAGES, S_P, MAX_STEPS = 512, 8, 8  # many more pages than used, so that a copy would show
LENS = np.array([5, 0, 9])
TABLE = np.array([[7, 300, 5], [-1, -1, -1], [100, 8, 3]], np.int32)
# Drawn with a seed, with penalties and log-probabilities, so that keys and counts matter.
ROWS = [
    SamplingParams(temperature=1.0, presence_penalty=0.5, logprobs=2, seed=1),
    SamplingParams(),
    SamplingParams(temperature=0.7, repetition_penalty=1.3, logprobs=2, seed=3),
]
PROMPTS = np.random.default_rng(2).integers(0, 64, (3, 16)).astype(np.int32)
SAMPLING, FEATURES = make_sampling_state(ROWS, [1, 2, 3], pad_to=3)


def pipeline(params, cache, state, num_steps, yield_idle):
    """A caller's own function around the loop."""
    cache, state, out = decode_loop(
        MODEL,
        params,
        cache,
        state,
        num_steps,
        yield_idle,
        max_steps=MAX_STEPS,
        features=FEATURES,
    )
    return cache, state, out, (out.tokens >= 0).sum(axis=1)


@pytest.fixture(scope="module")
def params():
    params = jax.tree.map(lambda x: 8 * x, init_params(jax.random.key(0), CONFIG))
    return prepare_for_backend(quantize_params(params, QuantConfig(group_size=-1)))


def empty_cache():
    return init_cache(CONFIG, num_pages=PAGES, page_size=S_P, kv_bits=4)


def start_state(remaining=(20, 0, 20)):
    """Before the first token: row 1 is idle, the others have prompts of LENS tokens."""
    prompts = [row[:length].tolist() for row, length in zip(PROMPTS, LENS, strict=True)]
    return DecodeState(
        tokens=jnp.zeros(3, jnp.int32),
        context_lens=jnp.asarray(LENS, jnp.int32),
        remaining=jnp.asarray(remaining, jnp.int32),
        block_table=jnp.asarray(TABLE),
        rope_lens=jnp.asarray(LENS + 20, jnp.int32),
        stop_ids=jnp.full((3, 2), -1, jnp.int32),
        sampling=SAMPLING,
        counts=make_token_counts(prompts, [[]] * 3, vocab_size=64, pad_to=3),
    )


@pytest.fixture(scope="module")
def prefilled(params):
    """(pages after the prompts, as numpy; the state with the first tokens)."""
    run = jax.jit(prefill_and_sample, static_argnums=0, static_argnames="features")
    state = start_state()
    prompts = jnp.asarray(PROMPTS)
    cache, state, first = run(MODEL, params, empty_cache(), prompts, state, features=FEATURES)
    return np.asarray(cache.pages), state, first


@pytest.fixture(scope="module")
def loop(params):
    """The compiled pipeline, its cache donated."""
    arguments = (params, empty_cache(), start_state(), jnp.int32(0), jnp.int32(9))
    return jax.jit(pipeline, donate_argnums=1).lower(*arguments).compile()


@pytest.fixture
def run(loop, params, prefilled):
    """run(num_steps=8, yield_idle=9, cache=None, **changes of the state)."""
    pages, first_state, _ = prefilled

    def run(num_steps=MAX_STEPS, yield_idle=9, cache=None, state=first_state, **changes):
        cache = KVCache(jnp.array(pages), 4, 16) if cache is None else cache
        state = dataclasses.replace(
            state, **{k: jnp.asarray(v, jnp.int32) for k, v in changes.items()}
        )
        return loop(params, cache, state, jnp.int32(num_steps), jnp.int32(yield_idle))

    return run


def test_prefill_and_sample_is_both(params, prefilled):
    pages, state, first = prefilled
    cache, logits = jax.jit(prefill, static_argnums=0)(
        MODEL,
        params,
        empty_cache(),
        jnp.asarray(PROMPTS),
        jnp.asarray(TABLE),
        jnp.asarray(LENS, jnp.int32),
    )
    before = start_state()
    out = sample(logits, SAMPLING, FEATURES, before.context_lens, before.counts)
    np.testing.assert_array_equal(first.tokens[::2], out.tokens[::2])
    for actual, expected in (
        (first.logprobs, out.logprobs),
        (first.top_logprobs, out.top_logprobs),
    ):
        np.testing.assert_allclose(np.asarray(actual)[::2], np.asarray(expected)[::2], rtol=1e-5)
    np.testing.assert_array_equal(state.context_lens, LENS)
    np.testing.assert_array_equal(state.tokens[::2], first.tokens[::2])
    np.testing.assert_array_equal(state.remaining, [19, 0, 19])
    assert pages.any()
    assert (pages != np.asarray(cache.pages)).mean() < 1e-4  # other programs, same codes


def test_a_first_token_can_end_a_row(prefilled):
    _, _, first = prefilled
    for change in (
        {"stop_ids": jnp.asarray([[-1, first.tokens[0]], [-1, -1], [-1, -1]])},
        {"remaining": jnp.asarray([1, 0, 20])},
    ):
        before = dataclasses.replace(start_state(), **change)
        after = advance(before, first.tokens, before.remaining > 0, appended=0)
        np.testing.assert_array_equal(after.remaining, [0, 0, 19])


def step_by_hand(params, cache, state):
    active = state.remaining > 0
    lens = jnp.where(active, state.context_lens + 1, 0)
    cache, logits = decode_step(
        MODEL, params, cache, state.tokens, state.block_table, lens, rope_lens=state.rope_lens
    )
    out = sample(logits, state.sampling, FEATURES, lens, state.counts)
    return cache, advance(state, out.tokens, active, appended=1), out


def test_loop_is_steps_by_hand(run, params, prefilled):
    pages, state, _ = prefilled
    by_hand = jax.jit(step_by_hand)
    cache, outs = KVCache(jnp.array(pages), 4, 16), []
    for _ in range(MAX_STEPS):
        cache, state, out = by_hand(params, cache, state)
        outs.append(out)
    loop_cache, loop_state, out, made = run()
    np.testing.assert_array_equal(made, [8, 0, 8])
    np.testing.assert_array_equal(out.tokens[1], np.full(8, -1))
    tokens = np.stack([o.tokens for o in outs], axis=1)
    assert len(np.unique(tokens[::2])) > 6
    np.testing.assert_array_equal(out.tokens[::2], tokens[::2])
    np.testing.assert_array_equal(
        out.top_tokens[::2], np.stack([o.top_tokens for o in outs], axis=1)[::2]
    )
    for name in ("logprobs", "top_logprobs"):
        expected = np.stack([getattr(o, name) for o in outs], axis=1)
        np.testing.assert_allclose(getattr(out, name)[::2], expected[::2], rtol=1e-4, atol=1e-5)
    for name in ("tokens", "context_lens", "remaining"):
        np.testing.assert_array_equal(getattr(loop_state, name), getattr(state, name))
    np.testing.assert_array_equal(loop_state.counts.output_counts, state.counts.output_counts)
    np.testing.assert_array_equal(loop_state.counts.output_counts.sum(axis=1), [9, 0, 9])
    assert (np.asarray(loop_cache.pages) != np.asarray(cache.pages)).mean() < 1e-4


@pytest.fixture
def free_run(run):
    """The tokens [3, 8] that nothing stops."""
    return np.asarray(run()[2].tokens)


def test_num_steps(run, free_run):
    for num_steps, steps in ((0, 0), (3, 3), (100, MAX_STEPS)):
        _, state, out, made = run(num_steps)
        np.testing.assert_array_equal(made, [steps, 0, steps])
        np.testing.assert_array_equal(out.tokens[:, :steps], free_run[:, :steps])
        assert (out.tokens[:, steps:] == -1).all()
        np.testing.assert_array_equal(state.remaining, [19 - steps, 0, 19 - steps])


def test_remaining(run, free_run):
    """A row that has made its last token writes and says nothing more; the other goes on."""
    _, state, out, made = run(remaining=[3, 0, 5])
    np.testing.assert_array_equal(made, [3, 0, 5])
    np.testing.assert_array_equal(state.remaining, 0)
    np.testing.assert_array_equal(state.context_lens, LENS + [3, 0, 5])
    np.testing.assert_array_equal(out.tokens[0], [*free_run[0, :3], *[-1] * 5])
    np.testing.assert_array_equal(out.tokens[2], [*free_run[2, :5], *[-1] * 3])


def stop_after(tokens, least):
    """A token, and after how many steps of at least `least` it first appears."""
    at = next(i for i in range(least - 1, MAX_STEPS) if tokens[i] not in tokens[:i])
    return tokens[at], at + 1


def test_stop_ids(run, free_run):
    stop, steps = stop_after(free_run[2], 3)
    _, state, out, made = run(stop_ids=[[-1, -1], [-1, -1], [-1, stop]])
    np.testing.assert_array_equal(made, [8, 0, steps])
    assert out.tokens[2, steps - 1] == stop and state.remaining[2] == 0
    np.testing.assert_array_equal(out.tokens[0], free_run[0])
    np.testing.assert_array_equal(out.tokens[2, :steps], free_run[2, :steps])


def test_yield_and_going_on(run, free_run):
    stop, steps = stop_after(free_run[2], 2)
    stop_ids = [[-1, -1], [-1, -1], [stop, -1]]
    cache, state, out, made = run(yield_idle=2, stop_ids=stop_ids)  # row 1 is idle already
    np.testing.assert_array_equal(made, [steps, 0, steps])
    np.testing.assert_array_equal(state.remaining > 0, [True, False, False])
    _, state, rest, made = run(MAX_STEPS - steps, cache=cache, state=state)
    np.testing.assert_array_equal(made, [MAX_STEPS - steps, 0, 0])
    together = [*out.tokens[0, :steps], *rest.tokens[0, : MAX_STEPS - steps]]
    np.testing.assert_array_equal(together, free_run[0])


@pytest.mark.parametrize("idle, steps", [(0, 1), (1, 3), (2, 4), (3, 6), (9, 6)])
def test_yields_when_so_many_rows_are_idle(run, idle, steps):
    *_, made = run(yield_idle=idle, remaining=[3, 4, 6])
    np.testing.assert_array_equal(made, np.minimum([3, 4, 6], steps))


def test_a_step_is_made_where_enough_rows_are_idle(run):
    *_, made = run(yield_idle=2, remaining=[0, 0, 6])
    np.testing.assert_array_equal(made, [0, 0, 1])


def test_idle_rows_leave_the_cache_alone(run, prefilled):
    pages, _, _ = prefilled
    cache, state, out, made = run(remaining=[0, 0, 0])
    np.testing.assert_array_equal(cache.pages, pages)
    assert (out.tokens == -1).all() and not made.any()
    # Row 0 is idle and names pages; only the slots of row 2's new tokens change.
    cache, *_ = run(2, remaining=[0, 0, 9])
    changed = np.flatnonzero((np.asarray(cache.pages) != pages).any(axis=(0, 2, 3)))
    np.testing.assert_array_equal(changed, [8])  # positions 9 and 10 lie in its second page


def test_the_cache_is_updated_in_place(loop, run, prefilled):
    pages = jnp.array(prefilled[0])
    before, size = pages.unsafe_buffer_pointer(), pages.nbytes
    after = run(cache=KVCache(pages, 4, 16))[0]
    assert after.pages.unsafe_buffer_pointer() == before and pages.is_deleted()
    memory = loop.memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 2
    dims = ",".join(map(str, pages.shape))
    made_by = set(re.findall(rf"= \w+\[{dims}\]\S* ([\w-]+)\(", loop.as_text()))
    assert made_by <= {"parameter", "get-tuple-element", "scatter", "fusion"}, made_by
    assert made_by & {"scatter", "fusion"}
