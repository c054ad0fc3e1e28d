"""The head in 8 bits: integers as numpy has them, a tied embedding left alone, little lost."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import qserve_jax
from qserve_jax import LLM, SamplingParams, load_model
from qserve_jax.models.llama import lm_logits
from qserve_jax.quantization.qtensor import W8PerChannel, nbytes
from qserve_jax.runtime.int8_head import with_int8_head

DEMO = Path(qserve_jax.__file__).parent / "assets" / "demo"


@pytest.fixture(scope="module")
def loaded():
    return load_model(DEMO)


def int8(x):
    """Rounded to nearest over its absolute maximum, and the scale."""
    scale = np.abs(x).max(axis=-1) / np.float32(127)
    codes = np.round(x * (np.float32(1) / scale)[..., None])
    return np.clip(codes, -127, 127).astype(np.int64), scale


def test_logits_are_the_integer_product(loaded, rng):
    model = with_int8_head(loaded)
    x = rng.standard_normal((3, loaded.config.hidden_size)).astype(np.float32)
    table = np.asarray(loaded.params["embed"]["embedding"], np.float32)
    (x8, x_scale), (w8, w_scale) = int8(x), int8(table)
    expected = (x8 @ w8.T) * w_scale * x_scale[:, None]
    logits = lm_logits(model.config, model.params, jnp.asarray(x))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    exact = x @ table.T
    assert 0 < np.linalg.norm(logits - exact) / np.linalg.norm(exact) < 0.02


def test_a_tied_embedding_stays_and_an_own_head_is_replaced(loaded):
    model = with_int8_head(loaded)
    assert loaded.config.tie_embeddings and not model.config.tie_embeddings
    assert model.params["embed"] is loaded.params["embed"] and "lm_head" not in loaded.params
    untied = dataclasses.replace(
        loaded,
        config=model.config,
        params={**loaded.params, "lm_head": {"embedding": -loaded.params["embed"]["embedding"]}},
    )
    head = with_int8_head(untied).params["lm_head"]["embedding"]
    assert isinstance(head, W8PerChannel)
    np.testing.assert_array_equal(head.codes, -model.params["lm_head"]["embedding"].codes)
    assert nbytes(head) == 2048 * (256 + 4)


def test_an_llm_with_it_still_tells_the_story(loaded):
    llm = LLM(loaded, max_model_len=128, num_pages=8, lm_head_bits=8)
    output = llm.generate("Once upon a time", SamplingParams(max_tokens=40))[0]
    assert output.text.startswith(", there was a little girl named Lily. She loved to play")
    with pytest.raises(ValueError, match="^lm_head_bits=4 is not supported: use 8 or 16$"):
        LLM(loaded, lm_head_bits=4)
