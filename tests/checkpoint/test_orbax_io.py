"""Quantised trees through Orbax, on one device and restored onto meshes of several."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from qserve_jax.checkpoint import (
    CheckpointError,
    abstract_orbax,
    load_model,
    load_orbax,
    save_native_orbax,
    save_orbax,
)
from qserve_jax.quantization import QuantConfig, Rule, quantize_params

RULES = (
    Rule("a/kernel"),
    Rule("b/kernel", group_size=-1),
    Rule("c/kernel", weight_bits=8),
    Rule("d/kernel", contract=(-3,), out=(-2, -1)),
)


def tree(rng):
    shapes = {"a": (2, 256, 64), "b": (256, 64), "c": (2, 128, 64), "d": (128, 4, 32)}
    params: dict[str, Any] = {
        "blocks": {k: {"kernel": rng.standard_normal(s, np.float32)} for k, s in shapes.items()}
    }
    params["norm"] = {"scale": jnp.arange(8, dtype=jnp.bfloat16)}
    return quantize_params(params, rules=RULES)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_out_and_in_again_is_the_identity(tmp_path, rng):
    params = tree(rng)
    save_orbax(tmp_path / "out", params)
    abstract = abstract_orbax(tmp_path / "out")
    shapes = jax.eval_shape(lambda: params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    assert_same(load_orbax(tmp_path / "out"), params)
    with pytest.raises(CheckpointError, match="exists already"):
        save_orbax(tmp_path / "out", params)


def test_what_is_not_there_or_not_whole_is_refused(tmp_path, rng):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError, match="no tree that save_orbax has written") as error:
            abstract_orbax(path)
        assert "\n" not in str(error.value)


def test_native_checkpoints_stored_by_orbax(checkpoint, tmp_path):
    loaded = load_model(checkpoint.write(), precision="w4a8kv8")
    save_native_orbax(tmp_path / "out", loaded.params, loaded.config, loaded.quant_config)
    again = load_model(tmp_path / "out")
    assert again.format == "orbax" and again.quant_config == QuantConfig(kv_bits=8)
    assert_same(again.params, loaded.params)


RESTORE = """
import json, sys
import jax, numpy as np
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from qserve_jax.checkpoint import abstract_orbax, load_orbax

path = sys.argv[1]
mesh = Mesh(np.array(jax.devices()), ("model",))
count = mesh.size

def place(x):
    '''Over the output features, the axis of 64 or 128; small arrays on all devices.'''
    axes = [i for i, n in enumerate(x.shape) if n in (64, 128)]
    spec = [None] * len(x.shape)
    if axes:
        spec[axes[0]] = "model"
    return x.update(sharding=NamedSharding(mesh, P(*spec)))

def read_bytes():
    found = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(v["value"] for m in found for v in m["values"])

like = jax.tree.map(place, abstract_orbax(path))
before = read_bytes()
params = load_orbax(path, like)
leaves = jax.tree.leaves(params)
for leaf, wanted in zip(leaves, jax.tree.leaves(like), strict=True):
    assert leaf.sharding == wanted.sharding, (leaf.sharding, wanted.sharding)
    shards = {s.device.id: s.data.shape for s in leaf.addressable_shards}
    assert len(shards) == count
    split = any(n in (64, 128) for n in leaf.shape)
    assert all(np.prod(s) * (count if split else 1) == leaf.size for s in shards.values()), shards
print(json.dumps({
    "devices": count, "read": read_bytes() - before, "bytes": sum(x.nbytes for x in leaves),
    "sums": [float(np.asarray(x, np.float64).sum()) for x in leaves],
}))
"""


def test_restores_sharded_onto_meshes_of_1_2_and_4_devices(tmp_path, rng):
    """The files are read about once for all devices, not once for each. (Of the reads of one
    device alone Orbax tells nothing.)"""
    kernels = {x: {"kernel": rng.standard_normal((2, 8192, 64), np.float32)} for x in "abc"}
    params = quantize_params({"blocks": kernels}, rules=RULES)
    save_orbax(tmp_path / "out", params)
    expected = [float(np.asarray(x, np.float64).sum()) for x in jax.tree.leaves(params)]
    for devices in (1, 2, 4):
        env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
        env["PYTHONPATH"] = str(Path(__file__).parents[2])
        command = [sys.executable, "-c", RESTORE, str(tmp_path / "out")]
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        found = json.loads(result.stdout)
        assert found["read"] < 2 * found["bytes"]
        assert "WARNING" not in result.stderr
        assert found["devices"] == devices and found["sums"] == expected


def test_a_full_disk_is_one_line_with_a_cure(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: at local file: No space left on device [os_error=28]")

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    with pytest.raises(CheckpointError, match="out cannot be written .No space left on device.: m"):
        save_orbax(tmp_path / "out", {"a": jnp.ones(2)})
