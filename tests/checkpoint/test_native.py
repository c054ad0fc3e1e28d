"""Native checkpoints: there and back, whole or not at all."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.checkpoint import (
    CheckpointError,
    atomic,
    export_qserve,
    load_model,
    save_native,
    save_native_orbax,
)
from qserve_jax.checkpoint.atomic import check_free
from qserve_jax.checkpoint.export import export_hf
from qserve_jax.models import param_shapes
from qserve_jax.pallas_kernels import prepare_for_backend
from qserve_jax.quantization import QuantConfig, Rule, quantize_params

DEMO = Path(__file__).parents[2] / "qserve_jax" / "assets" / "demo"


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("precision", "group_size"), [("w4a8kv4", 128), ("w4a16kv4", -1), ("w8a8kv8", 128)]
)
def test_out_and_in_again_is_the_identity(checkpoint, tmp_path, precision, group_size):
    loaded = load_model(checkpoint.write(), precision=precision, group_size=group_size)
    save_native(tmp_path / "out", loaded.params, loaded.config, loaded.quant_config)
    again = load_model(tmp_path / "out")
    assert again.format == "native" and again.quant_config == loaded.quant_config
    assert again.config == loaded.config.__class__(**{**vars(loaded.config), "dtype": "bfloat16"})
    assert_same(loaded.params, again.params)


def test_mixed_schemes_and_float_projections(checkpoint, tmp_path):
    exact = load_model(checkpoint.write(), precision="w16a16kv16", dtype="float32")
    rules = (Rule("q_proj/kernel", skip=True), Rule("up_proj/kernel", weight_bits=8))
    rules += (Rule("o_proj/kernel", group_size=-1), Rule("kernel$"))
    params = quantize_params(exact.params, rules=rules)
    save_native(tmp_path / "out", params, exact.config, QuantConfig())
    assert_same(load_model(tmp_path / "out", dtype="float32").params, params)


def centered_model(loaded):
    """The model with a centre for its keys, in its float tree and config."""
    config = dataclasses.replace(loaded.config, centered_keys=True)
    shape = param_shapes(config)["layers"]["key_center"]["center"]
    center = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape) / 64
    layers = loaded.params["layers"] | {"key_center": {"center": center}}
    return loaded.params | {"layers": layers}, config


@pytest.mark.parametrize("save", [save_native, save_native_orbax])
def test_centers_of_keys_are_kept(checkpoint, tmp_path, save):
    loaded = load_model(checkpoint.write(), dtype="float32")
    params, config = centered_model(loaded)
    save(tmp_path / "out", params, config, loaded.quant_config)
    again = load_model(tmp_path / "out", dtype="float32")
    assert again.config.centered_keys and again.model.config.centered_keys
    assert_same(again.params, params)
    tokens = jnp.arange(8)[None]
    centered = np.asarray(again.model.apply({"params": again.params}, tokens))
    plain = np.asarray(loaded.model.apply({"params": loaded.params}, tokens))
    np.testing.assert_allclose(centered, plain, atol=1e-4)  # softmax does not see them
    edit_config(tmp_path / "out", centered_keys="yes")
    with pytest.raises(CheckpointError, match="centered_keys 'yes' is not true or false"):
        load_model(tmp_path / "out")


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


def test_centers_of_keys_have_no_place_in_other_formats(checkpoint, tmp_path):
    loaded = load_model(checkpoint.write(), precision="w16a16kv16", dtype="float32")
    params, config = centered_model(loaded)
    with pytest.raises(ValueError, match="centered_keys=True has no place in this format"):
        export_hf(tmp_path / "hf", params, config)
    with pytest.raises(ValueError, match="centered_keys=True has no place in this format"):
        export_qserve(tmp_path / "qserve", quantize_params(params), config)
    assert not list(tmp_path.glob("*/config.json"))


def test_shards_and_companions(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic.write_shards, "__defaults__", (10**6,))
    loaded = load_model(DEMO)
    save_native(
        tmp_path / "a" / "out", loaded.params, loaded.config, loaded.quant_config, source=DEMO
    )
    out = tmp_path / "a" / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) == 4 and files[0] == "model-00001-of-00004.safetensors"
    assert all((out / name).stat().st_size < 1.2e6 for name in files[1:])
    again = load_model(out)
    assert again.tokenizer is not None and again.config == loaded.config
    assert_same(loaded.params, again.params)
    assert (out / "generation_config.json").is_file()


def test_flags_must_agree_with_the_weights(checkpoint, tmp_path):
    loaded = load_model(checkpoint.write())
    out = tmp_path / "out"
    save_native(out, loaded.params, loaded.config, loaded.quant_config)
    assert load_model(out, precision="w4a8kv4", group_size=128).quant_config == QuantConfig()
    assert load_model(out, precision="w4a16kv4").quant_config == QuantConfig(act_bits=16)
    options: dict[str, Any]
    for options in ({"precision": "w8a8kv4"}, {"precision": "w16a16kv16"}, {"group_size": -1}):
        with pytest.raises(CheckpointError, match=f"leave {next(iter(options))} out"):
            load_model(out, **options)


def test_damage_is_named(checkpoint, tmp_path):
    loaded = load_model(checkpoint.write())
    out = tmp_path / "out"
    bad = loaded.params["layers"]["v_proj"]["kernel"].channel_scale.at[1, 3].set(np.nan)
    object.__setattr__(loaded.params["layers"]["v_proj"]["kernel"], "channel_scale", bad)
    save_native(out, loaded.params, loaded.config, loaded.quant_config)
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.v_proj in .* channel 3 is nan"):
        load_model(out)
    hf = json.loads((out / "config.json").read_text())
    for change, words in (
        ({"version": 2}, "version 2 is not 1"),
        ({"projections": {}}, "malformed"),
        ({"kv_bits": 5}, "malformed .*kv_bits=5"),
        ({"storage": "x"}, "storage 'x' is unknown"),
    ):
        changed = hf | {"quantization_config": hf["quantization_config"] | change}
        (out / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=words):
            load_model(out)


def test_trees_that_do_not_fit_are_refused(checkpoint, tmp_path):
    loaded = load_model(checkpoint.write())
    fused = prepare_for_backend(loaded.params, "reference")
    with pytest.raises(ValueError, match="q_proj/kernel is missing .* before prepare_for_backend"):
        save_native(tmp_path / "out", fused, loaded.config, loaded.quant_config)
    assert not list(tmp_path.glob("out*"))


def test_an_existing_output_is_left_alone(checkpoint, tmp_path):
    loaded = load_model(checkpoint.write())
    (tmp_path / "out").mkdir()
    save_native(tmp_path / "out", loaded.params, loaded.config, loaded.quant_config)
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(CheckpointError, match="exists already"):
        save_native(tmp_path / "out", loaded.params, loaded.config, loaded.quant_config)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before


def test_a_link_is_no_empty_output(tmp_path):
    """Known before the work is done: a folder cannot be renamed to it."""
    (tmp_path / "empty").mkdir()
    check_free(tmp_path / "empty")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="exists already"):
        check_free(tmp_path / "link")


def test_an_error_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    loaded = load_model(checkpoint.write())

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(atomic, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_native(tmp_path / "out", loaded.params, loaded.config, loaded.quant_config)
    assert not list(tmp_path.glob("out*"))


SLOW_WRITE = """
import sys, time
from pathlib import Path
from typing import Any
from qserve_jax.checkpoint.atomic import atomic_folder
with atomic_folder(sys.argv[1]) as folder:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    print("written", flush=True)
    time.sleep(60)
"""


def test_a_killed_run_is_refused_with_the_cure(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITE, str(out)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None and process.stdout.readline() == b"written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    for path in (out, tmp_path / "out.partial"):
        with pytest.raises(CheckpointError, match="not written to its end .* run the command") as e:
            load_model(path)
        assert "\n" not in str(e.value)
    with atomic.atomic_folder(out) as folder:  # the next run clears it away
        assert not list(folder.iterdir())
    assert out.is_dir() and not (tmp_path / "out.partial").exists()
