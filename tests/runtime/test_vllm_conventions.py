"""What vLLM's users bring along: names of sampling fields, block tables and slot mappings."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax import SamplingParams
from qserve_jax.models import ModelConfig
from qserve_jax.pallas_kernels import append_kv, paged_attention
from qserve_jax.quantization.numerics import fake_quantize_kv
from qserve_jax.runtime import init_cache

VLLM_FIELDS = """n presence_penalty frequency_penalty repetition_penalty temperature top_p top_k
min_p seed stop stop_token_ids ignore_eos max_tokens min_tokens logprobs prompt_logprobs detokenize
skip_special_tokens spaces_between_special_tokens include_stop_str_in_output output_kind logit_bias
allowed_token_ids bad_words extra_args"""

CONFIG = ModelConfig("llama", 64, 64, 64, 1, 4, 2, 16, 256)
BLOCK = 16
SEQ_LENS = [33, 5, 16]  # in the middle of a block, within the first, at the end of one
PAD_SLOT_ID = -1


def test_sampling_fields_have_vllms_names():
    ours = {field.name for field in dataclasses.fields(SamplingParams)}
    assert ours <= set(VLLM_FIELDS.split()) and len(ours) == 17
    params = SamplingParams(
        n=2,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        temperature=0.8,
        top_p=0.95,
        top_k=-1,
        min_p=0.05,
        seed=7,
        stop=["\n", "###"],
        stop_token_ids=[2],
        ignore_eos=False,
        max_tokens=16,
        logprobs=5,
        logit_bias={5: -100.0},
        skip_special_tokens=True,
        include_stop_str_in_output=False,
    )
    assert (params.stop, params.stop_token_ids) == (("\n", "###"), (2,))
    assert SamplingParams(stop="x").stop == ("x",) and SamplingParams(stop=None).stop == ()


def vllm_tables() -> tuple[np.ndarray, np.ndarray]:
    """As vLLM's model runner builds them: block ids of a request anywhere in the pool, unused
    entries of the table 0; a slot per token of all requests, one after the other, then padding."""
    blocks = [[7, 2, 9], [4], [11]]
    table = np.zeros((len(SEQ_LENS), 8), np.int32)
    slots = []
    for row, (ids, length) in enumerate(zip(blocks, SEQ_LENS, strict=True)):
        table[row, : len(ids)] = ids
        positions = np.arange(length)
        slots.append(table[row][positions // BLOCK] * BLOCK + positions % BLOCK)
    return table, np.concatenate([*slots, np.full(10, PAD_SLOT_ID)]).astype(np.int64)


def dense(q, k, v):
    """One query [N, H] over its sequence's k, v [T, K, H], in float64."""
    k, v = (np.repeat(x, 2, axis=1) for x in (k, v))
    scores = np.einsum("nh,tnh->nt", q, k) / 4
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("nt,tnh->nh", weights / weights.sum(axis=1, keepdims=True), v)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_block_tables_and_slot_mappings_feed_the_kernels(bits, rng):
    table, slots = vllm_tables()
    total = sum(SEQ_LENS)
    k, v = (rng.standard_normal((len(slots), 2, 16)).astype(np.float32) for _ in range(2))
    q = rng.standard_normal((3, 4, 16)).astype(np.float32)
    cache = init_cache(CONFIG, num_pages=12, page_size=BLOCK, kv_bits=bits, dtype=jnp.float32)
    cache = append_kv(cache, jnp.asarray(k), jnp.asarray(v), jnp.asarray(slots), layer=0)
    used = np.flatnonzero(np.asarray(cache.pages)[0].reshape(12, -1).any(axis=1))
    assert set(used) == {7, 2, 9, 4, 11}  # what is padding wrote nothing, block 0 neither
    out = paged_attention(
        jnp.asarray(q),
        cache,
        jnp.asarray(table),
        jnp.asarray(SEQ_LENS, jnp.int32),
        attends="quantized",
        layer=0,
    )
    k, v = (np.asarray(fake_quantize_kv(jnp.asarray(x[:total]), bits), np.float64) for x in (k, v))
    ends = np.cumsum(SEQ_LENS)
    for row, (end, length) in enumerate(zip(ends, SEQ_LENS, strict=True)):
        mine = slice(end - length, end)
        np.testing.assert_allclose(out[row], dense(q[row], k[mine], v[mine]), atol=2e-6)
