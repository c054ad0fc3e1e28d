"""load_model: every tensor in its place, exactly, and quantised as quantize_params does."""

import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qserve_jax.checkpoint import load_model, stream
from qserve_jax.quantization import QuantConfig, W4PerChannel, W4PerGroup, quantize_params
from qserve_jax.quantization.config import PRECISIONS

GOLDEN = Path(__file__).parents[1] / "golden"


def load_float(folder, dtype="float32"):
    return load_model(folder, precision="w16a16kv16", dtype=dtype)


def assert_same(a, b):
    """The same tree: structure (containers' static fields too), dtypes and every bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def test_every_tensor_is_in_its_place(checkpoint):
    m = load_float(checkpoint.write())
    layers, tensors = m.params["layers"], checkpoint.tensors
    blocks = {
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        **{f"{x}_proj": f"self_attn.{x}_proj" for x in "qkvo"},
        **{f"{x}_proj": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    }
    assert set(layers) == set(blocks)
    for name, hf_name in blocks.items():
        for i in range(2):
            module = f"model.layers.{i}.{hf_name}"
            for parameter, value in layers[name].items():
                tensor = tensors[f"{module}.{'bias' if parameter == 'bias' else 'weight'}"]
                np.testing.assert_array_equal(value[i], tensor.T)
    assert {name for name in layers if "bias" in layers[name]} == {"q_proj", "k_proj", "v_proj"}
    for name, hf_name in {"embed": "model.embed_tokens", "lm_head": "lm_head"}.items():
        np.testing.assert_array_equal(m.params[name]["embedding"], tensors[f"{hf_name}.weight"])
    np.testing.assert_array_equal(m.params["final_norm"]["scale"], tensors["model.norm.weight"])


def test_fields(checkpoint):
    m = load_model(checkpoint.write(), precision="w8a8kv8", backend="reference")
    assert m.model.config is m.config and m.config.num_layers == 2
    assert m.quant_config == QuantConfig.preset("w8a8kv8")
    assert (m.model.act_bits, m.model.backend) == (8, "reference")
    assert m.tokenizer is None
    assert m.path == checkpoint.folder


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("wanted", ["float32", jnp.bfloat16, np.float16])
def test_dtypes_are_read_and_cast_exactly(checkpoint, stored, wanted):
    checkpoint.tensors = {n: t.astype(stored) for n, t in checkpoint.tensors.items()}
    params = load_float(checkpoint.write(), wanted).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(wanted)}
    for name in ("model.layers.1.mlp.down_proj.weight", "lm_head.weight"):
        expected = checkpoint.tensors[name].astype(jnp.dtype(wanted))
        found = {
            "lm_head.weight": params["lm_head"]["embedding"],
            "model.layers.1.mlp.down_proj.weight": params["layers"]["down_proj"]["kernel"][1].T,
        }[name]
        assert np.ascontiguousarray(found).tobytes() == expected.tobytes()


@pytest.mark.parametrize("group_size", [-1, 128])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_quantized_load_is_quantize_params_of_the_float_load(checkpoint, precision, group_size):
    folder = checkpoint.write()
    config = QuantConfig.preset(precision, group_size=group_size)
    loaded = load_model(folder, precision=precision, group_size=group_size, dtype="float32")
    assert_same(loaded.params, quantize_params(load_float(folder).params, config))
    assert loaded.quant_config == config


def test_codes_do_not_depend_on_dtype(checkpoint):
    """They come from the values in the file, not from rounded ones."""
    folder = checkpoint.write()
    a, b = (
        load_model(folder, dtype=d).params["layers"]["q_proj"]["kernel"]
        for d in ("float32", "bfloat16")
    )
    assert isinstance(a, W4PerGroup) and isinstance(b, W4PerGroup)
    assert (a.source.dtype, b.source.dtype) == ("float32", "bfloat16")
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("precision", ["w4a8kv4", "w16a16kv16"])
def test_blocks_change_nothing(checkpoint, monkeypatch, precision):
    folder = checkpoint.write()
    whole = load_model(folder, precision=precision)
    monkeypatch.setattr(stream, "BLOCK_ELEMENTS", 128 * 100)
    assert len(list(stream.row_blocks((256, 128)))) == 3
    assert_same(load_model(folder, precision=precision).params, whole.params)


@pytest.mark.parametrize("shape", [(1,), (7,), (1, 8), (7, 3), (64, 4), (65, 4), (5, 1000)])
def test_row_blocks_cover_all_rows_with_one_size(monkeypatch, shape):
    monkeypatch.setattr(stream, "BLOCK_ELEMENTS", 64)
    blocks = list(stream.row_blocks(shape))
    sizes = {stop - start for start, stop in blocks}
    assert len(sizes) == 1
    assert sizes.pop() * np.prod(shape[1:], dtype=int) <= max(64, np.prod(shape[1:], dtype=int))
    assert {i for start, stop in blocks for i in range(start, stop)} == set(range(shape[0]))


def test_sharded_equals_single(tmp_path):
    folder = GOLDEN / "llama_sharded"
    tensors = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert_same(load_float(folder).params, load_float(tmp_path).params)


def test_only_safetensors_of_another_name(checkpoint):
    folder = checkpoint.write()
    whole = load_float(folder).params
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert_same(load_float(folder).params, whole)


def test_what_says_nothing_new_is_ignored(checkpoint):
    checkpoint.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(32, np.float32)
    checkpoint.config["tie_word_embeddings"] = True
    checkpoint.tensors["lm_head.weight"] = checkpoint.tensors["model.embed_tokens.weight"].copy()
    assert "lm_head" not in load_float(checkpoint.write()).params


def test_end_tokens_are_those_of_generation_config(checkpoint):
    checkpoint.config["eos_token_id"] = 3
    folder = checkpoint.write()
    assert load_float(folder).config.eos_token_ids == (3,)
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [4, 5]}))
    assert load_float(folder).config.eos_token_ids == (4, 5)
    generation.write_text(json.dumps({"eos_token_id": None}))
    assert load_float(folder).config.eos_token_ids == (3,)


def test_config_may_begin_with_a_byte_order_mark(checkpoint):
    file = checkpoint.write() / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_float(checkpoint.folder).config.num_layers == 2


def narrow(checkpoint):
    """Make the MLP so narrow that down_proj's K is no multiple of 128."""
    checkpoint.config["intermediate_size"] = 96
    for name, t in checkpoint.tensors.items():
        if ".mlp." in name:
            checkpoint.tensors[name] = t[:96] if t.shape[0] == 256 else t[:, :96].copy()
    return checkpoint.write()


