"""What cannot be loaded is refused in one line that names the value, the limit and the cure."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from qserve_jax.checkpoint import CheckpointError, load_model, stream

UP = "model.layers.1.mlp.up_proj.weight"


def refusal(path, error: type[ValueError] = CheckpointError, **options) -> str:
    """The message with which load_model refuses `path`; checked to be one line with no chain."""
    with pytest.raises(error) as caught:
        load_model(path, **{"precision": "w16a16kv16", **options})
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_refused(path, *words, error: type[ValueError] = CheckpointError, **options):
    message = refusal(path, error, **options)
    for word in words:
        assert str(word) in message, (word, message)


@pytest.fixture
def headers_only(monkeypatch):
    monkeypatch.setattr(stream, "read_rows", lambda *_: pytest.fail("weights are read"))


def test_all_tensors_that_do_not_fit_are_listed_together(checkpoint, headers_only):
    del checkpoint.tensors["model.norm.weight"]
    del checkpoint.tensors["model.layers.0.self_attn.k_proj.bias"]
    checkpoint.tensors["model.extra.weight"] = np.ones((4, 5), np.float32)
    checkpoint.tensors[UP] = np.ones((128, 256), np.float32)
    checkpoint.tensors["lm_head.weight"] = np.ones((32, 128), np.int8)
    assert_refused(
        checkpoint.write(),
        checkpoint.folder,
        "2 missing: ",
        "model.norm.weight [128]",
        "model.layers.0.self_attn.k_proj.bias [64]",
        "1 unexpected: model.extra.weight [4, 5]",
        f"1 of another shape: {UP} [128, 256] instead of [256, 128]",
        "1 not F32, BF16, F16: lm_head.weight I8",
        "of the same checkpoint",
    )


def test_long_lists_are_cut_and_counted(checkpoint, headers_only):
    checkpoint.config["num_hidden_layers"] = 3
    assert_refused(checkpoint.write(), "12 missing: ", "model.layers.2.", "and 4 more")
    checkpoint.config["num_hidden_layers"] = 1
    message = refusal(checkpoint.write())
    assert "12 unexpected: " in message and message.count("model.layers.1.") == 8


def test_untied_head_must_be_there(checkpoint, headers_only):
    del checkpoint.tensors["lm_head.weight"]
    assert_refused(checkpoint.write(), "1 missing: lm_head.weight [32, 128]")


def test_tied_model_refuses_biases_it_does_not_have(checkpoint, headers_only):
    checkpoint.tensors["model.layers.0.self_attn.o_proj.bias"] = np.ones(128, np.float32)
    assert_refused(checkpoint.write(), "1 unexpected: model.layers.0.self_attn.o_proj.bias [128]")


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint8])
def test_other_dtypes(checkpoint, headers_only, dtype):
    checkpoint.tensors[UP] = checkpoint.tensors[UP].astype(dtype)
    code = {"float64": "F64", "int32": "I32", "uint8": "U8"}[np.dtype(dtype).name]
    assert_refused(checkpoint.write(), f"1 not F32, BF16, F16: {UP} {code}")


@pytest.mark.parametrize("precision", ["w16a16kv16", "w4a8kv4", "w8a8kv8"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(checkpoint, precision, dtype, value):
    checkpoint.tensors[UP] = checkpoint.tensors[UP].astype(dtype)
    checkpoint.tensors[UP][255, 127] = value
    assert_refused(
        checkpoint.write(), UP, "NaN or infinite", "use an intact checkpoint", precision=precision
    )


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_not_finite_outside_the_layers(checkpoint, name):
    checkpoint.tensors[name].flat[-1] = np.nan
    assert_refused(checkpoint.write(), name, "NaN or infinite", precision="w4a8kv4")


def test_too_large_for_float16(checkpoint):
    checkpoint.tensors["model.norm.weight"][3] = 1e5
    folder = checkpoint.write()
    assert_refused(folder, "model.norm.weight", "range of float16", "float32", dtype="float16")
    assert load_model(folder, precision="w16a16kv16").params["final_norm"]["scale"][3] == 99840


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickle(checkpoint, name):
    folder = checkpoint.write()
    (folder / "model.safetensors").rename(folder / name)
    assert_refused(folder, name, "pickled", "save_pretrained")


def test_no_weights(checkpoint):
    folder = checkpoint.write()
    (folder / "model.safetensors").unlink()
    assert_refused(folder, folder, "no model.safetensors", "download")


def test_several_files_without_an_index(checkpoint):
    folder = checkpoint.write()
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"x": np.ones(1)}, folder / "b.safetensors")
    assert_refused(folder, "2 safetensors files (a.safetensors, b.safetensors)", "index.json")


def write_shards(checkpoint, weight_map) -> Path:
    folder = checkpoint.write()
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_missing_shard(checkpoint):
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    folder = write_shards(checkpoint, weight_map)
    assert_refused(folder, "lacks 1 of the 2 shards", "(two.safetensors)", "download")


def test_tensor_in_two_shards(checkpoint):
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    folder = write_shards(checkpoint, weight_map)
    save_file({UP: checkpoint.tensors[UP]}, folder / "two.safetensors")
    assert_refused(folder, UP, "both in one.safetensors and in two.safetensors", "remove one")


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"a": "../x.safetensors"}, {"a": ".."}])
def test_bad_index(checkpoint, weight_map):
    folder = write_shards(checkpoint, weight_map)
    assert_refused(folder, "index.json maps no names to files", "download it again")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-100],
        lambda data: data[:20],
        lambda data: b"",
        lambda data: data + b"\0" * 8,
        lambda data: b"\xff" * 100,
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        lambda data: data[:8] + b"?" * 40 + data[48:],
    ],
    ids=["truncated", "header", "empty", "longer", "garbage", "lfs pointer", "no json"],
)
def test_damaged_safetensors(checkpoint, damage):
    file = checkpoint.write() / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert_refused(checkpoint.folder, file, "truncated or corrupt", "download it again")


def test_no_config(checkpoint):
    (checkpoint.write() / "config.json").unlink()
    assert_refused(checkpoint.folder, checkpoint.folder, "has no config.json")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", [b"{", b"", b"\xff\xfe", b"[1]", b"NULL"])
def test_bad_json(checkpoint, name, text):
    file = checkpoint.write() / name
    file.write_bytes(text)
    assert_refused(checkpoint.folder, file, "correct it")


def test_unsupported_configs(checkpoint):
    checkpoint.config["quantization_config"] = {"quant_method": "gptq"}
    assert_refused(checkpoint.write(), "quantization_config", "'gptq'", error=ValueError)
    checkpoint.config = {"model_type": "mamba"}
    assert_refused(checkpoint.write(), "model_type 'mamba'", error=ValueError)


@pytest.mark.parametrize("dtype", ["float64", "int8", "bf16", None, 7])
def test_bad_dtype(checkpoint, dtype):
    words = (f"dtype {dtype!r} is not supported", "float32, bfloat16, float16")
    assert_refused(checkpoint.write(), *words, error=ValueError, dtype=dtype)


def test_bad_arguments_are_found_before_the_checkpoint():
    path = "/no/such/directory"
    assert_refused(path, "precision 'w3a8'", error=ValueError, precision="w3a8")
    assert_refused(path, "group_size=64", error=ValueError, group_size=64)
    assert_refused(
        path, "tpu", "mosaic_sm90, mosaic_mma, reference", error=ValueError, backend="tpu"
    )
    assert_refused(path, "dtype 'int4'", error=ValueError, dtype="int4")
