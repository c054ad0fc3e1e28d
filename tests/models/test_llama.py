"""The decoder against a plain one in float64, and its cached form against both."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.models import (
    CausalLM,
    RopeConfig,
    decode_step,
    init_params,
    param_shapes,
    prefill,
)
from qserve_jax.models.layers import linear, quantize_input
from qserve_jax.pallas_kernels import prepare_for_backend
from qserve_jax.pallas_kernels.paged_attention.reference import read_pages
from qserve_jax.quantization import QuantConfig, dequantize_params, quantize_params
from qserve_jax.quantization.config import PRECISIONS
from qserve_jax.quantization.numerics import fake_quantize_kv
from qserve_jax.quantization.qtensor import is_quantized
from qserve_jax.runtime.kv_cache import init_cache

TOLERANCE = 1e-5  # of float32 logits, relative to the largest
S_P, T = 8, 16
LENS = np.array([13, 5, 16])  # prompts of T tokens or fewer
TABLE = np.array([[7, 2, 5], [4, 9, -1], [1, 8, 3]], np.int32)  # shuffled; page 0 and 6 unused
FAMILIES = {
    "llama": {},
    "qwen": {"qk_norm": True, "qkv_bias": True, "tie_embeddings": True, "sliding_window": 6},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "num_kv_heads": 4},
}

apply = jax.jit(
    lambda model, params, tokens, kv_bits=16: model.apply(
        {"params": params}, tokens, kv_bits=kv_bits
    ),
    static_argnums=(0, 3),
)
# Not donated, so that the caches before and after can be compared.
run_prefill = jax.jit(prefill, static_argnames=("model", "attends", "cached_pages", "all_logits"))
run_decode = jax.jit(decode_step, static_argnames=("model", "attends"))
read_layers = jax.jit(
    lambda cache, table: jnp.stack(
        [jnp.stack(read_pages(cache, table, layer=i)) for i in range(cache.pages.shape[0])], axis=1
    )
)


def i32(x):
    return jnp.asarray(x, jnp.int32)


def assert_close(actual, expected):
    expected = np.asarray(expected)
    error = np.abs(np.asarray(actual) - expected).max()
    assert error <= TOLERANCE * np.abs(expected).max()


def random_tokens(shape, seed=1):
    return np.random.default_rng(seed).integers(0, 64, shape)


def new_cache(config, bits=16, dtype=jnp.float32):
    return init_cache(config, num_pages=10, page_size=S_P, kv_bits=bits, dtype=dtype)


def generate(model, params, cache, tokens, steps, attends, **options):
    """Prefill of LENS tokens of each row, then `steps` decode steps with the tokens that follow.

    Returns the last cache and the logits [B, 1 + steps, V] after each call.
    """
    options = {"attends": attends} | options
    cache, logits = run_prefill(
        model, params, cache, i32(tokens[:, :T]), i32(TABLE), i32(LENS), cached_pages=0, **options
    )
    after = [logits]
    for lens in [LENS + step for step in range(steps)]:
        token = tokens[np.arange(3), lens]
        cache, logits = run_decode(
            model, params, cache, i32(token), i32(TABLE), i32(lens + 1), **options
        )
        after.append(logits)
    return cache, jnp.stack(after, axis=1)


def at_ends(logits, steps):
    """Of logits [B, S, V] those after each call of `generate`."""
    return np.asarray(logits)[np.arange(3)[:, None], LENS[:, None] - 1 + np.arange(steps + 1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_apply_is_the_plain_decoder(family, tiny, random_params, plain_decoder):
    config = tiny(**FAMILIES[family])
    params, tokens = random_params(config), random_tokens((3, T + 4))
    logits = apply(CausalLM(config), params, i32(tokens))
    assert logits.shape == (3, T + 4, 64) and logits.dtype == jnp.float32
    for row in range(3):
        assert_close(logits[row], plain_decoder(config, params, tokens[row])[0])


@pytest.mark.parametrize(
    "family, attends",
    [("llama", "full"), ("llama", "quantized"), ("qwen", "full"), ("qwen", "quantized")],
)
def test_16_bit_cache_equals_the_whole_sequence(family, attends, tiny, random_params):
    """Ragged prompts on shuffled pages in one batch, without query_lens, and decode after them."""
    config, steps = tiny(**FAMILIES[family]), 4
    model, params, tokens = CausalLM(config), random_params(config), random_tokens((3, T + 4))
    expected = at_ends(apply(model, params, i32(tokens)), steps)
    _, logits = generate(model, params, new_cache(config), tokens, steps, attends)
    assert_close(logits, expected)
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("bits, attends", [(16, "full"), (4, "quantized"), (8, "full")])
def test_chunked_prefill(bits, attends, tiny, random_params, plain_decoder):
    """Prompts of 13 and 16 in two chunks (6 tokens are no whole page), one of 5 there at once."""
    config = tiny()
    model, params, tokens = CausalLM(config), random_params(config), random_tokens((3, T))
    cache, before = new_cache(config, bits), np.minimum(LENS, 6)
    before[2] = 8
    for start, end in ((0 * before, before), (before, LENS)):
        count = end - start
        chunk = np.stack([np.roll(row, -s)[:8] for row, s in zip(tokens, start, strict=True)])
        ends = i32(np.where(count > 0, end, 0))
        cache, logits = run_prefill(
            model,
            params,
            cache,
            i32(chunk),
            i32(TABLE),
            ends,
            query_lens=i32(count),
            attends=attends,
            cached_pages=1,
        )
    for row in (0, 2):
        seen = read_layers(cache, i32(TABLE))[:, :, row, : LENS[row]]
        chunk_of = np.arange(LENS[row]) >= before[row]
        fresh = chunk_of[:, None] == chunk_of if attends == "full" else np.zeros((LENS[row],) * 2)
        expected, _ = plain_decoder(
            config, params, tokens[row, : LENS[row]], stored=np.asarray(seen), fresh=fresh > 0
        )
        assert_close(logits[row], expected[-1])
        if bits == 16:
            at_once, _ = plain_decoder(config, params, tokens[row, : LENS[row]])
            assert_close(logits[row], at_once[-1])


@pytest.mark.parametrize("bits, attends", [(4, "full"), (4, "quantized"), (8, "quantized")])
def test_quantised_cache(bits, attends, tiny, random_params, plain_decoder):
    """Prefill and decode against the plain decoder that sees K and V as the cache returns them.

    It reads them from the cache, because its own codes may differ where a value lies at the border
    of two. What the cache holds is compared with its own K and V apart.
    """
    config, steps = tiny(**FAMILIES["qwen"]), 3
    model, params, tokens = CausalLM(config), random_params(config), random_tokens((3, T + 4))
    cache, logits = generate(model, params, new_cache(config, bits), tokens, steps, attends)
    held = np.asarray(read_layers(cache, i32(TABLE)))
    for row, length in enumerate(LENS):
        total = length + steps
        call = np.maximum(np.arange(total) - length + 1, 0)  # 0 is the prefill
        fresh = (call[:, None] == call) & (attends == "full")
        expected, own = plain_decoder(
            config, params, tokens[row, :total], stored=held[:, :, row, :total], fresh=fresh
        )
        assert_close(logits[row], expected[length - 1 :])
        wanted = np.asarray(fake_quantize_kv(jnp.asarray(own, jnp.float32), bits))
        difference = np.abs(held[:, :, row, :total] - wanted)
        step = (own.max(-1, keepdims=True) - own.min(-1, keepdims=True)) / (2**bits - 1)
        assert (difference <= 1.01 * step).all()
        assert (difference <= 1e-3 * step).mean() > 0.99


def test_apply_with_kv_bits(tiny, random_params, plain_decoder):
    """Against the plain decoder that sees what a cache of the same sequences holds."""
    config = tiny(**FAMILIES["qwen"])
    model, params, tokens = CausalLM(config), random_params(config), random_tokens((3, T + 4))
    logits = apply(model, params, i32(tokens), 4)
    cache, _ = generate(model, params, new_cache(config, 4), tokens, 0, "quantized")
    held = np.asarray(read_layers(cache, i32(TABLE)))
    for row, length in enumerate(LENS):
        stored, fresh = held[:, :, row, :length], np.zeros((length, length), bool)
        expected, _ = plain_decoder(
            config, params, tokens[row, :length], stored=stored, fresh=fresh
        )
        assert_close(logits[row, :length], expected)
    assert np.abs(logits - apply(model, params, i32(tokens))).max() > 0.01


@pytest.mark.parametrize("bits", [4, 16])
def test_idle_rows_write_nothing(bits, tiny, random_params):
    config = tiny(**FAMILIES["qwen"])
    model, params, tokens = CausalLM(config), random_params(config), random_tokens((3, T + 4))
    cache, _ = generate(model, params, new_cache(config, bits), tokens, 0, "full")
    before = np.asarray(cache.pages)
    lens, options = i32([0, 6, 0]), {"attends": "full"}
    after, _ = run_decode(model, params, cache, i32(tokens[:, 0]), i32(TABLE), lens, **options)
    others = [page for page in range(10) if page not in TABLE[1]]
    np.testing.assert_array_equal(np.asarray(after.pages)[:, others], before[:, others])
    assert (np.asarray(after.pages) != before).any()
    prompts, options = i32(tokens[:, :T]), options | {"cached_pages": 0}
    after, logits = run_prefill(model, params, cache, prompts, i32(TABLE), 0 * lens, **options)
    np.testing.assert_array_equal(after.pages, before)
    assert np.isfinite(logits).all()


def test_all_logits(tiny, random_params):
    config = tiny()
    model, params, tokens = CausalLM(config), random_params(config), i32(random_tokens((3, T + 4)))
    _, logits = run_prefill(
        model, params, new_cache(config), tokens[:, :T], i32(TABLE), i32(LENS), all_logits=True
    )
    expected = apply(model, params, tokens)
    for row, length in enumerate(LENS):
        assert_close(logits[row, :length], expected[row, :length])


def test_narrow_integers_do_not_wrap(tiny, random_params):
    """Slots of page 2 do not fit 8 bits."""
    config = tiny()
    model, params = CausalLM(config), random_params(config)
    found = []
    for dtype in (jnp.int32, jnp.int8, jnp.uint8):
        cache = init_cache(config, num_pages=4, dtype=jnp.float32)
        arrays = [jnp.array(x, dtype) for x in ([[5, 6]], [[3, 2]], [66], [2])]
        *arrays, query_lens = arrays
        cache, logits = prefill(model, params, cache, *arrays, query_lens=query_lens)
        found.append((np.asarray(cache.pages), np.asarray(logits)))
    for pages, logits in found[1:]:
        np.testing.assert_array_equal(pages, found[0][0])
        np.testing.assert_array_equal(logits, found[0][1])
    assert np.any(found[0][0][:, 2]) and not np.any(found[0][0][:, 3])


def test_dynamic_rope_keeps_one_base(tiny, random_params, plain_decoder):
    """A sequence that grows past max_position_embeddings, with the base of its final length."""
    config = tiny(max_position_embeddings=8, rope=RopeConfig("dynamic", factor=4.0))
    model, params, tokens = CausalLM(config), random_params(config), random_tokens((3, T + 4))
    totals = LENS + 3
    _, logits = generate(model, params, new_cache(config), tokens, 3, "full", rope_lens=i32(totals))
    for row, (length, total) in enumerate(zip(LENS, totals, strict=True)):
        sequence = tokens[row, :total]
        expected, _ = plain_decoder(config, params, sequence, length=total)
        assert_close(logits[row], expected[length - 1 :])
        other, _ = plain_decoder(config, params, sequence, length=8)
        assert np.abs(expected - other).max() > (0.1 if total > 8 else -1)
    whole = apply(model, params, i32(tokens[:1, : totals[0]]))[0, LENS[0] - 1 :]
    assert_close(logits[0], whole)  # apply takes the whole sequence's length


def abstract_params(config):
    """Shapes of per-channel 4-bit parameters."""

    def make():
        return quantize_params(init_params(jax.random.key(0), config), QuantConfig(4, -1))

    return jax.eval_shape(make)


def test_the_layer_loop_is_compiled_once(tiny):
    """One scan, and a program of the same size for 2 and for 9 layers."""
    sizes = []
    for num_layers in (2, 9):
        config = tiny(num_layers=num_layers)
        model = CausalLM(config)
        params = abstract_params(config)
        cache = jax.eval_shape(functools.partial(new_cache, config, 4))
        step = functools.partial(decode_step, model)
        arguments = (params, cache, i32([0]), i32([[0]]), i32([1]))
        jaxpr = jax.make_jaxpr(step)(*arguments)
        assert str(jaxpr).count("scan[") == 1
        sizes.append(len(jax.jit(step).lower(*arguments).as_text()))
    assert abs(sizes[1] - sizes[0]) < 0.01 * sizes[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_init_makes_the_canonical_tree(family, tiny):
    config = tiny(**FAMILIES[family])
    model = CausalLM(config, param_dtype=jnp.bfloat16)
    made = jax.eval_shape(model.init, jax.random.key(0), i32([[0]]))
    assert made.keys() == {"params"}
    assert jax.tree.map(lambda x: x.shape, made["params"]) == param_shapes(config)
    assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype(jnp.bfloat16)}


def test_initial_values(tiny):
    config = tiny(qkv_bias=True, num_layers=8, num_kv_heads=4, intermediate_size=64)
    params = init_params(jax.random.key(0), config)
    layers = params["layers"]
    assert (layers["attn_norm"]["scale"] == 1).all() and not layers["q_proj"]["bias"].any()
    stds = {"q_proj": 0.02, "up_proj": 0.02, "o_proj": 0.005, "down_proj": 0.005}  # / sqrt(2 L)
    for name, std in stds.items():
        assert abs(float(layers[name]["kernel"].std()) - std) < 0.02 * std
    assert not jnp.array_equal(layers["gate_proj"]["kernel"], layers["up_proj"]["kernel"])
    assert not jnp.array_equal(layers["q_proj"]["kernel"][0], layers["q_proj"]["kernel"][1])


def test_training_reduces_the_loss(tiny):
    config = tiny(**FAMILIES["qwen"], o_bias=True, mlp_bias=True)
    model, tokens = CausalLM(config), i32(random_tokens((4, T)))
    params = init_params(jax.random.key(0), config)

    @jax.jit
    def step(params):
        def loss(params):
            logits = apply(model, params, tokens)[:, :-1]
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
            return -chosen.mean()

        value, gradient = jax.value_and_grad(loss)(params)
        return value, gradient, jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)

    losses = []
    for i in range(12):
        value, gradient, params = step(params)
        losses.append(float(value))
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient) if i == 0 else ():
            assert np.isfinite(leaf).all(), path
            assert leaf.any(), path
    assert abs(losses[0] - np.log(64)) < 0.1
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("dtype, unit", [(jnp.bfloat16, 2.0**-8), (jnp.float16, 2.0**-11)])
def test_16_bit_params(dtype, unit, tiny, random_params, plain_decoder):
    """Logits within a few roundings of the plain decoder with the same (rounded) parameters."""
    config = tiny(**FAMILIES["qwen"])
    model, tokens = CausalLM(config), random_tokens((3, T + 4))
    params = jax.tree.map(lambda x: x.astype(dtype), random_params(config))
    cache, logits = generate(model, params, new_cache(config, 16, dtype), tokens, 2, "full")
    assert cache.pages.dtype == dtype and logits.dtype == jnp.float32
    for row, length in enumerate(LENS):
        expected = plain_decoder(config, params, tokens[row, : length + 2])[0][length - 1 :]
        error = np.sqrt(((logits[row] - expected) ** 2).mean() / (expected**2).mean())
        assert error < 2 * unit


PRESET_ERRORS = {  # relative, root mean square, of the logits of a random model
    "w4a8kv4": (0.1, 0.25),
    "w4a8kv8": (0.1, 0.25),
    "w8a8kv4": (0.04, 0.1),
    "w8a8kv8": (0.01, 0.03),
    "w4a16kv4": (0.1, 0.25),
    "w16a16kv16": (0, TOLERANCE),
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_presets(precision, tiny, random_params):
    """Each loses as much as its bits say: not less, as if something stayed in float."""
    config = tiny(hidden_size=128, head_dim=32, intermediate_size=256)
    quant = QuantConfig.preset(precision)
    model = CausalLM(config, act_bits=quant.act_bits)
    exact, tokens = random_params(config), random_tokens((3, T + 4))
    params = exact if quant.weight_bits == 16 else quantize_params(exact, quant)
    cache = new_cache(config, quant.kv_bits)
    cache, logits = generate(model, prepare_for_backend(params), cache, tokens, 0, "quantized")
    assert cache.bits == quant.kv_bits
    expected = at_ends(apply(CausalLM(config), exact, i32(tokens)), 0)
    error = np.sqrt(((logits - expected) ** 2).mean() / (expected**2).mean())
    low, high = PRESET_ERRORS[precision]
    assert low <= error < high


@pytest.mark.parametrize("act_bits, expected", [(8, 7), (16, 0)])
def test_integer_matmuls_of_a_layer(act_bits, expected, tiny):
    """Seven projections on int8 activations, or none; embedding and head are never quantised."""
    config = tiny()
    params = abstract_params(config)
    model = CausalLM(config, act_bits=act_bits)
    jaxpr = jax.make_jaxpr(model.apply)({"params": params}, i32([[0]]))
    assert str(jaxpr).count("preferred_element_type=int32") == expected


@pytest.mark.parametrize("weight_bits, group_size", [(4, 128), (4, -1), (8, -1)])
def test_float_activations_use_the_dequantised_weights(
    weight_bits, group_size, tiny, random_params, plain_decoder
):
    config = tiny(hidden_size=128, head_dim=32, intermediate_size=128)
    quant = QuantConfig(weight_bits, group_size, act_bits=16)
    params, tokens = quantize_params(random_params(config), quant), random_tokens((1, T))
    assert is_quantized(params["layers"]["down_proj"]["kernel"])
    logits = apply(CausalLM(config, act_bits=16), params, i32(tokens))
    expected, _ = plain_decoder(config, dequantize_params(params), tokens[0])
    assert_close(logits[0], expected)


@pytest.mark.parametrize("quant", [QuantConfig(), QuantConfig(4, -1), QuantConfig(8)])
def test_linear_multiplies_integers(quant, tiny, random_params, rng):
    """One layer's projection from its own int8 input, against int64 and the dequantised weight."""
    config = tiny(hidden_size=128, head_dim=32, qkv_bias=True)
    p = quantize_params(random_params(config), quant)["layers"]["q_proj"]
    x: Any = quantize_input(jnp.asarray(rng.standard_normal((5, 128)), jnp.float32), 8, p["kernel"])
    y = linear(x, {**p, "bias": p["bias"][1]}, layer=1, dtype=jnp.float32)
    weight = np.asarray(dequantize_params(p)["kernel"][1], np.float64)
    codes, scale = np.asarray(x.codes, np.int64), np.asarray(x.scale, np.float64)
    expected = (codes @ weight) * scale[:, None] + np.asarray(p["bias"][1])
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


