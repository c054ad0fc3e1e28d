"""Published QServe checkpoints against formulas in plain numpy loops, and there and back."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from qserve_jax.checkpoint import CheckpointError, export_qserve, load_model, qserve_format
from qserve_jax.quantization import QuantConfig, dequantize_params, quantize_params
from qserve_jax.quantization.qtensor import W4PerChannel, W4PerGroup

FLOAT: dict[str, Any] = {"precision": "w16a16kv16", "dtype": "float16"}


def qweight_by_formula(codes):
    """int8[N, K/2] of codes [N, K], one byte at a time."""
    n_all, k_all = codes.shape
    octets = np.zeros(n_all * k_all // 2, np.uint8)
    for n in range(n_all):
        for k in range(k_all):
            block = (n >> 5) * (k_all // 32) + (k >> 5)
            row = ((n & 7) << 2) | ((k >> 2) & 3)
            column = (((k >> 4) & 1) << 1) | ((n >> 3) & 1)
            octets[block * 512 + row * 16 + column * 4 + (k & 3)] |= codes[n, k] << (n >> 4 & 1) * 4
    return octets.view(np.int8).reshape(n_all, k_all // 2)


def s2_position(n, order):
    if order == "tile32":
        return (n & ~31) | ((n & 7) << 2) | ((n >> 3) & 3)
    return (n & ~15) | ((n & 7) << 1) | ((n >> 3) & 1)  # 0, 8, 1, 9, 2, 10, ...


def s2_by_formula(values, order):
    """int8[G, N] of values [N, G]."""
    rows = np.zeros(values.shape[::-1], values.dtype)
    for n in range(values.shape[0]):
        rows[:, s2_position(n, order)] = values[n]
    return rows


def converted(w, group_size, order="tile32", eight_bit_zero=False):
    """The tensors of one linear as the two generations of converters make them, in numpy.

    eight_bit_zero: the newer generation, any zero point of level 1 instead of z * s2."""
    if group_size == -1:
        low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
        s1 = ((high - low) / 15).astype(np.float16)
        z = np.round(-low / s1.astype(np.float32))
        codes = np.clip(np.round(w / s1[:, None].astype(np.float32) + z[:, None]), 0, 15)
        qweight = qweight_by_formula(codes.astype(np.uint8))
        return {"qweight": qweight, "s1_scales": s1, "s1_szeros": (z * s1).astype(np.float16)}
    s1 = (np.abs(w).max(1) / 119).astype(np.float16)
    u = np.clip(np.round(w / s1[:, None].astype(np.float32)), -119, 119)
    groups = u.reshape(len(w), -1, 128)
    low, high = np.minimum(groups.min(2), 0), np.maximum(groups.max(2), 0)
    s2 = np.maximum(np.round((high - low) / 15), 1)
    zero = -low if eight_bit_zero else np.round(-low / s2) * s2
    codes = np.round((groups + zero[..., None]) / s2[..., None])
    top = np.floor((127 + zero) / s2)[..., None]  # the converter keeps level 1 in int8
    codes = np.clip(codes, 0, np.minimum(15, top)).reshape(w.shape)
    return {
        "qweight": qweight_by_formula(codes.astype(np.uint8)),
        "s1_scales": s1,
        "s2_scales": s2_by_formula(s2.astype(np.int8), order),
        "s2_zeros": s2_by_formula((-zero).astype(np.int64).astype(np.int8), order),
    }


def weight_of(tensors, order):
    """float32 weights [N, K] of one linear, by w8 = int8((code * s2 + s2_zero) mod 256)."""
    n_all, half = tensors["qweight"].shape
    octets = tensors["qweight"].reshape(-1).view(np.uint8)
    codes = np.zeros((n_all, 2 * half), np.int64)
    for n in range(n_all):
        for k in range(2 * half):
            block = (n >> 5) * (2 * half // 32) + (k >> 5)
            row = ((n & 7) << 2) | ((k >> 2) & 3)
            column = (((k >> 4) & 1) << 1) | ((n >> 3) & 1)
            octet = octets[block * 512 + row * 16 + column * 4 + (k & 3)]
            codes[n, k] = (octet >> ((n >> 4) & 1) * 4) & 15
    s1 = tensors["s1_scales"].astype(np.float32)[:, None]
    if "s1_szeros" in tensors:
        return codes * s1 - tensors["s1_szeros"].astype(np.float32)[:, None]
    at = [s2_position(n, order) for n in range(n_all)]
    s2, zeros = (tensors[x][:, at].T.astype(np.int64) for x in ("s2_scales", "s2_zeros"))
    value = codes.reshape(n_all, -1, 128) * s2[..., None] + zeros[..., None]
    return (value % 256).astype(np.uint8).view(np.int8).reshape(codes.shape) * s1


@pytest.fixture
def publish(checkpoint):
    """publish(group_size, ...) -> a folder of `converted` projections of Gaussian weights."""

    def write(*args, change=None, **options):
        for name in [n for n in checkpoint.tensors if n.endswith("_proj.weight")]:
            module, w = name.removesuffix(".weight"), checkpoint.tensors.pop(name)
            for field, tensor in converted(w, *args, **options).items():
                checkpoint.tensors[f"{module}.{field}"] = tensor
        if change is not None:
            change(checkpoint)
        for name, tensor in checkpoint.tensors.items():
            if tensor.dtype == np.float32:
                checkpoint.tensors[name] = tensor.astype(np.float16)
        return checkpoint.write()

    return write


def test_codes_lie_as_the_formula_says(rng):
    codes = rng.integers(0, 16, (64, 96), np.uint8)
    expected = qweight_by_formula(codes)
    np.testing.assert_array_equal(qserve_format.qweight_from_codes(jnp.asarray(codes)), expected)
    np.testing.assert_array_equal(qserve_format.codes_from_qweight(jnp.asarray(expected)), codes)


@pytest.mark.parametrize("order", qserve_format.S2_ORDERS)
def test_level_two_lies_as_the_formula_says(rng, order):
    values = rng.integers(-128, 128, (96, 3), np.int8)
    expected = s2_by_formula(values, order)
    np.testing.assert_array_equal(qserve_format.to_s2_order(jnp.asarray(values), order), expected)
    np.testing.assert_array_equal(qserve_format.from_s2_order(jnp.asarray(expected), order), values)


@pytest.mark.parametrize("eight_bit_zero", [False, True])
@pytest.mark.parametrize("order", qserve_format.S2_ORDERS)
def test_all_variants_with_groups_come_in_exactly(publish, checkpoint, order, eight_bit_zero):
    loaded = load_model(publish(128, order, eight_bit_zero), dtype="float32")
    assert loaded.format == "qserve" and loaded.quant_config == QuantConfig()
    assert_imported(loaded, checkpoint, order, W4PerGroup)


@pytest.mark.parametrize("eight_bit_zero", [False, True])
def test_both_orders_come_in_as_the_same_weights(publish, checkpoint, eight_bit_zero):
    floats, trees, stored = dict(checkpoint.tensors), [], []
    for order in qserve_format.S2_ORDERS:
        checkpoint.tensors = dict(floats)
        trees.append(load_model(publish(128, order, eight_bit_zero)).params)
        stored.append(checkpoint.tensors["model.layers.1.mlp.up_proj.s2_scales"])
    assert not np.array_equal(*stored)
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_per_channel_comes_in_exactly(publish, checkpoint):
    loaded = load_model(publish(-1), dtype="float32")
    assert loaded.quant_config == QuantConfig(group_size=-1)
    assert_imported(loaded, checkpoint, "tile32", W4PerChannel)


def assert_imported(loaded, checkpoint, order, kind):
    floats = dequantize_params(loaded.params)
    for layer in range(2):
        for projection in ("self_attn.k_proj", "mlp.down_proj"):
            module = f"model.layers.{layer}.{projection}."
            found = checkpoint.tensors.items()
            tensors = {n.removeprefix(module): t for n, t in found if n.startswith(module)}
            name = projection.split(".")[1]
            assert isinstance(loaded.params["layers"][name]["kernel"], kind)
            np.testing.assert_array_equal(
                floats["layers"][name]["kernel"][layer].T, weight_of(tensors, order)
            )


@pytest.mark.parametrize("group_size", [-1, 128])
def test_out_and_in_again_is_the_identity(checkpoint, tmp_path, group_size):
    exact = load_model(checkpoint.write(), **FLOAT)
    config = QuantConfig(group_size=group_size, scale_dtype="float16")
    params = quantize_params(exact.params, config)
    assert export_qserve(tmp_path / "out", params, exact.config) == 0
    again = load_model(tmp_path / "out", dtype="float16")
    assert jax.tree.structure(again.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again.params, params)
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    contract = {"quant_method": "qoq", "wbits": 4, "group_size": group_size}
    assert hf["quantization_config"] == contract
    dtypes = {"qweight": "I8", "s1_scales": "F16", "s1_szeros": "F16", "s2_zeros": "I8"}
    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as f:
        for name in f.keys():  # noqa: SIM118 (not a dict)
            field = name.rpartition(".")[2]
            assert f.get_slice(name).get_dtype() == dtypes.get(
                field, "I8" if "s2" in field else "F16"
            )


def test_float32_scales_are_rounded_and_said_so(checkpoint, tmp_path):
    exact = load_model(checkpoint.write(), **FLOAT)
    params = quantize_params(exact.params)
    error = export_qserve(tmp_path / "out", params, exact.config)
    assert 2**-14 < error <= 2**-11
    again = load_model(tmp_path / "out", dtype="float16").params["layers"]["up_proj"]["kernel"]
    kernel = params["layers"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(again.codes, kernel.codes)
    np.testing.assert_array_equal(again.channel_scale, kernel.channel_scale.astype(np.float16))


def test_tied_embeddings_are_written_twice_and_stay_tied(checkpoint, tmp_path):
    checkpoint.config["tie_word_embeddings"] = True
    del checkpoint.tensors["lm_head.weight"]
    loaded = load_model(checkpoint.write(), dtype="float16", scale_dtype="float16")
    export_qserve(tmp_path / "out", loaded.params, loaded.config)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    head, embedding = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    np.testing.assert_array_equal(head, embedding)
    assert "lm_head" not in load_model(tmp_path / "out").params


def test_the_statistic_is_far_from_ambiguous_for_gaussian_weights(publish, monkeypatch):
    folder = publish(128)
    monkeypatch.setattr(qserve_format, "AMBIGUITY", 3.0)
    assert load_model(folder).format == "qserve"


def test_an_ambiguous_order_is_refused_unless_named(publish):
    def alike(checkpoint):
        for name in [n for n in checkpoint.tensors if n.endswith("s2_scales")]:
            checkpoint.tensors[name][:] = 8
            checkpoint.tensors[name.replace("scales", "zeros")][:] = -64

    folder = publish(128, change=alike)
    with pytest.raises(CheckpointError, match="cannot be told .* name it by s2_order") as error:
        load_model(folder)
    assert "\n" not in str(error.value)
    assert load_model(folder, s2_order="tile16").format == "qserve"
    with pytest.raises(CheckpointError, match="s2_order 'x' is none of tile32, tile16"):
        load_model(folder, s2_order="x")


def test_a_code_outside_int8_is_refused_by_name(publish):
    def overflow(checkpoint):
        """(s2, z) = (12, 4) and the code 15 give 132, in channel 0 and group 1 of layer 1."""
        module = "model.layers.1.mlp.down_proj"
        checkpoint.tensors[f"{module}.s2_scales"][1, 0] = 12
        checkpoint.tensors[f"{module}.s2_zeros"][1, 0] = -48
        octets = checkpoint.tensors[f"{module}.qweight"].reshape(-1).view(np.uint8)
        octets[4 * 512] |= 15  # n = 0, k = 128

    words = (
        r"layers.1.mlp.down_proj in .* code 15 of channel 0, input 128 gives 15 \* 12 \+ -48 = 132"
    )
    with pytest.raises(CheckpointError, match=words) as error:
        load_model(publish(128, change=overflow))
    assert "\n" not in str(error.value)


def test_a_zero_that_does_not_fit_int8_is_refused(publish):
    def wrap(checkpoint):
        """-15 * 10 = -150 is stored as 106: right modulo 256, but not what a kernel computes."""
        module = "model.layers.0.self_attn.k_proj"
        checkpoint.tensors[f"{module}.qweight"][:] = -1  # all codes 15
        checkpoint.tensors[f"{module}.s2_scales"][:] = 10
        checkpoint.tensors[f"{module}.s2_zeros"][:] = 106

    with pytest.raises(CheckpointError, match=r"k_proj .* = 256, outside int8"):
        load_model(publish(128, change=wrap), s2_order="tile32")


def test_config_and_tensors_must_agree(publish, checkpoint):
    folder = publish(128)
    checkpoint.config["quantization_config"] = {"quant_method": "qoq", "wbits": 4, "group_size": -1}
    checkpoint.write()
    with pytest.raises(CheckpointError, match="says qoq with group_size -1, the tensors 128"):
        load_model(folder)
    checkpoint.config["quantization_config"]["group_size"] = 128
    checkpoint.write()
    assert load_model(folder).format == "qserve"
    with pytest.raises(CheckpointError, match="group_size=128, not -1"):
        load_model(folder, group_size=-1)


def test_missing_and_mistyped_tensors_are_listed(publish, checkpoint):
    folder = publish(128)
    tensors = checkpoint.tensors
    del tensors["model.layers.1.mlp.up_proj.s1_scales"]
    name = "model.layers.0.mlp.up_proj.s2_zeros"
    tensors[name] = tensors[name].astype(np.int16)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="1 missing: .*up_proj.s1_scales.* I16 instead of I8"):
        load_model(folder)


def test_what_the_format_cannot_hold_is_refused(checkpoint, tmp_path):
    exact = load_model(checkpoint.write(), **FLOAT)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="not W8PerChannel"):
        export_qserve(out, quantize_params(exact.params, QuantConfig(weight_bits=8)), exact.config)
    params = quantize_params(exact.params)
    scale = params["layers"]["up_proj"]["kernel"].channel_scale
    for value, words in ((1e6, "not finite in float16"), (3e-8, "too small for float16")):
        kernel = params["layers"]["up_proj"]["kernel"]
        kernel = dataclasses.replace(kernel, channel_scale=scale.at[1, 2].set(value))
        layers = params["layers"] | {"up_proj": {"kernel": kernel}}
        with pytest.raises(ValueError, match=rf"layers.1.mlp.up_proj.s1_scales.*{words}"):
            export_qserve(out, params | {"layers": layers}, exact.config)
        assert not list(tmp_path.glob("out*"))
