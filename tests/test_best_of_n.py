"""The example of a pipeline of one's own: it keeps its rule, and says what the model says."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.models import CausalLM, ModelConfig, init_params
from qserve_jax.runtime import init_cache

PATH = Path(__file__).resolve().parent.parent / "examples" / "best_of_n.py"
CONFIG = ModelConfig("llama", 32, 64, 64, 2, 4, 2, 16, 128)
MODEL = CausalLM(CONFIG)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("best_of_n", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["best_of_n"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: 8 * x, init_params(jax.random.key(0), CONFIG))


def run(example, params, n, seed=1):
    cache = init_cache(CONFIG, num_pages=1 + 4 * n, page_size=8, kv_bits=16, dtype=jnp.float32)
    return example.best_of_n(
        MODEL,
        params,
        cache,
        jnp.arange(11),
        jax.random.key(seed),
        rule=example.no_repeated_pair,
        n=n,
        max_tokens=20,
    )


def test_the_rule_forbids_what_followed_before(example):
    logits = jnp.zeros((3, 9))
    tokens = jnp.asarray([[4, 5, 4, -1], [4, 4, -1, -1], [-1, -1, -1, -1]])
    banned = np.isinf(example.no_repeated_pair(logits, tokens))
    assert [np.flatnonzero(row).tolist() for row in banned] == [[5], [4], []]


def test_the_best_sample_is_scored_as_the_model_scores_it(example, params):
    _, tokens, score = run(example, params, 6)
    pairs = list(zip(tokens.tolist(), tokens.tolist()[1:], strict=False))
    assert len(set(pairs)) == len(pairs) == 19
    ids = jnp.concatenate([jnp.arange(11), tokens])[None]
    logits = jnp.asarray(MODEL.apply({"params": params}, ids))[0, 10:-1]
    logprobs = jax.nn.log_softmax(logits)[jnp.arange(20), tokens]
    np.testing.assert_allclose(score, logprobs.mean(), rtol=1e-5)
    scores = [run(example, params, n)[2] for n in (1, 6)]
    assert scores[1] == score and scores[1] > scores[0]


def test_one_program_and_no_second_cache(example, params):
    run(example, params, 6)
    before = example.best_of_n._cache_size()
    run(example, params, 6, seed=2)
    assert example.best_of_n._cache_size() == before
    cache = init_cache(CONFIG, num_pages=25, page_size=8, kv_bits=16, dtype=jnp.float32)
    example.best_of_n(
        MODEL,
        params,
        cache,
        jnp.arange(11),
        jax.random.key(0),
        rule=example.no_repeated_pair,
        n=6,
        max_tokens=20,
    )
    assert cache.pages.is_deleted()
