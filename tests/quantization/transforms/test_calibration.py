import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.models.calibration import _tapped, attention_heads, matmul_inputs
from qserve_jax.quantization.transforms import collect_statistics
from qserve_jax.quantization.transforms.calibration import input_name, statistic


def two_layers(params, tokens):
    """Somebody's own model: names of matmuls and what enters them."""
    hidden = jax.nn.relu(tokens @ params["first"])
    return {"first": tokens, "second": hidden}


def test_streaming_equals_one_batch_and_numpy(rng):
    params = {"first": jnp.asarray(rng.standard_normal((6, 5)), jnp.float32)}
    x = rng.standard_normal((4, 3, 6)).astype(np.float32)
    stats = collect_statistics(two_layers, params, [x[:1], x[1:]], hessians=True)
    flat = x.reshape(-1, 6).astype(np.float64)
    hidden = np.maximum(flat @ np.asarray(params["first"], np.float64), 0)
    for name, want in (("first", flat), ("second", hidden)):
        np.testing.assert_allclose(stats.absmax[name], np.abs(want).max(0), rtol=1e-6)
        np.testing.assert_allclose(
            stats.hessian[name], 2 * want.T @ want / 12, rtol=1e-5, atol=1e-6
        )
    assert collect_statistics(two_layers, params, [x]).hessian == {}


def test_of_our_models_against_a_second_way(make):
    case = make(qkv_bias=True)
    got = collect_statistics(
        matmul_inputs(case.model, hessians=True), case.params, [case.tokens[:1], case.tokens[1:]]
    )
    heads = jax.jit(attention_heads(case.model))(case.params, case.tokens)
    for name in ("layers/keys", "layers/queries"):
        np.testing.assert_allclose(got.absmax[name], jnp.abs(heads[name]).max((1, 2)), rtol=1e-5)
    x = case.params["embed"]["embedding"][case.tokens].reshape(-1, 64)
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + case.config.rms_norm_eps)
    x = np.asarray(x * case.params["layers"]["attn_norm"]["scale"][0], np.float64)
    want = 2 * x.T @ x / len(x)
    np.testing.assert_allclose(got.hessian["layers/q_proj"][0], want, rtol=1e-4, atol=1e-5)
    shapes = {name: h.shape for name, h in got.hessian.items()}
    assert shapes == {
        "layers/q_proj": (2, 64, 64),
        "layers/o_proj": (2, 64, 64),
        "layers/gate_proj": (2, 64, 64),
        "layers/down_proj": (2, 128, 128),
    }


def test_inputs_of_o_and_down_explain_the_residual(make):
    """The taps are the true inputs: x + o(attention) + down(mlp) of one layer gives its output."""
    case = make(num_layers=1, vocab_size=48)
    taps = _tapped(case.model, lambda taps: taps)(case.params, case.tokens % 48)
    p = jax.tree.map(lambda w: w[0], case.params["layers"])
    x = case.params["embed"]["embedding"][case.tokens % 48]
    x = x + taps["layers/o_proj"][0] @ p["o_proj"]["kernel"]
    x = x + taps["layers/down_proj"][0] @ p["down_proj"]["kernel"]
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + case.config.rms_norm_eps)
    logits = (x * case.params["final_norm"]["scale"]) @ case.params["lm_head"]["embedding"].T
    want = case.model.apply({"params": case.params}, case.tokens % 48)
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)


def test_sharded_batches(make):
    case = make()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded = case.stats(case.params, hessians=True)
    case.tokens = jax.device_put(case.tokens, sharding)
    for a, b in zip(*map(jax.tree.leaves, (sharded, case.stats(hessians=True))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_nan_is_named(make):
    case = make()
    kernel = case.params["layers"]["up_proj"]["kernel"].at[1, 0, 5].set(jnp.nan)
    case.params["layers"]["up_proj"]["kernel"] = kernel
    with pytest.raises(ValueError, match="'layers/down_proj' of layer 1 is not finite in channel"):
        case.stats()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e20])
def test_one_number_that_is_not_finite_is_found(rng, value):
    """Among so many that XLA computes with vectors; of 1e20 the square is infinite."""
    x = rng.standard_normal((256, 64)).astype(np.float32)
    x[77, 3] = value
    with pytest.raises(ValueError, match="input 'x' is not finite in channel 3"):
        collect_statistics(lambda _, tokens: {"x": tokens}, {}, [x], hessians=value == 1e20)


def test_refusals(make):
    with pytest.raises(ValueError, match="token_batches is empty"):
        collect_statistics(two_layers, {}, [])
    stats = make().stats()
    with pytest.raises(ValueError, match=r"\[2, 128\] but the weights need \[2, 136\]"):
        statistic(stats.absmax, "layers/down_proj", (2, 136))
    with pytest.raises(ValueError, match="no statistic 'layers/x'"):
        statistic(stats.absmax, "layers/x", (2, 136))


def test_names():
    assert input_name("layers/v_proj/kernel") == "layers/q_proj"
    assert input_name("layers/up_proj/kernel") == "layers/gate_proj"
    assert input_name("a/b/dense/kernel") == "a/b/dense"
