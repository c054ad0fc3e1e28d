"""Peak host memory of loading: the largest tensor plus the result."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import GetAttrKey
from safetensors.numpy import save_file

from qserve_jax.checkpoint.hf import tensor_specs
from qserve_jax.checkpoint.key_table import targets
from qserve_jax.checkpoint.load import quantized_shapes
from qserve_jax.checkpoint.native import save_native
from qserve_jax.models import config_from_hf
from qserve_jax.quantization.config import QuantConfig

CONFIG = {
    "model_type": "llama",
    "vocab_size": 24576,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
LARGEST = 24576 * 1024 * 4

# The first load compiles, which takes memory of its own. Of three others the least is taken: JAX's
# threads free a tensor some time after it was used, later on a busy machine.
MEASURE = """
import ctypes, gc, re, sys
from qserve_jax.checkpoint import load_model
from qserve_jax.quantization.qtensor import nbytes

def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

growths = []
for _ in range(4):
    loaded = None
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")  # resets the peak
    before = status("VmRSS")
    loaded = load_model(sys.argv[1], precision="w4a8kv4", dtype="bfloat16")
    growths.append(status("VmHWM") - before)
print(min(growths[1:]), nbytes(loaded.params))
"""


def write_checkpoint(folder: Path) -> int:
    """Writes float32 weights; returns their bytes."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    numbers = np.random.default_rng(0).standard_normal(2**16, dtype=np.float32)
    shapes = {name: target.shape for name, target in targets(config_from_hf(CONFIG)).items()}
    tensors = {name: np.resize(numbers, shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_is_the_largest_tensor_plus_the_result(tmp_path):
    size = write_checkpoint(tmp_path)
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    growth, params = map(int, result.stdout.split())
    assert params < 0.4 * size and LARGEST < 0.7 * size
    assert params < growth <= params + LARGEST


NATIVE = CONFIG | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4}


def write_native(folder: Path) -> int:
    """Writes 4-bit weights that mean nothing but can be loaded; returns the largest tensor."""
    config, quant = config_from_hf(NATIVE), QuantConfig()
    rng = np.random.default_rng(0)

    def leaf(path, struct):
        if path[-1] in (GetAttrKey("group_scale"), GetAttrKey("group_offset")):
            return np.ones(struct.shape, struct.dtype)
        if struct.dtype == np.uint8:
            return rng.integers(0, 256, struct.shape, np.uint8)
        return np.ones(struct.shape, struct.dtype)

    shapes = quantized_shapes(config, quant, jnp.bfloat16, strict=True)
    params = jax.tree_util.tree_map_with_path(leaf, shapes)
    save_native(folder, params, config, quant)
    return max(spec.nbytes for spec in tensor_specs([folder / "model.safetensors"]).values())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_native_checkpoint_goes_to_the_device_tensor_by_tensor(tmp_path):
    """On the CPU the device's memory is the host's: the result, and less than the largest tensor,
    which is neither copied on the host nor on the device at once."""
    largest = write_native(tmp_path / "native")
    command = [sys.executable, "-c", MEASURE.replace('precision="w4a8kv4", ', "")]
    result = subprocess.run([*command, str(tmp_path / "native")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    growth, params = map(int, result.stdout.split())
    assert params > 200e6 and largest < 0.5 * params
    assert params < growth < params + largest
