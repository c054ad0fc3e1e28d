"""LLM on meshes of CPU devices: the tokens of one device, whatever the engine does meanwhile."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qserve_jax
from qserve_jax import LLM, SamplingParams, load_model
from qserve_jax.models.sharding import tensor_mesh
from qserve_jax.runtime.int8_head import with_int8_head
from qserve_jax.runtime.perplexity import agreement, loss_difference, perplexity

DEMO = Path(qserve_jax.__file__).parent / "assets" / "demo"
FLOAT: dict[str, Any] = {"precision": "w16a16kv16", "dtype": "float32"}
# A pool that forces preemption, and chunks of prompts.
SETTINGS: dict[str, Any] = {
    "max_model_len": 128,
    "page_size": 16,
    "num_pages": 9,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 16,
    "seed": 0,
}
TOKENS = np.arange(40, 56)[None]


def requests():
    """Greedy, sampled and penalised, with log-probabilities; four share their first 32 tokens."""
    rng = np.random.default_rng(0)
    prefix = rng.integers(5, 2000, 32).tolist()
    prompts = [prefix * (i % 2) + rng.integers(5, 2000, 4 + 9 * i).tolist() for i in range(8)]
    params = [SamplingParams(max_tokens=24, ignore_eos=True) for _ in prompts]
    params[3] = SamplingParams(max_tokens=24, ignore_eos=True, temperature=1.0, top_k=20, seed=3)
    params[4] = SamplingParams(max_tokens=9, ignore_eos=True, presence_penalty=1.0, logprobs=2)
    return prompts, params


@pytest.fixture(scope="module")
def exact():
    """Of the float32 model on 1, 2 and 4 devices (2 KV heads): the LLM and what it made."""
    found = {}
    for ranks in (1, 2, 4):
        llm = LLM(load_model(DEMO, mesh=tensor_mesh(ranks), **FLOAT), **SETTINGS)
        found[ranks] = llm, llm.generate(*requests())
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_float32_model_makes_the_tokens_of_one_device(exact, ranks):
    (_, one), (llm, outputs) = exact[1], exact[ranks]
    assert [o.token_ids for o in outputs] == [o.token_ids for o in one]
    assert llm.stats.preemptions > 0 and llm.stats.shared_tokens > 0
    assert llm.pool.free_pages == 9 and llm.engine.idle
    for made, wanted in zip(outputs[4].logprobs, one[4].logprobs, strict=True):
        assert abs(made.logprob - wanted.logprob) < 1e-4


def test_the_cache_is_cut_by_heads_and_work_like_before_compiles_nothing(exact):
    for ranks in (2, 4):
        pages = exact[ranks][0].engine.device._cache.pages
        assert pages.shape[2] == max(2, ranks)
        assert {shard.data.shape[2] for shard in pages.addressable_shards} == {1}
    llm, _ = exact[2]
    llm.generate(*requests())  # other chunks than before, for prefixes are known now
    before = llm.engine.device._prefill._cache_size(), llm.engine.device._decode._cache_size()
    llm.generate(*requests())
    assert before == (
        llm.engine.device._prefill._cache_size(),
        llm.engine.device._decode._cache_size(),
    )


def test_w4a8kv4_stays_within_what_rounding_differently_does():
    """Inputs of o and down are quantised by rank, so a token may differ where two nearly tie. What
    is measured on the demo model's own text: the loss does not move, greedy tokens agree."""
    one = load_model(DEMO)
    llm = LLM(one, **SETTINGS)
    prompt = "Once upon a time there was a dog. He liked to"
    text = llm.generate(prompt, SamplingParams(max_tokens=100, temperature=0.8, seed=1))[0]
    ids = text.prompt_token_ids + text.token_ids
    found = []
    for ranks in (1, 2):
        loaded = load_model(DEMO, mesh=tensor_mesh(ranks))
        found.append(perplexity(loaded.model, loaded.params, ids, kv_bits=4, seq_len=28))
    delta, _ = loss_difference(found[1], found[0])
    assert delta != 0 and abs(delta) < 0.03
    assert agreement(*found)[0] > 0.9


def test_a_head_in_8_bits_is_cut_too():
    found = []
    for ranks in (1, 2):
        loaded = with_int8_head(load_model(DEMO, mesh=tensor_mesh(ranks), **FLOAT))
        head = loaded.params["lm_head"]["embedding"]
        assert head.codes.addressable_shards[0].data.shape == (2048 // ranks, 256)
        found.append(np.asarray(loaded.model.apply({"params": loaded.params}, TOKENS)))
    # A hidden state that differs in its last bits may be rounded to another of 255 codes.
    np.testing.assert_allclose(found[1], found[0], atol=2e-2)
    assert (found[1].argmax(-1) == found[0].argmax(-1)).all()


def test_sizes_that_cannot_be_had_are_refused():
    with pytest.raises(ValueError, match="tensor_parallel_size=64 but JAX sees 4 cpu"):
        LLM(DEMO, tensor_parallel_size=64)
    with pytest.raises(ValueError, match="tensor_parallel_size=0 must be an integer"):
        LLM(DEMO, tensor_parallel_size=0)
    message = "=4 does not divide 4 query and 2 KV heads of 64 in groups of 128 inputs: "
    message += "use 1 or 2, or quantise with group_size=-1"
    with pytest.raises(ValueError, match=message):
        LLM(DEMO, tensor_parallel_size=4)
    with pytest.raises(ValueError, match="=2 but the model was loaded onto 1 device"):
        LLM(load_model(DEMO, **FLOAT), tensor_parallel_size=2)
