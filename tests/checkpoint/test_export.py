"""Exported directories against the checkpoints that transformers wrote (tests/golden)."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from qserve_jax.checkpoint import load_model
from qserve_jax.checkpoint.export import config_to_hf, export_hf
from qserve_jax.models import ModelConfig, RopeConfig, config_from_hf, param_shapes

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINTS = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
CONFIG = ModelConfig("llama", 11, 8, 12, 2, 2, 1, 4, 32, bos_token_id=0, eos_token_ids=(0,))


def tensors(folder):
    """name -> (safetensors' dtype, float32 values) of all tensors in a directory."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as f:
            for name in f.keys():  # noqa: SIM118 (not a dict)
                dtype = f.get_slice(name).get_dtype()
                found[name] = (dtype, np.asarray(f.get_tensor(name), np.float32))
    return found


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, param_shapes(config), is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize("name", ["llama_biases", "llama_sharded", "qwen2_tied", "qwen3_untied"])
def test_export_undoes_load(tmp_path, name):
    loaded = load_model(GOLDEN / name, precision="w16a16kv16", dtype="float32")
    export_hf(tmp_path, loaded.params, loaded.config, dtype="float32")
    expected, found = tensors(GOLDEN / name), tensors(tmp_path)
    assert found.keys() == expected.keys()
    for tensor, (dtype, values) in expected.items():
        assert found[tensor][0] == dtype == "F32"
        np.testing.assert_array_equal(found[tensor][1], values, err_msg=tensor)
    again = load_model(tmp_path, precision="w16a16kv16", dtype="float32")
    assert again.config == dataclasses.replace(loaded.config, dtype="float32")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_config_survives(name):
    config = config_from_hf(json.loads((GOLDEN / name / "config.json").read_text()))
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_transformers_reads_the_config_as_its_own(tmp_path, name):
    hf = config_to_hf(config_from_hf(json.loads((GOLDEN / name / "config.json").read_text())))
    (tmp_path / "config.json").write_text(json.dumps(hf))
    ours, theirs = (transformers_config(path) for path in (tmp_path, GOLDEN / name))
    known = theirs.keys() - {"rope_theta", "rope_scaling"}  # translated to rope_parameters
    for key in {*hf, "dtype", "rope_parameters", "layer_types"} & known:
        assert ours[key] == theirs[key], key


def transformers_config(folder):
    """What transformers reads, without the spellings that mean the same."""
    config = pytest.importorskip("transformers").AutoConfig.from_pretrained(folder).to_dict()
    rope = config["rope_parameters"].items()
    config["rope_parameters"] = {k: v for k, v in rope if k != "type" and v is not None}
    return config


def test_bfloat16_is_rounded_once_and_named(tmp_path):
    params = random_params(CONFIG)
    export_hf(tmp_path, params, CONFIG)
    hf = json.loads((tmp_path / "config.json").read_text())
    assert (hf["torch_dtype"], hf["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])
    found = tensors(tmp_path)
    dtype, values = found["model.layers.1.mlp.down_proj.weight"]
    rounded = jnp.asarray(params["layers"]["down_proj"]["kernel"][1].T, jnp.bfloat16)
    assert dtype == "BF16" and values.shape == (8, 12)
    np.testing.assert_array_equal(values, np.asarray(rounded, np.float32))
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def test_jax_arrays_and_several_eos_tokens(tmp_path):
    config = dataclasses.replace(CONFIG, eos_token_ids=(3, 4), bos_token_id=None)
    config = dataclasses.replace(config, tie_embeddings=True)
    params = jax.tree.map(jnp.asarray, random_params(config))
    export_hf(tmp_path, params, config, dtype=jnp.float16)
    loaded = load_model(tmp_path, precision="w16a16kv16", dtype=jnp.float16)
    assert loaded.config == dataclasses.replace(config, dtype="float16")
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.astype(jnp.float16), b), params, loaded.params
    )


def test_a_cut_off_export_leaves_no_config(tmp_path, monkeypatch):
    export_hf(tmp_path, random_params(CONFIG), CONFIG)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("qserve_jax.checkpoint.export.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        export_hf(tmp_path, random_params(CONFIG), CONFIG)
    assert not (tmp_path / "config.json").exists()


def refuse(message, call):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_trees_that_do_not_fit_are_refused(tmp_path):
    params = random_params(CONFIG)
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    message = r"lm_head/embedding is \(11, 8\) instead of absent"
    refuse(message, lambda: export_hf(tmp_path, params, tied))
    del params["final_norm"]
    refuse(r"final_norm/scale is missing", lambda: export_hf(tmp_path, params, CONFIG))
    params = random_params(dataclasses.replace(CONFIG, intermediate_size=13))
    refuse(r"layers/up_proj/kernel is \(2, 8, 13\)", lambda: export_hf(tmp_path, params, CONFIG))
    assert not list(tmp_path.iterdir())


def test_values_and_dtypes_out_of_range_are_refused(tmp_path):
    params = random_params(CONFIG)
    params["layers"]["q_proj"]["kernel"][1, 0, 0] = 1e6
    message = r"1 tensors are not finite in float16 \(model.layers.1.self_attn.q_proj.weight\)"
    with np.errstate(over="ignore"):
        refuse(message, lambda: export_hf(tmp_path, params, CONFIG, dtype="float16"))
    message = "dtype 'int8' is not supported"
    refuse(message, lambda: export_hf(tmp_path, params, CONFIG, dtype="int8"))


def test_quantised_trees_are_refused(tmp_path):
    loaded = load_model(GOLDEN / "llama_mha", group_size=-1)
    refuse(
        "params are quantised: export the float tree",
        lambda: export_hf(tmp_path, loaded.params, loaded.config),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"qkv_bias": True}, "a llama config.json cannot say o_bias=False"),
        ({"sliding_window": 8}, "a llama config.json cannot say sliding_window=8"),
        ({"model_type": "qwen2"}, "a qwen2 config.json cannot say qkv_bias=False"),
        ({"rope": RopeConfig(factor=2.0)}, "a llama config.json cannot say rope=RopeConfig"),
    ],
)
def test_configs_that_the_family_cannot_express_are_refused(changes, message):
    refuse(message, lambda: config_to_hf(dataclasses.replace(CONFIG, **changes)))


def test_windows_of_qwen_are_on_every_layer():
    config = dataclasses.replace(CONFIG, model_type="qwen2", qkv_bias=True, sliding_window=8)
    hf = config_to_hf(config)
    assert (hf["use_sliding_window"], hf["sliding_window"], hf["max_window_layers"]) == (True, 8, 0)
