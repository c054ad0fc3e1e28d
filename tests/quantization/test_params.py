"""quantize_params over trees: layouts, rules, transformations, frameworks, sharding, warnings."""

import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from qserve_jax.quantization import (
    FLAX_RULES,
    MAXTEXT_RULES,
    QuantConfig,
    Rule,
    W4PerChannel,
    W4PerGroup,
    W8PerChannel,
    dequantize_kernel,
    dequantize_params,
    quantize_kernel,
    quantize_params,
)
from qserve_jax.quantization.params import path_name
from qserve_jax.quantization.qtensor import is_quantized, nbytes

G128, PER_CHANNEL = QuantConfig(), QuantConfig(group_size=-1)
W8 = QuantConfig(weight_bits=8)
PRESET: Any = "w4a8kv4"  # a name where a QuantConfig belongs
W16 = QuantConfig(weight_bits=16, act_bits=16)


def normal(rng, *shape, dtype="float32"):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def assert_same(a, b):
    """Two containers hold the same arrays (their sources may differ)."""
    assert type(a) is type(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


def take(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


# name: shape, contract, out, transpose to [*stack, K, N], [K, N]
LAYOUTS = {
    "KN": ((256, 6), (-2,), (-1,), (0, 1), (256, 6)),
    "NK": ((6, 256), (-1,), (-2,), (1, 0), (256, 6)),
    "LKN": ((3, 256, 6), (-2,), (-1,), (0, 1, 2), (256, 6)),
    "KLN": ((256, 3, 6), (0,), (-1,), (1, 0, 2), (256, 6)),
    "D heads head_dim": ((256, 2, 8), (-3,), (-2, -1), (0, 1, 2), (256, 16)),
    "heads head_dim D": ((2, 128, 6), (-3, -2), (-1,), (0, 1, 2), (256, 6)),
    "heads L head_dim D": ((2, 3, 128, 6), (0, 2), (-1,), (1, 0, 2, 3), (256, 6)),
}


@pytest.mark.parametrize(
    "name, value",
    [("group_size", 128.0), ("weight_bits", 4.0), ("kv_bits", 5), ("round_level_one", "x")],
)
def test_other_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} is not supported: use "):
        QuantConfig(**{name: value})


@pytest.mark.parametrize("config", [G128, PER_CHANNEL, W8], ids=["g128", "channel", "w8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_the_two_dimensional_matrix_quantised(layout, config, rng):
    shape, contract, out, order, (k, n) = LAYOUTS[layout]
    w = normal(rng, *shape)
    rules = [Rule("w$", contract, out)]
    quantized = quantize_params({"w": w}, config, rules=rules)["w"]
    stacked = jnp.transpose(w, order).reshape(-1, k, n)
    for i, matrix in enumerate(stacked):
        one = take(quantized, i) if len(stacked) > 1 else quantized
        assert_same(one, quantize_kernel(matrix, config))
    assert quantized.channel_scale.shape == ((n,) if len(stacked) == 1 else (3, n))

    back = dequantize_params({"w": quantized})["w"]
    assert back.shape == shape and back.dtype == w.dtype
    flat = np.asarray(jnp.transpose(back, order).reshape(-1, k, n))
    expected = [np.asarray(dequantize_kernel(quantize_kernel(m, config))) for m in stacked]
    np.testing.assert_array_equal(flat, expected)
    limit = {8: 0.0005, 4: 0.025}[config.weight_bits]  # mean square; a step is about 6 / 15
    assert jnp.mean((back - w) ** 2) < limit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_come_back_and_only_the_values_matter(dtype, rng):
    w = normal(rng, 128, 4, dtype=dtype)
    quantized = quantize_kernel(w)
    assert_same(quantized, quantize_kernel(w.astype(jnp.float32)))
    assert dequantize_kernel(quantized).dtype == jnp.dtype(dtype)


def test_default_rule_takes_kernels_with_two_axes_and_leaves_the_rest(rng):
    params = {
        "attn": [{"kernel": normal(rng, 128, 4), "bias": normal(rng, 4)}],
        "norm": {"kernel": normal(rng, 4)},
        "kernel": {"scale": normal(rng, 128, 4)},
        "my_kernel": normal(rng, 128, 4),
        "step": 3,
        "none": None,
    }
    quantized = quantize_params(params)
    assert isinstance(quantized["attn"][0]["kernel"], W4PerGroup)
    quantized["attn"][0]["kernel"] = params["attn"][0]["kernel"]
    assert jax.tree.structure(quantized) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (quantized, params)), strict=True))


