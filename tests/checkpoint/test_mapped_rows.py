"""Rows of safetensors as a mapping: of every dtype, of part of a tensor, at an odd address."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from qserve_jax.checkpoint.hf import read_rows, tensor_specs

DTYPES = (np.float32, jnp.bfloat16, np.float16, np.uint8, np.int8, np.int32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_those_of_the_file(tmp_path, rng, dtype):
    tensors = {name: (100 * rng.random((7, 5))).astype(dtype) for name in ("a", "b")}
    save_file(tensors, tmp_path / "x.safetensors")
    specs = tensor_specs([tmp_path / "x.safetensors"])
    for name, tensor in tensors.items():
        assert specs[name].nbytes == tensor.nbytes
        for start, stop in ((0, 7), (2, 4), (6, 7), (3, 3)):
            rows = read_rows(specs[name], start, stop)
            assert rows.dtype == tensor.dtype
            np.testing.assert_array_equal(rows, tensor[start:stop])


def test_tensors_at_odd_addresses_are_copied(tmp_path):
    """safetensors' own writer aligns them, the format does not."""
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    entries = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "x": {"dtype": "F32", "shape": [3, 2], "data_offsets": [3, 27]},
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    content = len(header).to_bytes(8, "little") + header + b"abc" + values.tobytes()
    (tmp_path / "x.safetensors").write_bytes(content)
    rows = read_rows(tensor_specs([tmp_path / "x.safetensors"])["x"], 1, 3)
    assert rows.flags.aligned
    np.testing.assert_array_equal(rows, values[1:])
