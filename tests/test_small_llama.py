"""A small Llama trained by others (karpathy/tinyllamas stories260K), where the data folder has it.

Its contractions (64 and 172) are no multiples of 128, and its keys are hard on a 4-bit cache: in
most heads one channel lies far off zero (mean up to -18, standard deviation 4) and stretches the
range that the other channels share with it.

Wanted was a loss in w4a8kv4 per channel of at most 0.15 nats per token more than float. The tests
hold what comes true for each reader of the cache: a prompt that attends to itself unquantised, as
QServe computes prefill, meets it; what reads the 4-bit cache misses it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax import LLM, SamplingParams
from qserve_jax.checkpoint import load_model
from qserve_jax.models.llama import decode_step, prefill
from qserve_jax.runtime import init_cache
from qserve_jax.runtime.perplexity import perplexity

STORY = (
    ", there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball."
)
WINDOW = 512
PAGES = WINDOW // 64
WANTED = 0.15


@pytest.fixture(scope="module")
def folder(shared_data):
    return shared_data / "stories260k-hf"


@pytest.fixture(scope="module")
def tokens(shared_data, float32) -> list[int]:
    """24 windows of TinyStories."""
    text = (shared_data / "tinystories" / "tinystoriesV2_train_head_1425K.txt").read_text()
    tokenizer = float32.tokenizer
    assert tokenizer is not None
    ids = []
    for story in text.split("<|endoftext|>")[1000:1060]:
        ids += tokenizer.encode(story.strip())
    return ids[: 24 * WINDOW]


@pytest.fixture(scope="module")
def windows(tokens) -> np.ndarray:
    return np.array(tokens, np.int32).reshape(-1, WINDOW)


@pytest.fixture(scope="module")
def float32(folder):
    return load_model(folder, precision="w16a16kv16", dtype="float32")


@pytest.fixture(scope="module")
def w4a8kv4(folder):
    return load_model(folder, precision="w4a8kv4", group_size=-1, dtype="float32")


@pytest.fixture(scope="module")
def exact(float32, tokens) -> float:
    return loss(float32, tokens)


def loss(m, tokens, kv_bits=16) -> float:
    return perplexity(m.model, m.params, tokens, seq_len=WINDOW, kv_bits=kv_bits).loss


def token_losses(logits, targets):
    """-log p of targets i32[B, T] under logits f32[B, T, V]: f32[B, T]."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


@functools.partial(jax.jit, static_argnums=0)
def apply_losses(model, params, windows):
    """f32[B, T-1], without a cache."""
    return token_losses(model.apply({"params": params}, windows)[:, :-1], windows[:, 1:])


def empty_cache(config, rows):
    """A 4-bit cache of whole windows, and its block table."""
    table = jnp.arange(rows * PAGES).reshape(rows, PAGES)
    return init_cache(config, num_pages=rows * PAGES, kv_bits=4), table


@functools.partial(jax.jit, static_argnums=(0, 3))
def prefill_losses(model, params, windows, attends):
    """f32[B, T-1], each window as one prompt into a 4-bit cache."""
    rows, length = windows.shape
    cache, table = empty_cache(model.config, rows)
    lens = jnp.full(rows, length)
    options = {"attends": attends, "cached_pages": 0, "all_logits": True}
    _, logits = prefill(model, params, cache, windows, table, lens, **options)
    return token_losses(logits[:, :-1], windows[:, 1:])


@functools.partial(jax.jit, static_argnums=(0, 3))
def decode_losses(model, params, windows, prompt):
    """f32[B, T-1-prompt]: a prompt of that many tokens, then the others one by one."""
    rows, length = windows.shape
    cache, table = empty_cache(model.config, rows)
    first = (windows[:, :prompt], table, jnp.full(rows, prompt))
    cache, _ = prefill(model, params, cache, *first, cached_pages=0)

    def step(cache, position):
        lens = jnp.full(rows, position + 1)
        return decode_step(model, params, cache, windows[:, position], table, lens)

    _, logits = jax.lax.scan(step, cache, jnp.arange(prompt, length - 1))
    return token_losses(jnp.swapaxes(logits, 0, 1), windows[:, prompt + 1 :])


def mean_loss(losses, m, windows, *options) -> float:
    """Nats per token, a few windows at a time for memory's sake."""
    batches = np.split(windows, 4)
    parts = [losses(m.model, m.params, batch, *options) for batch in batches]
    return float(np.mean(np.concatenate(parts), dtype=np.float64))


def test_tells_the_story_of_its_source(folder):
    llm = LLM(folder, precision="w16a16kv16", dtype=jnp.float32)
    output = llm.generate("Once upon a time", SamplingParams(max_tokens=60))[0]
    assert output.text.startswith(STORY)


def test_w4a8_per_channel_costs_0_12(exact, w4a8kv4, tokens):
    """Weights and activations, as `model.apply` of a quantised tree computes: K and V in float."""
    assert 1.29 <= exact <= 1.40  # what its source reports
    np.testing.assert_allclose(loss(w4a8kv4, tokens) - exact, 0.12, atol=0.01)


def test_prefill_into_a_4_bit_cache_costs_at_most_0_15(exact, w4a8kv4, windows):
    """Met, in QServe's way: a prompt is written to the cache but attends to itself unquantised."""
    assert mean_loss(prefill_losses, w4a8kv4, windows, "full") - exact <= WANTED


def test_prefill_that_reads_the_4_bit_cache_misses_it(exact, w4a8kv4, windows, tokens):
    """Held here so that it can only be lowered knowingly. `perplexity` measures the same."""
    quantized = mean_loss(prefill_losses, w4a8kv4, windows, "quantized")
    np.testing.assert_allclose(quantized - exact, 0.53, atol=0.01)
    np.testing.assert_allclose(loss(w4a8kv4, tokens, kv_bits=4), quantized, atol=1e-4)


def test_decoding_after_a_prompt_misses_it(float32, w4a8kv4, windows):
    """As the engine runs: a prompt of half a window, then every token reads those before it from
    the cache. Against float over the same tokens, and held like the miss above."""
    prompt = WINDOW // 2
    reference = mean_loss(lambda *args: apply_losses(*args)[:, prompt:], float32, windows)
    decoded = mean_loss(decode_losses, w4a8kv4, windows, prompt)
    np.testing.assert_allclose(decoded - reference, 0.42, atol=0.01)


def test_kv4_alone_costs_0_34_and_kv8_nothing(exact, float32, tokens):
    """Round-to-nearest KV4 on float weights: because of the keys, see the top of this file."""
    np.testing.assert_allclose(loss(float32, tokens, kv_bits=4) - exact, 0.34, atol=0.01)
    assert loss(float32, tokens, kv_bits=8) - exact <= 0.005


def test_group_128_falls_to_per_channel_with_one_warning(folder):
    with pytest.warns(UserWarning) as warned:
        load_model(folder, group_size=128)
    (warning,) = warned
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert f"layers/{name}/kernel" in str(warning.message)
    with pytest.raises(ValueError, match="K=172 is not a multiple of group_size=128"):
        load_model(folder, group_size=128, strict=True)