def test_rules_first_match_skip_and_overrides(rng):
    params = {name: {"kernel": normal(rng, 128, 4)} for name in "abcde"}
    rules = [
        Rule("a/", skip=True),
        Rule("b/", weight_bits=8),
        Rule("c/", group_size=-1),
        Rule("d/", weight_bits=16),
        Rule("[ae]/"),
    ]
    quantized = quantize_params(params, rules=rules)
    kinds = [type(quantized[name]["kernel"]) for name in "bce"]
    assert kinds == [W8PerChannel, W4PerChannel, W4PerGroup]
    assert all(quantized[name]["kernel"] is params[name]["kernel"] for name in "ad")


def test_containers_and_16_bit_weights_are_left_as_they_are(rng):
    params = {"kernel": normal(rng, 128, 4), "ids": {"kernel": jnp.ones((2, 2), int)}}
    assert quantize_params(params, W16) is not None
    assert all(
        a is b
        for a, b in zip(
            jax.tree.leaves(quantize_params(params, W16)), jax.tree.leaves(params), strict=True
        )
    )
    once = quantize_params({"kernel": params["kernel"]})
    twice = quantize_params(once, W8)
    assert twice["kernel"] is once["kernel"]


def test_numpy_leaves_on_the_host(rng):
    w = rng.standard_normal((128, 4)).astype(np.float32)
    assert_same(quantize_params({"kernel": w})["kernel"], quantize_kernel(jnp.asarray(w)))
    half = w.astype(jnp.bfloat16)
    assert dequantize_kernel(quantize_params({"kernel": half})["kernel"]).dtype == jnp.bfloat16
    double = quantize_params({"kernel": w.astype(np.float64)})["kernel"]
    assert dequantize_kernel(double).dtype == jnp.float32  # as jnp.asarray reads float64


def test_jit_eval_shape_and_eager_agree(rng):
    params = {"kernel": normal(rng, 2, 128, 4), "bias": normal(rng, 4)}
    eager = quantize_params(params)
    jitted = jax.jit(quantize_params, static_argnums=1)(params, QuantConfig())
    assert_same(jitted["kernel"], eager["kernel"])
    assert jitted["kernel"].source == eager["kernel"].source
    shapes = jax.eval_shape(quantize_params, params)
    assert jax.tree.structure(shapes) == jax.tree.structure(eager)
    assert nbytes(shapes) == nbytes(eager)
    np.testing.assert_array_equal(
        jax.jit(dequantize_params)(eager)["kernel"], dequantize_kernel(eager["kernel"])
    )


def test_vmap_equals_the_stack(rng):
    w = normal(rng, 3, 128, 4)
    mapped = jax.vmap(quantize_kernel)(w)
    assert_same(mapped, quantize_kernel(w))
    expected = dequantize_kernel(quantize_kernel(w))
    np.testing.assert_array_equal(jax.vmap(dequantize_kernel)(mapped), expected)
    np.testing.assert_array_equal(dequantize_kernel(mapped), expected)  # the added axis leads


