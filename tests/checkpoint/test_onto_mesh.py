"""Checkpoints of all formats onto meshes: the same function, and each device reads its part."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.checkpoint import (
    CheckpointError,
    export_qserve,
    load_model,
    save_native,
    save_native_orbax,
    stream,
)
from qserve_jax.models.sharding import tensor_mesh

TOKENS = jnp.arange(12).reshape(2, 6)


@pytest.fixture
def odd(checkpoint):
    """One KV head, 3 groups of F, 31 words: two ranks repeat the head and pad the others."""
    checkpoint.config |= {"intermediate_size": 384, "vocab_size": 31}
    rng = np.random.default_rng(5)
    for name, tensor in checkpoint.tensors.items():
        shape = [{256: 384, 32: 31}.get(n) or n for n in tensor.shape]
        checkpoint.tensors[name] = rng.standard_normal(shape).astype(np.float32) * 0.1
    return checkpoint.write()


def logits(loaded) -> Any:
    return np.asarray(jax.jit(loaded.model.apply)({"params": loaded.params}, TOKENS))


# w4a16: no inputs are quantised, so that only the order of sums differs.
FLOAT: dict[str, Any] = {"dtype": "float32", "precision": "w16a16kv16"}
OPTIONS: dict[str, Any] = {"dtype": "float32", "precision": "w4a16kv4", "group_size": -1}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("on load", "qserve")]


@pytest.mark.parametrize("storage", ["float", "native", "orbax", *SLOW])
def test_two_devices_compute_what_one_does(odd, tmp_path_factory, storage):
    path, options = odd, OPTIONS
    if storage == "float":
        options = FLOAT
    one = load_model(path, **options)
    if storage in ("native", "orbax", "qserve"):
        path = tmp_path_factory.mktemp("saved") / "out"
        if storage == "qserve":
            export_qserve(path, one.params, one.config)
        else:
            save = save_native if storage == "native" else save_native_orbax
            save(path, one.params, one.config, one.quant_config)
        one = load_model(path, **options)
    two = load_model(path, **options, mesh=tensor_mesh(2))
    assert (two.config.num_kv_heads, two.config.intermediate_size) == (2, 512)
    assert two.config.vocab_size == 31 and two.model.mesh is not None
    expected = logits(one)
    np.testing.assert_allclose(logits(two), expected, rtol=0, atol=3e-6 * abs(expected).max())
    keys = two.params["layers"]["k_proj"]
    first, second = (
        [np.asarray(x.addressable_shards[rank].data) for x in jax.tree.leaves(keys)]
        for rank in range(2)
    )
    for a, b in zip(first, second, strict=True):  # the repeated head
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("storage", ["float", "native"])
def test_each_device_reads_the_bytes_it_holds(checkpoint, tmp_path, monkeypatch, storage):
    checkpoint.config["num_key_value_heads"] = 2
    for i in range(2):
        for x in "kv":
            q = f"model.layers.{i}.self_attn.q_proj"
            for part in ("weight", "bias"):
                name = f"{q}.{part}".replace("q_proj", f"{x}_proj")
                checkpoint.tensors[name] = checkpoint.tensors[f"{q}.{part}"]
    path, options = checkpoint.write(), FLOAT
    if storage == "native":
        one = load_model(path, **OPTIONS)
        path = tmp_path / "native"
        save_native(path, one.params, one.config, one.quant_config)
        options = {"dtype": FLOAT["dtype"]}
    read = {device: 0 for device in jax.devices()[:2]}

    def counting(function):
        def write(leaf, arrays, *args, **kwargs):
            for array in jax.tree.leaves(arrays):
                assert isinstance(array, np.memmap)  # nothing is read but what is taken of it
                read[jax.config.jax_default_device] += array.nbytes
            return function(leaf, arrays, *args, **kwargs)

        return write

    for name in ("_write", "_write_packed"):
        monkeypatch.setattr(stream, name, counting(getattr(stream, name)))
    params = load_model(path, **options, mesh=tensor_mesh(2)).params
    for rank, device in enumerate(read):
        shards = [x.addressable_shards[rank] for x in jax.tree.leaves(params)]
        assert {shard.device for shard in shards} == {device}
        assert read[device] == sum(shard.data.nbytes for shard in shards)
    whole = sum(x.nbytes for x in jax.tree.leaves(params))
    assert whole / 2 < read[device] < 0.53 * whole  # norms, and scales of o and down, twice


def test_an_orbax_folder_of_another_model_is_refused(odd, checkpoint, tmp_path):
    one = load_model(odd, **OPTIONS)
    save_native_orbax(tmp_path / "out", one.params, one.config, one.quant_config)
    file = tmp_path / "out" / "config.json"
    file.write_text(
        file.read_text().replace('"intermediate_size": 384', '"intermediate_size": 512')
    )
    with pytest.raises(CheckpointError, match="do not fit together in .*down_proj") as error:
        load_model(tmp_path / "out", mesh=tensor_mesh(2))
    assert "\n" not in str(error.value)


def test_heads_that_do_not_divide_are_refused_before_weights_are_read(odd, monkeypatch):
    monkeypatch.setattr(stream, "read_rows", None)
    with pytest.raises(
        ValueError, match="=4 does not divide 2 query and 1 KV heads .*: use 1 or 2"
    ):
        load_model(odd, **OPTIONS, mesh=tensor_mesh(4))
