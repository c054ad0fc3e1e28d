"""PyTorch's .bin: tensors come out, and nothing that a pickle asks for is run."""

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qserve_jax.checkpoint import CheckpointError, load_model
from qserve_jax.checkpoint.hf import read_rows, tensor_specs
from qserve_jax.checkpoint.torch_file import read_index

GOLDEN = Path(__file__).parents[1] / "golden" / "torch_tensors.bin"
BASE = np.arange(24, dtype=np.float32).reshape(4, 6)
EXPECTED = {
    "f32": BASE,
    "f16": BASE.astype(np.float16),
    "bf16": BASE.astype(ml_dtypes.bfloat16),
    "i8": (BASE - 12).astype(np.int8),
    "i32": BASE.astype(np.int32),
    "transposed": BASE.astype(np.float16).T,
    "offset": BASE.astype(np.float16)[2:],
    "parameter": BASE.astype(np.float16),
    "tied": BASE,
}


def test_what_torch_wrote_is_read():
    specs = tensor_specs([GOLDEN])
    assert specs.keys() == {*EXPECTED, "scalar"} and specs["scalar"].shape == ()
    for name, expected in EXPECTED.items():
        found = read_rows(specs[name], 0, len(expected))
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(read_rows(specs[name], 1, 2), expected[1:2])


class Global:
    """Pickled as the global `module.name`, whatever that is, without importing it."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Pickled as a call of `function` with `args`, and with `state` set on the result."""

    def __init__(self, function, *args, state=None):
        self.function, self.args, self.state = function, args, state


class Storage:
    def __init__(self, kind: Any = "HalfStorage", key: Any = "0", size=24):
        kind = Global("torch", kind) if isinstance(kind, str) else kind
        self.pid = ("storage", kind, key, "cpu", size)


PythonPickler: Any = getattr(pickle, "_Pickler")  # noqa: B009 (it is not in the type stubs)