@pytest.mark.parametrize("layout", ["LKN", "KLN", "heads L head_dim D"])
def test_slices_and_scanned_slices_dequantise_to_the_layout_without_the_layer(layout, rng):
    shape, contract, out, order, _ = LAYOUTS[layout]
    quantized = quantize_kernel(normal(rng, *shape), G128, contract, out)
    layers = jnp.moveaxis(dequantize_kernel(quantized), order[0], 0)
    np.testing.assert_array_equal(dequantize_kernel(take(quantized, 1)), layers[1])
    _, scanned = jax.lax.scan(lambda c, w: (c, dequantize_kernel(w)), 0, quantized)
    np.testing.assert_array_equal(scanned, layers)


def test_two_stack_axes_lose_the_first_when_sliced(rng):
    w = normal(rng, 2, 128, 3, 4)
    quantized = quantize_kernel(w, G128, (1,), (3,))
    assert quantized.codes.shape == (2, 3, 4, 64)
    np.testing.assert_array_equal(
        dequantize_kernel(take(quantized, 1)), dequantize_kernel(quantized)[1]
    )


def test_linen_dicts_and_boxes(rng):
    variables: Any = nn.Dense(4).init(jax.random.key(0), jnp.ones((1, 128)))
    quantized = quantize_params(variables)
    kernel = variables["params"]["kernel"]
    assert_same(quantized["params"]["kernel"], quantize_kernel(kernel))
    boxed = {"kernel": nn.Partitioned(kernel, names=("x", "y"))}
    assert_same(quantize_params(boxed)["kernel"].value, quantize_kernel(kernel))
    assert isinstance(dequantize_params(quantize_params(boxed))["kernel"], nn.Partitioned)


def test_nnx_state_keeps_its_structure_and_merges():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(128, 4, rngs=rngs)])

    block = Block(nnx.Rngs(0))
    graph, state = nnx.split(block)
    quantized = quantize_params(state, rules=[Rule("layers/0/kernel$")])
    assert isinstance(quantized, nnx.State)
    kernel = block.layers[0].kernel[...]
    for made in (quantized, quantize_params(state)):
        _, container = jax.tree.leaves(made, is_leaf=is_quantized)  # after the bias
        assert_same(container, quantize_kernel(kernel))
    back = nnx.merge(graph, dequantize_params(quantized))
    np.testing.assert_array_equal(
        back.layers[0].kernel[...], dequantize_kernel(quantize_kernel(kernel))
    )


def assert_matrices(quantized, params, order):
    """Containers hold what the [K, N] matrices of `params` give, axes as in `order` by name.

    order: by the name of the kernel's parent, the transpose to [*stack, *in, *out], how many axes
    are "in" and how many "out".
    """
    for name, (axes, ins, outs) in order.items():
        w = jnp.transpose(params[name]["kernel"], axes)
        stack, rest = w.shape[: w.ndim - ins - outs], w.shape[w.ndim - ins - outs :]
        k = int(np.prod(rest[:ins]))
        matrix = w.reshape(*stack, k, -1)
        assert_same(quantized[name]["kernel"], quantize_kernel(matrix, PER_CHANNEL))
        np.testing.assert_array_equal(
            jnp.transpose(dequantize_kernel(quantized[name]["kernel"]), axes).reshape(matrix.shape),
            dequantize_kernel(quantize_kernel(matrix, PER_CHANNEL)),
        )
        back = dequantize_kernel(quantized[name]["kernel"])
        assert back.shape == params[name]["kernel"].shape


HEADS = {name: ((0, 1, 2), 1, 2) for name in ("query", "key", "value")}
FLAX = HEADS | {"out": ((0, 1, 2), 2, 1)}


def linen_attention():
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=16)
    return module.init(jax.random.key(0), jnp.ones((1, 3, 32)))["params"]


def nnx_attention():
    module = nnx.MultiHeadAttention(2, 32, 16, decode=False, rngs=nnx.Rngs(0))
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


