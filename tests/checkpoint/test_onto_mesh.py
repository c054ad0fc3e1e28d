"""Checkpoints of all formats onto meshes: the same function, and each device reads its part."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts

from qserve_jax.benchmarks.dummy import dummy_model
from qserve_jax.checkpoint import (
    CheckpointError,
    export_qserve,
    load_model,
    save_native,
    save_native_orbax,
    stream,
)
from qserve_jax.models import ModelConfig
from qserve_jax.models.sharding import tensor_mesh
from qserve_jax.quantization import QuantConfig

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


@pytest.fixture
def read(monkeypatch):
    """Bytes of mapped files that become arrays of each device, None for the default one."""
    found = collections.Counter()

    def counting(function):
        def write(leaf, arrays, *args, **kwargs):
            for array in jax.tree.leaves(arrays):
                assert isinstance(array, np.memmap)  # nothing is read but what is taken of it
                found[jax.config.jax_default_device] += array.nbytes
            return function(leaf, arrays, *args, **kwargs)

        return write

    for name in ("_write", "_write_packed"):
        monkeypatch.setattr(stream, name, counting(getattr(stream, name)))
    return found


@pytest.mark.parametrize("storage", ["float", "native"])
def test_each_device_reads_the_bytes_it_holds(checkpoint, tmp_path, read, storage):
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
    read.clear()
    params = load_model(path, **options, mesh=tensor_mesh(2)).params
    for rank, device in enumerate(jax.devices()[:2]):
        shards = [x.addressable_shards[rank] for x in jax.tree.leaves(params)]
        assert {shard.device for shard in shards} == {device}
        assert read[device] == sum(shard.data.nbytes for shard in shards)
    whole = sum(x.nbytes for x in jax.tree.leaves(params))
    assert whole / 2 < read[device] < 0.53 * whole  # norms, and scales of o and down, twice


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """W4A8KV4 g128, whose larger arrays are several of Orbax's chunks; by storage, its folder."""
    heads: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 64}
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 8192, "num_layers": 2}
    sizes |= {"vocab_size": 4096, "max_position_embeddings": 64}
    made = dummy_model(ModelConfig("llama", **sizes, **heads), QuantConfig(), dtype="float32")
    folder = tmp_path_factory.mktemp("quantized")
    for save in (save_native, save_native_orbax):
        save(folder / save.__name__, made.params, made.config, made.quant_config)
    return made.params, folder


def orbax_bytes_read():
    found = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in found for value in metric["values"])


SEVERAL = [("save_native_orbax", ranks) for ranks in (1, 2, 4)] + [("save_native", 4)]
SEVERAL += [pytest.param("save_native", ranks, marks=pytest.mark.slow) for ranks in (1, 2)]


@pytest.mark.parametrize(("storage", "ranks"), SEVERAL)
def test_a_quantized_checkpoint_on_one_two_and_four_devices(quantized, read, storage, ranks):
    """What is restored is what was saved, and as many bytes are read as the devices hold."""
    params, folder = quantized
    before = orbax_bytes_read()
    found = load_model(folder / storage, dtype="float32", mesh=tensor_mesh(ranks)).params
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), found, params)
    own = [sum(x.addressable_shards[r].data.nbytes for x in jax.tree.leaves(found))
           for r in range(ranks)]  # fmt: skip
    whole = sum(x.nbytes for x in jax.tree.leaves(params))
    assert whole / ranks <= max(own) == min(own) < 1.02 * whole / ranks
    if storage == "save_native":
        assert sorted(read.values()) == own
    else:  # which compresses, takes about a tenth off random floats, and reads its metadata
        assert 0.8 * sum(own) < orbax_bytes_read() - before < 1.1 * sum(own)


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
