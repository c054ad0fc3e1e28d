"""A long prompt in chunks against one shot, and the kernels that a layer runs on a GPU."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.models import CausalLM, ModelConfig
from qserve_jax.models.llama import decode_step, init_params, prefill
from qserve_jax.pallas_kernels import prepare_for_backend
from qserve_jax.quantization import quantize_params
from qserve_jax.runtime import init_cache

T, CHUNK = 256, 32  # as 8192 in chunks of 1024
run_prefill = jax.jit(
    prefill, static_argnames=("model", "attends", "cached_pages", "all_logits"), donate_argnums=2
)


@pytest.fixture(scope="module")
def prompt():
    return np.random.default_rng(0).integers(0, 64, (2, T)).astype(np.int32)


def logits_of(config, params, prompt, chunk, bits, attends):
    """[B, T, V], prefilled `chunk` at a time."""
    cache = init_cache(config, num_pages=2 * T // 64, kv_bits=bits, dtype=jnp.float32)
    table = jnp.arange(2 * T // 64)[::-1].reshape(2, -1)
    found = []
    for start in range(0, T, chunk):
        tokens = jnp.asarray(prompt[:, start : start + chunk])
        lens = jnp.full(2, start + chunk)
        options = {"attends": attends, "all_logits": True}
        arguments = (CausalLM(config), params, cache, tokens, table, lens)
        cache, logits = run_prefill(*arguments, **options)
        found.append(np.asarray(logits, np.float64))
    return np.concatenate(found, axis=1)


def difference(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("bits, attends", [(16, "full"), (4, "full"), (4, "quantized")])
def test_chunks_equal_one_shot_up_to_the_cached_part(bits, attends, tiny, random_params, prompt):
    """Nothing but quantisation makes a difference: none with 16 bits, none where every token is
    attended as stored."""
    config = tiny()
    params = random_params(config)
    whole = logits_of(config, params, prompt, T, bits, attends)
    found = logits_of(config, params, prompt, CHUNK, bits, attends)
    first = difference(found[:, :CHUNK], whole[:, :CHUNK])
    rest = difference(found[:, CHUNK:], whole[:, CHUNK:])
    assert first < 1e-4  # the first chunk has nothing before it
    if bits == 4 and attends == "full":
        assert 1e-3 < rest < 0.3
    else:  # with 4 bits a code at a boundary may be rounded the other way
        assert rest < (1e-4 if bits == 16 else 1e-3)


def shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.mark.parametrize("kv_bits", [4, 8, 16])
@pytest.mark.parametrize("step", ["decode", "chunk"])
def test_a_layer_on_a_gpu(step, kv_bits, monkeypatch):
    """Ten kernels of ours in the loop over layers, by name, and the cache aliased through one. No
    two matmuls have the same shape: those would be one function that is called twice."""
    monkeypatch.setattr("qserve_jax.models.llama.LAYERS_AT_ONCE", 1)
    config = ModelConfig("llama", 64, 128, 384, 2, 4, 2, 64, 512)
    model = CausalLM(config, backend="mosaic_sm90")

    def make():
        params = init_params(jax.random.key(0), config, jnp.bfloat16)
        params = prepare_for_backend(quantize_params(params), "mosaic_sm90")
        return params, init_cache(config, num_pages=40, kv_bits=kv_bits)

    params, cache = jax.eval_shape(make)
    lens: Any = jax.ShapeDtypeStruct((3,), jnp.int32)
    table: Any = jax.ShapeDtypeStruct((3, 4), jnp.int32)
    tokens: Any = jax.ShapeDtypeStruct((3, 96), jnp.int32)
    run = jax.jit(prefill, static_argnums=0, donate_argnums=2)
    if step == "decode":
        run, tokens = jax.jit(decode_step, static_argnums=0, donate_argnums=2), lens
    lowered = run.trace(model, params, cache, tokens, table, lens)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    lines = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    aliased = ["output_operand_alias<" in line for line in lines]
    assert len(lines) == 10 and sum(aliased) == 1