@pytest.mark.parametrize("make", [linen_attention, nnx_attention])
def test_flax_rules_on_attention(make):
    params: Any = make()
    quantized = quantize_params(params, PER_CHANNEL, rules=FLAX_RULES, strict=True)
    assert_matrices(quantized, params, FLAX)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), {"block": {"attention": params}})
    quantized = quantize_params(stacked, PER_CHANNEL, rules=FLAX_RULES, strict=True)
    first = take(quantized["block"]["attention"], 0)
    assert_matrices(first, params, FLAX)


def test_flax_rules_leave_the_rest_to_the_default(rng):
    params = {"query": {"kernel": normal(rng, 128, 4)}, "up": {"kernel": normal(rng, 3, 128, 4)}}
    quantized = quantize_params(params, PER_CHANNEL, rules=FLAX_RULES, strict=True)
    for name in params:
        assert_same(quantized[name]["kernel"], quantize_kernel(params[name]["kernel"], PER_CHANNEL))


def test_maxtext_rules(rng):
    """Layers scanned on axis 1, unscanned layers, and kernels outside the layers."""
    scanned = {
        "query": {"kernel": normal(rng, 32, 3, 2, 8)},
        "key": {"kernel": normal(rng, 32, 3, 1, 8)},
        "value": {"kernel": normal(rng, 32, 3, 1, 8)},
        "out": {"kernel": normal(rng, 2, 3, 8, 32)},
        "wi_0": {"kernel": normal(rng, 32, 3, 48)},
        "wo": {"kernel": normal(rng, 48, 3, 32)},
    }
    order = {name: ((1, 0, 2, 3), 1, 2) for name in ("query", "key", "value")}
    order |= {"out": ((1, 0, 2, 3), 2, 1), "wi_0": ((1, 0, 2), 1, 1), "wo": ((1, 0, 2), 1, 1)}
    params = {"decoder": {"layers": scanned, "logits_dense": {"kernel": normal(rng, 32, 10)}}}
    quantized = quantize_params(params, PER_CHANNEL, rules=MAXTEXT_RULES, strict=True)["decoder"]
    assert_matrices(quantized["layers"], scanned, order)
    assert_matrices(quantized, params["decoder"], {"logits_dense": ((0, 1), 1, 1)})
    layer = {name: {"kernel": part["kernel"][:, 1]} for name, part in scanned.items()}
    quantized = quantize_params(layer, PER_CHANNEL, rules=MAXTEXT_RULES, strict=True)
    assert_matrices(quantized, layer, FLAX | {name: ((0, 1), 1, 1) for name in ("wi_0", "wo")})


