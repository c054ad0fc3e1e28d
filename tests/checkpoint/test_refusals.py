"""What cannot be loaded is refused in one line that names the value, the limit and the cure."""

import json
import os
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


@pytest.mark.parametrize("change", ["value", "dtype", "shape"])
def test_tied_model_refuses_another_head(checkpoint, change, monkeypatch):
    """One number of the last block is enough; transformers would not tie these either."""
    monkeypatch.setattr(stream, "BLOCK_ELEMENTS", 128 * 10)
    head = checkpoint.tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    head = {"value": head, "dtype": head.astype(np.float16), "shape": head[:-1]}[change]
    checkpoint.config["tie_word_embeddings"] = True
    checkpoint.tensors["lm_head.weight"] = head
    assert_refused(
        checkpoint.write(), "lm_head.weight in", "differs", "tie_word_embeddings to false to use"
    )
    checkpoint.config["tie_word_embeddings"] = False
    if change == "value":
        loaded = load_model(checkpoint.write(), precision="w16a16kv16", dtype="float32")
        np.testing.assert_array_equal(loaded.params["lm_head"]["embedding"], head)


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


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_deeply_nested_json(checkpoint, name):
    file = checkpoint.write() / name
    file.write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")
    assert_refused(checkpoint.folder, f"{file} is not valid JSON (", "correct it")


def make_loop(file):
    file.symlink_to(file.name)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Path.mkdir, "is a directory: put the file itself there"),
        (make_loop, "is a symbolic link that leads to no file"),
        (lambda file: file.symlink_to("nowhere"), "is a symbolic link that leads to no file"),
        (os.mkfifo, "is no regular file"),
    ],
    ids=["directory", "loop", "dead link", "pipe"],
)
def test_what_is_no_file_is_called_what_it_is(checkpoint, name, make, words):
    file = checkpoint.write() / name
    file.unlink(missing_ok=True)
    make(file)
    assert_refused(checkpoint.folder, f"{file} {words}")


def test_names_of_tensors_cannot_break_the_line(checkpoint, headers_only):
    checkpoint.tensors["a\nb\u2028c" + "d" * 1000] = np.ones(1, np.float32)
    message = refusal(checkpoint.write())
    assert r"a\nb\u2028cddd" in message and len(message) < 600


@pytest.mark.parametrize("ids", [32, -1, [3, 2**31], 10**400], ids=["32", "-1", "list", "huge"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_end_tokens_outside_the_vocabulary(checkpoint, name, ids):
    content = {"eos_token_id": ids}
    file = checkpoint.write() / name
    file.write_text(json.dumps((checkpoint.config if name == "config.json" else {}) | content))
    assert_refused(checkpoint.folder, f"{file}: eos_token_id=", "not in the vocabulary", "0 to 31")


def test_odd_keys_cannot_break_the_line(checkpoint):
    checkpoint.config["a\nb"] = "c\nd"
    assert_refused(checkpoint.write(), r"'a\nb'='c\nd'")


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
    for precision in (4, ["w4a8kv4"], b"w4a8kv4"):
        assert_refused(path, "is not a string", error=ValueError, precision=precision)
    for size in ("128", 128.0, True, np.ones(2)):
        assert_refused(path, "not an integer: use 128", error=ValueError, group_size=size)
    assert_refused(
        path, "tpu", "mosaic_sm90, mosaic_mma, reference", error=ValueError, backend="tpu"
    )
    assert_refused(path, "dtype 'int4'", error=ValueError, dtype="int4")