def test_fallback_is_announced_once_and_is_that_of_quantize_params(checkpoint):
    folder = narrow(checkpoint)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load_model(folder, dtype="float32")
    assert len(caught) == 1 and caught[0].category is UserWarning
    message = str(caught[0].message)
    assert "layers/down_proj/kernel" in message and "K=96" in message
    assert "up_proj" not in message
    assert isinstance(loaded.params["layers"]["down_proj"]["kernel"], W4PerChannel)
    assert isinstance(loaded.params["layers"]["up_proj"]["kernel"], W4PerGroup)
    with pytest.warns(UserWarning) as expected:
        assert_same(loaded.params, quantize_params(load_float(folder).params))
    assert str(expected[0].message) == message


def test_strict_refuses_the_fallback_before_reading(checkpoint, monkeypatch):
    folder = narrow(checkpoint)
    monkeypatch.setattr(stream, "read_rows", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(ValueError, match=r"layers/down_proj/kernel \(K=96 .*group_size=-1"):
        load_model(folder, strict=True)


def test_progress_is_shown_on_stderr_when_asked_for(checkpoint, capfd):
    folder = checkpoint.write()
    load_float(folder)
    assert capfd.readouterr() == ("", "")
    load_model(folder, precision="w16a16kv16", progress=True)
    out, err = capfd.readouterr()
    assert out == "" and f"{len(checkpoint.tensors)}/{len(checkpoint.tensors)}" in err


def test_small_trained_llama_tells_its_story(shared_data):
    """The text is that of shared data's own description of the model: greedy, float32."""
    m = load_float(shared_data / "stories260k-hf")
    apply = jax.jit(lambda params, tokens: m.model.apply({"params": params}, tokens))
    ids = m.tokenizer.encode("Once upon a time")
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(ids)] = ids
    for n in range(len(ids), 64):
        tokens[0, n] = apply(m.params, tokens)[0, n - 1].argmax()
    story = ", there was a little girl named Lily. She loved to play outside in the park. "
    story += "One day, she saw a big, red ball."
    assert m.tokenizer.decode(tokens[0], skip_special_tokens=True).startswith(
        "Once upon a time" + story
    )


def test_small_trained_llama_falls_to_per_channel(shared_data):
    with pytest.warns(UserWarning, match="7 leaves .*K=172.*K=64") as caught:
        m = load_model(shared_data / "stories260k-hf")
    assert len(caught) == 1
    kernels = [m.params["layers"][name]["kernel"] for name in ("q_proj", "down_proj")]
    assert all(isinstance(kernel, W4PerChannel) for kernel in kernels)
    with pytest.raises(ValueError, match="7 leaves"):
        load_model(shared_data / "stories260k-hf", strict=True)