@pytest.mark.parametrize("config", [PER_CHANNEL, W8], ids=["channel", "w8"])
def test_default_rules_doubt_heads_on_axes_of_their_own(config, rng):
    params: Any = {name: {"kernel": normal(rng, 4, 6, 8)} for name in FLAX}
    params["up"] = {"kernel": normal(rng, 4, 6, 8)}
    params["odd"] = {
        "query": {"kernel": normal(rng, 4, 7, 8)},
        "out": {"kernel": normal(rng, 4, 8)},
    }
    with pytest.warns(UserWarning) as caught:
        quantize_params(params, config)
    message = str(caught[0].message)
    assert len(caught) == 1 and message.startswith("5 leaves")
    assert message.count("3 axes taken as a stack of [K, N]: pass rules=FLAX_RULES") == 5
    assert "odd/query/kernel" in message and "odd/out" not in message and "up" not in message
    with pytest.raises(ValueError, match="MAXTEXT_RULES, or a Rule") as refused:
        quantize_params(params, config, strict=True)
    assert "\n" not in str(refused.value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_params(params, W8, rules=[Rule("kernel$")], strict=True)


def test_warnings_under_transformations_point_at_the_caller(rng):
    for call in (  # shapes differ, because a trace that is kept does not warn again
        lambda: jax.jit(quantize_params)({"kernel": normal(rng, 64, 5)}),
        lambda: jax.eval_shape(quantize_params, {"kernel": normal(rng, 64, 6)}),
        lambda: jax.vmap(quantize_params)({"kernel": normal(rng, 2, 64, 7)}),
    ):
        with pytest.warns(UserWarning, match="K=64") as caught:
            call()
        assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("config", [G128, PER_CHANNEL, W8], ids=["g128", "channel", "w8"])
@pytest.mark.parametrize("shape", [(128, 0), (0, 128, 4)])
def test_empty_outputs_and_stacks(shape, config):
    w = jnp.ones(shape)
    quantized = quantize_params({"kernel": w}, config)["kernel"]
    assert quantized.channel_scale.shape == (*shape[:-2], shape[-1])
    assert dequantize_kernel(quantized).shape == shape


def test_path_names_of_every_kind_of_key():
    tree = jax.tree_util
    keys = (tree.DictKey("a"), tree.SequenceKey(2), tree.GetAttrKey("kernel"))
    assert path_name(keys) == "a/2/kernel"
    assert path_name((*keys, tree.GetAttrKey("value"))) == "a/2/kernel"
    assert path_name((*keys, tree.FlattenedIndexKey(0))) == "a/2/kernel"
    assert path_name((tree.DictKey("value"),)) == "value"


def test_one_warning_names_every_fallback_and_strict_refuses(rng):
    params = {
        "a": {"kernel": normal(rng, 64, 4)},
        "b": {"kernel": normal(rng, 172, 4)},
        "c": {"kernel": normal(rng, 7, 4)},
        "good": {"kernel": normal(rng, 128, 4)},
    }
    with pytest.warns(UserWarning) as caught:
        quantized = quantize_params(params)
    assert len(caught) == 1 and caught[0].filename == __file__
    message = str(caught[0].message)
    assert "\n" not in message and "good" not in message
    assert all(text in message for text in ("a/kernel (K=64", "b/kernel (K=172", "c/kernel (K=7 "))
    assert_same(quantized["a"]["kernel"], quantize_kernel(params["a"]["kernel"], PER_CHANNEL))
    assert quantized["c"]["kernel"] is params["c"]["kernel"]
    with pytest.raises(ValueError, match="3 leaves .*a/kernel.*b/kernel.*c/kernel.*group_size=-1"):
        quantize_params(params, strict=True)
    with pytest.warns(UserWarning) as traced:
        jax.eval_shape(quantize_params, params)
    assert len(traced) == 1


def test_nothing_is_warned_where_all_goes_as_asked(rng):
    params = {"kernel": normal(rng, 7, 4), "even": {"kernel": normal(rng, 64, 4)}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_params(params, W8, strict=True)
        quantize_params({"even": params["even"]}, PER_CHANNEL, strict=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: quantize_params({"kernel": w}, stats={}), "stats=dict is no ActivationStats"),
        (lambda w: quantize_params({"a": {"kernel": w.astype(int)}}), "'a/kernel' has dtype int32"),
        (lambda w: quantize_params({"w": w}, rules=[Rule("w", (-3,))]), r"\(128, 4\).*\(-3,\)"),
        (lambda w: quantize_params({"w": w}, rules=[Rule("w", (-1,))]), "distinct axes"),
        (lambda w: quantize_params({"w": w}, rules=[Rule("w", (0, -2), ())]), "distinct axes"),
        (lambda w: quantize_params({"kernel": w}, PRESET), r"'w4a8kv4' .* QuantConfig\.preset"),
        (lambda w: quantize_params({"a": {"kernel": w[:0]}}), "'a/kernel' of shape .* K=0 inputs"),
        (lambda w: quantize_params({"kernel": w[:0]}, W8), "'kernel' of shape .* K=0 inputs"),
        (lambda w: quantize_kernel(w[:64]), "K=64 is not a multiple of group_size=128"),
        (lambda w: quantize_kernel(w[:7], PER_CHANNEL), "K=7 is odd"),
        (lambda w: quantize_kernel(w, W16), "weight_bits=16"),
        (lambda w: quantize_kernel(w[0]), "1 axes, fewer"),
        (lambda w: Rule("("), "is no regex"),
        (lambda w: Rule("w", weight_bits=3), "weight_bits=3"),
        (lambda w: Rule("w", group_size=64), "group_size=64"),
    ],
)
def test_bad_input_raises_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(jnp.ones((128, 4)))
    assert "\n" not in str(caught.value)


