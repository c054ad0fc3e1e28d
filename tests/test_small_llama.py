"""A small Llama trained by others (karpathy/tinyllamas stories260K), where the data folder has it.

Its contractions (64 and 172) are no multiples of 128, and its keys are hard on a 4-bit cache: one
channel of a head is near -18 for every token while the others spread over 4.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax import LLM, SamplingParams
from qserve_jax.checkpoint import load_model
from qserve_jax.runtime.perplexity import perplexity

STORY = (
    ", there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball."
)
WINDOW = 512


@pytest.fixture(scope="module")
def folder(shared_data):
    return shared_data / "stories260k-hf"


@pytest.fixture(scope="module")
def tokens(shared_data, folder) -> list[int]:
    """24 windows of TinyStories."""
    text = (shared_data / "tinystories" / "tinystoriesV2_train_head_1425K.txt").read_text()
    tokenizer = load_model(folder, precision="w16a16kv16").tokenizer
    assert tokenizer is not None
    ids = []
    for story in text.split("<|endoftext|>")[1000:1060]:
        ids += tokenizer.encode(story.strip())
    return ids[: 24 * WINDOW]


def loss(folder, tokens, precision, kv_bits) -> float:
    m = load_model(folder, precision=precision, group_size=-1, dtype="float32")
    return perplexity(m.model, m.params, tokens, seq_len=WINDOW, kv_bits=kv_bits).loss


def test_tells_the_story_of_its_source(folder):
    llm = LLM(folder, precision="w16a16kv16", dtype=jnp.float32)
    output = llm.generate("Once upon a time", SamplingParams(max_tokens=60))[0]
    assert output.text.startswith(STORY)


def test_loss_of_w4a8_per_channel_is_at_most_0_15_more(folder, tokens):
    """Weights and activations, as `model.apply` of a quantised tree computes: K and V in float."""
    exact = loss(folder, tokens, "w16a16kv16", 16)
    assert 1.29 <= exact <= 1.40  # what its source reports
    assert loss(folder, tokens, "w4a8kv4", 16) - exact <= 0.15


def test_loss_of_a_4_bit_cache_is_more_and_is_what_the_readme_says(folder, tokens):
    """A miss, held here so that it can only be lowered knowingly: round-to-nearest KV4 costs this
    model more than its 4-bit weights do, because of its keys. KV8 costs nothing."""
    exact = loss(folder, tokens, "w16a16kv16", 16)
    change = {
        bits: loss(folder, tokens, precision, int(bits)) - exact
        for precision, bits in (("w16a16kv16", "4"), ("w16a16kv16", "8"))
    }
    np.testing.assert_allclose(change["4"], 0.33, atol=0.02)
    assert change["8"] <= 0.005
    np.testing.assert_allclose(loss(folder, tokens, "w4a8kv4", 4) - exact, 0.53, atol=0.03)


def test_group_128_falls_to_per_channel_with_one_warning(folder):
    with pytest.warns(UserWarning) as warned:
        load_model(folder, group_size=128)
    (warning,) = warned
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert f"layers/{name}/kernel" in str(warning.message)
    with pytest.raises(ValueError, match="K=172 is not a multiple of group_size=128"):
        load_model(folder, group_size=128, strict=True)