class Pickler(PythonPickler):
    """The Python one, whose opcodes can be written by hand."""

    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, Storage) else None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            self.write(f"c{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.args)
            self.write(b"R")
            if obj.state is not None:
                self.save(obj.state)
                self.write(b"b")
        else:
            super().save(obj, save_persistent_id)


def dumps(obj):
    stream = io.BytesIO()
    Pickler(stream, 2).dump(obj)
    return stream.getvalue()


def write_bin(path, obj, *, content=None, data=bytes(48), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", dumps(obj) if content is None else content)
        archive.writestr("archive/data/0", data)
    return path


REBUILD = Global("torch._utils", "_rebuild_tensor_v2")


def tensor(storage: Any = None, offset: Any = 0, shape=(4, 6), strides=(6, 1)):
    return Call(REBUILD, storage or Storage(), offset, shape, strides, False, {})


def test_the_helper_writes_what_is_read(tmp_path):
    file = write_bin(tmp_path / "a.bin", {"x": tensor()}, data=BASE.astype("<f2").tobytes())
    specs = tensor_specs([file])
    np.testing.assert_array_equal(read_rows(specs["x"], 0, 4), BASE)


def attacks(marker):
    """Pickles that make `marker` when they are unpickled by pickle.load."""
    shell = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w').close()"
    system = Call(Global("os", "system"), shell)
    evil = Call(Global("builtins", "eval"), code)
    run = Global("builtins", "exec")
    return {
        "os.system": system,
        "posix.system": Call(Global("posix", "system"), shell),
        "eval": evil,
        "exec in a dict": {"x": Call(run, code)},
        "beside a tensor": {"x": tensor(), "y": system},
        "in a tensor's arguments": {"x": tensor(Storage(), evil)},
        "in a tensor's storage": {"x": tensor(evil)},
        "in a storage's key": {"x": tensor(Storage(key=evil))},
        "as a storage's class": {"x": tensor(Storage(kind=evil))},
        "nested": Call(
            Call(
                Global("builtins", "getattr"),
                Call(Global("builtins", "__import__"), "os"),
                "system",
            ),
            shell,
        ),
        "as a key": {evil: 1},
        "state": Call(Global("collections", "OrderedDict"), state={"x": evil}),
        "subprocess": Call(Global("subprocess", "getoutput"), shell),
        "partial": Call(Call(Global("functools", "partial"), run, code)),
    }


@pytest.mark.parametrize("name", attacks("x"))
@pytest.mark.parametrize("by", ["index", "load_model"])
def test_nothing_malicious_runs(tmp_path, checkpoint, name, by):
    marker = tmp_path / "it_ran"
    file = write_bin(tmp_path / "pytorch_model.bin", attacks(marker)[name])
    if by == "load_model":
        checkpoint.write()
        (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="asks for .*nothing of it was run") as error:
        read_index(file) if by == "index" else load_model(tmp_path)
    assert "\n" not in str(error.value) and not marker.exists()


@pytest.mark.parametrize("name", ["os.system", "eval", "exec in a dict", "nested", "partial"])
def test_the_attacks_do_work_elsewhere(tmp_path, name):
    """Else the test above would prove nothing."""
    marker = tmp_path / "it_ran"
    pickle.loads(dumps(attacks(marker)[name]))
    assert marker.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch", "load"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch", "HalfStorage.__class__"),
        ("collections", "OrderedDict.__init__"),
        ("qserve_jax.checkpoint.torch_file", "_Named"),
        ("torch._utils", "_rebuild_device_tensor_from_numpy"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_other_names_are_refused(tmp_path, module, name, protocol):
    if protocol == 4:  # STACK_GLOBAL takes dotted names
        text = [b"\x8c" + struct.pack("B", len(x)) + x.encode() for x in (module, name)]
        content = b"\x80\x04" + b"".join(text) + b"\x93."
    else:
        content = dumps(Global(module, name))
    with pytest.raises(CheckpointError, match="asks for"):
        read_index(write_bin(tmp_path / "a.bin", None, content=content))


def test_extension_codes_and_set_attributes_do_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="unregistered extension code"):
        read_index(write_bin(tmp_path / "a.bin", None, content=b"\x80\x02\x82\x01."))
    for target in (REBUILD, Global("collections", "OrderedDict")):
        content = dumps(target)[:-1] + dumps((None, {"__call__": 1}))[2:-1] + b"b."
        with pytest.raises(CheckpointError, match="no file of tensors"):
            read_index(write_bin(tmp_path / "a.bin", None, content=content))


@pytest.mark.parametrize(
    ("obj", "words"),
    [
        ([1, 2], "holds a list"),
        ({"x": 1}, "holds 'x', which is no named tensor"),
        ({1: tensor()}, "holds 1, which is no named tensor"),
        ({"x": tensor(shape=(5, 6))}, "exceeds its storage"),
        ({"x": tensor(offset=1)}, "exceeds its storage"),
        ({"x": tensor(offset=-1)}, "malformed"),
        ({"x": tensor(strides=(-6, 1))}, "malformed"),
        ({"x": tensor(strides=(6,))}, "no file of tensors"),
        ({"x": tensor(shape=("4", 6))}, "malformed"),
        ({"x": tensor(storage=3)}, "malformed"),
        ({"x": tensor(Storage(key="../../etc/passwd"))}, "no file of tensors"),
        ({"x": tensor(Storage(size=25))}, "shorter than the 25 elements"),
        ({"x": tensor(Storage("FloatStorage"))}, "shorter than the 24 elements"),
        ({"x": Call(Global("torch", "HalfStorage"), 3)}, "its pickle calls HalfStorage"),
    ],
)
def test_malformed_contents_are_refused_in_one_line(tmp_path, obj, words):
    with pytest.raises(CheckpointError, match=words) as error:
        read_index(write_bin(tmp_path / "a.bin", obj))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_damaged_archives_are_refused(tmp_path):
    file = write_bin(tmp_path / "a.bin", {"x": tensor()}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        read_index(file)
    content = GOLDEN.read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="no file of tensors"):
            read_index(file)
    file.write_bytes(os.urandom(100))
    with pytest.raises(CheckpointError, match="no file of tensors"):
        read_index(file)


def test_published_checkpoints_in_bin_load_as_safetensors_do(checkpoint, tmp_path):
    from safetensors.numpy import load_file

    from qserve_jax.checkpoint import export_qserve

    loaded = load_model(checkpoint.write(), dtype="float16", scale_dtype="float16")
    out = tmp_path / "out"
    export_qserve(out, loaded.params, loaded.config)
    kinds = {"float16": "HalfStorage", "int8": "CharStorage"}
    tensors = load_file(out / "model.safetensors")
    state, data = {}, []
    for i, (name, array) in enumerate(tensors.items()):
        storage = Storage(kinds[array.dtype.name], str(i), array.size)
        strides = tuple(s // array.itemsize for s in array.strides)
        state[name] = Call(REBUILD, storage, 0, array.shape, strides, False, {})
        data.append(array.tobytes())
    with zipfile.ZipFile(out / "pytorch_model.bin", "w") as archive:
        archive.writestr("x/data.pkl", dumps(state))
        for i, content in enumerate(data):
            archive.writestr(f"x/data/{i}", content)
    (out / "model.safetensors").unlink()
    again = load_model(out, dtype="float16")
    assert again.format == "qserve"
    np.testing.assert_array_equal(
        again.params["layers"]["down_proj"]["kernel"].codes,
        loaded.params["layers"]["down_proj"]["kernel"].codes,
    )