COLLECTIVES = r"(\S+) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\("


# shape, contract, out, sharding of the weight; expected of codes and channel_scale, collectives
SHARDED = {
    "N": ((256, 8), (0,), (1,), P(None, "x"), P("x"), P("x"), set()),
    "L": ((4, 256, 8), (1,), (2,), P("x"), P("x"), P("x"), set()),
    "L and N": ((4, 256, 8), (1,), (2,), P("y", None, "x"), P("y", "x"), P("y", "x"), set()),
    "heads": ((256, 4, 8), (0,), (1, 2), P(None, "x"), P("x"), P("x"), set()),
    "K": ((512, 8), (0,), (1,), P("x"), P(None, "x"), P(), {("f32[8]", "all-reduce")}),
    "heads of K": ((4, 128, 8), (0, 1), (2,), P("x"), P(None, "x"), P(),
                   {("f32[8]", "all-reduce")}),
}  # fmt: skip


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("case", SHARDED)
def test_sharded_weights_are_quantised_where_they_lie(case, axis_type, rng):
    shape, contract, out, spec, codes_spec, scale_spec, collectives = SHARDED[case]
    sizes = {"x": 2, "y": 2} if "y" in spec else {"x": 4}
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), (axis_type,) * len(sizes))
    w = normal(rng, *shape)
    sharded = {"w": jax.device_put(w, NamedSharding(mesh, spec))}
    rules = [Rule("w", contract, out)]
    jitted = jax.jit(lambda p: quantize_params(p, rules=rules))
    expected = quantize_params({"w": w}, rules=rules)["w"]
    for quantized in (quantize_params(sharded, rules=rules)["w"], jitted(sharded)["w"]):
        assert_same(quantized, expected)
        for array, wanted in (
            (quantized.codes, codes_spec),
            (quantized.group_scale, codes_spec),
            (quantized.channel_scale, scale_spec),
        ):
            assert array.sharding.is_equivalent_to(NamedSharding(mesh, wanted), array.ndim)
    np.testing.assert_array_equal(dequantize_kernel(quantized), dequantize_kernel(expected))
    hlo = jitted.lower(sharded).compile().as_text() or ""
    found = {(result.split("{")[0], name) for result, name in re.findall(COLLECTIVES, hlo)}
    assert found == collectives


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize(
    ("shape", "contract", "out", "spec"),
    [
        ((256, 8), (0,), (1,), P("x")),  # four shards of two groups
        ((256, 2, 8), (0,), (1, 2), P(None, None, "x")),  # head_dim
        ((2, 128, 8), (0, 1), (2,), P(None, "x")),
    ],
)
def test_shards_that_cut_a_group_or_a_head_give_the_same_codes(
    shape, contract, out, spec, axis_type, rng
):
    mesh = jax.make_mesh((4,), ("x",), (axis_type,))
    w = normal(rng, *shape)
    sharded = jax.device_put(w, NamedSharding(mesh, spec))
    quantized = quantize_kernel(sharded, G128, contract, out)
    assert_same(quantized, quantize_kernel(w, G128, contract, out))
    np.testing.assert_array_equal(
        dequantize_kernel(quantized), dequantize_kernel(quantize_kernel(w, G128, contract, out))
    )


def test_four_bit_weights_take_at_most_three_tenths_of_bfloat16():
    params = {"kernel": jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)}
    for config in (G128, PER_CHANNEL):
        quantized = jax.eval_shape(lambda p, config=config: quantize_params(p, config), params)
        assert nbytes(quantized) <= 0.30 * nbytes(params)
