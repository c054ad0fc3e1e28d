"""Peak host memory of loading: the largest tensor plus the result."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qserve_jax.checkpoint.key_table import targets
from qserve_jax.models import config_from_hf

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

# The first load compiles, which takes memory of its own; the second one is measured.
MEASURE = """
import ctypes, gc, re, sys
from qserve_jax.checkpoint import load_model
from qserve_jax.quantization.qtensor import nbytes

def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

for _ in range(2):
    loaded = None
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")  # resets the peak
    before = status("VmRSS")
    loaded = load_model(sys.argv[1], precision="w4a8kv4", dtype="bfloat16")
print(status("VmHWM") - before, nbytes(loaded.params))
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
