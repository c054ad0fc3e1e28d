"""A small Llama trained by others (karpathy/tinyllamas stories260K), where the data folder has it.

Its contractions (64 and 172) are no multiples of 128, and its keys are hard on a 4-bit cache: in
most heads one channel lies far off zero (mean up to -18, standard deviation 4) and stretches the
range that the other channels share with it.

Wanted is a loss in w4a8kv4 per channel of at most 0.15 nats per token more than float. The recipe
`qoq-per-channel-centered` meets it for every reader of the cache. Rounded to nearest on load,
without calibration, only a prompt that attends to itself unquantised (as QServe computes prefill)
meets it; the tests hold what the others lose.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax import LLM, SamplingParams
from qserve_jax.checkpoint import load_model
from qserve_jax.models.calibration import Calibrator
from qserve_jax.models.llama import config_of, decode_step, prefill
from qserve_jax.quantization.recipes import quantize_with_recipe
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
def story_tokens(shared_data, float32):
    """story_tokens(first, last, windows): that many windows of some of the TinyStories."""
    text = (shared_data / "tinystories" / "tinystoriesV2_train_head_1425K.txt").read_text()
    stories = text.split("<|endoftext|>")

    def story_tokens(first, last, windows) -> list[int]:
        ids = []
        for story in stories[first:last]:
            ids += float32.tokenizer.encode(story.strip())
        return ids[: windows * WINDOW]

    return story_tokens


@pytest.fixture(scope="module")
def tokens(story_tokens) -> list[int]:
    return story_tokens(1000, 1060, 24)


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
def calibrated(float32, w4a8kv4, story_tokens):
    """w4a8kv4 per channel by the recipe, calibrated on 32 windows of other stories."""
    batches = np.array(story_tokens(0, 80, 32), np.int32).reshape(8, 4, WINDOW)
    calibration = Calibrator(float32.model, [jnp.asarray(batch) for batch in batches])
    recipe = "qoq-per-channel-centered"
    params = quantize_with_recipe(float32.config, float32.params, calibration, recipe)
    config = config_of(float32.config, params)
    model = w4a8kv4.model.clone(config=config)
    return dataclasses.replace(w4a8kv4, model=model, params=params, config=config)


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


def test_recipe_costs_at_most_0_15_for_every_reader(exact, float32, calibrated, windows):
    """What is scored in one prefill, or decoded after a prompt, attends="quantized" included."""
    for attends in ("full", "quantized"):
        assert mean_loss(prefill_losses, calibrated, windows, attends) - exact <= WANTED
    assert after_prompt(calibrated, float32, windows) <= WANTED


def after_prompt(m, float32, windows) -> float:
    """Nats per token more than float for the second half of windows, decoded after the first: as
    the engine runs, a prompt, then every token reads those before it from the cache."""
    prompt = WINDOW // 2
    reference = mean_loss(lambda *args: apply_losses(*args)[:, prompt:], float32, windows)
    return mean_loss(decode_losses, m, windows, prompt) - reference


def test_rounding_misses_it_where_prefill_reads_the_4_bit_cache(exact, w4a8kv4, windows, tokens):
    """Held here so that it can only be lowered knowingly. `perplexity` measures the same."""
    quantized = mean_loss(prefill_losses, w4a8kv4, windows, "quantized")
    np.testing.assert_allclose(quantized - exact, 0.53, atol=0.01)
    np.testing.assert_allclose(loss(w4a8kv4, tokens, kv_bits=4), quantized, atol=1e-4)


def test_rounding_misses_it_in_decoding(float32, w4a8kv4, windows):
    """Held like the miss above."""
    np.testing.assert_allclose(after_prompt(w4a8kv4, float32, windows), 0.42, atol=0.01)


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
