"""The arithmetic on a GPU equals that on the CPU, which test_numerics.py holds to numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.quantization import numerics

pytestmark = pytest.mark.gpu

FUNCTIONS = {
    "progressive": lambda x: numerics.quantize_progressive(x, 128),
    "per channel": numerics.quantize_per_channel,
    "int8": numerics.quantize_int8,
    "activation": numerics.quantize_activation,
    "kv4": lambda x: numerics.quantize_kv(x, 4),
    "kv8": lambda x: numerics.quantize_kv(x, 8),
}


def inputs(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4096, 512)).astype(np.float32)
    if kind == "scales":
        return x * np.exp(rng.uniform(-9, 9, (4096, 1))).astype(np.float32)
    if kind == "grid":  # values on a coarse grid meet rounding boundaries often
        return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
    return x


@pytest.mark.parametrize("kind", ["normal", "scales", "grid"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gpu_equals_cpu_exactly(name, kind):
    function, x = jax.jit(FUNCTIONS[name]), inputs(kind)
    on_gpu = function(jax.device_put(x, jax.devices("gpu")[0]))
    on_cpu = function(jax.device_put(x, jax.devices("cpu")[0]))
    for gpu, cpu in zip(jax.tree.leaves(on_gpu), jax.tree.leaves(on_cpu), strict=True):
        np.testing.assert_array_equal(np.asarray(gpu), np.asarray(cpu))
