"""Rotary embeddings against transformers 5.23 and against complex rotation in float64."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.models.config import ModelConfig, RopeConfig
from qserve_jax.models.rope import apply_rope, rope_frequencies, yarn_attention_factor

MSCALES: dict[str, Any] = {"mscale": 1.0, "mscale_all_dim": 0.707}
LLAMA3: dict[str, Any] = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def model(rope_type="default", max_positions=2048, head_dim=16, **rope):
    return ModelConfig(
        model_type="llama",
        vocab_size=8,
        hidden_size=4 * head_dim,
        intermediate_size=8,
        num_layers=1,
        num_heads=4,
        num_kv_heads=4,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rope=RopeConfig(rope_type=rope_type, **rope),
    )


# inv_freq and attention_scaling of transformers' LlamaRotaryEmbedding, head_dim 16. It rounds to
# float32 at each step, so the last digit or two of its float32 values are its own.
EXPECTED = {
    "default": (
        model(),
        [1.0, 0.3162277638912201, 0.10000000149011612, 0.03162277862429619]
        + [0.009999999776482582, 0.003162277862429619, 0.0010000000474974513]
        + [0.0003162277862429619],
        1.0,
    ),
    "default, theta 5e6": (
        model(theta=5e6),
        [1.0, 0.14542154967784882, 0.02114742621779442, 0.003075291169807315]
        + [0.0004472136206459254, 6.503448821604252e-05, 9.457416126679163e-06]
        + [1.3753120811088593e-06],
        1.0,
    ),
    "linear": (
        model("linear", factor=4.0),
        [0.25, 0.07905694097280502, 0.02500000037252903, 0.007905694656074047]
        + [0.0024999999441206455, 0.0007905694656074047, 0.0002500000118743628]
        + [7.905694656074047e-05],
        1.0,
    ),
    "llama 3.1": (
        model("llama3", 131072, theta=5e5, original_max_position_embeddings=8192, **LLAMA3),
        [1.0, 0.193922758102417, 0.03760603070259094, 0.00729266507551074]
        + [0.0005248460220173001, 3.428102354519069e-05, 6.647869668086059e-06]
        + [1.289173155782919e-06],
        1.0,
    ),
    "yarn, Qwen2.5": (
        model("yarn", 32768, theta=1e6, factor=4.0, original_max_position_embeddings=32768),
        [1.0, 0.17782793939113617, 0.03162277862429619, 0.004217559937387705]
        + [0.0005000000237487257, 4.4456985051510856e-05, 7.905693564680405e-06]
        + [1.405853367941745e-06],
        1.138629436111989,
    ),
    "yarn, original length from the model": (
        model("yarn", 2048, factor=16.0),
        [1.0, 0.3162277638912201, 0.10000000149011612, 0.024211188778281212]
        + [0.0053125000558793545, 0.0009388012113049626, 6.25000029685907e-05]
        + [1.9764236640185118e-05],
        1.2772588722239782,
    ),
    "yarn, two mscales and own betas": (
        model("yarn", 4096, factor=40.0, beta_fast=16.0, beta_slow=2.0, **MSCALES),
        [1.0, 0.3162277638912201, 0.10000000149011612, 0.03162277862429619]
        + [0.006749999243766069, 0.0011067971354350448, 2.499999936844688e-05]
        + [7.905694474175107e-06],
        1.0857263992561355,
    ),
    "yarn, one mscale has no effect": (
        model("yarn", 4096, factor=40.0, mscale=0.707),
        [1.0, 0.3162277638912201, 0.10000000149011612, 0.023914724588394165]
        + [0.005124999675899744, 0.0008498621755279601, 2.499999936844688e-05]
        + [7.905694474175107e-06],
        1.3688879454113936,
    ),
    "yarn, attention_factor, not truncated": (
        model("yarn", 1024, factor=4.0, attention_factor=1.25, truncate=False),
        [1.0, 0.3162277638912201, 0.08539863675832748, 0.019126776605844498]
        + [0.003556971438229084, 0.0007905694656074047, 0.0002500000118743628]
        + [7.905694656074047e-05],
        1.25,
    ),
}
DYNAMIC = model("dynamic", 64, factor=2.5)
DYNAMIC_100 = [1.0, 0.2789476811885834, 0.07781180739402771, 0.021705422550439835]
DYNAMIC_100 += [0.006054677069187164, 0.0016889381222426891, 0.0004711253859568387]
DYNAMIC_100 += [0.00013141933595761657]
DYNAMIC_1000 = [1.0, 0.18838012218475342, 0.03548707067966461, 0.006685058120638132]
DYNAMIC_1000 += [0.0012593320570886135, 0.00023723313643131405, 4.46900085080415e-05]
DYNAMIC_1000 += [8.418708603130654e-06]
RTOL = 5e-7  # four units in the last place of float32


@pytest.mark.parametrize("name", EXPECTED)
def test_frequencies_equal_transformers(name):
    config, inv_freq, scale = EXPECTED[name]
    got, got_scale = rope_frequencies(config)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, inv_freq, rtol=RTOL, atol=0)
    assert got_scale == pytest.approx(scale, rel=1e-15)


def test_dynamic_has_one_base_per_sequence_under_jit():
    lengths = jnp.array([1, 64, 100, 1000], jnp.int32)
    got, scale = jax.jit(rope_frequencies, static_argnums=0)(DYNAMIC, lengths)
    unscaled = rope_frequencies(model())[0]
    assert got.shape == (4, 8) and got.dtype == jnp.float32 and scale == 1.0
    np.testing.assert_array_equal(got[0], unscaled)
    np.testing.assert_array_equal(got[1], unscaled)  # exactly at the limit: not scaled yet
    np.testing.assert_allclose(got[2:], [DYNAMIC_100, DYNAMIC_1000], rtol=RTOL, atol=0)


def test_dynamic_without_lengths_is_unscaled():
    np.testing.assert_array_equal(rope_frequencies(DYNAMIC)[0], rope_frequencies(model())[0])


def test_lengths_change_nothing_for_other_types():
    config = EXPECTED["yarn, Qwen2.5"][0]
    got = rope_frequencies(config, jnp.array([10, 10**6], jnp.int32))[0]
    np.testing.assert_array_equal(got, rope_frequencies(config)[0])


def test_yarn_factor_one_is_no_scaling():
    assert yarn_attention_factor(RopeConfig("yarn", mscale=0.5, mscale_all_dim=2.0)) == 1.0
    got = rope_frequencies(model("yarn", factor=1.0))[0]
    np.testing.assert_array_equal(got, rope_frequencies(model())[0])


def test_context_length_counts_the_scaling():
    assert model(max_positions=64).context_length == 64
    assert model("linear", 64, factor=4.0).context_length == 256
    assert DYNAMIC.context_length == 160
    assert EXPECTED["llama 3.1"][0].context_length == 131072
    assert EXPECTED["yarn, Qwen2.5"][0].context_length == 131072
    assert EXPECTED["yarn, attention_factor, not truncated"][0].context_length == 4096


def rotate(x, positions, inv_freq, scale):
    """Rotation of dimensions i and i + H/2 as one complex number, in float64."""
    x, inv_freq = np.asarray(x, np.float64), np.asarray(inv_freq, np.float64)
    half = x.shape[-1] // 2
    angles = positions[..., None] * np.broadcast_to(inv_freq, (x.shape[0], half))[:, None]
    z = (x[..., :half] + 1j * x[..., half:]) * (scale * np.exp(1j * angles))[:, :, None]
    return np.concatenate([z.real, z.imag], axis=-1)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_apply_rope_is_a_rotation_by_position(per_sequence):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 5, 16)).astype(np.float32)
    positions = np.array([[0, 1, 2], [7, 50, 31]], np.int32)
    lengths = jnp.array([3, 1000], jnp.int32) if per_sequence else None
    inv_freq = rope_frequencies(DYNAMIC, lengths)[0]
    got = apply_rope(jnp.asarray(x), jnp.asarray(positions), inv_freq, 1.25)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, rotate(x, positions, inv_freq, 1.25), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(got[0, 0], 1.25 * x[0, 0])  # position 0 only scales


def test_apply_rope_rotates_in_float32_and_rounds_once():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((1, 4, 2, 16)), jnp.bfloat16)
    positions = jnp.array([[0, 3, 500, 4000]], jnp.int32)
    inv_freq, scale = rope_frequencies(EXPECTED["yarn, Qwen2.5"][0])
    got = apply_rope(x, positions, inv_freq, scale)
    assert got.dtype == jnp.bfloat16 and got.shape == x.shape
    wide = apply_rope(x.astype(jnp.float32), positions, inv_freq, scale)
    np.testing.assert_array_equal(got, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_type": "longrope"}, "'longrope' is not supported: use a checkpoint with one of"),
        ({"theta": 0.0}, "theta=0.0 is out of range: set a number above 1"),
        ({"factor": 0.5}, "factor=0.5 is out of range: set a number of at least 1"),
        ({"factor": float("nan")}, "factor=nan is out of range"),
        ({"factor": True}, "factor=True is out of range"),
        ({"low_freq_factor": 4.0}, "high_freq_factor=4.0 is not above low_freq_factor=4.0"),
        ({"beta_fast": 1.0, "beta_slow": 2.0}, "beta_fast=1.0 is not above beta_slow=2.0"),
        ({"attention_factor": 0.0}, "attention_factor=0.0 is out of range"),
        ({"truncate": 1}, "truncate=1 is not a boolean"),
    ],
)
def test_values_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeConfig(**fields)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_attention_heads=4 is not a multiple of .*=3"):
        dataclasses.replace(model(), num_kv_heads=3)
    with pytest.raises(ValueError, match="head_dim=15 is odd"):
        model(head_dim=15)
    with pytest.raises(ValueError, match="head_dim=2 is too small: dynamic"):
        model("dynamic", head_dim=2)
