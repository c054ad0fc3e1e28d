"""The fused tree gives what the canonical tree gives."""

import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.models import CausalLM, ModelConfig, param_shapes
from qserve_jax.models.layers import join_in_place, projections, split_in_place
from qserve_jax.pallas_kernels import prepare, prepare_for_backend
from qserve_jax.quantization import QuantConfig, dequantize_params, quantize_params
from qserve_jax.quantization.qtensor import W4PerChannel, W4PerGroup, W8PerChannel, is_quantized

CONFIG = ModelConfig("llama", 64, 128, 256, 2, 4, 2, 32, 64, qkv_bias=True, mlp_bias=True)
KINDS = {
    W4PerGroup: QuantConfig(),
    W4PerChannel: QuantConfig(group_size=-1),
    W8PerChannel: QuantConfig(weight_bits=8),
    jax.Array: None,
}
WIDTHS = {"q_proj": 128, "k_proj": 64, "v_proj": 64, "gate_proj": 256, "up_proj": 256}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def make_params(kind, *, bias=True):
    """A canonical tree of random numbers, quantised, with or without its biases."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape) * 0.1, jnp.float32),
        param_shapes(CONFIG),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    for p in params["layers"].values() if not bias else ():
        p.pop("bias", None)
    return params if KINDS[kind] is None else quantize_params(params, KINDS[kind])


def assert_same(kind, actual, expected):
    """Bit for bit; float products of another width may be summed in another order."""
    if kind is jax.Array:
        largest = float(jnp.abs(expected).max())
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * largest)
    else:
        np.testing.assert_array_equal(actual, expected)


@every_kind
@pytest.mark.parametrize("bias", [False, True])
def test_projections(kind, bias, rng):
    params = make_params(kind, bias=bias)
    fused = prepare_for_backend(params)
    assert set(fused["layers"]) == (
        set(params["layers"]) - {name for names in FUSED.values() for name in names} | set(FUSED)
    )
    x = jnp.asarray(rng.standard_normal((3, 128)), jnp.float32)

    def project(layers, names, fused_name):
        scanned, in_place = split_in_place(layers)
        p = join_in_place(jax.tree.map(lambda leaf: leaf[1], scanned), in_place)
        return projections(x, p, names, fused_name, act_bits=8, layer=1, dtype=jnp.float32)

    project = jax.jit(project, static_argnums=(1, 2))
    for fused_name, names in FUSED.items():
        apart = project(params["layers"], names, fused_name)
        (together,) = project(fused["layers"], names, fused_name)
        assert [y.shape[-1] for y in apart] == [WIDTHS[name] for name in names]
        assert_same(kind, together, jnp.concatenate(apart, axis=-1))


@every_kind
def test_logits(kind, rng):
    params = make_params(kind)
    tokens = jnp.asarray(rng.integers(0, 64, (2, 8)))
    apply = jax.jit(CausalLM(CONFIG).apply)
    apart = apply({"params": params}, tokens)
    together = apply({"params": prepare_for_backend(params)}, tokens)
    assert float(jnp.abs(apart).max()) > 0.1
    assert_same(kind, together, apart)


@pytest.mark.parametrize("kind", [W4PerGroup, W4PerChannel, W8PerChannel])
def test_dequantised_fused_kernels(kind):
    params = make_params(kind)
    fused, apart = (
        dequantize_params(tree)["layers"] for tree in (prepare_for_backend(params), params)
    )
    for fused_name, names in FUSED.items():
        for key in ("kernel", "bias"):
            expected = jnp.concatenate([apart[name][key] for name in names], axis=-1)
            np.testing.assert_array_equal(fused[fused_name][key], expected)


def test_differently_quantised_projections_stay_apart():
    params = make_params(W4PerGroup)
    other = make_params(W4PerChannel)["layers"]
    params["layers"]["k_proj"] = other["k_proj"]
    del params["layers"]["up_proj"]["bias"]
    layers = prepare_for_backend(params)["layers"]
    assert set(layers) == set(params["layers"])


def test_the_argument_is_left_alone_and_the_rest_shared():
    params = make_params(W4PerGroup)
    names = set(params["layers"])
    fused = prepare_for_backend(params)
    assert set(params["layers"]) == names
    assert fused["embed"] is params["embed"]
    assert fused["layers"]["o_proj"]["kernel"] is params["layers"]["o_proj"]["kernel"]
    again = prepare_for_backend(fused)  # nothing left to fuse
    assert set(again["layers"]) == set(fused["layers"])


@every_kind
def test_in_place_frees_the_parts_of_one_projection_before_the_next(kind, monkeypatch):
    params = make_params(kind)
    expected = prepare_for_backend(params)
    arrays = {
        name: [weakref.ref(leaf) for leaf in jax.tree.leaves(params["layers"][name])]
        for name in WIDTHS
    }
    alive = []
    fuse = prepare._fuse

    def watch(parts):
        alive.append([n for n, refs in arrays.items() if any(ref() is not None for ref in refs)])
        return fuse(parts)

    monkeypatch.setattr(prepare, "_fuse", watch)
    result = prepare_for_backend(params, in_place=True)
    assert result is params
    assert alive == [list(WIDTHS), ["gate_proj", "up_proj"]]
    assert all(ref() is None for refs in arrays.values() for ref in refs)
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, result, expected)


def test_in_place_needs_dicts():
    params = types.MappingProxyType(make_params(W8PerChannel)["layers"])
    with pytest.raises(ValueError, match="needs plain dicts, got mappingproxy: pass"):
        prepare_for_backend({"layers": params}, in_place=True)


def test_under_jit():
    params = make_params(W8PerChannel)
    shapes = jax.eval_shape(prepare_for_backend, params)
    fused = shapes["layers"]["qkv_proj"]["kernel"]
    assert is_quantized(fused) and fused.codes.shape == (2, 256, 128)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend='cuda' is unknown"):
        prepare_for_backend(make_params(W8PerChannel), "cuda")