GOOD_STEP = {"tokens": i32([1, 2]), "block_table": i32(TABLE[:2]), "context_lens": i32([1, 1])}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokens": i32([[1], [2]])}, r"tokens is int32\[2, 1\] but must be an integer \[B\] "),
        ({"tokens": jnp.ones(2)}, r"tokens is float32\[2\] but must be an integer \[B\]"),
        ({"tokens": i32([1, 2]), "call": prefill}, r"int32\[2\] but must be an integer \[B, T\]"),
        ({"tokens": jnp.ones((2, 3)), "call": prefill}, r"tokens is float32\[2, 3\]"),
        ({"block_table": i32(TABLE)}, r"block_table is int32\[3, 3\] .* \[B, max_pages\]"),
        ({"block_table": i32(TABLE[0])}, r"block_table is int32\[3\] .* \[B, max_pages\]"),
        ({"context_lens": i32([1])}, r"context_lens is int32\[1\] .* \(tokens \[2\]; prefill"),
        ({"context_lens": jnp.ones(2)}, r"context_lens is float32\[2\] .* integer \[B\]"),
        ({"rope_lens": i32([9, 9, 9])}, r"rope_lens is int32\[3\]"),
        (
            {"tokens": i32(TABLE[:2]), "query_lens": i32(1), "call": prefill},
            r"query_lens is int32\[\] .* integer \[B\]",
        ),
    ],
)
def test_wrong_inputs_are_named(changes, message, tiny):
    config, arguments = tiny(), GOOD_STEP | changes
    call: Any = arguments.pop("call", decode_step)
    with pytest.raises(ValueError, match=message) as caught:
        call(CausalLM(config), {}, new_cache(config), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("quantized", "rounds"), [(True, 1), (False, 8)])
def test_rounds_of_the_layer_loop(tiny, random_params, quantized, rounds, monkeypatch):
    """Eight layers a round where kernels read them in place; float ones are sliced one by one."""
    config = tiny(num_layers=8)
    params = random_params(config)
    if quantized:
        params = quantize_params(params, QuantConfig.preset("w8a8kv4"))
    cache = init_cache(config, num_pages=2, page_size=16)
    monkeypatch.setattr("qserve_jax.models.llama.usable", lambda _: ("mosaic_sm90", "reference"))
    step = functools.partial(decode_step, CausalLM(config, backend="reference"))
    i32 = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2,), (2, 1), (2,))]
    text = str(jax.make_jaxpr(step)(params, cache, *i32))
    assert re.findall(r"length=8\b[^]]*?unroll=(\d+)", text, re.S) == [str(8 // rounds)]
